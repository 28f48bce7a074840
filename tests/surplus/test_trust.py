import pytest
import torch
from torch import Tensor

from specdec.surplus.trust import Trust, fit_trust, follow


def law(seed: int, n: int = 600, vocab: int = 9, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(n, vocab, generator=generator), dim=-1)


def crossed(log_p: Tensor, log_q: Tensor) -> float:
    return float(-(log_p.exp() * log_q).sum(-1).mean())


def spoiled(log_r: Tensor, seed: int) -> Tensor:
    """The control with noise in its logits: what a probe of a state that says nothing looks like."""
    return torch.log_softmax(log_r + law(seed, *log_r.shape), dim=-1)


def test_a_probe_that_is_right_is_followed_and_noise_is_not() -> None:
    p, r = law(0), law(1)
    assert fit_trust(r, p, p).share(r, p).min() > 0.9
    noise = spoiled(r, 2)
    assert fit_trust(r, noise, r).share(r, noise).mean() < 0.1


def test_share_differs_where_control_and_probe_are_right_in_turn() -> None:
    sure, vague = law(3, scale=6.0), law(4, scale=0.5)
    r = torch.cat([sure, vague])
    p = torch.cat([sure, law(5, scale=6.0)])  # where the control is sure it is right, elsewhere the probe is
    q = torch.cat([spoiled(sure, 6), p[600:]])
    share = fit_trust(r, q, p).share(r, q)
    assert share[:600].mean() < 0.3
    assert share[600:].mean() > 0.8
    fresh = torch.cat([law(13, scale=6.0), law(14, scale=0.5)])
    truth = torch.cat([fresh[:600], law(15, scale=6.0)])
    probe = torch.cat([spoiled(fresh[:600], 16), truth[600:]])
    followed = fit_trust(r, q, p).log_probs(fresh, probe)
    assert crossed(truth, followed) < min(crossed(truth, fresh), crossed(truth, probe)) - 0.1


def test_no_constant_share_does_better_on_the_text_it_was_fitted_on() -> None:
    p, r = law(7), law(8)
    q = torch.log_softmax(0.5 * p + 0.8 * law(9), dim=-1)
    best = min(crossed(p, follow(r, q, torch.full((600,), s / 20))) for s in range(21))
    assert crossed(p, fit_trust(r, q, p).log_probs(r, q)) < best + 1e-3


def test_whole_and_no_share_are_probe_and_control() -> None:
    r, q = law(10), law(11)
    torch.testing.assert_close(follow(r, q, torch.ones(600)), q)
    torch.testing.assert_close(follow(r, q, torch.zeros(600)), r)


@pytest.mark.parametrize("same", [True, False])
def test_equal_rows_and_a_probe_at_its_control_are_no_trouble(same: bool) -> None:
    r = law(12)[:1].expand(20, -1)
    q = r if same else law(13)[:1].expand(20, -1)
    found: Trust = fit_trust(r, q, law(14, n=20))
    assert torch.isfinite(found.log_probs(r, q)).all()
