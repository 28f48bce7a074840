"""Overlapping a kernel's start with the end of the one before it (programmatic dependent launch, sm_90 and newer).

Captured rounds are hundreds of kernels of a few microseconds, of which one goes by between two kernels. Kernels
launched with `available.launching()` may start while the one before still runs, so each has to wait before it touches
anything that others write. Imported only where triton is.
"""
# mypy: ignore-errors
# (the body is Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl

from specdec.fused.available import overlaps, overlaps_further

OVERLAPS = tl.constexpr(overlaps())
FURTHER = tl.constexpr(overlaps_further())


@triton.jit
def wait_for_others():
    """Wait until all kernels before this one are done and their writes are seen, and let the next one start.

    FURTHER: let it start first, so that it fetches what it needs two kernels ahead. It waits for this one, which waits
    for those before, so that it sees what they wrote all the same.
    """
    if OVERLAPS:
        if FURTHER:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not FURTHER:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_ahead(pointer, count, LANES: tl.constexpr):
    """Bring `count` elements from `pointer` on into the L2 cache, in bulk; nobody waits for them.

    Both `pointer` and the bytes asked for are multiples of 16. LANES: threads that share the asking.
    """
    if OVERLAPS:
        width: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        share = tl.cdiv(count * width, LANES * 16) * 16
        at = tl.arange(0, LANES) * share
        size = tl.minimum(count * width - at, share)
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
            " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [pointer.to(tl.uint64, bitcast=True) + at.to(tl.uint64), size], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def fetch_lines_ahead(pointers, count):
    """Bring `count` elements from each of the pointers on into the L2 cache; as `fetch_ahead`."""
    if OVERLAPS:
        size = tl.full(pointers.shape, 0, tl.int32) + count * (
            pointers.dtype.element_ty.primitive_bitwidth // 8
        )
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
            " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [pointers.to(tl.uint64, bitcast=True), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
