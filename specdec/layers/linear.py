"""A bias-optional projection that can be packed for CPU decoding.

Decoding multiplies a few rows by a large matrix. Through `F.linear` that product is re-laid at every call, or runs far
under the memory's speed; packed once, it does neither. Our own kernels come first (native/). Without a compiler it is
oneDNN's packed product, the one inductor uses when it freezes a graph. Training and CUDA use the plain weight.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.fused.available import applies
from specdec.fused.product import product
from specdec.fused.trial import cut_for
from specdec.layers.gate import gated
from specdec.layers.norm import RMSNorm
from specdec.native import linear as native

PACK_ROWS = 16  # the row count oneDNN's layout is tuned for: a small tree; single rows lose nothing by it
Packing = Literal["native", "onednn"]

KERNEL_ROWS = 32  # chunks of a prompt are padded to multiples of this for oneDNN, see `spare_rows`
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and PyTorch's wrapper's
CACHED = 256  # kernels: about as many as a few batch sizes with their usual trees need


def spare_rows(rows: int, room: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows to add to a chunk, at most `room`, so that chunks come in few sizes.

    oneDNN compiles a kernel for every number of rows that a matrix meets: half a megabyte that is kept, and
    milliseconds. Prompts of every length would fill memory for as long as a server runs. Our own kernels need none.
    """
    onednn = packing_of(torch.empty(0, dtype=dtype, device=device)) == "onednn"
    return min(-rows % KERNEL_ROWS, room) if onednn else 0


def bound_kernel_caches() -> None:
    """Keep `CACHED` kernels instead of 1024 in each cache, unless the environment says otherwise.

    For processes that run for long; works until the first product.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(CACHED))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 itself? CPUs that do not are far slower in it than in float32."""
    if device.type != "cpu":
        return True
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packing_of(weight: Tensor) -> Packing | None:
    """How this weight is packed on this machine; None where no packing exists."""
    if weight.device.type != "cpu":
        return None
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    in_hardware = multiplies_bfloat16(weight.device)
    if native.can_multiply(weight) and (
        weight.dtype == torch.float32 or native.tiles_kind() or not in_hardware
    ):
        return "native"
    if weight.dtype == torch.bfloat16:
        return "onednn" if in_hardware else None
    return "onednn" if onednn and weight.dtype == torch.float32 else None


class Projection(nn.Module):
    """y = x W^T + b. `weight` is [outputs, inputs]; after `pack()` it is gone and only the packed copy remains."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((outputs, inputs), torch.nan))
        self.bias = nn.Parameter(torch.full((outputs,), torch.nan)) if bias else None
        self.inputs, self.outputs = inputs, outputs
        self.packing: Packing | None = None
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Re-lay the weight and free it. Does nothing where no packing exists."""
        if self.packed is not None:
            return
        self.packing = packing_of(self.weight)
        if self.packing is None:
            return
        plain = self.weight.detach().contiguous()
        self.packed = (native.pack(plain) if self.packing == "native"
                       else torch.ops.mkldnn._reorder_linear_weight(plain, PACK_ROWS))  # fmt: skip
        self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)

    def plain_weight(self) -> Tensor:
        """[outputs, inputs], unpacked for the occasion where it has to be."""
        if self.packed is None:
            return self.weight.detach()
        return (
            native.unpack(self.packed, self.outputs, self.inputs)
            if self.packing == "native"
            else self.packed.to_dense()
        )

    def forward(
        self, x: Tensor, *, norm: RMSNorm | None = None, activated: bool = False, plus: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:  # fmt: skip
        """plus + after(W norm(x) + b), with as few launches as the device allows.

        Args:
            x: [..., inputs].
            norm: applied to x first.
            activated: `after` is the gated activation, which halves the outputs; not with `plus`.
            plus: [..., outputs], a residual; its memory may be overwritten where `reuse`.

        Returns: [..., outputs], or [..., outputs / 2] where `activated`.
        """
        cut = None
        if self.packed is None:
            cut = cut_for(x, self.weight, norm=norm is not None, paired=activated, plus=plus is not None)
        if cut is not None:
            factor, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return product(
                x, self.weight, self.bias, cut, plus=plus, factor=factor, eps=eps, paired=activated
            )
        x = x if norm is None else norm(x)
        if plus is None:
            y = self._product(x)
            return gated(y) if activated else y
        if reuse and self.bias is None and plus.is_contiguous() and applies(x):
            plus.view(-1, self.outputs).addmm_(x.reshape(-1, self.inputs), self.weight.t())
            return plus
        return plus + self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.inputs)
        if self.packing == "native":
            y = native.linear(rows, self.packed, self.outputs, self.bias)
        else:
            y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], self.outputs)


def pack(module: nn.Module) -> None:
    """Pack every projection of a module for decoding."""
    for child in module.modules():
        if isinstance(child, Projection):
            child.pack()
