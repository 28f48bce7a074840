from dataclasses import replace

import pytest
import torch

from specdec.errors import RequestError
from specdec.surplus.cells import bin_names, make_cell, slice_cells
from specdec.surplus.contract import Contexts
from specdec.surplus.controls import probe_data, toy_settings
from specdec.surplus.curve import fit_power_law, learning_curve
from specdec.surplus.estimate import TOPS, Estimate, EstimateSettings, Scores, cross_fit, score
from specdec.surplus.sources import mess3


def scores(n: int = 400, vocab: int = 12, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.log_softmax(2 * torch.randn(n, vocab, generator=generator), dim=-1)
    log_q = torch.log_softmax(log_p + 0.5 * torch.randn(n, vocab, generator=generator), dim=-1)
    where = Contexts(2, torch.arange(n), torch.zeros(n, 1, dtype=torch.int64))
    control = -(log_p.exp() * torch.full((vocab,), 1 / vocab).log()).sum(-1)
    return score(where, torch.arange(n) // 20, log_p, log_q, control)


def test_ceiling_does_not_depend_on_the_probe_and_bounds_hold_by_row() -> None:
    rows = scores()
    ceiling = torch.tensor(12.0).log() - rows.entropy
    torch.testing.assert_close(rows.surplus + rows.gap, ceiling)
    assert (rows.gap >= -1e-6).all()
    assert (rows.alpha >= 1 - (rows.gap / 2).clamp_min(0).sqrt() - 1e-6).all()  # Pinsker
    assert (rows.top <= rows.ideal + 1e-6).all()
    assert (rows.top.diff(dim=1) >= -1e-6).all()


def test_a_perfect_draft_has_no_gap_and_full_acceptance() -> None:
    log_p = torch.log_softmax(torch.randn(5, 4), dim=-1)
    where = Contexts(2, torch.arange(5), torch.zeros(5, 1, dtype=torch.int64))
    rows = score(where, torch.arange(5), log_p, log_p, torch.ones(5))
    torch.testing.assert_close(rows.gap, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.alpha, torch.ones(5))
    assert rows.top.shape == (5, len(TOPS))
    torch.testing.assert_close(rows.top[:, -1], torch.ones(5))


def test_cell_reports_ratio_of_means_and_widens_by_seeds() -> None:
    rows = scores()
    calm = make_cell(Estimate(2, rows, {"a": 1.0, "b": 1.2}, 0.0), {"depth": "2"}, draws=200)
    loud = make_cell(Estimate(2, rows, {"a": 1.0, "b": 1.2}, 0.1), {"depth": "2"}, draws=200)
    assert calm.captured.value == pytest.approx(calm.surplus.value / calm.ceiling.value)
    assert calm.ceiling.value == pytest.approx(calm.surplus.value + calm.gap.value)
    assert loud.gap.high - loud.gap.low > calm.gap.high - calm.gap.low
    assert calm.control_spread == pytest.approx(0.2)
    assert calm.gap.documents == 20


def test_slices_partition_rows_and_thin_cells_are_listed() -> None:
    rows = scores()
    estimate = Estimate(2, rows, {"a": 1.0}, 0.0)
    domain = ["math" if doc < 12 else "chat" for doc in rows.doc.tolist()]
    table = slice_cells(estimate, {"taps": "1"}, {"domain": domain}, draws=50)
    assert [cell.key for cell in table.cells] == [
        {"taps": "1", "domain": "chat"},
        {"taps": "1", "domain": "math"},
    ]
    assert sum(cell.gap.n for cell in table.cells) == 400
    rare = ["rare" if doc < 3 else "common" for doc in rows.doc.tolist()]
    assert [key["domain"] for key in slice_cells(estimate, {}, {"domain": rare}, draws=50).thin] == ["rare"]


def test_bins_are_named_with_their_edges() -> None:
    assert bin_names(torch.tensor([3, 64, 300]), (64, 256), "tokens") == [
        "< 64 tokens",
        "64 to 256 tokens",
        ">= 256 tokens",
    ]


def tiny(**changes: object) -> EstimateSettings:
    settings = toy_settings(2, rotations=2)
    probe = replace(settings.probe, epochs=6, width=32)
    return replace(settings, probe=probe, depths=(2, 3), **changes)


def test_cross_fit_scores_each_tested_context_once_with_its_bank() -> None:
    toy = mess3(0.9, 0.02).sample(40, 40, torch.Generator().manual_seed(0))
    found = cross_fit(probe_data(toy), toy.position, tiny(seeds=2, shuffled=True))
    assert set(found) == {2, 3}
    for estimate in found.values():
        assert set(estimate.bank) == {"n-gram", "neural table", "h permuted"}
        assert estimate.scores.at.unique().numel() == estimate.scores.at.numel()
        assert estimate.scores.doc.unique().numel() == 16
        assert estimate.seed_spread > 0
    assert found[2].scores.surplus.mean() > 0.05
    assert found[2].scores.surplus.mean() > found[3].scores.surplus.mean()


def test_cross_fit_refuses_one_document() -> None:
    toy = mess3().sample(1, 200, torch.Generator().manual_seed(0))
    with pytest.raises(RequestError, match="20 are needed"):
        cross_fit(probe_data(toy), toy.position, tiny())


def test_learning_curve_grows_its_training_text_and_keeps_its_test() -> None:
    toy = mess3(0.9, 0.02).sample(40, 30, torch.Generator().manual_seed(0))
    points = learning_curve(
        probe_data(toy), toy.position, replace(tiny(), depths=(2,)), fractions=(0.25, 1.0)
    )[2]
    assert points[0].contexts * 4 == points[1].contexts
    assert points[0].gap.n == points[1].gap.n
    assert points[1].gap.value < points[0].gap.value + 0.01


@pytest.mark.parametrize(("limit", "scale", "exponent"), [(0.3, 2.0, 0.5), (0.0, 4.0, 0.3), (0.1, 9.0, 1.0)])
def test_power_law_is_recovered(limit: float, scale: float, exponent: float) -> None:
    sizes = [1e3, 2e3, 4e3, 8e3]
    law = fit_power_law(sizes, [limit + scale * n**-exponent for n in sizes])
    assert (law.limit, law.scale, law.exponent) == pytest.approx((limit, scale, exponent), rel=1e-6, abs=1e-6)
    assert law.at(1e9) == pytest.approx(limit, abs=0.01)


def test_a_rising_curve_has_no_limit_below_its_mean_and_two_sizes_are_refused() -> None:
    assert fit_power_law([1, 2, 3], [0.1, 0.2, 0.3]).scale == 0
    with pytest.raises(RequestError, match="three sizes"):
        fit_power_law([1, 2], [0.1, 0.2])
