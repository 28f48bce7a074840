"""The target run on z alone: its laws are those of plain forwards, its mixture is never worse than either on the text
that chose it, and it is a control that a known source cannot be told apart from."""

from __future__ import annotations

import engines
import pytest
import torch

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.surplus.brief import beginning, finals
from specdec.surplus.contract import TargetHead, contexts
from specdec.surplus.control import cross_entropy, fit_ngram, hard_labels
from specdec.surplus.labels import HeadLabels, Lumping, TableLabels
from specdec.surplus.mixture import mixed
from specdec.target.load import LeanTarget

DEPTHS = (2, 3, 4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LeanTarget:
    loaded = engines.load(tmp_path_factory.mktemp("brief"), "llama", "lean")
    assert isinstance(loaded, LeanTarget)
    return loaded


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Three documents, one of them too short for the deepest context."""
    ids = torch.randint(12, (47,), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([0] * 30 + [1] * 3 + [2] * 14)


def head_of(target: LeanTarget, temperature: float = 0.7) -> TargetHead:
    return TargetHead(target.output_embedding().float(), temperature=temperature)


@torch.inference_mode()
def plain(target: LeanTarget, tokens: list[int], temperature: float) -> torch.Tensor:
    slot = torch.zeros(1, dtype=torch.int64)
    cache = KVCache(target.info.cache, 1, len(tokens))
    final = target.forward(torch.tensor([tokens]), chunk_rows(slot, slot, len(tokens)), cache, ()).final
    return (target.logits(final)[0, -1].float() / temperature).log_softmax(-1)


@pytest.mark.parametrize("before", [(), (3, 1)])
def test_laws_are_those_of_the_target_on_z_and_nothing_else(
    target: LeanTarget, text: tuple[torch.Tensor, torch.Tensor], before: tuple[int, ...]
) -> None:
    ids, doc = text
    told: list[tuple[int, int]] = []
    found = finals(target, ids, doc, DEPTHS, before, lambda d, n: told.append((d, n)))
    assert told[-1][0] == told[-1][1]
    lumping = Lumping(torch.tensor([4, 9, 2]), target.info.vocab)
    for depth in DEPTHS:
        brief = found[depth].brief(head_of(target), lumping)
        z = contexts(ids, doc, depth).z
        assert len(brief.keys) == len(torch.unique(z, dim=0))
        wanted = torch.stack([plain(target, [*before, *row], 0.7) for row in z[::5].tolist()])
        torch.testing.assert_close(brief.log_probs(z[::5]), lumping.log_probs(wanted), atol=2e-4, rtol=0)


def test_a_mixture_is_no_worse_than_either(
    target: LeanTarget, text: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, doc = text
    where = contexts(ids, doc, 2)
    law = torch.full((len(ids), target.info.vocab), -30.0)
    law[torch.arange(len(ids)), ids.roll(-1)] = 0.0
    labels = TableLabels(law.log_softmax(-1))
    brief = finals(target, ids, doc, (2,))[2].brief(head_of(target), None)
    ngram = fit_ngram(where.z, hard_labels(ids.roll(-1)[where.label_row]), target.info.vocab)
    losses = [cross_entropy(one, where, labels) for one in (brief, ngram, mixed(brief, ngram, where, labels))]
    assert losses[2] <= min(losses[:2]) + 0.11  # the least share of the target costs -log 0.9 at most
    assert mixed(brief, ngram, where, labels).log_probs(where.z).exp().sum(-1) == pytest.approx(1, abs=1e-4)


def test_the_beginning_that_predicts_best_is_taken(
    target: LeanTarget, text: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Labels that are the target's own after the commonest token and z can only be met by starting with it."""
    ids, doc = text
    common = int(torch.bincount(ids).argmax())
    laws = torch.stack([plain(target, [common, token], 1.0) for token in ids.tolist()])
    head = head_of(target, 1.0)
    assert beginning(target, ids, doc, TableLabels(laws), head, None) == (common,)
    z = contexts(ids, doc, 2).z
    brief = finals(target, ids, doc, (2,), (common,))[2].brief(head, None)
    assert isinstance(brief.laws, TableLabels | HeadLabels)
    torch.testing.assert_close(brief.log_probs(z), laws[contexts(ids, doc, 2).label_row], atol=2e-4, rtol=0)


def test_what_the_text_does_not_hold_is_a_bug(
    target: LeanTarget, text: tuple[torch.Tensor, torch.Tensor]
) -> None:
    brief = finals(target, *text, (2,))[2].brief(head_of(target), None)
    with pytest.raises(AssertionError, match="does not hold"):
        brief.log_probs(torch.tensor([[59]]))
