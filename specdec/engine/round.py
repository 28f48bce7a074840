"""The round: draft, verify, choose, accept, keep. Plain decoding is the same round over trees of one node.

This is the whole journey from tokens to accepted tokens; requests, text and scheduling live above it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.accept import Verdict, verify_block, walk
from specdec.attention.protocol import tree_rows
from specdec.cache import KVCache
from specdec.drafting.protocol import Drafter, Shape
from specdec.engine.batch import Batch
from specdec.sampling import choose, largest, process, spread
from specdec.target.protocol import Target
from specdec.tree import DraftTree, trim


@dataclass(frozen=True, slots=True)
class Outcome:
    """One round's values: the trees, the target's word on them, and the seconds each phase took.

    On a device a phase's seconds are those of its launches, as long as nothing waits; only their sum is the round's.

    Attributes:
        peaks: [B, N], the largest logit after each node; NaN where logits are no numbers.
    """

    tree: DraftTree
    logits: Tensor
    peaks: Tensor
    features: Tensor
    chosen: Tensor
    verdict: Verdict
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a round gave its B requests, on the host; lists by request.

    Attributes:
        counts, tokens: tokens emitted, and the tokens themselves (what follows the first `counts` is padding).
        offered: depth of the deepest node on offer; sizes: nodes verified.
        sick: did the answer go through logits that are not numbers?
        seconds: by phase.
        promised: drafts the drafter expected to see accepted, of all requests; only where nobody keeps the trees.
    """

    counts: list[int]
    tokens: list[list[int]]
    offered: list[int]
    sizes: list[int]
    sick: list[bool]
    seconds: dict[str, float]
    promised: float = 0.0

    @staticmethod
    def of(outcome: Outcome) -> Emitted:
        """Read a round that ran step by step."""
        tree, verdict = outcome.tree, outcome.verdict
        sick = outcome.peaks.isnan().gather(1, verdict.kept).any(dim=1)
        return Emitted(
            verdict.counts.tolist(),
            verdict.tokens.tolist(),
            verdict.offered.tolist(),
            tree.sizes.tolist(),
            sick.tolist(),
            outcome.seconds,
        )


@dataclass(frozen=True, slots=True)
class Rounds:
    """Runs rounds over one target, one drafter and one cache."""

    target: Target
    drafter: Drafter
    cache: KVCache

    def run(self, batch: Batch, shape: Shape) -> Outcome:
        """One draft, verify, accept cycle; afterwards the cache holds exactly the accepted tokens."""
        c = batch.context
        started = time.perf_counter()
        tree = _plain_where_asked(self.drafter.propose(c, shape), batch)
        drafted = time.perf_counter()
        states = self.target.forward(
            tree.tokens, tree_rows(c.slots, c.lengths, tree), self.cache, self.drafter.taps
        )
        logits = self.target.logits(states.final)
        verified = time.perf_counter()
        peaks, likeliest = largest(logits)
        processed = process(logits, tree, batch.sampling, batch.seen, _allowed(batch, tree, logits))
        chosen, verdict = _decide(tree, processed, batch, likeliest if processed is logits else None)
        self.cache.keep(c.slots, c.lengths, verdict.kept)
        self.drafter.observe(c, states.features, verdict)
        accepted = time.perf_counter()
        seconds = {"draft": drafted - started, "verify": verified - drafted, "accept": accepted - verified}
        return Outcome(tree, logits, peaks, states.features, chosen, verdict, seconds)


def _decide(
    tree: DraftTree, processed: Tensor, batch: Batch, likeliest: Tensor | None
) -> tuple[Tensor, Verdict]:
    """The target's own tokens and what survives them; sampled chains are tested against the q they came from.

    Args:
        likeliest: int64 [B, N], the largest entries of `processed`, where they are known.
    """
    chosen = choose(processed, tree, batch.sampling, batch.uniforms, likeliest)
    if tree.probs is None:
        return chosen, walk(tree, chosen)
    assert batch.tests is not None, "sampled chains need tests"
    # the temperature is in `processed` already: 1 for whoever samples, a point for whoever does not
    law = spread(processed.float(), (batch.sampling.temperature > 0).float())
    return chosen, verify_block(tree.tokens[:, 1:], tree.probs, law, batch.tests[:, : tree.nodes])


def _plain_where_asked(tree: DraftTree, batch: Batch) -> DraftTree:
    """Cut the trees of requests that run plainly among others back to their roots."""
    speculate = [r.speculate for r in batch.requests]
    if all(speculate) or tree.nodes == 1:
        return tree
    return trim(tree, torch.where(torch.tensor(speculate, device=tree.sizes.device), tree.sizes, 1))


def _allowed(batch: Batch, tree: DraftTree, logits: Tensor) -> Tensor | None:
    """What grammars permit after each node, bool [B, N, V], or None when there is no grammar."""
    if all(r.constraint is None for r in batch.requests):
        return None
    allowed = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    for row, request in enumerate(batch.requests):
        if request.constraint is not None:
            allowed[row] = request.constraint.allowed(tree, row).to(logits.device)
    return allowed
