"""One pass over a layer's new heads: queries and keys are turned to their positions, keys and values stored; and one
over all layers that moves accepted rows together.

Does what `rotate`, `KVCache.write` and `KVCache.keep` do, rounding where they round, without the copies between.
Dimension legend: B requests, N rows, D head size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specdec.native.calls import PlacingCall
from specdec.native.elementwise import applies
from specdec.native.library import library

HALF = 16  # what half a head must divide by: the widest vector


def can_place(x: Tensor, plane: Tensor) -> bool:
    """Is there a kernel for heads made of x, to be stored in this plane of a cache?"""
    size = plane.shape[-1]
    return x.dtype == plane.dtype and size % (2 * HALF) == 0 and applies(x, size // 2)


def place(heads: Tensor, cos: Tensor, sin: Tensor, plane: Tensor, slots: Tensor, indices: Tensor) -> None:
    """Turn in place and store.

    Args:
        heads: [B, N, query heads + 2 * KV heads, D], contiguous: queries, then keys, then values.
        cos, sin: [B, N, 1, D], the sine of the first half negated.
        plane: [2, slots, KV heads, length, D], one layer of a cache.
        slots: int64 [B]; indices: int64 [B, N] rows to store at.
    """
    kernels = library()
    assert kernels is not None and heads.is_contiguous(), "no kernels, or heads in pieces"
    b, n, count, size = heads.shape
    kv_heads = plane.shape[2]
    cos, sin, slots, indices = (x.contiguous() for x in (cos, sin, slots, indices))
    call = PlacingCall(
        heads=heads.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), keys=plane[0].data_ptr(),
        values=plane[1].data_ptr(), slots=slots.data_ptr(), indices=indices.data_ptr(), batch=b, rows=n,
        heads_count=count - 2 * kv_heads, kv_heads=kv_heads, size=size, capacity=plane.shape[3],
        type=heads.element_size() == 2, threads=torch.get_num_threads(),
    )  # fmt: skip
    kernels.specdec_place(ctypes.byref(call))


def keep(kv: Tensor, slot: int, to: list[int], at: list[int]) -> bool:
    """Move rows `at` of a slot to rows `to`, in every layer; both rise, and no row moves behind itself.

    Args:
        kv: [layers, 2, slots, KV heads, length, D].

    Returns: was there a kernel for it?
    """
    kernels = library() if kv.device.type == "cpu" and kv.is_contiguous() else None
    if kernels is None:
        return False
    size, step = kv.element_size(), kv.stride()
    rows = ctypes.c_int64 * len(to)
    kernels.specdec_keep(
        kv.data_ptr() + slot * step[2] * size, kv.shape[0] * 2, step[1] * size, kv.shape[3], step[3] * size,
        step[4] * size, rows(*to), rows(*at), len(to),
    )  # fmt: skip
    return True
