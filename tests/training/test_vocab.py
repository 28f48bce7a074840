"""The draft vocabulary by hand-counted examples, and the mass outside it against the plain formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.errors import SpecdecError
from training.data import Sample
from training.vocab import count_tokens, coverage, draft_vocab, outside_mass


def sample(ids: list[int], mask: list[int]) -> Sample:
    return Sample("s", np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_))


def test_only_what_the_assistant_wrote_counts() -> None:
    counts = count_tokens([sample([1, 2, 2, 3], [0, 1, 1, 1]), sample([3, 0], [1, 0])], 5)
    assert counts.tolist() == [0, 0, 2, 2, 0] and counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "mask"), [([5], [1]), ([-1], [1]), ([5, 1], [0, 1]), ([1, -1, 1], [1, 0, 1])]
)
def test_ids_of_another_vocabulary_are_refused(ids: list[int], mask: list[int]) -> None:
    with pytest.raises(SpecdecError, match="another target"):
        count_tokens([sample(ids, mask)], 5)


def test_frequency_ties_by_id_stop_ids_always_rising() -> None:
    counts = torch.tensor([5, 0, 7, 7, 1])
    assert draft_vocab(counts, 3, stop_ids=[1]).tolist() == [1, 2, 3]
    assert draft_vocab(counts, 1).tolist() == [2]
    assert draft_vocab(torch.tensor([0, 0, 9, 0]), 3).tolist() == [0, 1, 2]
    assert draft_vocab(counts, None, [1]).tolist() == draft_vocab(counts, 99).tolist() == [0, 1, 2, 3, 4]


def test_sizes_and_stops_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecdecError, match=r"vocab\.size"):
        draft_vocab(torch.tensor([1, 1, 1]), 1, [0, 1])
    with pytest.raises(SpecdecError, match="stop_ids"):
        draft_vocab(torch.tensor([1, 1, 1]), 2, [3])


def test_coverage() -> None:
    counts = torch.tensor([5, 0, 7, 7, 1])
    assert coverage(counts, torch.tensor([2, 3])) == 0.7
    assert coverage(torch.zeros(3, dtype=torch.int64), torch.tensor([0])) == 1.0


def test_outside_mass_is_one_minus_the_mass_inside_however_it_is_chunked() -> None:
    logits = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.arange(0, 50, 3)
    whole = outside_mass([logits], ids)
    parts = outside_mass([logits.reshape(14, 50)[:5], logits.reshape(14, 50)[5:]], ids)
    probs = logits.double().softmax(-1)
    assert whole.mass == pytest.approx(float(1 - probs[..., ids].sum(-1).mean()), abs=1e-6)
    assert whole.argmax == pytest.approx(float((logits.argmax(-1) % 3 != 0).double().mean()))
    assert parts.mass == pytest.approx(whole.mass) and parts.positions == whole.positions == 14


def test_tiny_masses_survive_and_the_full_vocabulary_loses_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -13.0]])
    assert outside_mass([logits], torch.tensor([0, 1])).mass == pytest.approx(np.exp(-13) / 2, rel=1e-3)
    assert outside_mass([logits], torch.arange(3)).mass == 0


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(SpecdecError, match="no positions"):
        outside_mass([], torch.tensor([0]))
    with pytest.raises(SpecdecError, match="NaN"):
        outside_mass([torch.full((1, 3), torch.nan)], torch.tensor([0]))
