"""Toy sources whose surplus is known in closed form: the controls of the self-check.

Order-1 Markov (surplus exactly zero), lag-2 copy (closed form), finite hidden Markov models (enumeration plus
filtering), and permutation of rows within equal z. A source is a `Toy`: sampled ids, exact next-token laws
and belief-like features; no probe, no target. Dimension legend: D documents, L length, V symbols, S hidden
states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Toy:
    """Sampled text of a known source, rows as in `contract.Captured`.

    Attributes:
        ids: int64 [T].
        doc: int64 [T].
        position: int64 [T].
        features: float32 [T, F], a random linear map of what the past says about the future.
        log_probs: float32 [T, V], row i the exact law of ids[i + 1].
    """

    ids: Tensor
    doc: Tensor
    position: Tensor
    features: Tensor
    log_probs: Tensor


def _pack(ids_DL: Tensor, state_DLF: Tensor, probs_DLV: Tensor, generator: torch.Generator) -> Toy:
    documents, length = ids_DL.shape
    width = max(32, state_DLF.shape[-1])
    mixing = torch.randn(state_DLF.shape[-1], width, generator=generator) / state_DLF.shape[-1] ** 0.5
    return Toy(
        ids=ids_DL.flatten(),
        doc=torch.arange(documents).repeat_interleave(length),
        position=torch.arange(length).repeat(documents),
        features=state_DLF.flatten(0, 1).float() @ mixing,
        log_probs=probs_DLV.flatten(0, 1).clamp_min(1e-30).log().float(),
    )


@dataclass(frozen=True, slots=True)
class Markov:
    """Order-1 Markov chain: z_k already holds the sufficient x_{t+k-1}, so S_k = 0 for every k >= 2."""

    transition: Tensor

    def sample(self, documents: int, length: int, generator: torch.Generator) -> Toy:
        """`documents` chains of `length`; features are the one-hot of x_t, randomly mapped."""
        symbols = self.transition.shape[0]
        ids = torch.empty(documents, length, dtype=torch.int64)
        ids[:, 0] = torch.randint(symbols, (documents,), generator=generator)
        for t in range(1, length):
            ids[:, t] = torch.multinomial(self.transition[ids[:, t - 1]], 1, generator=generator)[:, 0]
        eye = torch.eye(symbols)
        return _pack(ids, eye[ids], self.transition[ids], generator)


def random_markov(symbols: int, generator: torch.Generator, sharpness: float = 2.0) -> Markov:
    """A chain with softmax(sharpness * normal) rows."""
    return Markov(torch.softmax(sharpness * torch.randn(symbols, symbols, generator=generator), dim=-1))


@dataclass(frozen=True, slots=True)
class LagCopy:
    """x_{t+2} = x_t with probability 1 - epsilon, else uniform on the `symbols`."""

    symbols: int
    epsilon: float

    @property
    def surplus(self) -> float:
        """S_2 = ln V + a ln a + (V - 1) b ln b, a = 1 - eps + eps / V, b = eps / V, nats."""
        b = self.epsilon / self.symbols
        a = 1 - self.epsilon + b
        return math.log(self.symbols) + a * math.log(a) + (self.symbols - 1) * b * math.log(b)

    def sample(self, documents: int, length: int, generator: torch.Generator) -> Toy:
        """Features are the one-hots of x_t and x_{t-1}, randomly mapped."""
        v = self.symbols
        ids = torch.randint(v, (documents, length), generator=generator)
        keep = torch.rand(documents, length, generator=generator) >= self.epsilon
        for t in range(2, length):
            ids[:, t] = torch.where(keep[:, t], ids[:, t - 2], ids[:, t])
        eye = torch.eye(v)
        before = ids.roll(1, dims=1)
        probs = (1 - self.epsilon) * eye[before] + self.epsilon / v
        probs[:, 0] = 1 / v  # x_1 has no x_{-1} to copy
        state = torch.cat([eye[ids], eye[before]], dim=-1)
        state[:, 0, v:] = 0
        return _pack(ids, state, probs, generator)


@dataclass(frozen=True, slots=True)
class HiddenMarkov:
    """A stationary finite HMM in edge-emitting form.

    Attributes:
        edges: float64 [V, S, S]; edges[x, i, j] = P(emit x, go to j | in i); sums to 1 over (x, j).
    """

    edges: Tensor

    @property
    def stationary(self) -> Tensor:
        """float64 [S], the invariant law of the hidden state."""
        step = self.edges.sum(0)
        law = torch.full((step.shape[0],), 1 / step.shape[0], dtype=torch.float64)
        power = torch.linalg.matrix_power(step, 4096)
        stationary: Tensor = law @ power
        return stationary

    def sample(self, documents: int, length: int, generator: torch.Generator) -> Toy:
        """Start in the stationary law; features are the log-belief after x_t, randomly mapped."""
        states = self.edges.shape[1]
        hidden = torch.multinomial(self.stationary.expand(documents, -1), 1, generator=generator)[:, 0]
        belief = self.stationary.expand(documents, -1)
        ids, beliefs, laws = [], [], []
        for _ in range(length):
            joint = self.edges[:, hidden].transpose(0, 1).flatten(1)
            drawn = torch.multinomial(joint, 1, generator=generator)[:, 0]
            token, hidden = drawn // states, drawn % states
            belief = torch.einsum("di,dij->dj", belief, self.edges[token])
            belief = belief / belief.sum(-1, keepdim=True)
            ids.append(token)
            beliefs.append(belief)
            laws.append(torch.einsum("di,vij->dv", belief, self.edges))
        # The mean-zero log-belief is the sufficient statistic in a scale that separates small beliefs.
        logs = torch.stack(beliefs, 1).clamp_min(1e-12).log()
        return _pack(torch.stack(ids, 1), logs - logs.mean(-1, keepdim=True), torch.stack(laws, 1), generator)

    def eta(self, k: int) -> float:
        """eta_k = H(X_k | X_{1:k-1}) in nats, over all V^(k-1) words; eta_1 is the marginal entropy."""
        forward = self.stationary[None]
        for _ in range(k - 1):
            forward = torch.einsum("ni,vij->nvj", forward, self.edges).flatten(0, 1)
        joint = torch.einsum("ni,vij->nv", forward, self.edges)
        weight = joint.sum(-1, keepdim=True).clamp_min(1e-300)
        return float(-torch.special.xlogy(joint, joint / weight).sum())

    def surplus(self, k: int, horizon: int) -> float:
        """S_k = eta_k - eta_inf, eta_inf read at `horizon`, converged from above."""
        return self.eta(k) - self.eta(horizon)


def mess3(alpha: float = 0.85, x: float = 0.05) -> HiddenMarkov:
    """Mess3 (Shai et al. 2405.15943): 3 states, 3 symbols; T^(a)_ij = transition_ij * P(a | j)."""
    stay = torch.full((3, 3), x, dtype=torch.float64) + torch.eye(3, dtype=torch.float64) * (1 - 3 * x)
    emit = torch.full((3, 3), (1 - alpha) / 2, dtype=torch.float64)
    emit += torch.eye(3, dtype=torch.float64) * (alpha - (1 - alpha) / 2)
    return HiddenMarkov(stay[None] * emit.T[:, None, :])


def permute_within(z: Tensor, doc: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation that gives each row the feature of another row with equal z.

    Groups are shuffled, ordered by document and turned by half their size, so that donors come from other
    documents where the group spans several. A row whose z is unique would keep its own feature and make the
    control see h; such rows are grouped by their last token alone, then all together.

    Args:
        z: int64 [n, k - 1].
        doc: int64 [n].

    Returns:
        int64 [n], a permutation without fixed points (n >= 2).
    """
    count = z.shape[0]
    donor = torch.arange(count)
    keys = (_dense(z), _dense(z[:, -1:]), torch.zeros(count, dtype=torch.int64))
    for key in keys:
        alone = (donor == torch.arange(count)).nonzero()[:, 0]
        if alone.numel() < 2:
            break
        donor[alone] = alone[_turn(key[alone], doc[alone], generator)]
    left = (donor == torch.arange(count)).nonzero()[:, 0]
    if left.numel() == 1 and count > 1:
        other = (left + 1) % count
        donor[left], donor[other] = donor[other].clone(), donor[left].clone()
    return donor


def _dense(rows: Tensor) -> Tensor:
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    dense: Tensor = group
    return dense


def _turn(key: Tensor, doc: Tensor, generator: torch.Generator) -> Tensor:
    """Donor of each row when every group of equal `key` is rotated by half its size."""
    order = torch.randperm(key.shape[0], generator=generator)
    order = order[doc[order].argsort(stable=True)]
    order = order[key[order].argsort(stable=True)]
    _, group, size = torch.unique_consecutive(key[order], return_inverse=True, return_counts=True)
    first = size.cumsum(0) - size
    within = torch.arange(key.shape[0]) - first[group]
    source = first[group] + (within + size[group] // 2) % size[group]
    donor = torch.empty_like(order)
    donor[order] = order[source]
    return donor
