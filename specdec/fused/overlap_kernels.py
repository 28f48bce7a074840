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

from specdec.fused.available import overlaps

OVERLAPS = tl.constexpr(overlaps())


@triton.jit
def wait_for_others():
    """Wait until all kernels before this one are done and their writes are seen, and let the next one start."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
