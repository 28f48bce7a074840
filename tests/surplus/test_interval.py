import pytest
import torch

from specdec.errors import RequestError
from specdec.surplus.interval import Interval, bootstrap, resamples


def test_rows_of_one_document_do_not_narrow_the_interval() -> None:
    level = torch.randn(20, generator=torch.Generator().manual_seed(0))
    once = resamples(torch.arange(20)).mean(level)
    copied = resamples(torch.arange(20).repeat_interleave(50)).mean(level.repeat_interleave(50))
    assert copied.n == 1000
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=1e-6)


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(100):
        found = resamples(torch.arange(60), draws=200).mean(torch.randn(60, generator=generator))
        covered += found.low <= 0 <= found.high
    assert 86 <= covered <= 99


def test_ratio_is_of_means_and_paired() -> None:
    below = torch.rand(30, generator=torch.Generator().manual_seed(2)) + 0.5
    found = resamples(torch.arange(30)).ratio(below / 2, below)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_general_bootstrap_agrees_with_the_weighted_one() -> None:
    doc = torch.arange(12).repeat_interleave(torch.arange(1, 13))
    values = torch.randn(doc.numel(), generator=torch.Generator().manual_seed(3))
    fast = resamples(doc, draws=300, seed=4).mean(values)
    slow = bootstrap(doc, lambda rows: float(values[rows].double().mean()), draws=300, seed=4)
    assert (slow.value, slow.low, slow.high) == pytest.approx((fast.value, fast.low, fast.high))


def test_too_few_documents_are_refused_with_the_number_needed() -> None:
    with pytest.raises(RequestError, match="8 are needed"):
        resamples(torch.zeros(1000, dtype=torch.int64))


def test_widening_adds_in_quadrature() -> None:
    found = Interval(1.0, 1.0 - 3.0, 1.0 + 3.0, 10, 10).widen(4.0 / 1.96)
    assert (found.low, found.high) == pytest.approx((-4.0, 6.0))
