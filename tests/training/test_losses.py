"""Losses against autograd and against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.errors import SpecdecError
from training.losses import CHUNK, KINDS, Loss, fused_loss, grade, target_probs


def rows(count: int = 7, vocab: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(count, vocab, generator=generator)).softmax(-1)
    return torch.randn(count, vocab, generator=generator), p


def defined(logits: Tensor, p: Tensor, loss: Loss) -> Tensor:
    """The formulas of the module's docstring, for autograd."""
    q = logits.softmax(-1)
    kl = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
    alpha = torch.minimum(p, q).sum(-1)
    mix = (-loss.lk_rate * alpha.detach()).exp()
    return {"kl": kl, "tv": 1 - alpha, "lk": mix * kl + (1 - mix) * (1 - alpha), "alpha": -alpha.log()}[
        loss.kind
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_definition(kind: str) -> None:
    logits, p = rows()
    logits.requires_grad_()
    expected = defined(logits, p, Loss(kind))
    graded, gradient = grade(logits.detach(), p, Loss(kind))
    torch.testing.assert_close(graded.loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_loss_equals_autograd_across_chunks(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    count = CHUNK + 5
    hidden = torch.randn(count, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    _, p = rows(9)
    index = torch.randint(9, (count,), generator=generator)
    row_weight = torch.rand(count, generator=generator)
    value, graded = fused_loss(hidden, weight, p, index, row_weight, Loss(kind))
    expected = (defined(hidden @ weight.T, p[index], Loss(kind)) * row_weight).sum()
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(v, (hidden, weight)) for v in (value, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graded.overlap.shape == (count,)


def test_a_perfect_head_loses_nothing_and_is_always_accepted() -> None:
    _, p = rows()
    for kind in KINDS:
        graded, gradient = grade(p.log(), p, Loss(kind))
        assert graded.loss.abs().max() < 1e-5
        assert graded.hit.all()
        torch.testing.assert_close(graded.overlap, torch.ones(7))
        if kind == "kl":
            assert gradient.abs().max() < 1e-6


def test_no_rows_give_zero() -> None:
    hidden = torch.zeros(0, 6, requires_grad=True)
    none = torch.zeros(0)
    value, graded = fused_loss(hidden, torch.zeros(11, 6), torch.zeros(0, 11), none.long(), none, Loss())
    assert value.item() == 0.0
    assert not len(graded.loss)


def test_target_probs_are_restricted_and_sum_to_one() -> None:
    final, matrix = torch.randn(CHUNK + 3, 6), torch.randn(20, 6)
    ids = torch.arange(0, 20, 2)
    p = target_probs(final, matrix[ids])
    whole = (final @ matrix.T).softmax(-1)[:, ids]
    torch.testing.assert_close(p, whole / whole.sum(-1, keepdim=True))


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(SpecdecError, match=r"loss\.kind"):
        Loss("hinge")
