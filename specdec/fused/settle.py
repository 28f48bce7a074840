"""Launches of the kernels that end a round: compaction, standings and report.

Each does in one launch, and without a host, what the torch code of its caller says.
Dimension legend: B requests, S slots, N nodes, D + 1 columns of a verdict.
"""

from __future__ import annotations

from torch import Tensor

from specdec.fused.available import launching, power


def compact(kv: Tensor, slots: Tensor, lengths: Tensor, kept: Tensor) -> None:
    """`KVCache.compact`. kv [layers, 2, S, heads, length, D]; slots, lengths int64 [B]; kept int64 [B, D + 1]."""
    from specdec.fused.settle_kernels import compact_kernel

    layers, two, _, heads, _, size = kv.shape
    b, width = kept.shape
    compact_kernel[(b, layers * two * heads)](
        kv, slots.contiguous(), lengths.contiguous(), kept.contiguous(), kv.stride(2), kv.stride(1), kv.stride(3),
        kv.stride(4), heads, WIDTH=width, HEAD=size, BLOCK_WIDTH=power(1, width), BLOCK_HEAD=power(16, size),
        num_warps=2, **launching(),
    )  # fmt: skip


def settle(
    verdict: tuple[Tensor, Tensor, Tensor, Tensor], sizes: Tensor, scores: Tensor | None, peaks: Tensor,
    slots: Tensor, standing: tuple[Tensor, Tensor, Tensor | None], report: Tensor, promised: Tensor, first: int,
) -> None:  # fmt: skip
    """Standings by slot after a round, and what the host will want to know of it.

    Args:
        verdict: kept int64 [B, D + 1], counts int64 [B], emitted int64 [B, D + 1], offered int64 [B].
        sizes: int64 [B], nodes in use; scores: float32 [B, N] of their paths, or None.
        peaks: [B, N], the largest logit after each node.
        slots: int64 [B].
        standing: roots, lengths and waiting pairs, int64 [S]; no pairs without a head.
        report: int64 [B, first + columns]; promised: float32 [B].
    """
    from specdec.fused.settle_kernels import settle_kernel

    b, nodes = peaks.shape
    width = verdict[0].shape[1]
    given = (*verdict, sizes, scores, peaks, slots)
    settle_kernel[(b,)](
        *(None if x is None else x.contiguous() for x in given), *standing, report, promised, nodes, report.stride(0),
        WIDTH=width, FIRST=first, BLOCK_WIDTH=power(1, width), BLOCK_NODES=power(16, nodes), num_warps=1,
        **launching(),
    )  # fmt: skip
