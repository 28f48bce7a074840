"""Tree attention through the package's C kernels: the default on CPUs with a C compiler.

A node's result depends on its own path alone, bit by bit: not on the other nodes of the tree, on where they are stored,
or on the other requests of the batch. Head sizes divisible by 16, float32 or bfloat16, no soft cap.
Dimension legend: B requests, N rows, H heads, D head size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specdec.attention.protocol import Rows
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.native.calls import AttentionCall, AttentionPlan
from specdec.native.library import library, why_not
from specdec.native.linear import AVX512, DTYPES, PAIRS, PANEL, tiles_kind


def _scores_by(dtype: torch.dtype, head_dim: int) -> int:
    """A tile takes 32 numbers of a head; where they do not divide it, pairs do."""
    if dtype != torch.bfloat16:
        return 0
    return tiles_kind() if head_dim % (2 * PAIRS) == 0 else min(tiles_kind(), AVX512)


class NativeAttention:
    """One call a layer; query rows of a group share each key and value."""

    name = "native"

    def plan(self, rows: Rows, cache: KVCache, window: int | None) -> AttentionPlan:
        """Raises UnsupportedError for shapes, dtypes and devices without a kernel."""
        shape = cache.shape
        if library() is None:
            raise UnsupportedError(f"no kernels: {why_not()}", field="attention", value=self.name)
        if shape.head_dim % PANEL or shape.dtype not in DTYPES or cache.kv.device.type != "cpu":
            raise UnsupportedError("has no kernel for this cache", field="attention", value=self.name,
                                   allowed="CPU, float32 or bfloat16, head sizes divisible by 16")  # fmt: skip
        tree = rows.positions if rows.tree_positions is None else rows.tree_positions
        assert (
            window is None or rows.ancestors is None or rows.offset == 0 or rows.tree_positions is not None
        ), "a window needs all tree positions"
        tensors = [x.to(torch.int64).contiguous() for x in (rows.slots, rows.lengths, rows.positions, tree)]
        b, n = rows.positions.shape
        call = AttentionCall(
            slots=tensors[0].data_ptr(), lengths=tensors[1].data_ptr(), positions=tensors[2].data_ptr(),
            tree=tensors[3].data_ptr(), batch=b, rows=n, kv_heads=shape.kv_heads, size=shape.head_dim,
            capacity=cache.length, slot_step=shape.kv_heads * cache.length * shape.head_dim,
            tree_rows=tensors[3].shape[1], offset=rows.offset, window=window or 0,
            type=shape.dtype == torch.bfloat16, threads=torch.get_num_threads(),
            kind=_scores_by(shape.dtype, shape.head_dim),
        )  # fmt: skip
        if rows.ancestors is not None:
            tensors.append(rows.ancestors.contiguous())
            call.ancestors = tensors[-1].data_ptr()
        return AttentionPlan(call, tuple(tensors))

    def attend(
        self,
        query: Tensor,
        cache: KVCache,
        layer: int,
        plan: AttentionPlan,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """query [B, N, H, D] -> [B, N, H, D]. Raises UnsupportedError for a soft cap."""
        if softcap is not None:
            raise UnsupportedError("has no soft cap", field="attention", value=self.name)
        _, _, heads, d = query.shape
        if query.stride(3) != 1 or query.stride(2) != d or query.dtype != cache.kv.dtype:
            query = query.to(cache.kv.dtype).contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        call, plane = plan.call, cache.kv[layer]
        call.query, call.out = query.data_ptr(), out.data_ptr()
        call.keys, call.values = plane[0].data_ptr(), plane[1].data_ptr()
        call.heads, call.query_step, call.request_step = heads, query.stride(1), query.stride(0)
        call.scale = scale
        kernels = library()
        assert kernels is not None, "planned with kernels"
        if kernels.specdec_attention(ctypes.byref(call)):
            raise MemoryError("no memory for attention scores")
        return out
