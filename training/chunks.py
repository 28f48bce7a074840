"""Windows and batches: long samples split, like lengths together, an order that can be resumed at any batch.

Knows lengths and seeds; nothing of models. Dimension legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import SpecdecError
from training.data import Sample, Skipped

POOL_BATCHES = 64  # batches sorted by length together: little padding, and still a new mixture every epoch


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of like length, padded on the right.

    Attributes:
        ids: int64 [B, T]; padding holds 0.
        loss_mask: bool [B, T], False on padding.
        lengths: int64 [B] tokens before the padding.
    """

    ids: Tensor
    loss_mask: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the run, the next batch of an epoch: saved in a checkpoint, it resumes the very order."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class BatchRule:
    """How batches are made.

    Attributes:
        tokens: at most so many padded tokens in a batch.
        seed: of the order; with the epoch it decides everything.
    """

    tokens: int
    seed: int = 0


def split_windows(
    samples: Iterable[Sample], max_length: int, skipped: Skipped | None = None
) -> Iterator[Sample]:
    """Cut samples into windows of at most `max_length` tokens; none is dropped for its length.

    Args:
        samples: in any length.
        max_length: tokens of one window.
        skipped: counts windows in which the assistant wrote nothing (there is nothing to learn in them).

    A sample of ids a..g, max_length 4: `a b c d`, then `e f g`.

    Raises:
        SpecdecError: a length that leaves no room.
    """
    if max_length < 2:
        raise SpecdecError(
            "leaves no room for a window", field="data.max_length", value=max_length, allowed=">= 2"
        )
    for sample in samples:
        for number, start in enumerate(range(0, max(len(sample), 1), max_length)):
            window = _window(sample, number, slice(start, start + max_length))
            if window.loss_mask.any():
                yield window
            elif skipped is not None:
                skipped.add("window without assistant tokens")


def _window(sample: Sample, number: int, part: slice) -> Sample:
    if number == 0 and len(sample) <= part.stop:
        return sample
    return Sample(sample.id, sample.ids[part], sample.loss_mask[part], sample.turn, number)


def plan_epoch(
    lengths: Sequence[int] | NDArray[np.int64], rule: BatchRule, epoch: int
) -> list[tuple[int, ...]]:
    """The batches of one epoch, as indices into the samples: a function of lengths, rule and epoch alone.

    Samples are shuffled, sorted by length within pools of some batches, packed up to `rule.tokens` padded
    tokens, and the batches are shuffled again. Every sample comes exactly once.

    Raises:
        SpecdecError: no samples, or one that no batch can hold.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not sizes.size:
        raise SpecdecError(
            "there is nothing to batch", field="data", remedy="Check what was skipped and why."
        )
    if sizes.max() > rule.tokens:
        raise SpecdecError("cannot hold the longest sample", field="trainer.batch_tokens", value=rule.tokens,
                           allowed=f">= {sizes.max()}", remedy="Or lower data.max_length.")  # fmt: skip
    random = np.random.default_rng([rule.seed, epoch])
    order = random.permutation(sizes.size)
    pool = max(1, int(POOL_BATCHES * rule.tokens / sizes.mean()))
    batches: list[list[int]] = []
    for start in range(0, sizes.size, pool):
        part = order[start : start + pool]
        batches += _pack(part[np.argsort(sizes[part], kind="stable")], sizes, rule.tokens)
    return [tuple(batches[i]) for i in random.permutation(len(batches))]


def _pack(order: NDArray[np.int64], sizes: NDArray[np.int64], tokens: int) -> list[list[int]]:
    """Cut a run of rising sizes into batches: rows times the last, largest size stays within `tokens`."""
    batches: list[list[int]] = [[]]
    for index in order.tolist():
        if (len(batches[-1]) + 1) * int(sizes[index]) > tokens:
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]


def collate(samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
    """The samples of one batch as tensors."""
    chosen = [samples[i] for i in indices]
    longest = max(len(sample) for sample in chosen)
    ids = np.zeros((len(chosen), longest), dtype=np.int64)
    mask = np.zeros((len(chosen), longest), dtype=np.bool_)
    for row, sample in enumerate(chosen):
        ids[row, : len(sample)] = sample.ids
        mask[row, : len(sample)] = sample.loss_mask
    lengths = torch.tensor([len(sample) for sample in chosen])
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), lengths)
