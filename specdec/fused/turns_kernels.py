"""Who of the programs that share a piece of work is done last. Imported only where triton is."""
# mypy: ignore-errors
# (the body is Triton's own language, and triton carries no types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(turn, parts):
    """Count this program among so many parts; the last one sees what all have left, and puts zero back."""
    tl.debug_barrier()  # one thread counts, for what all have stored
    last = tl.atomic_add(turn, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(turn, 0)
    return last
