import pytest
import torch

from specdec.surplus.interval import Interval
from specdec.surplus.nce import NceSettings, agreement, ranking_loss, renormalised
from specdec.surplus.probe import ProbeSettings


def law(seed: int, n: int = 6, vocab: int = 9) -> torch.Tensor:
    return torch.log_softmax(2 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_renormalised_value_is_the_difference_of_cross_entropies_whatever_the_offset() -> None:
    p, q, r = law(0), law(1), law(2)
    exact = (p.exp() * (q - r)).sum(-1)
    torch.testing.assert_close(renormalised(q - r + 5.0, p, r), exact)


def test_no_critic_beats_the_true_ratio() -> None:
    p, r = law(0), law(2)
    best = renormalised(p - r, p, r)
    torch.testing.assert_close(best, (p.exp() * (p - r)).sum(-1))
    assert (renormalised(p - r + 0.3 * law(3), p, r) < best).all()


def test_ranking_loss_prefers_the_true_ratio_and_saturates_at_log_of_negatives() -> None:
    p, r = law(0, 400), law(2, 400)
    settings = NceSettings(ProbeSettings(), negatives=7)
    losses = [
        float(ranking_loss(f, p, r, settings, torch.Generator().manual_seed(0)))
        for f in (p - r, torch.zeros_like(p), r - p)
    ]
    assert losses[0] < losses[1] < losses[2]
    assert losses[1] == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-5)


def test_ranking_loss_counts_every_positive_by_its_weight() -> None:
    p, r, f = law(0, 1, 4), law(2, 1, 4), law(3, 1, 4)
    settings, seed = NceSettings(ProbeSettings(), negatives=5), torch.Generator().manual_seed(1)
    drawn = torch.multinomial(r.exp(), 5, replacement=True, generator=torch.Generator().manual_seed(1))[0]
    each = [(f[0, [y]] - torch.cat([f[0, [y]], f[0, drawn]]).logsumexp(0)).neg() for y in range(4)]
    expected = sum(float(p[0, y].exp()) * float(loss) for y, loss in enumerate(each))
    assert float(ranking_loss(f, p, r, settings, seed)) == pytest.approx(expected, rel=1e-5)


def test_agreement_allows_three_hundredths_or_five_percent() -> None:
    def at(value: float) -> Interval:
        return Interval(value, value - 0.1, value + 0.1, 9, 9)

    assert agreement(at(0.10), at(0.129)).holds
    assert not agreement(at(0.10), at(0.14)).holds
    assert agreement(at(2.0), at(2.09)).holds
