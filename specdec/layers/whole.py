"""Decoder layers, all of a target's or a draft head's one, in one call to the C kernels.

On a few rows a layer's ten steps take hardly longer than Python takes between them; and other threads may run beside C.
The result is that of the steps alone, bit by bit; where they are not all in C, there is no whole.
Dimension legend: B requests, N rows, H hidden, D head size, A taps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.cache import KVCache, RowIndex
from specdec.layers.linear import Projection
from specdec.layers.norm import RMSNorm
from specdec.layers.rope import Angles
from specdec.native.calls import AttentionCall, AttentionPlan, ForwardCall, LayerCall, MatrixCall
from specdec.native.library import library
from specdec.native.linear import PAIRS, PANEL, tiles_kind
from specdec.native.placing import HALF


@dataclass(frozen=True, slots=True)
class Parts:
    """A pre-norm layer with a gated MLP.

    Attributes:
        kv_heads, head_dim: of the layer; scale: of its attention.
        embedded_norm: of a draft head's token embeddings, which then stand before x in what `qkv` reads.
        q_norm, k_norm: of single heads.
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

    def fit(self) -> bool:
        """Has every step a kernel?"""
        inputs = 2 * PAIRS  # of a tile
        dtype = self.input_norm.weight.dtype
        return (
            all(product.packing == "native" and product.inputs % inputs == 0 and product.outputs % PANEL == 0
                for product in self.products())
            and all(product.packed is not None and product.packed.dtype == dtype for product in self.products())
            and self.head_dim % (2 * HALF) == 0
            and all((norm.eps, norm.weight.dtype) == (self.input_norm.eps, dtype) for norm in self.norms())
        )  # fmt: skip


class Whole:
    """Layers as one call, filled in but for what changes with each forward. Their parts are packed and stay put.

    Args:
        layers: at least one, all of one shape.
    """

    def __init__(self, layers: Sequence[Parts]) -> None:
        first = layers[0]
        self.hidden, self.dtype = first.input_norm.width, first.input_norm.weight.dtype
        self._heads, self._kv_heads, self._head_dim = (
            first.out.inputs // first.head_dim,
            first.kv_heads,
            first.head_dim,
        )
        self._scale = first.scale
        self._tensors: list[Tensor] = []  # they live as long as their addresses are used
        self._layers = (LayerCall * len(layers))(*map(self._layer, layers))

    def takes(self, x: Tensor, cache: KVCache, plans: Sequence[object]) -> bool:
        """Is everything about this forward the kernels' own? Not where gradients are wanted."""
        return (x.dtype == self.dtype == cache.shape.dtype and not torch.is_grad_enabled()
                and all(isinstance(plan, AttentionPlan) for plan in plans))  # fmt: skip

    def run(
        self, x: Tensor, angles: Angles, cache: KVCache, index: RowIndex, plans: Sequence[AttentionPlan], *,
        embedded: Tensor | None = None, taps: Sequence[int] = (), features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """All layers over x [B, N, H]; [B, N, H], in memory of its own.

        Args:
            index: where the rows are kept in the cache.
            plans: of each layer.
            embedded: [B, N, H] token embeddings for a draft head's layer.
            taps: layers before which states are copied to features [B, N, A * H]; the number of layers stands for the
                end.

        Raises:
            MemoryError: when there is none for what stands between the steps.
        """
        x, (cos, sin) = x.contiguous(), angles.values()
        y = torch.empty_like(x)
        embedded = None if embedded is None else embedded.contiguous()
        slots, indices = index.slots.contiguous(), index.indices.contiguous()
        attentions = (ctypes.POINTER(AttentionCall) * len(plans))(
            *(ctypes.pointer(plan.call) for plan in plans)
        )
        wanted = (ctypes.c_int64 * len(taps))(*taps)
        step, size = cache.kv.stride(), cache.kv.element_size()
        call = ForwardCall(
            x=x.data_ptr(), embedded=None if embedded is None else embedded.data_ptr(), y=y.data_ptr(),
            attentions=ctypes.addressof(attentions), scale=self._scale, rows=x.numel() // self.hidden,
            plane=step[0] * size, taps=ctypes.addressof(wanted), tap_count=len(taps),
            features=None if features is None else features.data_ptr(),
        )  # fmt: skip
        placing = call.placing
        placing.cos, placing.sin, placing.slots, placing.indices = map(
            Tensor.data_ptr, (cos, sin, slots, indices)
        )
        placing.keys, placing.values = cache.kv.data_ptr(), cache.kv.data_ptr() + step[1] * size
        placing.batch, placing.rows, placing.capacity = x.shape[0], x.shape[1], cache.length
        placing.heads_count, placing.kv_heads, placing.size = self._heads, self._kv_heads, self._head_dim
        placing.type, placing.threads = self.dtype == torch.bfloat16, torch.get_num_threads()
        kernels = library()
        assert kernels is not None, "packed with kernels"
        if kernels.specdec_layers(ctypes.addressof(self._layers), len(self._layers), ctypes.byref(call)):
            raise MemoryError("no memory for a layer's states")
        return y

    def _layer(self, parts: Parts) -> LayerCall:
        call = LayerCall(
            hidden=self.hidden, intermediate=parts.down.inputs, eps=parts.input_norm.eps,
            type=self.dtype == torch.bfloat16, tiles=tiles_kind() if self.dtype == torch.bfloat16 else 0,
        )  # fmt: skip
        for name in ("input_norm", "mlp_norm", "embedded_norm", "q_norm", "k_norm"):
            norm = getattr(parts, name)
            setattr(call, name, None if norm is None else self._address(norm.weight.detach()))
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(call, name, self._matrix(getattr(parts, name)))
        return call

    def _matrix(self, product: Projection) -> MatrixCall:
        assert product.packed is not None, "made of packed parts"
        spare = -product.outputs % PANEL
        bias = None if product.bias is None else F.pad(product.bias.detach().float(), (0, spare))
        return MatrixCall(self._address(product.packed), None if bias is None else self._address(bias),
                          product.inputs, product.outputs)  # fmt: skip

    def _address(self, x: Tensor) -> int:
        self._tensors.append(x)
        return x.data_ptr()


def whole(layers: Sequence[Parts]) -> Whole | None:
    """The layers as one call, or None where a step of one has no kernel."""
    return Whole(layers) if layers and all(parts.fit() for parts in layers) else None
