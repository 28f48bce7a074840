"""The walk down a tree in one launch; `specdec.accept.walk` says what it computes.

Dimension legend: B requests, N nodes, D longest path in edges.
"""

from __future__ import annotations

from torch import Tensor

from specdec.fused.available import launching, power


def walk(
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    sizes: Tensor,
    chosen: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Follow the target's own tokens chosen int64 [B, N].

    Args:
        tokens, parents, depths, ancestors: int64 [B, N]; sizes: int64 [B].
        width: D + 1 columns of the verdict, at most N.

    Returns: kept int64 [B, D + 1], counts int64 [B], emitted int64 [B, D + 1], offered int64 [B].
    """
    from specdec.fused.walk_kernels import walk_kernel

    b, n = tokens.shape
    assert width <= n, (width, n)
    kept, emitted = (chosen.new_empty(b, width) for _ in range(2))
    counts, offered = (chosen.new_empty(b) for _ in range(2))
    given = (tokens, parents, depths, ancestors, sizes, chosen)
    walk_kernel[(b,)](
        *(x.contiguous() for x in given), kept, counts, emitted, offered,
        NODES=n, WIDTH=width, BLOCK=power(16, n), num_warps=1, **launching(),
    )  # fmt: skip
    return kept, counts, emitted, offered
