"""Acceptance from information: what a gap in nats costs the verifier in use, by depth.

Two verifiers. Sampled drafts: alpha = sum min(p, q) = 1 - TV (Leviathan et al. 2211.17192). Deterministic top-m
children (this engine's default, and EAGLE's): acceptance is the p-mass of the children, so the target's own entropy
costs even a perfect draft. Depth j of a draft is x_{t+1+j}, that is k = j + 1. Knows numbers, not engines.
Dimension legend: n contexts, M symbols, K draft depths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import RequestError


def overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """alpha = sum min(p, q) = 1 - TV per row, [n]: acceptance of one sampled draft token."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def erfc_link(gap: Tensor) -> Tensor:
    """alpha = erfc(sqrt(d) / 2), the zero-parameter link of a Gaussian log-likelihood ratio.

    Average it over contexts; applied to an average gap it is biased (convexity).

    >>> [round(float(a), 2) for a in erfc_link(torch.tensor([0.008, 0.128, 0.910]))]
    [0.95, 0.8, 0.5]
    """
    alpha: Tensor = torch.special.erfc(gap.clamp_min(0).sqrt() / 2)
    return alpha


@dataclass(frozen=True, slots=True)
class Truncated:
    """A draft that covers only part of the vocabulary, per row [n].

    Attributes:
        coverage: rho = p(V_d), the ceiling of acceptance.
        gap: KL(p_d || q), p_d = p given V_d, nats (KL on the full vocabulary is infinite).
        alpha: sum over V_d of min(p, q), exact; at least rho (1 - TV(p_d, q)).
        bound: that lower bound.
    """

    coverage: Tensor
    gap: Tensor
    alpha: Tensor
    bound: Tensor


def truncated(log_p: Tensor, log_q: Tensor, draft_ids: Tensor) -> Truncated:
    """Split acceptance into coverage and disagreement.

    Args:
        log_p: [n, V] target.
        log_q: [n, D] draft, over `draft_ids` [D].

    Raises:
        RequestError: an empty draft vocabulary, or one that the target gives no mass anywhere.
    """
    if not draft_ids.numel():
        raise RequestError("no token in the draft vocabulary", field="draft_ids", allowed="at least one id")
    inside = log_p[:, draft_ids]
    log_rho = inside.logsumexp(-1)
    if bool((log_rho < -50).all()):
        raise RequestError(
            "the target gives the draft vocabulary no mass",
            field="draft_ids",
            remedy="Check that the head belongs to this target and that ids are not offsets",
        )
    given = inside - log_rho[:, None]
    return Truncated(
        coverage=log_rho.exp(),
        gap=(given.exp() * (given - log_q)).sum(-1),
        alpha=torch.minimum(inside, log_q).exp().sum(-1),
        bound=log_rho.exp() * overlap(given, log_q),
    )


@dataclass(frozen=True, slots=True)
class DepthLaw:
    """Acceptance by depth.

    Attributes:
        forced: [K] mean acceptance on all contexts (teacher-forced).
        alpha: [K] conditional acceptance among survivors, what the engine calls alpha(d). They are easier contexts than
            the text at large.
        reach: [K] P(L >= j), probability that depth j is accepted.
    """

    forced: Tensor
    alpha: Tensor
    reach: Tensor

    @property
    def tau(self) -> float:
        """Expected tokens per round, bonus included: 1 + sum_j P(L >= j)."""
        return 1 + float(self.reach.sum())


def depth_law(acceptance: Tensor, survival: Tensor) -> DepthLaw:
    """Depth law with survivor correction, on target-written text.

    P(L >= j) = E_{x ~ P} prod_{i<=j} w_i: along the target's own tokens each depth survives with weight w_i,
    which is min(1, q(x)/p(x)) for sampled drafts and the indicator that x is among the children for
    deterministic ones. The last factor is replaced by its expectation a_j, which removes its noise.

    Args:
        acceptance: [n, K] a_j(c), overlap or children mass, rows with all K depths.
        survival: [n, K] w_j of the token that really came.
    """
    before = torch.cat(
        [torch.ones_like(survival[:, :1]), survival.double().cumprod(1)[:, :-1]], dim=1
    ).double()
    reach = (before * acceptance.double()).mean(0)
    return DepthLaw(acceptance.double().mean(0), reach / before.mean(0).clamp_min(1e-300), reach)
