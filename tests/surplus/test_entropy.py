import math
from itertools import pairwise

import pytest
import torch

from specdec.errors import RequestError
from specdec.surplus.entropy import (
    best_temperature,
    calibrate,
    calibration_error,
    crossing,
    gini_simpson,
    heated,
    renyi,
    shannon,
)


def law(n: int = 50, vocab: int = 20, seed: int = 0, sharp: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(sharp * torch.randn(n, vocab, generator=generator), dim=-1)


def test_entropies_of_uniform_and_certain_laws() -> None:
    uniform, certain = torch.full((1, 8), -math.log(8)), torch.tensor([[0.0] + [-math.inf] * 7])
    for order in (0.0, 0.5, 1.0, 2.0):
        assert float(renyi(uniform, order)) == pytest.approx(math.log(8), rel=1e-5)
    assert float(gini_simpson(uniform)) == pytest.approx(7 / 8)
    assert float(shannon(certain)) == float(gini_simpson(certain)) == 0.0


def test_renyi_falls_with_its_order_and_meets_shannon_and_collision() -> None:
    log_p = law()
    orders = [renyi(log_p, order) for order in (0.5, 0.999, 1.0, 1.001, 2.0)]
    assert all((b <= a + 1e-5).all() for a, b in pairwise(orders))
    torch.testing.assert_close(orders[1], orders[2], atol=5e-3, rtol=0)
    torch.testing.assert_close(orders[4], -(1 - gini_simpson(log_p)).log())
    with pytest.raises(RequestError, match="order"):
        renyi(log_p, -1)


def test_cross_entropy_splits_exactly() -> None:
    p, q = law(seed=1), law(seed=2)
    parts = crossing(p, q)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(parts.divergence, kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.cross, parts.entropy + parts.divergence)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_applied_is_found(temperature: float) -> None:
    p = law(400)
    assert best_temperature(p, heated(p, 1 / temperature)) == pytest.approx(temperature, rel=0.01)


def test_calibration_error_is_zero_for_honest_confidence_and_the_shift_otherwise() -> None:
    stated = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 0.8
    assert calibration_error(stated, stated) == pytest.approx(0.0)
    assert calibration_error(stated, stated + 0.1) == pytest.approx(0.1, abs=1e-4)


def test_entropy_excess_of_a_calibrated_coarse_draft_is_its_divergence() -> None:
    """q = E[p | inputs]: the difference of entropies is the information loss."""
    p = law(2000, 6, seed=3)
    coarse = p.exp().view(500, 4, 6).mean(1, keepdim=True).expand(-1, 4, -1).reshape(2000, 6)
    found = calibrate(p, coarse.log())
    assert found.excess == pytest.approx(found.divergence, abs=1e-4)
    assert found.temperature == pytest.approx(1.0, abs=0.05)
    assert abs(found.residual) < 0.05 * found.divergence_fixed


def test_an_overconfident_draft_breaks_the_sign_and_temperature_repairs_it() -> None:
    p = law(2000, 6, seed=3)
    coarse = p.exp().view(500, 4, 6).mean(1, keepdim=True).expand(-1, 4, -1).reshape(2000, 6)
    loud = calibrate(p, heated(coarse.log(), 0.25), half=torch.arange(2000) % 8 < 4)
    assert loud.excess < 0
    assert loud.error > 0.1
    assert loud.temperature == pytest.approx(4.0, rel=0.1)
    assert loud.divergence_fixed < loud.divergence
    assert abs(loud.residual) < 0.15 * loud.divergence_fixed


def test_no_half_is_tempered_by_what_suits_itself() -> None:
    p, half = law(400), torch.arange(400) < 200
    q = torch.where(half[:, None], heated(p, 0.5), heated(p, 2.0))
    crossed, plain = calibrate(p, q, half=half), calibrate(p, q)
    assert crossed.temperature == plain.temperature
    assert crossed.divergence_fixed > crossed.divergence  # what suits one half is wrong for the other
    assert plain.divergence_fixed <= plain.divergence
