"""A decoder layer, the target's or a draft head's, in one call to the C kernels.

On a few rows a layer's ten steps take hardly longer than Python takes between them. The result is that of the steps
alone, bit by bit; where they are not all in C, there is no whole layer.
Dimension legend: B requests, N rows, H hidden, D head size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.cache import KVCache, RowIndex
from specdec.layers.linear import Projection
from specdec.layers.norm import RMSNorm
from specdec.layers.rope import Angles
from specdec.native.calls import AttentionPlan, LayerCall, MatrixCall
from specdec.native.library import library
from specdec.native.linear import PAIRS, PANEL, tiles_kind
from specdec.native.placing import HALF


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a layer's rows are kept, and the plan of who sees whom."""

    cache: KVCache
    layer: int
    index: RowIndex
    plan: Any


@dataclass(frozen=True, slots=True)
class Parts:
    """A pre-norm layer with a gated MLP.

    Attributes:
        embedded_norm: of a draft head's token embeddings, which then stand before x in what `qkv` reads.
        q_norm, k_norm: of single heads.
        kv_heads, head_dim: of the layer; scale: of its attention.
    """

    input_norm: RMSNorm
    qkv: Projection
    out: Projection
    mlp_norm: RMSNorm
    gate_up: Projection
    down: Projection
    kv_heads: int
    head_dim: int
    scale: float
    embedded_norm: RMSNorm | None = None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def products(self) -> tuple[Projection, ...]:
        """All four."""
        return self.qkv, self.out, self.gate_up, self.down

    def norms(self) -> tuple[RMSNorm, ...]:
        """Those there are."""
        found = (self.input_norm, self.mlp_norm, self.embedded_norm, self.q_norm, self.k_norm)
        return tuple(norm for norm in found if norm is not None)


class WholeLayer:
    """The call, filled in but for what changes with each forward. Its parts are packed and stay where they are."""

    def __init__(self, parts: Parts) -> None:
        self.hidden, self.dtype = parts.input_norm.width, parts.input_norm.weight.dtype
        self._tensors: list[Tensor] = []  # they live as long as their addresses are used
        call = self._call = LayerCall(
            hidden=self.hidden, intermediate=parts.down.inputs, eps=parts.input_norm.eps,
            type=self.dtype == torch.bfloat16, tiles=tiles_kind() if self.dtype == torch.bfloat16 else 0,
        )  # fmt: skip
        for name in ("input_norm", "mlp_norm", "embedded_norm", "q_norm", "k_norm"):
            norm = getattr(parts, name)
            setattr(call, name, None if norm is None else self._address(norm.weight.detach()))
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(call, name, self._matrix(getattr(parts, name)))
        self._heads, self._scale = parts.out.inputs // parts.head_dim, parts.scale
        call.placing.heads_count, call.placing.kv_heads = self._heads, parts.kv_heads
        call.placing.size, call.placing.type = parts.head_dim, call.type

    def takes(self, x: Tensor, kept: Kept) -> bool:
        """Is everything about this forward the kernels' own? Not where gradients are wanted."""
        return (isinstance(kept.plan, AttentionPlan) and x.dtype == self.dtype == kept.cache.shape.dtype
                and not torch.is_grad_enabled())  # fmt: skip

    def run(
        self, x: Tensor, angles: Angles, kept: Kept, embedded: Tensor | None = None, *, reuse: bool = False
    ) -> Tensor:
        """The layer over x [B, N, H], a draft head's with the token embeddings [B, N, H], too; [B, N, H].

        Args:
            reuse: x's memory may be overwritten.

        Raises:
            MemoryError: when there is none for what stands between the steps.
        """
        x, (cos, sin), cache = x.contiguous(), angles.values(), kept.cache
        y = x if reuse else torch.empty_like(x)
        embedded = None if embedded is None else embedded.contiguous()
        slots, indices = kept.index.slots.contiguous(), kept.index.indices.contiguous()
        call = LayerCall.from_buffer_copy(self._call)  # threads may run the same layer
        call.x, call.y, call.rows = x.data_ptr(), y.data_ptr(), x.numel() // self.hidden
        call.embedded = None if embedded is None else embedded.data_ptr()
        call.attention = kept.plan.call
        call.attention.heads, call.attention.scale = self._heads, self._scale
        placing, step = call.placing, cache.kv.stride()
        placing.keys = cache.kv.data_ptr() + kept.layer * step[0] * cache.kv.element_size()
        placing.values = placing.keys + step[1] * cache.kv.element_size()
        placing.cos, placing.sin = cos.data_ptr(), sin.data_ptr()
        placing.slots, placing.indices = slots.data_ptr(), indices.data_ptr()
        placing.batch, placing.rows, placing.capacity = x.shape[0], x.shape[1], cache.length
        kernels = library()
        assert kernels is not None, "packed with kernels"
        if kernels.specdec_layer(ctypes.byref(call)):
            raise MemoryError("no memory for a layer's states")
        return y

    def _matrix(self, product: Projection) -> MatrixCall:
        assert product.packed is not None, "made of packed parts"
        spare = -product.outputs % PANEL
        bias = None if product.bias is None else F.pad(product.bias.detach().float(), (0, spare))
        return MatrixCall(self._address(product.packed), None if bias is None else self._address(bias),
                          product.inputs, product.outputs)  # fmt: skip

    def _address(self, x: Tensor) -> int:
        self._tensors.append(x)
        return x.data_ptr()


def whole(parts: Parts) -> WholeLayer | None:
    """The layer as one call, or None where a step of it has no kernel."""
    even = 2 * PAIRS  # inputs of a tile
    fits = (
        all(product.packing == "native" and product.inputs % even == 0 and product.outputs % PANEL == 0
            for product in parts.products())
        and parts.head_dim % (2 * HALF) == 0
        and len({(norm.eps, norm.weight.dtype) for norm in parts.norms()}) == 1
        and all(product.packed is not None and product.packed.dtype == parts.input_norm.weight.dtype
                for product in parts.products())
    )  # fmt: skip
    return WholeLayer(parts) if fits else None
