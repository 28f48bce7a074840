import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.surplus.contract import contexts
from specdec.surplus.control import (
    NeuralTable,
    TableSettings,
    cross_entropy,
    fit_ngram,
    fit_table,
    hard_labels,
    make_bank,
    soft_labels,
    tune,
)
from specdec.surplus.labels import TableLabels
from specdec.surplus.sources import random_markov


@given(st.integers(0, 200), st.integers(1, 4), st.booleans())
def test_every_ngram_law_sums_to_one(seed: int, length: int, soft: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(3, (40, length), generator=generator)
    table = torch.log_softmax(torch.randn(40, 7, generator=generator), dim=-1)
    seen = soft_labels(TableLabels(table), torch.arange(40), top=3)
    labels = seen if soft else hard_labels(torch.randint(7, (40,), generator=generator))
    ngram = fit_ngram(z, labels, width=7)
    unseen = torch.randint(5, (20, length), generator=generator)
    torch.testing.assert_close(ngram.log_probs(unseen).exp().sum(-1), torch.ones(20))


def test_ngram_counts_by_hand() -> None:
    ngram = fit_ngram(torch.tensor([[0], [0], [1]]), hard_labels(torch.tensor([1, 1, 0])), width=2)
    base = torch.tensor([1.5, 2.5]) / 4
    expected = torch.stack([(torch.tensor([0.0, 2.0]) + 4 * base) / 6, base])
    torch.testing.assert_close(ngram.log_probs(torch.tensor([[0], [9]])).exp(), expected)


def test_longer_contexts_use_the_last_tokens() -> None:
    ngram = fit_ngram(torch.tensor([[0, 1], [2, 1]]), hard_labels(torch.tensor([0, 1])), width=2)
    law = ngram.log_probs(torch.tensor([[0, 1], [2, 1], [5, 1]])).exp()
    assert law[0, 0] > law[2, 0] > law[1, 0]


def markov_task() -> tuple[TableLabels, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    toy = random_markov(8, generator).sample(60, 40, generator)
    return TableLabels(toy.log_probs), toy.ids, toy.doc


def test_tuned_soft_ngram_reaches_the_entropy_of_a_markov_chain_and_beats_hard_counts() -> None:
    labels, ids, doc = markov_task()
    train, val = contexts(ids, doc, 2, doc < 40), contexts(ids, doc, 2, doc >= 40)
    soft = tune(fit_ngram(train.z, soft_labels(labels, train.label_row), 8), val, labels)
    following = ids[(train.label_row + 1).clamp_max(ids.numel() - 1)]
    hard = tune(fit_ngram(train.z, hard_labels(following), 8), val, labels)
    rows = labels.rows(val.label_row)
    entropy = float(-(rows.exp() * rows).sum(-1).mean())
    assert cross_entropy(soft, val, labels) - entropy < 1e-4
    assert 1e-3 < cross_entropy(hard, val, labels) - entropy < 0.1


def test_neural_table_starts_at_its_base_learns_and_competes_in_the_bank() -> None:
    labels, ids, doc = markov_task()
    train, val = contexts(ids, doc, 2, doc < 40), contexts(ids, doc, 2, doc >= 40)
    base = labels.rows(train.label_row).exp().mean(0)
    settings = TableSettings(width=32, rank=8, epochs=6, batch=64)
    model = NeuralTable(torch.eye(8), torch.eye(8), base, 1, settings)
    torch.testing.assert_close(model.log_probs(val.z[:3]), base.log().expand(3, -1))
    before = cross_entropy(model, val, labels)
    fit_table(model, train, val, labels, settings)
    ngram = tune(fit_ngram(train.z, soft_labels(labels, train.label_row), 8), val, labels)
    bank = make_bank([model, ngram], val, labels)
    assert bank.validation[0] - bank.validation[1] < (before - bank.validation[1]) / 2
    assert bank.best is ngram
    assert bank.validation[1] < bank.validation[0]
