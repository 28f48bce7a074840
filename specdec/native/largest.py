"""Where the largest entry of each row stands first, on the CPU.

Logits are the widest rows of a round, and `Tensor.max` with its places walks them far under the memory's speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.native.library import library
from specdec.native.linear import DTYPES


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
