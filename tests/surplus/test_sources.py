import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.surplus.sources import HiddenMarkov, LagCopy, mess3, permute_within, random_markov


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_lag_copy_has_the_closed_form_of_theory() -> None:
    assert LagCopy(64, 0.2).surplus == pytest.approx(2.847, abs=5e-4)
    assert LagCopy(64, 1.0).surplus == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "source", [LagCopy(8, 0.3), mess3(), random_markov(6, generator())], ids=["lag", "hmm", "markov"]
)
def test_next_token_laws_are_those_the_text_follows(source: LagCopy) -> None:
    toy = source.sample(400, 30, generator(1))
    assert toy.log_probs.exp().sum(-1) == pytest.approx(1.0, abs=1e-5)
    inside = toy.position < 29
    spent = -toy.log_probs[inside].gather(1, toy.ids.roll(-1)[inside][:, None]).mean()
    entropy = -(toy.log_probs.exp() * toy.log_probs)[inside].sum(-1).mean()
    assert float(spent) == pytest.approx(float(entropy), abs=0.02)


def test_mess3_is_symmetric_and_its_etas_fall_to_the_filtered_entropy() -> None:
    source = mess3()
    etas = [source.eta(k) for k in range(1, 9)]
    assert etas[0] == pytest.approx(math.log(3))
    assert all(b < a for a, b in pairwise(etas))
    toy = source.sample(400, 60, generator(2))
    entropy = -(toy.log_probs.exp() * toy.log_probs).sum(-1)[toy.position > 12].mean()
    assert float(entropy) == pytest.approx(source.eta(10), abs=0.004)


def random_hmm(states: int, symbols: int, generator: torch.Generator) -> HiddenMarkov:
    """A sticky random HMM."""
    logits = torch.randn(states, states, generator=generator, dtype=torch.float64)
    step = torch.softmax(logits + 3 * torch.eye(states, dtype=torch.float64), dim=-1)
    emit = torch.softmax(3 * torch.randn(states, symbols, generator=generator, dtype=torch.float64), dim=-1)
    return HiddenMarkov(step[None] * emit.T[:, None, :])


def test_eta_by_hand_for_a_markov_chain_in_edge_form() -> None:
    source = random_hmm(4, 6, generator(3))
    assert source.edges.sum((0, 2)) == pytest.approx(1.0)
    marginal = torch.einsum("i,vij->v", source.stationary, source.edges)
    assert source.eta(1) == pytest.approx(float(-(marginal * marginal.log()).sum()))


@given(st.integers(2, 60), st.integers(1, 6), st.integers(1, 8), st.integers(0, 20))
def test_permutation_has_no_fixed_point_and_is_one(n: int, symbols: int, documents: int, seed: int) -> None:
    z = torch.randint(symbols, (n, 2), generator=generator(seed))
    doc = torch.randint(documents, (n,), generator=generator(seed + 1)).sort().values
    donor = permute_within(z, doc, generator(seed))
    assert torch.equal(donor.sort().values, torch.arange(n))
    assert not (donor == torch.arange(n)).any()


def test_donors_have_equal_z_and_another_document_where_possible() -> None:
    z = torch.tensor([[0], [1]]).repeat(50, 1)
    doc = torch.arange(100) // 10
    donor = permute_within(z, doc, generator())
    assert torch.equal(z[donor], z)
    assert (doc[donor] != doc).all()


def test_a_unique_z_borrows_from_the_same_last_token() -> None:
    z = torch.tensor([[0, 5], [1, 5], [2, 6], [3, 6]])
    donor = permute_within(z, torch.zeros(4, dtype=torch.int64), generator())
    assert donor.tolist() == [1, 0, 3, 2]
