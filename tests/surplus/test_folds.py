import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.errors import RequestError
from specdec.surplus.folds import among, make_folds, split_roles


@given(st.integers(20, 60), st.integers(3, 5), st.integers(0, 5))
def test_folds_partition_documents_and_test_each_once(documents: int, folds: int, seed: int) -> None:
    doc = torch.arange(documents).repeat_interleave(3) * 7
    found = make_folds(doc, folds=folds, seed=seed)
    for fold in found:
        parts = torch.cat([fold.train, fold.val, fold.test])
        assert torch.equal(parts.sort().values, torch.unique(doc))
    tested = torch.cat([fold.test for fold in found])
    assert torch.equal(tested.sort().values, torch.unique(doc))


def test_five_folds_train_on_three_parts() -> None:
    fold = make_folds(torch.arange(50))[0]
    assert (fold.train.numel(), fold.val.numel(), fold.test.numel()) == (30, 10, 10)


def test_folds_balance_domains() -> None:
    doc, domain = torch.arange(40), torch.arange(40) // 20
    for fold in make_folds(doc, folds=5, domain=domain):
        assert torch.bincount(domain[fold.test]).tolist() == [4, 4]


def test_too_few_documents_are_refused_with_the_number_needed() -> None:
    with pytest.raises(RequestError, match=r"20 are needed.*got 1;"):
        make_folds(torch.zeros(100, dtype=torch.int64))


@given(st.integers(2, 50), st.floats(0.1, 0.9), st.integers(0, 5))
def test_predictor_and_outcome_documents_are_disjoint_and_complete(n: int, share: float, seed: int) -> None:
    predictor, outcome = split_roles(torch.arange(n), outcome=share, seed=seed)
    assert not torch.isin(predictor, outcome).any()
    assert predictor.numel() + outcome.numel() == n
    assert outcome.numel() >= 1
    assert predictor.numel() >= 1


def test_roles_are_balanced_over_domains() -> None:
    domain = torch.arange(40) // 20
    _, outcome = split_roles(torch.arange(40), outcome=0.5, domain=domain)
    assert torch.bincount(domain[outcome]).tolist() == [10, 10]


def test_one_document_cannot_play_both_roles() -> None:
    with pytest.raises(RequestError, match="2 are needed"):
        split_roles(torch.zeros(9, dtype=torch.int64))


def test_among_marks_rows() -> None:
    assert among(torch.tensor([1, 2, 3]), torch.tensor([3, 1])).tolist() == [True, False, True]
