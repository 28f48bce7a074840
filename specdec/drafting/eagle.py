"""EagleDrafter: grows trees with a draft head over true target features (EAGLE-2 growth, EAGLE-3 head).

Keeps a KV cache of its own (one layer) and, per slot, the accepted (feature, token) pairs the head has not read yet;
it reads them at the next proposal, so requests that end or run plain cost nothing.
Dimension legend: B requests, K width, H head size, F feature width, Vd draft vocabulary.

    committed tokens  0 1 2 ... L-1 | root = token L
    head rows         0 1 2 ... L-1 |             row t reads feature(t), token(t + 1) and predicts token t + 2
    level d rows                    | position L + d - 1: token of a depth-d node, feature fed back from its parent
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec import tree as trees
from specdec.accept import Verdict
from specdec.attention.protocol import Levels, Rows, TreeAttention, chunk_rows, level_rows
from specdec.cache import KVCache
from specdec.drafting.growth import Growth, growth_of
from specdec.drafting.protocol import Context, Shape
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from specdec.layers.linear import spare_rows
from specdec.sampling import draw, spread
from specdec.tree import MAX_NODES, DraftTree

CHUNK = 512  # rows of a prompt the head reads at once
TOGETHER = 16  # pending rows up to which requests are extended in one padded batch
LEFT_BYTES = 4 * 2**20  # of unread features that a slot keeps for whoever comes with the same beginning


@dataclass(slots=True)
class _Lane:
    """One slot: rows the head has read, and the pairs it has yet to read.

    Attributes:
        features, tokens: parts of those pairs, as long as a request is there. What one leaves behind are features
            alone: the tokens after them are the next one's own.
    """

    rows: int = 0
    features: list[Tensor] | None = None
    tokens: list[Tensor] | None = None


class EagleDrafter:
    """Proposes EAGLE-2 trees from a draft head.

    Args:
        head: frozen weights.
        embed: the target's input embedding, tokens -> [..., H].
        attention: backend for the head's layer.
        slots, length: of the engine's cache.
    """

    name = "eagle"
    sources: tuple[str, ...] = ("head",)

    def __init__(
        self,
        head: DraftHead,
        embed: Callable[[Tensor], Tensor],
        attention: TreeAttention,
        slots: int,
        length: int,
    ) -> None:
        self.head, self.embed, self.attention = head, embed, attention
        self.taps = head.config.taps
        self.cache = KVCache(head.cache_shape(), slots, length + MAX_NODES + TOGETHER)
        head.reserve(self.cache.length)
        self.last = torch.zeros(slots, head.config.hidden, dtype=head.dtype, device=head.device)
        self.lanes = [_Lane() for _ in range(slots)]

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Remember the prompt's pairs; the head reads them at the first proposal."""
        lane = self.lanes[slot]
        lane.features = [*(lane.features or []), features]  # behind those taken over
        lane.rows = tokens.shape[0] - sum(len(part) for part in lane.features)
        lane.tokens = [torch.cat([tokens[lane.rows + 1 :], tokens.new_tensor([root])])]

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """Rows of the source, less the last whose next token may differ: what the head has read, and the features of
        what it has not."""
        lane, most = self.lanes[source], max(rows - 1, 0)
        read = kept = min(lane.rows, most)
        unread = _joined(lane.features) if most > read else None
        if unread is not None:
            unread = unread[: most - read]
            kept += len(unread)
        self.cache.copy_prefix(source, slot, read)
        self.lanes[slot] = _Lane(read, None if unread is None else [unread])
        return kept

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """Queue the accepted nodes' true features with the tokens that followed them."""
        kept = verdict.kept[..., None].expand(-1, -1, features.shape[2])
        accepted = features if features.shape[1] == 1 else features.gather(1, kept)
        rows = zip(accepted.unbind(), verdict.tokens.unbind(), strict=True)
        counts = zip(context.slots.tolist(), verdict.counts.tolist(), strict=True)
        for (slot, count), (seen, tokens) in zip(counts, rows, strict=True):
            lane = self.lanes[slot]
            assert lane.features is not None and lane.tokens is not None, "observed before admitted"
            lane.features.append(seen[:count])
            lane.tokens.append(tokens[:count])

    def release(self, slot: int) -> None:
        """Forget the tokens that are pending; rows already read, and some features of others, stay for `reuse`."""
        lane = self.lanes[slot]
        left = _joined(lane.features)
        if left is not None:
            most = LEFT_BYTES // (left.shape[1] * left.element_size())
            left = left if len(left) <= most else left[:most].clone()
        lane.features, lane.tokens = None if left is None else [left], None

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """Grow level by level from the head's own output, then keep the likeliest nodes."""
        if shape.depth == 0 or shape.nodes == 1:
            return trees.root_only(context.roots)
        y = self.extend(context)
        if shape.sampled:
            return self._sample_chain(context, shape, y)
        return self.grow(context, shape, y)

    def grow(self, context: Context, shape: Shape, y: Tensor) -> DraftTree:
        """The tree that follows the head's output y [B, H] at the last accepted pair.

        With neither floors nor prices in `shape`, nothing is read on the host.
        """
        assert not (context.fixed and shape.node_floor > 0), "levels of a fixed round are equally wide"
        growth = growth_of(self.head.ids, shape, self.head.dtype)
        windowed = self.head.config.window is not None
        levels, above = None, list[Tensor]()
        if context.fixed:
            levels = Levels.of(context.slots, context.lengths, growth.width, shape.depth - 1, windowed)
        frontier_y = growth.level(self.head.logits(y[:, None]), y[:, None])
        while growth.worth_another():
            rows = levels.rows(growth.depth - 1, growth.bits) if levels else _level(context, growth, above)
            frontier_y = self.forward(growth.tokens, self.head.feedback(frontier_y), rows)
            frontier_y = growth.level(self.head.logits(frontier_y), frontier_y)
        return replace(growth.finish(context.roots), levels=growth.depth)

    def _sample_chain(self, context: Context, shape: Shape, y: Tensor) -> DraftTree:
        """A chain drawn token by token from the head's distribution at the request's temperature, with that
        distribution over the target's vocabulary: what block verification needs to stay exact."""
        assert context.draws is not None and context.temperature is not None, "sampled chains need draws"
        tokens, probs, positions = [context.roots], [], list[Tensor]()
        rows = torch.arange(len(y), device=y.device)
        own = torch.zeros(len(y), 1, dtype=torch.int64, device=y.device)
        for depth in range(1, shape.depth + 1):
            if depth > 1:
                own = own | (1 << (depth - 2))
                positions.append((context.lengths + depth - 2)[:, None])
                step = level_rows(context.slots, context.lengths, positions[-1], own, depth - 2,
                                  torch.cat(positions, dim=1))  # fmt: skip
                y = self.forward(tokens[-1][:, None], self.head.feedback(y)[:, None], step)[:, 0]
            q = spread(self.head.logits(y).float(), context.temperature)
            drawn = draw(q, context.draws[:, depth - 1])
            tokens.append(self.head.ids[drawn])
            full = q.new_zeros(len(y), self.head.config.vocab)
            full[rows[:, None], self.head.ids] = q
            probs.append(full)
        chain = trees.chain(torch.stack(tokens, dim=1))
        return replace(chain, probs=torch.stack(probs, dim=1), levels=shape.depth)

    def forward(self, tokens: Tensor, g: Tensor, rows: Rows) -> Tensor:
        """The head over tokens int64 [B, n] and their fused or fed-back g [B, n, H]; y [B, n, H]."""
        plan = self.attention.plan(rows, self.cache, self.head.config.window)
        embedded, angles = self.embed(tokens).to(g.dtype), self.head.angles(rows.positions)
        whole = self.head.whole
        if whole is not None and whole.takes(g, self.cache, [plan]):
            return whole.run(g, angles, self.cache, rows.index, [plan], embedded=embedded)

        def attend(heads: Heads, scale: float) -> Tensor:
            query = heads.store(self.cache, 0, rows.index)
            return self.attention.attend(query, self.cache, 0, plan, scale)

        return self.head(embedded, g, angles, attend)  # type: ignore[no-any-return]

    def extend(self, context: Context) -> Tensor:
        """Read all pending pairs; returns the head's output at each request's last row [B, H]."""
        slots = context.slots.tolist()
        short = [s for s in slots if 0 < self.pending(s) <= TOGETHER]
        for slot in slots:
            if self.pending(slot) > TOGETHER:
                self._read_long(slot)
        if short:
            self._read_together(short)
        return self.last[context.slots]

    def pending(self, slot: int) -> int:
        """Accepted pairs that the head has yet to read."""
        return sum(len(t) for t in self.lanes[slot].tokens or ())

    def _take(self, slot: int) -> tuple[Tensor, Tensor]:
        lane = self.lanes[slot]
        assert lane.features is not None and lane.tokens is not None, "proposed before admitted"
        features, tokens = torch.cat(lane.features), torch.cat(lane.tokens)
        lane.features, lane.tokens = [], []
        return features, tokens

    def _read_long(self, slot: int) -> None:
        features, tokens = self._take(slot)
        lane = self.lanes[slot]
        where = torch.tensor([slot], device=tokens.device)
        for start in range(0, len(tokens), CHUNK):
            part, seen = tokens[start : start + CHUNK], features[start : start + CHUNK]
            count = len(part)
            # written where the next rows go
            spare = spare_rows(count, MAX_NODES, self.head.dtype, part.device)
            part, seen = pad(part, (0, spare)), pad(seen, (0, 0, 0, spare))
            rows = chunk_rows(where, torch.tensor([lane.rows], device=tokens.device), len(part))
            y = self.forward(part[None], self.head.fuse(seen[None].to(self.head.dtype)), rows)
            lane.rows += count
        self.last[slot] = y[0, count - 1]

    def _read_together(self, slots: list[int]) -> None:
        """A padded batch: rows past a request's own are written but never seen, and overwritten later."""
        taken = [self._take(slot) for slot in slots]
        counts = [len(tokens) for _, tokens in taken]
        n = max(counts)
        features = torch.stack([_rows(f, n) for f, _ in taken])
        tokens = torch.stack([_rows(t, n) for _, t in taken])
        where = torch.tensor(slots, device=tokens.device)
        lengths = torch.tensor([self.lanes[s].rows for s in slots], device=tokens.device)
        y = self.forward(tokens, self.head.fuse(features.to(self.head.dtype)), chunk_rows(where, lengths, n))
        last = torch.tensor(counts, device=tokens.device) - 1
        self.last[where] = y[torch.arange(len(slots), device=tokens.device), last]
        for slot, count in zip(slots, counts, strict=True):
            self.lanes[slot].rows += count


def _level(context: Context, growth: Growth, positions: list[Tensor]) -> Rows:
    """Where the frontier's rows go: tokens just drafted, behind those of the levels before, whose `positions` it adds
    its own to."""
    positions.append((context.lengths + growth.depth - 1)[:, None].expand_as(growth.tokens))
    return level_rows(context.slots, context.lengths, positions[-1], growth.bits, growth.rows_before,
                      torch.cat(positions, dim=1))  # fmt: skip


def _rows(x: Tensor, n: int) -> Tensor:
    """x [rows, ...] with zeros behind, n rows in all."""
    spare = n - len(x)
    return x if spare == 0 else pad(x, (0, 0) * (x.dim() - 1) + (0, spare))


def _joined(parts: list[Tensor] | None) -> Tensor | None:
    return torch.cat(parts) if parts else None
