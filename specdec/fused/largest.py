"""The largest entry of long rows in two launches: torch walks a row of logits with few blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.fused.available import launching, power

SHARE = 4096  # entries of one program


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row [..., V], float32 [...], and where it stands first, int64 [...].

    What is no number counts as largest.
    """
    from specdec.fused.largest_kernels import largest_kernel, share_kernel

    width = x.shape[-1]
    rows = x.reshape(-1, width)
    count, splits = rows.shape[0], -(-width // SHARE)
    words = torch.empty(count, splits, dtype=torch.int64, device=x.device)
    values = torch.empty(x.shape[:-1], device=x.device)
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    share_kernel[(count, splits)](
        rows, words, rows.stride(0), width, SPLITS=splits, BLOCK=SHARE, num_warps=4, **launching()
    )
    largest_kernel[(count,)](
        words,
        values,
        indices,
        SPLITS=splits,
        BLOCK_SPLITS=power(2, splits),
        num_warps=1,
        **launching(),
    )
    return values, indices
