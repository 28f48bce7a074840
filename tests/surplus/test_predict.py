import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.predict import (
    depth_law,
    erfc_link,
    overlap,
    truncated,
)


def law(n: int, vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(n, vocab, generator=generator), dim=-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize(
    ("gap", "alpha"), [(0.008, 0.95), (0.032, 0.9), (0.128, 0.8), (0.297, 0.7), (0.550, 0.6), (0.910, 0.5)]
)
def test_link_has_the_table_of_theory(gap: float, alpha: float) -> None:
    assert float(erfc_link(torch.tensor(gap))) == pytest.approx(alpha, abs=2e-3)


@pytest.mark.parametrize("shift", [0.1, 0.5, 1.5])
def test_link_is_exact_for_a_gaussian_log_likelihood_ratio(shift: float) -> None:
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    p = torch.log_softmax(-(grid**2) / 2, dim=0)[None]
    q = torch.log_softmax(-((grid - shift) ** 2) / 2, dim=0)[None]
    torch.testing.assert_close(erfc_link(divergence(p, q)), overlap(p, q), atol=1e-4, rtol=0)


@given(st.integers(0, 300))
def test_truncated_vocabulary_keeps_its_lower_bound_and_exact_overlap(seed: int) -> None:
    ids = torch.tensor([1, 4, 5, 11])
    p, q = law(6, 12, seed), law(6, 4, seed + 1)
    found = truncated(p, q, ids)
    padded = torch.zeros(6, 12).index_copy_(1, ids, q.exp())
    torch.testing.assert_close(found.alpha, torch.minimum(p.exp(), padded).sum(-1))
    assert (found.alpha >= found.bound - 1e-6).all()
    assert (found.alpha <= found.coverage + 1e-6).all()
    assert (found.gap >= -1e-5).all()


def test_empty_or_massless_draft_vocabularies_are_refused() -> None:
    p = law(3, 8, 0)
    with pytest.raises(RequestError, match="draft_ids"):
        truncated(p, torch.zeros(3, 0), torch.zeros(0, dtype=torch.int64))
    p[:, 2] = -200.0
    with pytest.raises(RequestError, match="no mass"):
        truncated(p, torch.zeros(3, 1), torch.tensor([2]))


def children_mass(log_p: Tensor, log_q: Tensor, m: int) -> Tensor:
    """A_m = p-mass of the top-m of q per row, [n]: acceptance of m deterministic children."""
    picks = log_q.topk(min(m, log_q.shape[-1]), dim=-1).indices
    return log_p.gather(-1, picks).exp().sum(-1)


def sampled_survival(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    """min(1, q(x) / p(x)) of the tokens [n] that came: [n]."""
    ratio = (log_q - log_p).gather(-1, tokens[:, None])[:, 0]
    return ratio.clamp_max(0).exp()


def children_survival(log_q: Tensor, tokens: Tensor, m: int) -> Tensor:
    """1 where the token is among the top-m of q, else 0: [n]."""
    picks = log_q.topk(min(m, log_q.shape[-1]), dim=-1).indices
    return (picks == tokens[:, None]).any(-1).float()


class Chains:
    """Order-1 target and draft: every quantity of a chain is a product of small matrices."""

    def __init__(self, vocab: int = 5, depth: int = 4, paths: int = 40000) -> None:
        self.p, self.q = law(vocab, vocab, 0), law(vocab, vocab, 0) + 0.7 * law(vocab, vocab, 1)
        self.q = torch.log_softmax(self.q, dim=-1)
        generator = torch.Generator().manual_seed(2)
        tokens = [torch.randint(vocab, (paths,), generator=generator)]
        for _ in range(depth):
            tokens.append(torch.multinomial(self.p[tokens[-1]].exp(), 1, generator=generator)[:, 0])
        self.tokens, self.vocab, self.depth = tokens, vocab, depth

    def reach(self, step: Tensor) -> list[float]:
        """P(L >= j) exactly, from a uniform start: step[x, y] is the accepted mass of x -> y."""
        state, found = torch.full((self.vocab,), 1 / self.vocab), []
        for _ in range(self.depth):
            state = state @ step
            found.append(float(state.sum()))
        return found


def test_survivor_correction_gives_the_exact_chain_of_sampled_drafts() -> None:
    chain = Chains()
    before, after = chain.tokens[:-1], chain.tokens[1:]
    acceptance = torch.stack([overlap(chain.p[x], chain.q[x]) for x in before], dim=1)
    survival = torch.stack(
        [sampled_survival(chain.p[x], chain.q[x], y) for x, y in zip(before, after, strict=True)], dim=1
    )
    found = depth_law(acceptance, survival)
    exact = chain.reach(torch.minimum(chain.p, chain.q).exp())
    assert found.reach.tolist() == pytest.approx(exact, abs=0.01)
    assert found.tau == pytest.approx(1 + sum(exact), rel=0.01)
    # Conditional acceptance times reach of the depth before is the reach again.
    torch.testing.assert_close(found.alpha.cumprod(0), found.reach, atol=5e-3, rtol=0)


@pytest.mark.parametrize("m", [1, 2])
def test_survivor_correction_gives_the_exact_chain_of_deterministic_children(m: int) -> None:
    chain = Chains()
    before, after = chain.tokens[:-1], chain.tokens[1:]
    acceptance = torch.stack([children_mass(chain.p[x], chain.q[x], m) for x in before], dim=1)
    survival = torch.stack(
        [children_survival(chain.q[x], y, m) for x, y in zip(before, after, strict=True)], dim=1
    )
    children = torch.zeros(5, 5).scatter_(1, chain.q.topk(m, dim=-1).indices, 1.0)
    exact = chain.reach(chain.p.exp() * children)
    assert depth_law(acceptance, survival).reach.tolist() == pytest.approx(exact, abs=0.01)


def test_without_correction_the_chain_would_be_wrong() -> None:
    """The naive product of teacher-forced means misses what survivors have in common."""
    easy = torch.tensor([1.0, 0.0]).repeat(500)[:, None].expand(-1, 3)
    found = depth_law(easy, easy)
    assert found.tau == pytest.approx(2.5)
    mean = float(found.forced[0])
    assert 1 + sum(mean**depth for depth in (1, 2, 3)) == pytest.approx(1.875)
    assert (found.alpha - found.forced).tolist() == pytest.approx([0.0, 0.5, 0.5])
