"""The replay drafter is as right as its profile says, and the sweep counts only what runs at the full batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import sweep
from bench.replay import Profile, ReplayDrafter
from bench.steps import EIGHT_B
from bench.sweep import replay_pair, window
from specdec.drafting.protocol import Context, Shape
from specdec.engine.budget import Budget
from specdec.engine.engine import Engine

TINY = replace(EIGHT_B, vocab=97, hidden=32, intermediate=48, layers=4, heads=4, kv_heads=2, head_dim=8,
               max_length=512, windows=(None,) * 4)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> sweep.Pair:
    torch.manual_seed(0)
    return replay_pair(TINY, Profile((0.8, 0.6)), CPU, torch.float32, 3, 40, Shape(4, 3, 12))


def test_texts_stay_the_targets_own(pair: sweep.Pair) -> None:
    plain, drafted = (window(engine, pair.prompts, 40) for engine in (pair.plain, pair.drafted))
    assert plain.texts == drafted.texts
    assert plain.tokens == plain.rounds * 3  # one token of every request a round
    assert drafted.rounds < plain.rounds


def test_the_targets_text_is_known_in_low_precision_too() -> None:
    """Trees and single tokens round differently; a text that changes with it is replayed in vain."""
    torch.manual_seed(0)
    pair = replay_pair(TINY, Profile((0.8, 0.6)), CPU, torch.bfloat16, 2, 40, Shape(4, 3, 12))
    plain, drafted = (window(engine, pair.prompts, 40) for engine in (pair.plain, pair.drafted))
    assert plain.texts == drafted.texts
    for prompt, text in zip(pair.prompts, plain.texts, strict=True):
        assert text == tuple((prompt[-1] + 1 + place) % TINY.vocab for place in range(len(text)))
    assert drafted.rounds < plain.rounds


def test_acceptance_follows_the_profile(pair: sweep.Pair) -> None:
    """Over random texts: which drafts are right is the drafter's doing, not the texts'."""
    profile, shape = Profile((0.8, 0.6)), Shape(4, 3, 12)
    texts = {
        (i,): torch.randint(97, (600,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)
    }
    drafter = ReplayDrafter(texts, profile, 4, 97, CPU)
    for slot, (prompt, text) in enumerate(texts.items()):
        drafter.admit(slot, torch.tensor(prompt), torch.zeros(1, 0), text[0])
    kept = []
    for place in range(500):
        roots = torch.tensor([text[place] for text in texts.values()])
        tree = drafter.propose(Context(torch.arange(4), roots, torch.full((4,), place + 1)), shape)
        for row, text in enumerate(texts.values()):
            kept.append(_walk(tree.tokens[row].tolist(), tree.parents[row].tolist(), text[place + 1 :]))
    reached = [sum(k >= d for k in kept) for d in range(4)]
    alpha = [sum(k >= d for k in kept) / reached[d - 1] for d in range(1, 4)]
    assert alpha == pytest.approx([0.8, 0.6, 0.6], abs=0.05)
    assert 1 + sum(kept) / len(kept) == pytest.approx(profile.tau(4), abs=0.1)
    assert tree.nodes == 12 and tree.scores is not None and bool((tree.scores.diff(dim=1) <= 0).all())


def _walk(tokens: list[int], parents: list[int], text: list[int]) -> int:
    """Drafts accepted: children of the node reached that carry the text's next token."""
    at, depth = 0, 0
    while True:
        nexts = [i for i in range(1, len(tokens)) if parents[i] == at and tokens[i] == text[depth]]
        if not nexts:
            return depth
        at, depth = nexts[0], depth + 1


def test_off_the_known_text_nothing_is_right(pair: sweep.Pair) -> None:
    drafter = ReplayDrafter({(5,): [1, 2, 3, 4, 5, 6]}, Profile((1.0,)), 1, 97, CPU)
    drafter.admit(0, torch.tensor([5]), torch.zeros(1, 0), 1)
    slot, length, shape = torch.tensor([0]), torch.tensor([2]), Shape(3, 1, 4)
    assert drafter.propose(Context(slot, torch.tensor([2]), length), shape).tokens.tolist() == [[2, 3, 4, 5]]
    assert drafter.propose(Context(slot, torch.tensor([9]), length), shape).tokens[0, 1] != 3


def test_priced_nodes_are_left_out_and_prices_can_end_drafting() -> None:
    drafter = ReplayDrafter({(5,): list(range(20))}, Profile((0.5,)), 1, 97, CPU)
    drafter.admit(0, torch.tensor([5]), torch.zeros(1, 0), 0)
    context = Context(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    cheap = Shape(6, 2, 10, prices=tuple(0.05 * n for n in range(10)))
    assert 1 < drafter.propose(context, cheap).nodes < 10
    assert drafter.propose(context, replace(cheap, prices=(0.0,) + (5.0,) * 9)).nodes == 1


def test_a_row_per_batch(pair: sweep.Pair) -> None:
    rows = list(sweep.sweep(pair, [1, 3], 1))
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["same_texts"] == 1.0 and row["tau"] > 1.2 for row in rows)
    assert all(row["over_plain"] > 0 for row in rows)
    assert sweep.table([{"target": "t", **row} for row in rows]).row_count == 2


def test_the_budget_may_choose(pair: sweep.Pair) -> None:
    drafted = pair.drafted
    budget = sweep._budget(drafted.target, drafted.drafter, None, drafted.limits)
    assert isinstance(budget, Budget) and budget.costs is not None
    machine = Engine(drafted.target, drafted.drafter, budget, drafted.limits)
    assert (
        window(machine, pair.prompts, 24).texts[0][:24] == window(pair.plain, pair.prompts, 24).texts[0][:24]
    )
