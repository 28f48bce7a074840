"""States recomputed from the last w tokens only: the dose of the window curve (theory.md 2.3, E3).

A state that saw fewer tokens cannot know more; no learned map can fake that. Knows the target and captured ids.
Dimension legend: N captured rows, B rows at once, w window, A taps, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.surplus.capture import Document
from specdec.surplus.plan import TapSet
from specdec.target.protocol import Target

ROWS = 64
"""Windows run through the target at once."""


def windowed(target: Target, texts: list[Document], taps: TapSet) -> Callable[[int], Tensor]:
    """w -> taps [N, A * d] in bfloat16, as captured, of every written row from its last w tokens.

    Rows with fewer than w tokens before them see what there is.
    """

    def recompute(window: int) -> Tensor:
        cache = KVCache(target.info.cache, ROWS, window)
        parts = []
        for text in texts:
            at = torch.arange(text.start, text.ids.shape[0])
            for rows in torch.split(at, ROWS):
                parts.append(_states(target, cache, text.ids, rows, window, taps))
        return torch.cat(parts)

    return recompute


@torch.inference_mode()
def _states(target: Target, cache: KVCache, ids: Tensor, rows: Tensor, window: int, taps: TapSet) -> Tensor:
    """States [n, A * d] of `rows`; windows that begin before the text are cut at its start."""
    device = target.info.device
    found = torch.empty(rows.shape[0], len(taps) * target.info.hidden, dtype=torch.bfloat16)
    for length in torch.unique((rows + 1).clamp_max(window)).tolist():
        same = ((rows + 1).clamp_max(window) == length).nonzero()[:, 0]
        tokens = ids[rows[same][:, None] + torch.arange(1 - length, 1)].to(device)
        slots = torch.arange(same.shape[0], device=device)
        where = chunk_rows(slots, torch.zeros_like(slots), int(length))
        found[same] = target.forward(tokens, where, cache, taps).features[:, -1].to(torch.bfloat16).cpu()
    return found
