"""A head's logits graded against the target's distributions on the CPU, a row at a time in cache.

Torch walks rows as wide as a vocabulary a dozen times through memory for this, longer than the products beside it take.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specdec.native.calls import GradingCall
from specdec.native.library import library
from specdec.native.linear import DTYPES

KINDS = ("kl", "tv", "lk", "alpha")  # in the order of grading.c


def can_grade(logits: Tensor) -> bool:
    """Is there a kernel for logits like these?"""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and library() is not None


def grade(logits: Tensor, probs: Tensor, index: Tensor, weights: Tensor, kind: str, rate: float
          ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses of rows; in place of the logits stand their gradients, times the row's weight, afterwards.

    Args:
        logits: [R, Vd], contiguous; overwritten.
        probs: [M, Vd] of the same dtype; rows sum to one.
        index: int64 [R], the row of `probs` that grades each row.
        weights: float32 [R].
        kind: one of KINDS, defined in `training.losses`; rate: of "lk".

    Returns:
        (loss float32 [R], overlap float32 [R], hit bool [R]).

    Raises:
        MemoryError: no room for two rows.
    """
    kernels, (rows, width) = library(), logits.shape
    assert kernels is not None and logits.is_contiguous(), "no kernels, or a view"
    assert probs.dtype == logits.dtype and probs.shape[1] == width, "distributions of another kind"
    probs, index, weights = probs.contiguous(), index.contiguous(), weights.float().contiguous()
    loss, overlap, hit = torch.empty(rows), torch.empty(rows), torch.empty(rows, dtype=torch.bool)
    call = GradingCall(
        logits.data_ptr(), probs.data_ptr(), index.data_ptr(), weights.data_ptr(), loss.data_ptr(), overlap.data_ptr(),
        hit.data_ptr(), rows, width, rate, logits.dtype == torch.bfloat16, KINDS.index(kind), torch.get_num_threads(),
    )  # fmt: skip
    if kernels.specdec_grade(ctypes.byref(call)):
        raise MemoryError(f"no room for rows of {width} logits")
    return loss, overlap, hit
