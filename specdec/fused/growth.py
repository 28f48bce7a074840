"""Launches that grow trees: two a level and one for the tree; `specdec.drafting.growth` says what they compute.

Every share of every frontier node's vocabulary finds its likeliest drafts; then they are merged for each request,
its candidates noted and its frontier picked; in the end one program a request draws the tree.

Dimension legend: B requests, K width, C candidates, H head size, N nodes, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.fused.available import launching, power
from specdec.tree import MAX_NODES

WIDEST = 16  # a frontier's candidates are one tile
SPLITS = 16  # shares of a vocabulary, at most; fewer where a share would be below `SHARE`
SHARE = 1024
LEVEL_WARPS, TREE_WARPS = 8, 4


@dataclass(frozen=True, slots=True)
class Shares:
    """What every share of every row's vocabulary found.

    Attributes:
        words: int64 [R, splits, K], the likeliest drafts, packed.
        peaks, totals: float32 [R, splits], the share's part of the softmax.
    """

    words: Tensor
    peaks: Tensor
    totals: Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of all levels: tokens, parents int64 and scores float32 [B, C], filled from the left."""

    tokens: Tensor
    parents: Tensor
    scores: Tensor

    @staticmethod
    def room(b: int, size: int, device: torch.device) -> Candidates:
        """For so many, none yet."""
        tokens, parents = (torch.empty((b, size), dtype=torch.int64, device=device) for _ in range(2))
        return Candidates(tokens, parents, torch.empty((b, size), dtype=torch.float32, device=device))


def capacity(width: int, depth: int) -> int:
    """C: the most candidates that so many levels can have, while their head rows fit into a word."""
    levels = min(depth, MAX_NODES // width + 1)
    return width + (levels - 1) * width * width


def shares(logits: Tensor, width: int) -> Shares:
    """The first launch of a level. logits: [R, Vd]."""
    from specdec.fused.growth_kernels import shares_kernel

    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    blocks = share_blocks(vocabulary, width)
    splits = blocks["SPLITS"]
    words = torch.empty((rows, splits, width), dtype=torch.int64, device=logits.device)
    peaks, totals = (torch.empty((rows, splits), dtype=torch.float32, device=logits.device) for _ in range(2))
    shares_kernel[(rows, splits)](
        logits, words, peaks, totals, logits.stride(0), vocabulary, **blocks,
        num_warps=share_warps(blocks["BLOCK"]), **launching(),
    )  # fmt: skip
    return Shares(words, peaks, totals)


def share_blocks(vocabulary: int, width: int) -> dict[str, int]:
    """What `shares_kernel` is cut in."""
    block = min(power(SHARE, -(-vocabulary // SPLITS)), power(16, vocabulary))
    return {"SPLITS": -(-vocabulary // block), "WIDTH": width, "BLOCK": block, "BLOCK_WIDTH": power(1, width)}


def share_warps(block: int) -> int:
    """Eight words a thread; more where a share has more than sixteen warps can take so."""
    return min(16, max(1, block // 256))


def grow(given: Shares, ids: Tensor, old: tuple[Tensor, ...] | None, y: Tensor, found: Candidates,
         new: tuple[Tensor, ...], count: int, before: int) -> None:  # fmt: skip
    """The second launch of a level: its candidates, and its frontier.

    Args:
        given: of the frontier's rows, request by request.
        ids: int64 [Vd], target ids of drafts.
        old: the frontier's scores, places among the candidates, and ancestor words [B, K'].
        y: its outputs [B, K', H].
        found: written to from `count` on.
        new: tokens, scores, places, ancestor words [B, K] and parents' outputs [B, K, H]; written to.
        before: head rows written by earlier levels.
    """
    from specdec.fused.growth_kernels import level_kernel

    b, rows, hidden = y.shape
    _, splits, width = given.words.shape
    blocks = level_blocks(rows, splits, width, hidden)
    level_kernel[b, -(-hidden // blocks["BLOCK_HIDDEN"])](
        given.words, given.peaks, given.totals, ids, *(old or (None,) * 3), y.contiguous(),
        found.tokens, found.scores, found.parents, *new, count, before, found.tokens.shape[1], hidden,
        **blocks, num_warps=LEVEL_WARPS, **launching(),
    )  # fmt: skip


def level_blocks(rows: int, splits: int, width: int, hidden: int) -> dict[str, int]:
    """What `level_kernel` is cut in."""
    return {
        "ROWS": rows, "SPLITS": splits, "WIDTH": width, "BLOCK_ROWS": power(1, rows),
        "BLOCK_SPLITS": power(1, splits), "BLOCK_WORDS": power(1, splits * width), "BLOCK_WIDTH": power(1, width),
        "BLOCK_HIDDEN": min(512, power(16, hidden)),
    }  # fmt: skip


def rerank(
    roots: Tensor, found: Candidates, count: int, nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`trees.rerank` of the first `count` candidates, in one launch.

    Args:
        roots: int64 [B].

    Returns: tokens, parents, depths, ancestors int64 [B, N], sizes int64 [B], scores float32 [B, N].
    """
    from specdec.fused.growth_kernels import rerank_kernel

    b, room = found.tokens.shape
    n = min(nodes - 1, count) + 1
    tokens, parents, depths, ancestors = (roots.new_empty(b, n) for _ in range(4))
    scores, sizes = found.scores.new_empty(b, n), roots.new_empty(b)
    rerank_kernel[(b,)](
        roots.contiguous(), found.tokens, found.parents, found.scores, tokens, parents, scores, depths, ancestors,
        sizes, count, room, **tree_blocks(room, n), num_warps=TREE_WARPS, **launching(),
    )  # fmt: skip
    return tokens, parents, depths, ancestors, sizes, scores


def tree_blocks(room: int, nodes: int) -> dict[str, int]:
    """What `rerank_kernel` is cut in, and how often it doubles how far up a node sees."""
    return {
        "NODES": nodes, "TURNS": (nodes - 1).bit_length(), "BLOCK": power(16, room), "BLOCK_NODES": power(16, nodes),
    }  # fmt: skip
