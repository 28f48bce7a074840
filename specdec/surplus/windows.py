"""States recomputed from the last w tokens only: the dose of the window curve.

A state that saw fewer tokens cannot know more; no learned map can fake that. Knows the target and captured ids.
Dimension legend: N captured rows, w window, A taps, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.surplus.capture import Document
from specdec.surplus.plan import TapSet
from specdec.target.protocol import Target

ROWS = 64
"""Windows run through the target at once."""


def windowed(target: Target, texts: Sequence[Document], taps: TapSet) -> Callable[[int], Tensor]:
    """w -> taps [N, A * d] in bfloat16, as captured, of every written row from its last w tokens.

    Rows with fewer than w tokens before them see what there is; a window as long as the longest text gives the captured
    states back.
    """

    def recompute(window: int) -> Tensor:
        if window >= longest(texts):
            return torch.cat([_captured(text, taps) for text in texts])
        cache = KVCache(target.info.cache, ROWS, window)
        lengths = torch.cat([_rows(text) + 1 for text in texts]).clamp_max(window)
        found = torch.empty(len(lengths), len(taps) * target.info.hidden, dtype=torch.bfloat16)
        for length in torch.unique(lengths).tolist():
            windows = torch.cat([_windows(text, window, length) for text in texts])
            # The same few tokens give the same state wherever they stand: each window is run once.
            distinct, place = torch.unique(windows, dim=0, return_inverse=True)
            states = [_states(target, cache, part, taps) for part in torch.split(distinct, ROWS)]
            found[lengths == length] = torch.cat(states)[place]
        return found

    return recompute


def longest(texts: Sequence[Document]) -> int:
    """Tokens of the longest document: the window that cuts nothing."""
    return max(text.ids.shape[0] for text in texts)


def _rows(text: Document) -> Tensor:
    return torch.arange(text.start, text.ids.shape[0])


def _captured(text: Document, taps: TapSet) -> Tensor:
    return text.taps[text.start :, [text.layers.index(layer) for layer in taps]].flatten(1)


def _windows(text: Document, window: int, length: int) -> Tensor:
    """Last `length` tokens [n, length] of the rows that see just so many."""
    rows = _rows(text)
    rows = rows[(rows + 1).clamp_max(window) == length]
    return text.ids[rows[:, None] + torch.arange(1 - length, 1)]


@torch.inference_mode()
def _states(target: Target, cache: KVCache, tokens: Tensor, taps: TapSet) -> Tensor:
    """States [n, A * d] of the last of tokens [n, w]."""
    slots = torch.arange(tokens.shape[0], device=target.info.device)
    where = chunk_rows(slots, torch.zeros_like(slots), tokens.shape[1])
    states = target.forward(tokens.to(target.info.device), where, cache, taps)
    return states.features[:, -1].to(torch.bfloat16).cpu()
