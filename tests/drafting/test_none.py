"""NoDrafter: roots alone, always."""

from __future__ import annotations

import torch

from specdec.accept import walk
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import Context, Drafter, Shape


def test_rounds_are_plain_whatever_the_shape() -> None:
    drafter: Drafter = NoDrafter()
    context = Context(torch.tensor([3, 1]), torch.tensor([7, 8]), torch.tensor([4, 9]))
    drafter.admit(3, torch.tensor([1, 2]), torch.zeros(2, 0), 7)
    tree = drafter.propose(context, Shape(7, 10, 60))
    assert tree.tokens.tolist() == [[7], [8]]
    assert tree.sizes.tolist() == [1, 1]
    verdict = walk(tree, torch.tensor([[5], [6]]))
    assert verdict.tokens.tolist() == [[5], [6]]
    drafter.observe(context, torch.zeros(2, 1, 0), verdict)
    drafter.release(3)


def test_needs_no_features_and_keeps_every_row() -> None:
    drafter = NoDrafter()
    assert drafter.taps == ()
    assert drafter.reuse(0, 1, 12) == 12
