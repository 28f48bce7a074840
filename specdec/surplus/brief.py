"""The target run on z alone: a control that knows the language and not the context.

Fitted controls have seen a few thousand rows; the target has read a library. What it makes of the last k - 1 tokens is
a law that needs no h, so whatever it explains is no surplus. One pass over a window of k - 1 tokens gives the laws of
all its beginnings. Knows the target and captured ids; scores come from `control`.
Dimension legend: u distinct z, n windows, j tokens of one, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.surplus.contract import TargetHead, contexts
from specdec.surplus.control import context_keys, cross_entropies
from specdec.surplus.labels import HeadLabels, Labels, Lumping, in_memory
from specdec.surplus.mixture import Brief
from specdec.target.protocol import Target

ROWS = 64
"""Windows run through the target at once."""
TRIED = 256
"""Contexts on which beginnings of a window are compared."""


@dataclass(frozen=True, slots=True)
class Finals:
    """What the target made of every z of one depth.

    Attributes:
        keys: int64 [u] sorted, see `context_keys`.
        states: [u, H] normed final states after its last token.
    """

    keys: Tensor
    states: Tensor

    def brief(self, head: TargetHead, lumping: Lumping | None) -> Brief:
        """The control, its laws in memory where they fit. head: of the target, which normed the states already."""
        plain = TargetHead(head.unembedding, temperature=head.temperature)
        return Brief(self.keys, in_memory(HeadLabels(plain, self.states, lumping), len(self.keys)))


@torch.inference_mode()
def finals(
    target: Target, ids: Tensor, doc: Tensor, depths: Sequence[int], before: Sequence[int] = (),
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> dict[int, Finals]:  # fmt: skip
    """Run the target on every z of every depth, at least one of which the text must hold.

    Args:
        ids, doc: int64 [T].
        before: tokens that every window starts with, the same for all; see `beginning`.
    """
    keys: dict[int, list[Tensor]] = {k: [] for k in depths}
    states: dict[int, list[Tensor]] = {k: [] for k in depths}
    known: dict[int, set[int]] = {k: set() for k in depths}
    runs = {k: torch.unique(contexts(ids, doc, k).z, dim=0) for k in sorted(depths, reverse=True)}
    seen, total = 0, sum(map(len, runs.values()))
    for depth, windows in runs.items():
        seen += len(windows)
        windows = windows[_fresh(windows, known[depth])]  # beginnings of longer windows are known by now
        seen -= len(windows)
        for part in torch.split(windows, ROWS) if len(windows) else ():
            after = _states(target, part, before)
            for k in (k for k in depths if k <= depth):
                first = _fresh(part[:, : k - 1], known[k])
                key = context_keys(part[first, : k - 1])
                known[k] |= set(key.tolist())
                keys[k].append(key)
                states[k].append(after[first, k - 2])
            seen += len(part)
            tell(seen, total)
    tell(total, total)
    return {k: _sorted(torch.cat(keys[k]), torch.cat(states[k])) for k in depths if known[k]}


def beginning(
    target: Target, ids: Tensor, doc: Tensor, labels: Labels, head: TargetHead, lumping: Lumping | None
) -> tuple[int, ...]:
    """What windows should start with: a model's first position is unlike all others, so something had better be there.

    Nothing, the first special ids, what ends an answer, or the text's commonest token: by cross-entropy after a token.
    """
    where = contexts(ids, doc, 2)
    where = where.take(torch.arange(0, len(where.at), max(1, len(where.at) // TRIED)))
    common = int(torch.bincount(ids).argmax())
    tried = [(), *((token,) for token in dict.fromkeys((0, 1, *target.info.stop_ids, common)))]
    alone = torch.arange(len(where.at)).repeat_interleave(2)  # each z as a document of its own
    pairs = where.z.repeat(1, 2).flatten()
    losses = []
    for before in tried:
        found = finals(target, pairs, alone, (2,), before)[2].brief(head, lumping)
        losses.append(float(cross_entropies(found, where, labels).mean()))
    return tried[losses.index(min(losses))]


def _fresh(z: Tensor, known: set[int]) -> Tensor:
    """Index of the first of every z [n, j] that is not known yet."""
    found: dict[int, int] = {}
    for row, key in enumerate(context_keys(z).tolist()):
        if key not in known:
            found.setdefault(key, row)
    return torch.tensor(list(found.values()), dtype=torch.int64)


def _sorted(keys: Tensor, states: Tensor) -> Finals:
    order = keys.argsort()
    return Finals(keys[order], states[order])


def _states(target: Target, windows: Tensor, before: Sequence[int]) -> Tensor:
    """Final states [n, j, H] after every token of windows [n, j]."""
    lead = torch.tensor(before, dtype=torch.int64).expand(len(windows), -1)
    tokens = torch.cat([lead, windows], dim=1)
    cache = KVCache(target.info.cache, len(tokens), tokens.shape[1])
    slots = torch.arange(len(tokens), device=target.info.device)
    where = chunk_rows(slots, torch.zeros_like(slots), tokens.shape[1])
    return (
        target.forward(tokens.to(target.info.device), where, cache, ()).final[:, len(before) :].float().cpu()
    )
