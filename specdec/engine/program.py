"""The round as one device program: the journey of `round.py` at fixed shapes, with nothing for the host to decide.

Everything a round needs of a request lies in tensors by slot, and the round moves them on itself; so it can be captured
once and launched again before anybody has read what the last one gave. Requests beyond a batch are its last one again:
`pick` lets them follow it to the letter.
Dimension legend: B requests of the program, S slots, N nodes, D depth, W = the pipeline's deepest D + 1, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.accept import Verdict, walk
from specdec.attention.protocol import tree_rows
from specdec.cache import KVCache
from specdec.drafting.pairs import Pairs
from specdec.drafting.protocol import Context, Shape
from specdec.fused import available
from specdec.sampling import BatchSampling, Sampling, choose, largest, process
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES, DraftTree, root_only

ALONE = 2  # requests up to which a program has no seats to spare: nobody is there twice
COUNTS, OFFERED, SIZES, SICK, TOKENS = range(5)  # columns of a report; the emitted tokens are the last


@dataclass(frozen=True, slots=True)
class Seats:
    """Who takes part: the program's inputs, and where it leaves its report.

    Attributes:
        slots: int64 [B].
        pick: int64 [B], 0, 1, ... and the last request's row for those beyond the batch.
        report: int64 [B, TOKENS + W].
        promised: float32 [B], drafts that the drafter expects to see accepted.
        bare: trees of one node, for other tokens.
    """

    slots: Tensor
    pick: Tensor
    report: Tensor
    promised: Tensor
    bare: DraftTree

    @staticmethod
    def of(size: int, width: int, device: torch.device) -> Seats:
        """For `size` requests of which nobody has sat down."""
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        report = torch.zeros(size, TOKENS + width, dtype=torch.int64, device=device)
        return Seats(zeros, zeros.clone(), report, torch.zeros(size, device=device), root_only(zeros.clone()))

    def take(self, slots: list[int]) -> None:
        """Seat a batch of at most B requests."""
        at = torch.arange(len(self.slots)).clamp(max=len(slots) - 1)
        self.slots.copy_(torch.tensor(slots)[at])
        self.pick.copy_(at)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the request of every slot stands.

    Attributes:
        lengths, roots: int64 [S], committed tokens and the newest emitted one.
        most: int64 [S], nodes that may be verified; 1 for requests that run plainly.
        heat: float32 [S], temperatures.
        uniforms: float64 [S, rows of a slot], u_t at the row its token's parent is stored in.
    """

    lengths: Tensor
    roots: Tensor
    most: Tensor
    heat: Tensor
    uniforms: Tensor

    @staticmethod
    def of(slots: int, length: int, device: torch.device) -> Standing:
        """For `slots` slots of `length` rows."""
        zeros = torch.zeros(slots, dtype=torch.int64, device=device)
        uniforms = torch.zeros(slots, length + MAX_NODES, dtype=torch.float64, device=device)
        return Standing(zeros, zeros.clone(), zeros.clone(), torch.zeros(slots, device=device), uniforms)


@dataclass(frozen=True, slots=True)
class Program:
    """Rounds over one target, one cache, and the head behind `pairs` (None: plain decoding)."""

    target: Target
    cache: KVCache
    standing: Standing
    pairs: Pairs | None

    def run(self, seats: Seats, shape: Shape, greedy: bool) -> None:
        """One draft, verify, accept cycle of the seated requests, from standing to standing.

        Args:
            shape: without floors and prices.
            greedy: nobody samples; else rows of heat 0 still take the argmax.
        """
        s, shared = self.standing, len(seats.slots) > ALONE
        c = Context(seats.slots, s.roots[seats.slots], s.lengths[seats.slots], fixed=True)
        tree = self._tree(c, seats, shape)
        rows = tree_rows(c.slots, c.lengths, tree, spans=False)
        states = self.target.forward(
            tree.tokens, rows, self.cache, self.pairs.drafter.taps if self.pairs else ()
        )
        logits = self.target.logits(states.final)
        width = min(shape.depth + 1, tree.nodes)
        peaks, likeliest = largest(logits)
        chosen = likeliest
        if not greedy:
            sampling = _sampling(s.heat[c.slots])
            chosen = choose(process(logits, tree, sampling), tree, sampling, self._uniforms(c, width))
        verdict, features = _verdict(tree, chosen, width), states.features
        if shared:
            found = (verdict.kept, verdict.counts, verdict.tokens, verdict.offered)
            verdict, features = Verdict(*(x[seats.pick] for x in found)), features[seats.pick]
        if width > 1:
            self.cache.compact(c.slots, c.lengths, verdict.kept)
        if self.pairs is not None:
            self.pairs.observe(c.slots, features, verdict)
        self._settle(seats, tree, verdict, peaks)

    def _tree(self, context: Context, seats: Seats, shape: Shape) -> DraftTree:
        """What is verified; cut back where requests run plainly."""
        if self.pairs is None or shape.nodes == 1:
            return replace(seats.bare, tokens=context.roots[:, None])
        tree = self.pairs.drafter.grow(context, shape, self.pairs.read(context))
        tree = _picked(tree, seats.pick) if len(seats.slots) > ALONE else tree
        return replace(tree, sizes=torch.minimum(tree.sizes, self.standing.most[context.slots]))

    def _settle(self, seats: Seats, tree: DraftTree, verdict: Verdict, peaks: Tensor) -> None:
        """Let standings go on, and write what the host will want to know.

        Args:
            peaks: [B, N], the largest logit after each node; NaN where logits are no numbers.
        """
        s, waiting = self.standing, None if self.pairs is None else self.pairs.counts
        if available.runs(peaks.device):
            from specdec.fused.settle import settle

            found = (verdict.kept, verdict.counts, verdict.tokens, verdict.offered)
            standing = (s.roots, s.lengths, waiting)
            return settle(
                found, tree.sizes, tree.scores, peaks, seats.slots, standing, seats.report, seats.promised, TOKENS
            )  # fmt: skip
        for held in (s.lengths, waiting):
            if held is not None:
                held[seats.slots] = held[seats.slots] + verdict.counts
        s.roots[seats.slots] = verdict.tokens.gather(1, verdict.counts[:, None] - 1)[:, 0]
        _report(seats, tree, verdict, peaks)

    def _uniforms(self, context: Context, width: int) -> Tensor:
        """u_t from the next output position on [B, D + 1]."""
        ahead = torch.arange(width, device=context.slots.device)
        return self.standing.uniforms[context.slots[:, None], context.lengths[:, None] + ahead]

    def state(self) -> list[Tensor]:
        """What a round changes, by slot; the caches' rows beyond the committed ones aside."""
        return [self.standing.lengths, self.standing.roots, *(self.pairs.state() if self.pairs else ())]


def takes(sampling: Sampling) -> bool:
    """Can the program do this? Penalties, biases and log-probabilities look at tokens on the host, truncation asks the
    device how far to look; such requests run in plain rounds."""
    truncated = (sampling.top_k, sampling.top_p, sampling.min_p) != (0, 1.0, 0.0)
    return not (sampling.penalised or sampling.logit_bias or truncated) and sampling.logprobs is None


def _verdict(tree: DraftTree, chosen: Tensor, width: int) -> Verdict:
    """`walk`, of which a tree without drafts needs nothing."""
    if tree.nodes > 1:
        return walk(tree, chosen, width)
    return Verdict(tree.parents, tree.sizes, chosen, tree.depths[:, 0])


def _picked(tree: DraftTree, pick: Tensor) -> DraftTree:
    """The trees of the picked requests."""
    return replace(
        tree, tokens=tree.tokens[pick], parents=tree.parents[pick], depths=tree.depths[pick],
        ancestors=tree.ancestors[pick], sizes=tree.sizes[pick],
        scores=None if tree.scores is None else tree.scores[pick],
    )  # fmt: skip


def _sampling(heat: Tensor) -> BatchSampling:
    return BatchSampling(heat, heat, heat, heat, bias=None, penalties=None, greedy=False, plain=True)


def _report(seats: Seats, tree: DraftTree, verdict: Verdict, peaks: Tensor) -> None:
    """Write what the host will want to know."""
    sick = peaks.gather(1, verdict.kept).isnan().any(dim=1)
    columns = torch.stack([verdict.counts, verdict.offered, tree.sizes, sick.to(torch.int64)], dim=1)
    seats.report[:, :TOKENS] = columns
    seats.report[:, TOKENS : TOKENS + verdict.tokens.shape[1]] = verdict.tokens
    if tree.scores is None:
        seats.promised.zero_()
    else:
        used = torch.arange(tree.nodes, device=peaks.device) < tree.sizes[:, None]
        seats.promised.copy_((tree.scores.exp() * used)[:, 1:].sum(dim=1))
