"""The closed-form start: it finds a linear law, and a head that was started so is better than chance."""

from __future__ import annotations

import pytest
import torch
from tiny_head import HIDDEN, tiny_head
from tiny_training import TableTarget, samples

from training.build import measure
from training.features import Capture, Features
from training.losses import Loss
from training.objective import Material, Objective, Settings, folded
from training.warmstart import Moments, Sources, cold_start, solve, unit, warm_start


def test_the_regression_finds_a_linear_law_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = Moments(24 + 8, 8)
    fc = torch.randn(8, 24, generator=generator)
    token = torch.randn(8, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    for _ in range(20):
        taps, embedded = torch.randn(500, 24, generator=generator), torch.randn(500, 8, generator=generator)
        moments.inner += (x := torch.cat([taps, unit(embedded)], -1)).double().T @ x.double()
        moments.cross += (taps @ fc.T + unit(embedded) @ token.T).double().T @ x.double()
        moments.rows += 500
    found, out, value = solve(moments, 24, torch.eye(8), rank=3)
    torch.testing.assert_close(found, fc, rtol=0.02, atol=0.02)
    torch.testing.assert_close(out @ value, token, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("head_dim", [8, 32])
def test_a_solved_head_beats_a_random_one_before_any_step(head_dim: int) -> None:
    """Also where values are wider than the state, as Gemma's are."""
    target, texts = TableTarget(), samples(60)
    features = Features(texts, Capture(target, (1, 2, 3)))
    moments = measure(target, features, torch.Generator().manual_seed(0))
    assert moments.rows > 100
    ids = torch.arange(0, 50, 2)
    rows = target.matrix[ids]
    hits = {}
    for name in ("warm", "cold"):
        head, generator = tiny_head(head_dim=head_dim), torch.Generator().manual_seed(1)
        if name == "warm":
            warm_start(head, ids, moments, Sources(torch.ones(HIDDEN), rows), generator)
        else:
            cold_start(head, ids, generator)
        assert all(torch.isfinite(parameter).all() for parameter in head.parameters())
        objective = Objective(head, target.embed, rows, torch.ones(3 * HIDDEN), Settings(Loss()))
        tokens = torch.stack([torch.from_numpy(s.ids[:8]).long() for s in texts])
        every = torch.ones_like(tokens)
        material = Material(target.taps[tokens], target.final[tokens], tokens, every.float(), every.bool(),
                            torch.full((len(texts),), 8))  # fmt: skip
        with torch.no_grad():
            sums = objective(material, 1, len(texts))[1]
        hits[name] = float(sums[0, 2] / sums[0, 3])
    assert hits["warm"] > 4 * hits["cold"]


def test_folding_undoes_the_scale_of_the_moments() -> None:
    moments = Moments(2, 1)
    moments.add(torch.tensor([[3.0], [4.0]]), torch.ones(2, 1), torch.ones(2, 1))
    scale = moments.scale(1)
    torch.testing.assert_close(scale, torch.tensor([12.5**0.5]))
    state = folded({"fc.weight": torch.ones(1, 1)}, scale)
    torch.testing.assert_close(state["fc.weight"], 1 / scale[None])
