from dataclasses import replace

import pytest
import torch

from specdec.errors import RequestError
from specdec.surplus.draft import RANKS, DraftRows
from specdec.surplus.estimate import TOPS, Estimate, Scores
from specdec.surplus.forecasts import (
    Aligned,
    align,
    cell_forecasts,
    probe_forecasts,
)
from specdec.surplus.outcome import CellKey
from specdec.surplus.recorder import TreeShape

ROWS, DEPTHS = 400, 3
CHAIN = TreeShape((0, 0, 1, 2), (0, 0, 0, 0))
BUSH = TreeShape((0, 0, 0, 1), (0, 0, 1, 0))


def scores(first: float, gap: float = 0.1) -> Scores:
    """Rows whose likeliest draft has mass `first`, the next half of the rest."""
    top = torch.full((ROWS, len(TOPS)), first)
    top[:, 1:] = first + (1 - first) / 2
    flat = torch.full((ROWS,), gap)
    at = torch.arange(ROWS)
    return Scores(at, at // 20, flat, flat, flat + 0.5, flat, flat, flat, top, top)


def depth(k: int, first: float, seed: int) -> DraftRows:
    """The text's token is the head's best with probability `first`, independently."""
    generator = torch.Generator().manual_seed(seed)
    rank = (torch.rand(ROWS, generator=generator) >= first).long() * 3
    masses = torch.zeros(ROWS, RANKS)
    masses[:, 0], masses[:, 1] = first, (1 - first) / 2
    law = (torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    return DraftRows(
        k, scores(first), torch.zeros(ROWS), torch.ones(ROWS), torch.zeros(ROWS), rank, masses, law, law
    )


def aligned() -> Aligned:
    domain = torch.arange(ROWS) % 2
    return align({k: depth(k, 0.8, k) for k in range(2, 2 + DEPTHS)}, domain)


def test_a_chain_of_independent_depths_is_geometric() -> None:
    expected = pytest.approx(1 + 0.8 + 0.64 + 0.512, rel=0.05)
    assert 1 + float(aligned().law().reach.sum()) == expected
    assert aligned().rounds("chain", ()).tau == expected
    assert aligned().rounds("tree", [CHAIN]).tau == expected


def test_a_tree_counts_every_branch() -> None:
    found = aligned().rounds("tree", [BUSH])
    assert found.tau == pytest.approx(1 + 0.8 + 0.1 + 0.64, rel=0.05)
    assert found.alpha[:2].tolist() == pytest.approx([0.9, 0.8], abs=1e-6)
    assert bool(found.alpha[2].isnan())  # no shape drafts there
    both = aligned().rounds("tree", [BUSH, CHAIN])
    assert float(both.alpha[0]) == pytest.approx((0.9 + 0.8) / 2)
    assert float(both.alpha[1]) == pytest.approx(0.8)


def test_cells_follow_shape_and_depth() -> None:
    keys = [CellKey("chain", 0, 1), CellKey("tree", 1, 1), CellKey("sampled chain", 0, 2)]
    told = cell_forecasts(aligned(), keys, [BUSH])
    assert told.ours[:2].tolist() == pytest.approx([0.8, 0.9], rel=1e-6)
    assert float(told.ours[2]) == pytest.approx(1.0)  # q = p along the text: every sampled draft survives


def test_a_domain_without_text_has_no_forecast() -> None:
    keys = [CellKey("chain", 0, 1), CellKey("chain", 7, 1)]
    assert cell_forecasts(aligned(), keys, [BUSH]).ours.isnan().tolist() == [False, True]
    estimates = {2: Estimate(2, scores(0.4), {"n-gram": 1.0}, 0.0)}
    found, scale = probe_forecasts(estimates, aligned(), torch.arange(ROWS) % 2, keys, [BUSH])
    assert scale == pytest.approx(2.0, rel=1e-6)
    assert found.isnan().tolist() == [False, True]


def test_the_probe_gets_one_scale() -> None:
    keys = [CellKey("chain", 0, 1), CellKey("chain", 1, 2), CellKey("chain", 0, 3)]
    estimates = {k: Estimate(k, scores(0.4), {"n-gram": 1.0}, 0.0) for k in (2, 3)}
    found, scale = probe_forecasts(estimates, aligned(), torch.arange(ROWS) % 2, keys, [BUSH])
    assert scale == pytest.approx(2.0, rel=1e-6)
    assert found[:2].tolist() == pytest.approx([0.8, 0.8], rel=1e-6)
    assert bool(found[2].isnan())  # the probe has no k = 4


def test_text_too_short_for_the_deepest_draft() -> None:
    short = replace(depth(2, 0.8, 0), log_ratio=torch.full((ROWS,), float("nan")))
    with pytest.raises(RequestError, match="no text is long enough"):
        align({2: short}, torch.zeros(ROWS, dtype=torch.int64))
