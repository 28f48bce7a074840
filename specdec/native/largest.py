"""The largest entries of each row on the CPU: where the one stands first, or some with their log-probabilities.

Logits are the widest rows of a round, and torch walks them far under the memory's speed, several times over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.native.library import library
from specdec.native.linear import DTYPES

MOST = 32  # as in largest.c


def can_find(x: Tensor) -> bool:
    """Is there a kernel for rows of this tensor?"""
    return (x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0 and x.is_contiguous()
            and library() is not None)  # fmt: skip


def places(x: Tensor) -> Tensor:
    """[..., V], V at least 1 -> int64 [...]; what is not a number counts as largest."""
    kernels, width = library(), x.shape[-1]
    assert kernels is not None, "no kernels"
    found = torch.empty(x.shape[:-1], dtype=torch.int64)
    kernels.specdec_largest(x.data_ptr(), found.data_ptr(), x.numel() // width, width, x.dtype == torch.bfloat16,
                            torch.get_num_threads())  # fmt: skip
    return found


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[..., V] -> (log-probabilities float32 [..., count], places int64 [..., count]), likeliest first, the first of
    equals first; `count` is at most MOST and V. Where a logit is NaN, so are the values of its row."""
    kernels, width = library(), logits.shape[-1]
    assert kernels is not None and count <= min(MOST, width), "no kernels, or more than are kept"
    values = torch.empty(*logits.shape[:-1], count)
    found = torch.zeros(*logits.shape[:-1], count, dtype=torch.int64)
    kernels.specdec_top(logits.data_ptr(), values.data_ptr(), found.data_ptr(), logits.numel() // width, width, count,
                        logits.dtype == torch.bfloat16, torch.get_num_threads())  # fmt: skip
    return values, found
