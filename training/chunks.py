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
        ids: int64 [B, T]; padding holds `pad_id`.
        loss_mask: bool [B, T], False on padding.
        lengths: int64 [B] tokens before the padding.
        samples: index of each row in what was batched.
    """

    ids: Tensor
    loss_mask: Tensor
    lengths: Tensor
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True)
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
        multiple: T is a multiple of this (fewer shapes to compile).
        pad_id: token id on padding; any valid id.
    """

    tokens: int
    seed: int = 0
    multiple: int = 1
    pad_id: int = 0

    def __post_init__(self) -> None:
        for field, value in (("tokens", self.tokens), ("multiple", self.multiple)):
            if value < 1:
                raise SpecdecError("must be positive", field=f"batch {field}", value=value, allowed=">= 1")


def split_windows(
    samples: Iterable[Sample], max_length: int, overlap: int = 0, skipped: Skipped | None = None
) -> Iterator[Sample]:
    """Cut samples into windows of at most `max_length` tokens; none is dropped for its length.

    Args:
        samples: in any length.
        max_length: tokens of one window.
        overlap: tokens that a later window repeats as context; they carry no loss a second time.
        skipped: counts windows in which the assistant wrote nothing (there is nothing to learn in them).

    A sample of ids a..g, max_length 4, overlap 1: `a b c d`, then `d e f g` with no loss on d.

    Raises:
        SpecdecError: a length or overlap that leaves no room.
    """
    if max_length < 2 or not 0 <= overlap < max_length:
        raise SpecdecError("leaves no room for a window", field="data.max_length, overlap",
                           value=(max_length, overlap), allowed="2 or more, overlap below it")  # fmt: skip
    for sample in samples:
        for number, start in enumerate(range(0, max(len(sample) - overlap, 1), max_length - overlap)):
            window = _window(sample, number, slice(start, start + max_length), overlap)
            if window.loss_mask.any():
                yield window
            elif skipped is not None:
                skipped.add("window without assistant tokens")


def _window(sample: Sample, number: int, part: slice, overlap: int) -> Sample:
    if number == 0 and len(sample) <= part.stop:
        return sample
    mask = sample.loss_mask[part].copy()
    mask[: overlap if number else 0] = False
    return Sample(sample.id, sample.ids[part], mask, sample.turn, number)


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
    sizes = -(-sizes // rule.multiple) * rule.multiple
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


def collate(samples: Sequence[Sample], indices: Sequence[int], rule: BatchRule) -> Batch:
    """The samples of one batch as tensors."""
    chosen = [samples[i] for i in indices]
    longest = -(-max(len(sample) for sample in chosen) // rule.multiple) * rule.multiple
    ids = np.full((len(chosen), longest), rule.pad_id, dtype=np.int64)
    mask = np.zeros((len(chosen), longest), dtype=np.bool_)
    for row, sample in enumerate(chosen):
        ids[row, : len(sample)] = sample.ids
        mask[row, : len(sample)] = sample.loss_mask
    lengths = torch.tensor([len(sample) for sample in chosen])
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), lengths, tuple(indices))


def batches(
    samples: Sequence[Sample], rule: BatchRule, epochs: int, start: Position | None = None
) -> Iterator[tuple[Position, Batch]]:
    """Batches from `start` (None: the beginning) to the last epoch's end, each with the position after it.

    Resuming at a yielded position gives exactly what would have followed.
    """
    start = Position() if start is None else start
    lengths = np.array([len(sample) for sample in samples])
    for epoch in range(start.epoch, epochs):
        plan = plan_epoch(lengths, rule, epoch)
        for number in range(start.batch if epoch == start.epoch else 0, len(plan)):
            last = number + 1 == len(plan)
            after = Position(epoch + 1, 0) if last else Position(epoch, number + 1)
            yield after, collate(samples, plan[number], rule)
