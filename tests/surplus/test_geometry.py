import pytest
import torch
from torch import Tensor

from specdec.surplus.contract import TargetHead
from specdec.surplus.geometry import fisher_factor, forecast, spectrum


def head(norm: bool = True, temperature: float = 1.0, vocab: int = 40, width: int = 6) -> TargetHead:
    generator = torch.Generator().manual_seed(0)
    gain = 1 + 0.3 * torch.randn(width, generator=generator) if norm else None
    return TargetHead(torch.randn(vocab, width, generator=generator), gain, 1e-5, temperature)


def states(n: int = 5, width: int = 6) -> Tensor:
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(1))


def hessian_of_kl(target: TargetHead, state: Tensor) -> Tensor:
    """The metric by definition: the second derivative of KL(p_h || p_{h + v}) at v = 0."""
    log_p = target.log_probs(state[None])[0]

    def kl(v: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - target.log_probs((state + v)[None])[0])).sum()

    found: Tensor = torch.autograd.functional.hessian(kl, torch.zeros_like(state))
    return found


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_metric_is_the_hessian_of_kl(norm: bool, temperature: float) -> None:
    target = head(norm, temperature)
    rows = fisher_factor(target, states(), top=40).rows
    for state, a in zip(states(), rows, strict=True):
        torch.testing.assert_close(a.T @ a, hessian_of_kl(target, state), atol=2e-4, rtol=2e-3)


def test_radial_direction_is_null_through_the_norm() -> None:
    rows = fisher_factor(head(), states(), top=40).rows
    along = torch.einsum("nmd,nd->nm", rows, states())
    assert along.abs().max() < 1e-4 * rows.norm()


def test_trace_is_the_variance_of_output_vectors() -> None:
    target = head(norm=False)
    p = target.log_probs(states()).exp()
    square = p @ target.unembedding.square().sum(-1)
    mean = p @ target.unembedding
    found = spectrum(fisher_factor(target, states(), top=40))
    torch.testing.assert_close(found.trace, square - mean.square().sum(-1), atol=1e-4, rtol=1e-4)


def test_spectrum_is_normalised_and_equal_through_either_gram_matrix() -> None:
    target = head(vocab=6, width=6)
    few, many = fisher_factor(target, states(), top=5), fisher_factor(head(), states(), top=40)
    for factor in (few, many):
        found = spectrum(factor)
        torch.testing.assert_close(found.values.sum(-1), torch.ones(5))
        assert (found.participation <= found.effective_rank + 1e-4).all()
        assert (found.effective_rank <= 6).all()
        assert (found.anisotropy >= 1 - 1e-4).all()
    values = torch.linalg.svdvals(few.rows).square()
    torch.testing.assert_close(
        spectrum(few).values, values / values.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
    )


def test_top_m_reports_the_mass_it_kept() -> None:
    target = TargetHead(4 * head(norm=False).unembedding)
    log_p = target.log_probs(states())
    factor = fisher_factor(target, states(), top=8)
    torch.testing.assert_close(factor.mass, log_p.exp().topk(8).values.sum(-1))
    assert ((factor.mass > 0) & (factor.mass <= 1 + 1e-6)).all()
    full = fisher_factor(target, states(), top=40)
    assert (full.mass > 0.999).all()


def test_forecasts_meet_exact_values_for_small_errors() -> None:
    error = 0.01 * torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    found = forecast(head(), states(), error, top=40)
    torch.testing.assert_close(found.kl, found.exact_kl, rtol=0.05, atol=2e-7)
    torch.testing.assert_close(found.tv, found.exact_tv, rtol=0.05, atol=1e-6)


def test_share_tells_predictive_errors_from_null_ones() -> None:
    rows = fisher_factor(head(), states(), top=40).rows
    _, vectors = torch.linalg.eigh(rows.mT @ rows)
    strong = forecast(head(), states(), 0.01 * vectors[..., -1], top=40)
    weak = forecast(head(), states(), 0.01 * vectors[..., 0], top=40)
    assert (strong.share > 0).all()
    assert (weak.share < -3).all()
