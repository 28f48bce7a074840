"""A bias-optional projection that can be packed for CPU decoding.

Decoding multiplies a few rows by a large matrix. Through `F.linear` oneDNN re-lays the matrix at every call; packed
once, the same product runs at about half the time in float32 and bfloat16 on AVX-512 machines. The packing ops are
the ones inductor uses when it freezes a graph. Training and CUDA use the plain weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACK_ROWS = 16  # the row count the layout is tuned for: a small tree; single rows lose nothing by it


def can_pack(weight: Tensor) -> bool:
    """Is there a packed product for this weight on this machine?"""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Projection(nn.Module):
    """y = x W^T + b. `weight` is [outputs, inputs]; after `pack()` it is gone and only the packed copy remains."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((outputs, inputs), torch.nan))
        self.bias = nn.Parameter(torch.full((outputs,), torch.nan)) if bias else None
        self.inputs, self.outputs = inputs, outputs
        self.packed: Tensor | None = None

    def pack(self, *, keep_weight: bool = False) -> None:
        """Re-lay the weight for oneDNN; frees it unless `keep_weight`. Does nothing where no packing exists."""
        if self.packed is not None or not can_pack(self.weight):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().contiguous(), PACK_ROWS)
        if not keep_weight:
            self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.inputs)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], self.outputs)


def pack(module: nn.Module) -> None:
    """Pack every projection of a module for decoding."""
    for child in module.modules():
        if isinstance(child, Projection):
            child.pack()
