import pytest
import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.claims import (
    CellOutcomes,
    Verdict,
    at_least,
    at_most,
    attainable,
    cell_fit,
    claim_f1,
    claim_f2,
    claim_f3,
    claim_f4,
    claim_f5,
    require_disjoint,
)
from specdec.surplus.interval import Interval, resamples


def interval(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half, 100, 20)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("value", "half", "verdict"),
    [(0.9, 0.05, Verdict.HOLDS), (0.82, 0.05, Verdict.UNDECIDED), (0.6, 0.05, Verdict.FAILS)],
)
def test_verdict_asks_the_whole_interval(value: float, half: float, verdict: Verdict) -> None:
    assert at_least("x", interval(value, half), 0.8).verdict is verdict
    assert at_most("x", interval(-value, half), -0.8).verdict is verdict


def f1(direct: float) -> tuple[Verdict, Verdict]:
    doc = torch.arange(60).repeat_interleave(30)
    entropy, own = normal(1800, seed=0), normal(1800, seed=1)
    gap = entropy + own
    acceptance = -entropy - direct * own + 0.3 * normal(1800, seed=2)
    given = torch.stack([entropy, -entropy + 0.2 * normal(1800, seed=3)], dim=1)
    raw, partial = claim_f1(gap, acceptance, given, doc, draws=60)
    return raw.verdict, partial.verdict


def test_f1_partial_fails_when_entropy_explains_everything() -> None:
    assert f1(direct=1.0) == (Verdict.HOLDS, Verdict.HOLDS)
    assert f1(direct=0.0) == (Verdict.HOLDS, Verdict.FAILS)


def outcomes(cells: int = 48, documents: int = 40, each: int = 10) -> tuple[Tensor, CellOutcomes]:
    truth = torch.linspace(0.3, 0.9, cells)
    doc = (100 + torch.arange(documents)).repeat_interleave(cells * each)
    cell = torch.arange(cells).repeat_interleave(each).repeat(documents)
    accepted = torch.bernoulli(truth[cell], generator=torch.Generator().manual_seed(0))
    return truth, CellOutcomes(cell, doc, accepted, cells)


def test_cells_are_means_of_their_rows() -> None:
    _, found = outcomes()
    assert float(found.measured()[7]) == pytest.approx(float(found.acceptance[found.cell == 7].mean()))


def test_f2_accepts_a_true_prediction_and_beats_a_constant() -> None:
    truth, measured = outcomes()
    constant = torch.full_like(truth, 0.6)
    first, second = claim_f2("F2a", truth, measured, torch.arange(30), {"constant": constant})
    assert (first.verdict, second.verdict) == (Verdict.HOLDS, Verdict.HOLDS)
    assert first.impressive
    fit = cell_fit(truth, measured)
    assert fit.slope.value == pytest.approx(1.0, abs=0.05)
    assert fit.error.value < 0.03


def test_what_exact_predictions_would_reach_is_what_they_reach() -> None:
    truth, measured = outcomes()
    reached = cell_fit(truth, measured).r_squared.value
    assert attainable(measured) == pytest.approx(reached, abs=0.03)
    assert attainable(measured) < 1


def test_f2_rejects_a_wrong_prediction_and_a_better_baseline() -> None:
    truth, measured = outcomes()
    first, second = claim_f2("F2a", truth.flip(0), measured, torch.arange(30), {"oracle": truth})
    assert (first.verdict, second.verdict) == (Verdict.FAILS, Verdict.FAILS)


def test_f2_refuses_shared_documents_and_too_few_cells() -> None:
    truth, measured = outcomes()
    with pytest.raises(RequestError, match="1 shared"):
        claim_f2("F2a", truth, measured, torch.tensor([5, 139]), {})
    few, some = outcomes(cells=12)
    with pytest.raises(RequestError, match="40 are needed"):
        claim_f2("F2a", few, some, torch.arange(5), {})
    require_disjoint(torch.arange(5), torch.arange(5, 9))


def test_f3_wants_small_gaps_to_mean_long_accepted_lengths() -> None:
    gaps = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    copies = gaps + 0.001 * normal(50, 6, seed=0)
    good = claim_f3(torch.cat([gaps[None], copies]), torch.cat([5 - gaps[None], 5 - copies]))
    bad = claim_f3(torch.cat([gaps[None], copies]), torch.cat([gaps[None], copies]))
    assert (good.value, good.verdict, good.impressive) == (1.0, Verdict.HOLDS, True)
    assert bad.verdict is Verdict.FAILS
    with pytest.raises(RequestError, match="6 tap sets"):
        claim_f3(copies[:, :5], copies[:, :5])


@pytest.mark.parametrize(
    ("predicted", "verdict", "impressive"),
    [
        (3.0, Verdict.HOLDS, True),
        (3.2, Verdict.HOLDS, False),
        (3.3, Verdict.UNDECIDED, False),
        (4.0, Verdict.FAILS, False),
    ],
)
def test_f4_is_a_relative_error(predicted: float, verdict: Verdict, impressive: bool) -> None:
    claim = claim_f4("chain", interval(predicted, 0.001), interval(3.0, 0.05), impressive=0.03)
    assert claim.value == pytest.approx(abs(predicted / 3 - 1))
    assert (claim.verdict, claim.impressive) == (verdict, impressive)


def test_f4_counts_the_documents_of_both_sides() -> None:
    """Exact forecasts: the error's interval reaches 0 in 95% of worlds, not in the 78% that one side alone gives."""
    torch.manual_seed(0)

    def tau(documents: int) -> Interval:
        rounds = torch.full((documents,), 50.0)
        won = torch.binomial(rounds, torch.distributions.Beta(3, 5).sample((documents,)))
        return resamples(torch.arange(documents), draws=200).ratio(rounds + won, rounds)

    worlds = [claim_f4("chain", tau(45), tau(60), impressive=0.03).interval.low == 0 for _ in range(200)]
    assert 0.90 <= sum(worlds) / len(worlds) <= 0.99
    certain = claim_f4("chain", interval(3.2, 0.05), interval(3.0, 0.05), impressive=0.03).interval
    assert (certain.low, certain.high) == pytest.approx((0.042, 0.092), abs=0.002)


def test_f5_needs_the_sign_at_every_depth() -> None:
    good = claim_f5([interval(0.3, 0.1), interval(0.5, 0.1)], [0.001, 0.002], [0.2, 0.3])
    assert (good.verdict, good.impressive, good.value) == (Verdict.HOLDS, True, 0.3)
    assert claim_f5([interval(0.3, 0.1), interval(-0.5, 0.1)], [0.0, 0.0], [1, 1]).verdict is Verdict.FAILS
    assert claim_f5([interval(0.05, 0.1)], [0.1], [0.2]).verdict is Verdict.UNDECIDED
