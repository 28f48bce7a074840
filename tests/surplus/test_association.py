import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.surplus.association import (
    affine_left_out,
    auroc,
    kendall,
    mean_absolute_error,
    partial_spearman,
    pearson,
    r_squared,
    ranks,
    slope,
    spearman,
)


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_ranks_share_ties() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=20))
def test_ranks_are_a_permutations_sum_and_order(values: list[int]) -> None:
    x = torch.tensor(values).double()
    found = ranks(x)
    assert float(found.sum()) == pytest.approx(len(values) * (len(values) - 1) / 2)
    assert ((x[:, None] < x) == (found[:, None] < found)).all()


def test_spearman_sees_order_only() -> None:
    x = normal(200, 0)
    assert spearman(x, x.exp()) == pytest.approx(1.0)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0)
    assert abs(spearman(x, normal(200, 1))) < 0.2
    assert math.isnan(spearman(x, torch.ones(200)))


def test_known_gaussian_rank_correlation() -> None:
    x = normal(50000, 0)
    y = 0.6 * x + 0.8 * normal(50000, 1)
    assert pearson(x, y) == pytest.approx(0.6, abs=0.01)
    assert spearman(x, y) == pytest.approx(6 / math.pi * math.asin(0.3), abs=0.01)


def test_partial_correlation_removes_a_common_cause_and_keeps_a_direct_one() -> None:
    cause = normal(20000, 0)
    x, y = cause + normal(20000, 1), cause + normal(20000, 2)
    assert spearman(x, y) > 0.4
    assert partial_spearman(x, y, cause[:, None]) == pytest.approx(0.0, abs=0.03)
    assert partial_spearman(x, y + x, cause[:, None]) > 0.5
    assert math.isnan(partial_spearman(x, cause, cause[:, None]))


def test_kendall_by_hand_with_a_tie() -> None:
    assert kendall(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(1 / 3)
    tied = kendall(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert tied == pytest.approx(2 / math.sqrt(2 * 3))


def test_fit_statistics_fit_nothing() -> None:
    x = torch.tensor([0.1, 0.5, 0.9])
    assert (r_squared(x, x), slope(x, x), mean_absolute_error(x, x)) == pytest.approx((1.0, 1.0, 0.0))
    assert slope(x, 2 * x + 3) == pytest.approx(2.0)
    assert r_squared(2 * x + 3, x) < 0
    assert mean_absolute_error(x + 0.2, x) == pytest.approx(0.2)


def test_auroc_of_perfect_random_and_tied_scores() -> None:
    event = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), event) == 1.0
    assert auroc(torch.tensor([0.4, 0.3, 0.2, 0.1]), event) == 0.0
    assert auroc(torch.ones(4), event) == 0.5
    assert math.isnan(auroc(torch.ones(4), torch.ones(4)))


def test_left_out_affine_fit_never_sees_its_own_group() -> None:
    x, group = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])
    y = torch.tensor([0.0, 1.0, 20.0, 30.0])
    found = affine_left_out(x, y, group)
    assert found.tolist() == pytest.approx([0.0, 10.0, 2.0, 3.0])
