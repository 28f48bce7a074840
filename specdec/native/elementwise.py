"""The norm and the gated activation of a decoder layer on the CPU in one pass each, rounding where torch's would.

A handful of torch operations on a few rows costs more in launching than in arithmetic; each row is computed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.native.library import library
from specdec.native.linear import DTYPES, PANEL


def applies(x: Tensor, width: int) -> bool:
    """Is there a kernel for rows of this width? Not where gradients are wanted."""
    return (not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in DTYPES
            and width % PANEL == 0 and library() is not None)  # fmt: skip


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. [..., W] -> [..., W]"""
    kernels, rows = library(), x.contiguous()
    assert kernels is not None and weight.dtype == x.dtype, "no kernels, or weights of another dtype"
    y = torch.empty_like(rows)
    width = x.shape[-1]
    kernels.specdec_norm(rows.data_ptr(), weight.data_ptr(), y.data_ptr(), rows.numel() // width, width, eps,
                         x.dtype == torch.bfloat16, torch.get_num_threads())  # fmt: skip
    return y


def gate(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension. [..., 2W] -> [..., W]"""
    kernels, rows = library(), x.contiguous()
    assert kernels is not None, "no kernels"
    width = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
    kernels.specdec_gate(rows.data_ptr(), y.data_ptr(), y.numel() // width, width, x.dtype == torch.bfloat16,
                         torch.get_num_threads())  # fmt: skip
    return y
