"""Merged trees against brute force, and when the head is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import tree as trees
from specdec.accept import Verdict
from specdec.drafting.mixed import LONGEST_WAIT, SHORTEST_WAIT, SUREST, MixedDrafter, merge
from specdec.drafting.protocol import Context, Shape
from specdec.drafting.sketch import Sketch, falling, of_tree, to_tree
from specdec.tree import DraftTree

PRICED = Shape(
    depth=6, width=4, nodes=8, prices=tuple(0.05 * n for n in range(8)), first_level=0.2, next_level=0.1
)


def sketch(*nodes: tuple[int, int, float]) -> Sketch:
    """(token, parent, conditional probability) of each node below root 9."""
    made = Sketch([9])
    for token, parent, p in nodes:
        made.add(token, parent, made.scores[parent] + math.log(p))
    return made


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    made, used = Sketch([9]), set()
    for _ in range(draw(st.integers(0, 12))):
        parent, token = draw(st.integers(0, len(made.tokens) - 1)), draw(st.integers(0, 3))
        if (parent, token) not in used:
            used.add((parent, token))
            made.add(token, parent, made.scores[parent] + math.log(draw(st.floats(0.01, 1.0))))
    return made


def paths(one: Sketch) -> dict[tuple[int, ...], float]:
    """Token paths below the root with their log-probabilities."""
    out: list[tuple[int, ...]] = [()]
    for node in range(1, len(one.tokens)):
        out.append((*out[one.parents[node]], one.tokens[node]))
    return dict(zip(out, one.scores, strict=True))


@given(sketches(), sketches(), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_merged_tree_is_a_tree_of_both_best_first(left: Sketch, right: Sketch, nodes: int) -> None:
    merged = merge(left, right, nodes)
    both = paths(left).keys() | paths(right).keys()
    assert set(paths(merged)) <= both
    assert len(merged.tokens) == min(nodes, len(both))
    assert len(paths(merged)) == len(merged.tokens), "a path appears twice"
    assert all(parent < node for node, parent in enumerate(merged.parents[1:], start=1))
    assert merged.scores == sorted(merged.scores, reverse=True)
    assert all(
        merged.scores[node] < merged.scores[parent] for node, parent in enumerate(merged.parents[1:], start=1)
    )


@given(st.lists(sketches(), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_sketches_survive_tensors(several: list[Sketch]) -> None:
    tree = to_tree(several, torch.device("cpu"))
    same = trees.build(tree.tokens, tree.parents, tree.sizes)
    assert torch.equal(same.ancestors, tree.ancestors)
    assert [paths(s).keys() for s in of_tree(tree)] == [paths(s).keys() for s in several]


def test_the_highest_bit_survives_tensors() -> None:
    chain = Sketch([9])
    for node in range(63):
        chain.add(1, node, -0.1 * node - 0.1)
    (back,) = of_tree(to_tree([chain], torch.device("cpu")))
    assert back.ancestors == chain.ancestors
    assert to_tree([back], torch.device("cpu")).ancestors[0, 63] == -1


def test_two_sources_that_agree_are_believed_more() -> None:
    merged = paths(merge(sketch((1, 0, 0.5)), sketch((1, 0, 0.6), (2, 0, 0.1), (3, 1, 0.5)), 8))
    assert math.exp(merged[1,]) == 1 - 0.5 * 0.4
    assert math.isclose(math.exp(merged[2,]), 0.1, rel_tol=1e-6)
    assert math.isclose(math.exp(merged[1, 3]), 0.8 * 0.5, rel_tol=1e-6)


def test_siblings_never_promise_more_than_one() -> None:
    merged = paths(merge(sketch((1, 0, 0.9)), sketch((2, 0, 0.8)), 8))
    assert math.isclose(sum(math.exp(score) for path, score in merged.items() if path), 1.0, rel_tol=1e-6)
    sure = paths(merge(sketch((1, 0, 1.0)), sketch((1, 0, 1.0)), 8))
    assert math.exp(sure[1,]) <= SUREST + 1e-9


@dataclass
class Head:
    """Stands in for an EagleDrafter: always drafts token 5, and counts how often it is asked."""

    name: str = "head"
    taps: tuple[int, ...] = (1,)
    asked: int = 0
    heard: list[int] = field(default_factory=list)

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        self.heard.append(slot)

    def reuse(self, source: int, slot: int, rows: int) -> int:
        return rows - 1

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        self.asked += 1
        b = len(context.roots)
        tokens = torch.stack([context.roots, torch.full((b,), 5)], dim=1)
        scores = torch.tensor([[0.0, math.log(0.6)]]).expand(b, 2)
        tree = trees.build(tokens, torch.zeros(b, 2, dtype=torch.int64), scores=scores)
        return DraftTree(tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.sizes, scores, levels=1)

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None: ...

    def release(self, slot: int) -> None:
        self.heard.remove(slot)


def mixed(prompt: list[int]) -> tuple[MixedDrafter, Head, Context]:
    head = Head()
    drafter = MixedDrafter(head)  # type: ignore[arg-type]
    drafter.admit(0, torch.tensor(prompt[:-1]), torch.zeros(len(prompt) - 1, 1), prompt[-1])
    return (
        drafter,
        head,
        Context(torch.tensor([0]), torch.tensor([prompt[-1]]), torch.tensor([len(prompt) - 1])),
    )


def verdict(*tokens: int) -> Verdict:
    count = torch.tensor([len(tokens)])
    return Verdict(torch.zeros(1, len(tokens), dtype=torch.int64), count, torch.tensor([tokens]), count - 1)


def rounds(drafter: MixedDrafter, context: Context, emitted: tuple[int, ...], count: int) -> None:
    for _ in range(count):
        drafter.propose(context, PRICED)
        drafter.observe(context, torch.zeros(1, 1, 1), verdict(*emitted))


def test_the_head_is_asked_while_it_pays_and_left_alone_where_it_does_not() -> None:
    fresh = iter(range(100, 100_000))  # text that never repeats, so lookups promise nothing
    drafter, head, context = mixed([1, 2, 3])
    for _ in range(40):
        rounds(drafter, context, (5, next(fresh)), 1)
    assert head.asked == 40
    for _ in range(400):
        rounds(drafter, context, (next(fresh),), 1)
    assert 40 < head.asked < 140, "a head that never hits is asked rarely, but not never"
    assert drafter.advantages[1][0].wait == LONGEST_WAIT
    before = head.asked
    for _ in range(1500):
        rounds(drafter, context, (5, next(fresh)), 1)
    assert head.asked > before + 700, "it is not found again"


def test_what_was_learned_of_one_request_says_nothing_of_many() -> None:
    fresh = iter(range(100, 100_000))
    drafter, head, context = mixed([1, 2, 3])
    for _ in range(40):
        rounds(drafter, context, (5, next(fresh)), 1)
    assert head.asked == 40
    for slot in range(1, 4):
        drafter.admit(slot, torch.tensor([1, 2]), torch.zeros(2, 1), 3)
    four = Context(torch.arange(4), *(x.expand(4) for x in (context.roots, context.lengths)))
    dear = replace(
        PRICED, prices=tuple(0.5 * n for n in range(PRICED.nodes)), first_level=0.3, next_level=0.3
    )
    for _ in range(4 * SHORTEST_WAIT - 1):
        drafter.propose(four, dear)
    assert head.asked == 40, "it cannot pay for four at these prices"
    drafter.propose(four, dear)
    assert head.asked == 41, "but it is tried"
    rounds(drafter, context, (5, next(fresh)), 1)
    assert head.asked == 42, "and one request alone still has it"


def test_without_prices_the_head_is_always_asked() -> None:
    drafter, head, context = mixed([1, 2, 3])
    fresh = iter(range(100, 100_000))
    for _ in range(100):
        drafter.propose(context, Shape(6, 4, 8))
        drafter.observe(context, torch.zeros(1, 1, 1), verdict(next(fresh)))
    assert head.asked == 100


def test_where_lookups_promise_much_a_head_that_adds_nothing_is_left_alone() -> None:
    drafter, head, context = mixed([1, 2, 3, 4, 6, 7, 8] * 6 + [1])
    tree = drafter.propose(context, PRICED)
    assert tree.tokens[0, 1:4].tolist() == [2, 3, 4]
    cycle, at = [1, 2, 3, 4, 6, 7, 8], 1
    for _ in range(60):
        tokens = tuple(cycle[(at + k) % 7] for k in range(4))
        at += 4
        rounds(drafter, context, tokens, 1)
    assert head.asked < 20


def test_both_hear_of_slots() -> None:
    drafter, head, context = mixed([1, 2, 3])
    assert drafter.taps == (1,)
    assert drafter.reuse(0, 1, 7) == 6
    assert falling(drafter.lookup.sketch(context, PRICED)).shape == (1, 0)
    drafter.release(0)
    assert head.heard == []
    assert drafter.lookup._texts == {}


def test_a_request_may_have_one_source_alone() -> None:
    drafter, head, context = mixed([1, 2, 3, 4] * 6 + [1])
    drafter.admit(1, torch.tensor([1, 2, 3, 4] * 6), torch.zeros(24, 1), 1)
    two = Context(*(torch.cat([x, x]) for x in (context.slots, context.roots, context.lengths)))

    def firsts(*only: str | None) -> list[set[int]]:
        tree = drafter.propose(replace(two, slots=torch.tensor([0, 1]), only=only), Shape(6, 4, 8))
        below = tree.depths == 1
        return [
            set(row[kept[: len(row)]].tolist())
            for row, kept in zip(tree.tokens, below & _real(tree), strict=True)
        ]

    assert firsts(None, "ngram") == [{2, 5}, {2}]
    assert firsts("head", "ngram") == [{5}, {2}]
    before = head.asked
    assert firsts("ngram", "ngram") == [{2}, {2}]
    assert head.asked == before, "nobody may have it"
    for advantage in drafter.advantages[2]:
        advantage.total, advantage.rounds = -1000.0, 100.0
    drafter.propose(replace(two, slots=torch.tensor([0, 1]), only=("head", None)), PRICED)
    assert head.asked == before + 1, "who wants the head alone gets it, paying or not"


def _real(tree: DraftTree) -> Tensor:
    return torch.arange(tree.nodes) < tree.sizes[:, None]
