"""The draft vocabulary: which of the target's tokens the head may propose, and what is lost by the choice.

Knows counts and logits; offsets (`d2t`) exist in checkpoint files only. Legend: V vocabulary, D draft.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.errors import SpecdecError
from training.data import Sample


@dataclass(frozen=True, slots=True)
class OutsideMass:
    """What the target gives to tokens outside the draft vocabulary.

    Attributes:
        mass: mean probability; a bound on what the choice costs in acceptance at depth 1.
        argmax: share of positions whose likeliest token is outside.
        positions: over how many.
    """

    mass: float
    argmax: float
    positions: int


def count_tokens(samples: Iterable[Sample], vocab: int) -> Tensor:
    """How often the assistant wrote each token: int64 [V], over loss-masked positions.

    Raises:
        SpecdecError: an id outside the vocabulary, in prompts as well (data of another tokenizer).
    """
    counts = np.zeros(vocab, dtype=np.int64)
    for sample in samples:
        outside = sample.ids[(sample.ids < 0) | (sample.ids >= vocab)]
        if outside.size:
            raise SpecdecError("is outside the target's vocabulary", field=f"token id of sample {sample.id}",
                               value=int(outside[0]), allowed=f"0 to {vocab - 1}",
                               remedy="The answers come from another target; start a new run. Or the tokenizer has "
                               "tokens that the model lacks.")  # fmt: skip
        counts += np.bincount(sample.ids[sample.loss_mask], minlength=vocab)
    return torch.from_numpy(counts)


def draft_vocab(counts: Tensor, size: int | None, stop_ids: Collection[int] = ()) -> Tensor:
    """The target ids of the draft vocabulary: int64 [D], rising.

    Args:
        counts: [V] how often each token was written.
        size: D; None, or a size of V and more, gives the full vocabulary.
        stop_ids: always in: a head that cannot end an answer drafts past every end.

    The most frequent tokens, ties to the lower id.

    >>> draft_vocab(torch.tensor([5, 0, 7, 7, 1]), 3, stop_ids=[1]).tolist()
    [1, 2, 3]

    Raises:
        SpecdecError: the size cannot hold the stop ids, or a stop id is not in the vocabulary.
    """
    total = len(counts)
    if any(not 0 <= stop < total for stop in stop_ids):
        raise SpecdecError("is outside the vocabulary", field="stop_ids", value=sorted(stop_ids),
                           allowed=f"0 to {total - 1}")  # fmt: skip
    if size is None or size >= total:
        return torch.arange(total)
    if size < max(1, len(set(stop_ids))):
        raise SpecdecError("cannot hold the target's stop tokens", field="vocab.size", value=size,
                           allowed=f">= {max(1, len(set(stop_ids)))}, or null for all")  # fmt: skip
    rank = counts.clone()
    rank[torch.tensor(sorted(set(stop_ids)), dtype=torch.int64)] = torch.iinfo(torch.int64).max
    order = torch.sort(rank, descending=True, stable=True).indices
    return order[:size].sort().values


def coverage(counts: Tensor, ids: Tensor) -> float:
    """Share of the written tokens that the draft vocabulary `ids` [D] holds; 1.0 when nothing was written."""
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else 1.0


@torch.inference_mode()
def outside_mass(chunks: Iterable[Tensor], ids: Tensor) -> OutsideMass:
    """The target's probability outside the draft vocabulary `ids` [D], from its logits in chunks [..., V].

    Raises:
        SpecdecError: no position, or a NaN among the logits.
    """
    mass, wide, positions = 0.0, 0, 0
    for logits in chunks:
        rows = logits.reshape(-1, logits.shape[-1]).float()
        outside = rows.index_fill(1, ids.to(rows.device), -torch.inf)
        # The mass outside is summed itself: as one minus the mass inside, 1e-6 would be rounding noise.
        mass += float((outside.logsumexp(1) - rows.logsumexp(1)).exp().double().sum())
        wide += int((outside.amax(1) > rows.index_select(1, ids.to(rows.device)).amax(1)).sum())
        positions += len(rows)
    if not positions or mass != mass:
        raise SpecdecError("cannot be measured: no positions" if not positions else "is NaN: broken logits",
                           field="mass outside the draft vocabulary")  # fmt: skip
    return OutsideMass(mass / positions, wide / positions, positions)
