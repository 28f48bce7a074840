"""Launches of the kernels of accepted pairs; `specdec.drafting.pairs` says what they compute.

Dimension legend: B requests, S slots, N nodes, D + 1 columns of a verdict, F feature width, R room of a slot, W pairs
read at once, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.fused.available import launching

FEATURES = 1024  # of one program


def keep(
    features: Tensor, kept: Tensor, emitted: Tensor, slots: Tensor, waiting: Tensor, to_features: Tensor,
    to_tokens: Tensor,
) -> None:  # fmt: skip
    """`Pairs.observe`: accepted features and tokens behind those that wait.

    Args:
        features: [B, N, F]; kept, emitted: int64 [B, D + 1] of a verdict.
        slots: int64 [B]; waiting: int64 [S].
        to_features: [S, R, F]; to_tokens: int64 [S, R].
    """
    from specdec.fused.pairs_kernels import keep_kernel

    b, nodes, wide = features.shape
    width = kept.shape[1]
    keep_kernel[(b, width, -(-wide // FEATURES))](
        features.contiguous(), kept.contiguous(), emitted.contiguous(), slots.contiguous(), waiting,
        to_features, to_tokens, nodes, wide, to_tokens.shape[1], WIDTH=width, BLOCK=FEATURES, num_warps=4,
        **launching(),
    )  # fmt: skip


def take(
    features: Tensor, tokens: Tensor, slots: Tensor, waiting: Tensor, lengths: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The first W = `width` pairs of each request, and the head rows they are for.

    Args:
        features: [S, R, F]; tokens: int64 [S, R].
        slots, lengths: int64 [B], whose, and of how many committed tokens; waiting: int64 [S].

    Returns: features [B, W, F] of `dtype`, tokens int64 [B, W], first rows int64 [B], rows int64 [B, W].
    """
    from specdec.fused.pairs_kernels import take_kernel

    (b,), (_, room, wide) = slots.shape, features.shape
    taken = torch.empty((b, width, wide), dtype=dtype, device=features.device)
    to_tokens, indices = tokens.new_empty(b, width), tokens.new_empty(b, width)
    first = tokens.new_empty(b)
    take_kernel[(b, width, -(-wide // FEATURES))](
        features, tokens, slots.contiguous(), waiting, lengths.contiguous(), taken, to_tokens, first, indices, wide,
        room, WIDTH=width, BLOCK=FEATURES, num_warps=4, **launching(),
    )  # fmt: skip
    return taken, to_tokens, first, indices


def leave(y: Tensor, slots: Tensor, waiting: Tensor, last: Tensor) -> Tensor:
    """Of the head's outputs y [B, W, H] the one at each request's last pair, [B, H]; remembered in last [S, H]."""
    from specdec.fused.pairs_kernels import leave_kernel

    b, width, hidden = y.shape
    now = y.new_empty(b, hidden)
    leave_kernel[(b, -(-hidden // FEATURES))](
        y.contiguous(), slots.contiguous(), waiting, last, now, hidden, WIDTH=width, BLOCK=FEATURES, num_warps=4,
        **launching(),
    )  # fmt: skip
    return now
