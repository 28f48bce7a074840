"""Windows keep every token and every loss once; batches keep every sample once, within bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import SpecdecError
from training.chunks import BatchRule, collate, plan_epoch, split_windows
from training.data import Sample, Skipped


def sample(length: int, id: str = "s", masked: bool = True) -> Sample:
    return Sample(id, np.arange(length, dtype=np.int32), np.full(length, masked))


def test_the_docstrings_example() -> None:
    first, second = split_windows([sample(7)], 4)
    assert (first.ids.tolist(), second.ids.tolist()) == ([0, 1, 2, 3], [4, 5, 6])
    assert [(w.id, w.window) for w in (first, second)] == [("s", 0), ("s", 1)]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 60), max_length=st.integers(2, 20))
def test_every_token_bears_its_loss_exactly_once(length: int, max_length: int) -> None:
    windows = list(split_windows([sample(length)], max_length))
    assert np.concatenate([w.ids[w.loss_mask] for w in windows]).tolist() == list(range(length))
    assert all(len(w) <= max_length for w in windows)
    assert [w.window for w in windows] == list(range(len(windows)))


def test_windows_without_loss_are_counted_not_kept() -> None:
    mask = np.array([False] * 5 + [True])
    skipped = Skipped()
    (window,) = split_windows([Sample("s", np.arange(6, dtype=np.int32), mask)], 4, skipped=skipped)
    assert window.ids.tolist() == [4, 5] and skipped.reasons == {"window without assistant tokens": 1}


def test_windows_without_room_are_refused() -> None:
    with pytest.raises(SpecdecError, match="max_length"):
        list(split_windows([sample(3)], 1))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    tokens=st.integers(40, 200),
    epoch=st.integers(0, 3),
)
def test_a_plan_holds_every_sample_once_within_bounds(lengths: list[int], tokens: int, epoch: int) -> None:
    plan = plan_epoch(lengths, BatchRule(tokens, seed=1), epoch)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert max(max(lengths[i] for i in batch) * len(batch) for batch in plan) <= tokens


def test_bucketing_pads_little_and_the_order_is_by_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, size=2000)
    rule = BatchRule(4096, seed=3)
    plan = plan_epoch(lengths, rule, 0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in plan)
    assert sum(lengths) > 0.95 * padded
    assert plan == plan_epoch(lengths, rule, 0)
    assert plan != plan_epoch(lengths, rule, 1)
    assert plan != plan_epoch(lengths, BatchRule(4096, seed=4), 0)
    firsts = [lengths[batch[0]] for batch in plan]
    assert firsts != sorted(firsts), "batches come in mixed lengths, not in a ramp"


def test_padding_carries_no_loss() -> None:
    batch = collate([sample(3), sample(9), sample(5)], (2, 0))
    assert batch.ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch.loss_mask.sum(1).tolist() == batch.lengths.tolist() == [5, 3]


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(SpecdecError, match="nothing to batch"):
        plan_epoch([], BatchRule(8), 0)
    with pytest.raises(SpecdecError, match=r"trainer\.batch_tokens"):
        plan_epoch([9], BatchRule(8), 0)
