"""The walk down a tree in one launch; `specdec.accept.walk` says what it computes.

Dimension legend: B requests, N nodes, D longest path in edges.
"""

from __future__ import annotations

from torch import Tensor

from specdec.accept import Verdict
from specdec.fused.available import launching, power
from specdec.tree import DraftTree


def walk(tree: DraftTree, chosen: Tensor, width: int) -> Verdict:
    """Follow the target's own tokens chosen int64 [B, N]; `width` = D + 1 columns of the verdict, at most N."""
    from specdec.fused.walk_kernels import walk_kernel

    b, n = tree.tokens.shape
    assert width <= n, (width, n)
    kept, emitted = (chosen.new_empty(b, width) for _ in range(2))
    counts, offered = (chosen.new_empty(b) for _ in range(2))
    given = (tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.sizes, chosen)
    walk_kernel[(b,)](
        *(x.contiguous() for x in given), kept, counts, emitted, offered,
        NODES=n, WIDTH=width, BLOCK=power(16, n), num_warps=1, **launching(),
    )  # fmt: skip
    return Verdict(kept, counts, emitted, offered)
