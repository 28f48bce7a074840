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
def fetch_ahead(pointer, step, count, LINES: tl.constexpr):
    """Bring `count` elements of each of LINES lines, `step` apart from `pointer` on, into the L2 cache, in bulk; nobody
    waits for them. Shared by all threads, so that none asks for what another does.

    The pointer, and `step` and `count` in bytes, are multiples of 16.
    """
    if OVERLAPS:
        width: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        SHARES: tl.constexpr = (tl.extra.cuda.num_threads() + LINES - 1) // LINES
        at = tl.arange(0, LINES * SHARES)
        share = tl.cdiv(count * width, SHARES * 16) * 16
        begin = at % SHARES * share
        size = tl.minimum(count * width - begin, share)
        spot = pointer.to(tl.uint64, bitcast=True) + ((at // SHARES).to(tl.int64) * step * width + begin).to(
            tl.uint64
        )
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
            " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [spot, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
