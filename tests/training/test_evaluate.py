"""Simulated decoding: the trees are the drafter's own, the counting is by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_head import HIDDEN, VOCAB, Embed, tiny_head

from specdec.attention.reference import ReferenceAttention
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Context, Shape
from specdec.head.model import DraftHead
from specdec.tree import DraftTree
from training.evaluate import Growth, Text, simulate, teacher_forced


def text(b: int = 3, t: int = 20) -> Text:
    """Half of the tokens are in the draft vocabulary; answers start at different places and end early."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(b, t, 3 * HIDDEN, generator=generator)
    tokens = torch.randint(VOCAB // 2, (b, t), generator=generator) * 2
    column, starts = torch.arange(t), torch.arange(b)[:, None] + 3
    lengths = t - torch.arange(b)
    return Text(features, tokens, (column >= starts) & (column < lengths[:, None]), lengths)


def engine_tree(head: DraftHead, embed: Embed, sample: Text, row: int, at: int, growth: Growth) -> DraftTree:
    """What EagleDrafter proposes with the root at position `at` of a sequence."""
    drafter = EagleDrafter(head, embed, ReferenceAttention(), 1, 64)
    tokens = sample.tokens[row]
    root = tokens[at : at + 1]
    drafter.admit(0, tokens[:at], sample.features[row, :at], int(root))
    context = Context(slots=torch.tensor([0]), roots=root, lengths=torch.tensor([at]))
    return drafter.propose(context, Shape(growth.depth, growth.width, growth.nodes))


def accepted(tree: DraftTree, tokens: list[int]) -> int:
    """Nodes accepted when the target says `tokens` after the root; a plain loop."""
    node = 0
    for count, token in enumerate(tokens):
        children = [
            i for i in range(1, tree.nodes) if tree.parents[0, i] == node and tree.tokens[0, i] == token
        ]
        if not children:
            return count
        node = children[0]
    return len(tokens)


@pytest.mark.parametrize("growth", [Growth(4, 3, 12), Growth(3, 1, 4)])
def test_simulation_counts_what_the_engine_would_do(growth: Growth) -> None:
    head, embed, sample = tiny_head(), Embed(), text()
    emitted = rounds = cut = 0
    with torch.no_grad():
        for row in range(3):
            end = int(sample.lengths[row])
            at = int(sample.loss_mask[row].nonzero()[0])
            while at < end - 1:
                said = sample.tokens[row, at + 1 : end].tolist()
                count = accepted(engine_tree(head, embed, sample, row, at, growth), said) + 1
                at += count
                if count > len(said):
                    cut += 1
                else:
                    emitted, rounds = emitted + count, rounds + 1
    counters = simulate(head, embed, sample, growth)
    assert (counters.emitted, counters.rounds, counters.cut) == (emitted, rounds, cut)
    assert counters.emitted > counters.rounds, "the test needs some acceptance"


def test_teacher_forced_rates_are_conditional() -> None:
    head, embed, sample = tiny_head(), Embed(), text()
    rates = teacher_forced(head, embed, sample, 3)
    assert len(rates) == 3
    assert all(0.0 <= rate <= 1.0 for rate in rates)


def test_a_head_that_knows_the_text_is_always_accepted() -> None:
    """The text repeats one token, the head can only say that token."""
    head, embed, sample = tiny_head(draft_vocab=1), Embed(), text()
    same = Text(sample.features, torch.zeros_like(sample.tokens), sample.loss_mask, sample.lengths)
    counters = simulate(head, embed, same, Growth(3, 10, 4))
    assert counters.tau == 4.0
    assert counters.alpha() == [1.0, 1.0, 1.0]
    assert teacher_forced(head, embed, same, 2) == [1.0, 1.0]
