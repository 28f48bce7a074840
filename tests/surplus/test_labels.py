import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.errors import RequestError
from specdec.surplus.contract import TargetHead
from specdec.surplus.labels import HeadLabels, Lumping, tabulate


def laws(n: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(3 * torch.randn(n, vocab, generator=generator), dim=-1)


def test_lumped_law_keeps_the_kept_and_sums_the_rest() -> None:
    full = laws(5, 9, 0)
    lumped = Lumping(torch.tensor([4, 1]), 9).log_probs(full).exp()
    assert torch.allclose(lumped[:, :2], full.exp()[:, [4, 1]])
    torch.testing.assert_close(lumped.sum(-1), torch.ones(5))


@given(st.integers(0, 100), st.integers(1, 11))
def test_lumping_never_adds_information(seed: int, keep: int) -> None:
    lumping = Lumping(torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:keep], 12)
    p, q = laws(6, 12, seed), laws(6, 12, seed + 1)
    coarse_p, coarse_q = lumping.log_probs(p), lumping.log_probs(q)
    lost = (p.exp() * (p - q)).sum(-1) - (coarse_p.exp() * (coarse_p - coarse_q)).sum(-1)
    assert (lost > -1e-5).all()


def test_symbols_and_unembedding_match_the_columns() -> None:
    lumping = Lumping(torch.tensor([2, 0]), 4)
    assert lumping.symbols(torch.tensor([[0, 1], [2, 3]])).tolist() == [[1, 2], [0, 2]]
    rows = torch.arange(8.0).view(4, 2)
    assert lumping.unembedding(rows).tolist() == [[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]


@pytest.mark.parametrize("kept", [[], [0, 0], [5], [-1], [0, 1, 2, 3]])
def test_improper_subsets_are_refused(kept: list[int]) -> None:
    with pytest.raises(RequestError, match="kept"):
        Lumping(torch.tensor(kept, dtype=torch.int64), 4)


def test_a_table_equals_recomputing_from_final_states() -> None:
    head = TargetHead(torch.randn(9, 4), torch.ones(4))
    labels = HeadLabels(head, torch.randn(11, 4), Lumping(torch.tensor([1, 5, 7]), 9))
    table = tabulate(labels, 11, chunk=4)
    rows = torch.tensor([10, 0, 3])
    torch.testing.assert_close(table.rows(rows), labels.rows(rows))
    assert table.width == labels.width == 4
