"""The place of the largest entry against torch's own, ties and what is no number included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.native.largest import MOST, can_find, places, top
from specdec.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

DTYPES = [torch.float32, torch.bfloat16]
values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.5, math.inf, -math.inf])


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=st.lists(values, min_size=1, max_size=70))
def test_the_first_of_equals(dtype: torch.dtype, row: list[float]) -> None:
    x = torch.tensor([row, row[::-1]], dtype=dtype)
    assert places(x).tolist() == [int((one == one.max()).nonzero()[0]) for one in x]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 1023, 1024, 1025, 5000])
def test_every_place_of_a_row(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    for place in {0, width // 2, width - 1}:
        x[1, 1, place] = 9.0
        assert places(x)[1, 1] == place
        x[1, 1, place] = 0.0
    assert torch.equal(x.gather(-1, places(x)[..., None])[..., 0], x.amax(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 700, 1023, 1024, 4999])
def test_what_is_not_a_number_is_largest(dtype: torch.dtype, place: int) -> None:
    x = torch.zeros(2, 5000, dtype=dtype)
    x[0, 4000], x[1, place] = math.inf, math.nan
    assert places(x).tolist() == [4000, place]


def test_takes_whole_rows_only() -> None:
    x = torch.zeros(4, 8)
    assert can_find(x) and not can_find(x.t()) and not can_find(x[:0]) and not can_find(x.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "count"), [(1, 1), (7, 7), (40, 10), (8192, 10), (8193, MOST)])
def test_top_equals_torch(dtype: torch.dtype, width: int, count: int) -> None:
    x = (4 * torch.randn(3, 2, width, generator=torch.Generator().manual_seed(width))).to(dtype)
    values, found = top(x, count)
    wanted = x.float().log_softmax(-1)
    torch.testing.assert_close(values, wanted.topk(count).values, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(values, wanted.gather(-1, found), atol=2e-6, rtol=2e-6)
    assert all(len(set(row)) == count for row in found.flatten(0, 1).tolist())


@given(row=st.lists(st.sampled_from([0.0, 1.0, 2.0, -math.inf]), min_size=1, max_size=70), data=st.data())
def test_top_takes_the_first_of_equals(row: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(len(row), MOST)))
    found = top(torch.tensor([row, row]), count)[1]
    assert found.tolist() == [sorted(range(len(row)), key=lambda i: -row[i])[:count]] * 2


def test_top_of_what_is_no_number_is_none() -> None:
    x = torch.zeros(2, 50)
    x[0, 30] = math.nan
    values, found = top(x, 4)
    assert values[0].isnan().all() and not values[1].isnan().any()
    assert (found >= 0).all() and (found < 50).all()
