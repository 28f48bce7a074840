"""NativeGrowth: the candidates of one proposal by the C kernels, one call a level where torch makes two dozen.

Dimension legend: B requests, K width, C candidates, H head size, N nodes, Vd draft vocabulary.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafting.growth import Growth
from specdec.drafting.protocol import Shape
from specdec.native.calls import ChoosingCall, LevelCall
from specdec.native.largest import MOST
from specdec.native.library import library
from specdec.native.linear import DTYPES
from specdec.tree import MAX_NODES, DraftTree


@dataclass(frozen=True, slots=True)
class Candidates:
    """tokens and parents int64 [B, C], paths float32 [B, C]; filled from the left."""

    tokens: Tensor
    parents: Tensor
    paths: Tensor

    @staticmethod
    def room(batch: int, width: int, depth: int) -> Candidates:
        """For the children of the root and of as many rows of the head as a word has bits, in however many levels."""
        rows = min((depth - 1) * width, MAX_NODES)
        whole = torch.empty(2, batch, width + rows * width, dtype=torch.int64)
        return Candidates(whole[0], whole[1], torch.empty(whole.shape[1:]))


class NativeGrowth(Growth):
    """See `Growth`; every shape that `fits` is grown alike."""

    found: Candidates
    held: float

    def level(self, logits: Tensor, y: Tensor) -> Tensor:
        """See `Growth.level`. Raises MemoryError when there is none for the likeliest entries."""
        kernels = library()
        assert kernels is not None, "no kernels"
        b, rows, vocab = logits.shape
        k, first = self.width, self.depth == 0
        if first:
            self.found = Candidates.room(b, k, self.shape.depth)
        self.rows_before = 0 if first else self.rows_before + rows
        logits, y = logits.contiguous(), y.contiguous()
        tokens, at, bits = torch.empty(3, b, k, dtype=torch.int64).unbind()
        scores, next_y = torch.empty(b, k), y.new_empty(b, k, y.shape[2])
        call = LevelCall(
            logits=logits.data_ptr(), ids=self.ids.data_ptr(), y=y.data_ptr(), tokens=self.found.tokens.data_ptr(),
            parents=self.found.parents.data_ptr(), paths=self.found.paths.data_ptr(), next_tokens=tokens.data_ptr(),
            next_at=at.data_ptr(), next_bits=bits.data_ptr(), next_scores=scores.data_ptr(), next_y=next_y.data_ptr(),
            batch=b, rows=rows, vocab=vocab, width=k, room=self.found.tokens.shape[1], count=self.count,
            rows_before=self.rows_before, y_bytes=y.shape[2] * y.element_size(),
            floor=self.shape.node_floor, type=logits.dtype == torch.bfloat16, threads=torch.get_num_threads(),
        )  # fmt: skip
        if not first:
            call.scores, call.at, call.bits = (x.data_ptr() for x in (self.scores, self.at, self.bits))
        self.held = kernels.specdec_level(ctypes.byref(call))
        if self.held < 0:
            raise MemoryError("no memory for the likeliest drafts")
        found = (tokens, scores, at, bits)
        self.tokens, self.scores, self.at, self.bits = (x[:, : call.likely].contiguous() for x in found)
        self.count += rows * k
        self.depth += 1
        return next_y[:, : call.likely]

    def promise(self) -> float:
        """See `Growth.promise`."""
        return self.held

    def worth(self) -> int:
        """See `Growth.worth`."""
        kernels = library()
        assert kernels is not None, "no kernels"
        most = min(len(self.shape.prices), self.shape.nodes)
        prices = (ctypes.c_double * most)(*self.shape.prices[:most])
        b, room = self.found.paths.shape
        return int(kernels.specdec_worth(self.found.paths.data_ptr(), prices, b, room, self.count, most))

    def path_scores(self) -> Tensor:
        """See `Growth.path_scores`."""
        return self.found.paths[:, : self.count]

    def tree(self, roots: Tensor, nodes: int) -> DraftTree:
        """See `Growth.tree`."""
        kernels = library()
        assert kernels is not None, "no kernels"
        b, n = len(roots), min(nodes - 1, self.count) + 1
        tokens, parents, depths, ancestors = torch.empty(4, b, n, dtype=torch.int64).unbind()
        scores, roots = torch.empty(b, n), roots.contiguous()
        call = ChoosingCall(
            roots=roots.data_ptr(), tokens=self.found.tokens.data_ptr(), parents=self.found.parents.data_ptr(),
            paths=self.found.paths.data_ptr(), next_tokens=tokens.data_ptr(), next_parents=parents.data_ptr(),
            depths=depths.data_ptr(), ancestors=ancestors.data_ptr(), scores=scores.data_ptr(), batch=b,
            room=self.found.tokens.shape[1], count=self.count, nodes=n,
        )  # fmt: skip
        kernels.specdec_choose(ctypes.byref(call))
        return DraftTree(tokens, parents, depths, ancestors, torch.full((b,), n), scores)


def fits(ids: Tensor, width: int, shape: Shape, dtype: torch.dtype) -> bool:
    """Can the kernels grow trees of this shape out of such logits?"""
    return (ids.device.type == "cpu" and ids.is_contiguous() and dtype in DTYPES and width <= MOST
            and shape.nodes <= MAX_NODES and library() is not None)  # fmt: skip
