"""Draft trees: every derived tensor follows from parents, and re-shaping keeps the meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import tree as trees
from specdec.tree import MAX_NODES, DraftTree


@st.composite
def parent_lists(draw: st.DrawFn, nodes: int = 16) -> list[int]:
    n = draw(st.integers(1, nodes))
    return [0] + [draw(st.integers(0, node - 1)) for node in range(1, n)]


def tree_of(parents: list[int]) -> DraftTree:
    n = len(parents)
    return trees.build(torch.arange(n)[None], torch.tensor([parents]), scores=-torch.arange(n)[None].float())


def closure(parents: list[int], node: int) -> set[int]:
    seen = {node}
    while node:
        node = parents[node]
        seen.add(node)
    return seen


def paths(tree: DraftTree, row: int = 0) -> set[tuple[int, ...]]:
    """The token path of every node in use."""
    parents, tokens = tree.parents[row].tolist(), tree.tokens[row].tolist()
    return {tuple(tokens[j] for j in sorted(closure(parents, node))) for node in range(int(tree.sizes[row]))}


def assert_same(a: DraftTree, b: DraftTree) -> None:
    for name in ("tokens", "parents", "depths", "ancestors", "sizes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


class TestBuild:
    @given(parent_lists())
    def test_mask_is_the_ancestor_closure(self, parents: list[int]) -> None:
        n = len(parents)
        mask = trees.mask(tree_of(parents).ancestors, n)[0]
        for node in range(n):
            assert set(mask[node].nonzero()[:, 0].tolist()) == closure(parents, node)

    @given(parent_lists())
    def test_depth_is_ancestors_less_one(self, parents: list[int]) -> None:
        tree = tree_of(parents)
        assert torch.equal(tree.depths, trees.mask(tree.ancestors, len(parents)).sum(-1) - 1)

    def test_drawn_example(self) -> None:
        tree = tree_of([0, 0, 0, 1, 2])
        assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
        assert tree.ancestors.tolist() == [[1, 3, 5, 11, 21]]
        assert tree.sizes.tolist() == [5]

    def test_the_last_bit_of_the_word(self) -> None:
        tree = trees.chain(torch.arange(MAX_NODES)[None])
        assert tree.ancestors[0, -1] == -1  # all 64 bits
        assert trees.mask(tree.ancestors, MAX_NODES)[0].equal(torch.ones(64, 64).tril().bool())
        with pytest.raises(AssertionError):
            trees.chain(torch.arange(MAX_NODES + 1)[None])

    def test_rows_are_apart(self) -> None:
        both = trees.build(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 0, 1], [0, 0, 0]]))
        assert both.ancestors.tolist() == [[1, 3, 7], [1, 3, 5]]


class TestShapes:
    def test_root_only_is_a_tree_of_one(self) -> None:
        tree = trees.root_only(torch.tensor([4, 5]))
        assert_same(tree, trees.build(torch.tensor([[4], [5]]), torch.zeros(2, 1, dtype=torch.int64)))
        assert tree.nodes == 1

    def test_chain_hangs_node_on_node(self) -> None:
        tree = trees.chain(torch.tensor([[4, 5, 6]]), torch.tensor([2]))
        assert tree.parents.tolist() == [[0, 0, 1]]
        assert tree.depths.tolist() == [[0, 1, 2]]
        assert tree.sizes.tolist() == [2]

    @given(parent_lists(), st.integers(1, 16))
    def test_trim_keeps_the_first_nodes(self, parents: list[int], size: int) -> None:
        size = min(size, len(parents))
        cut = trees.trim(tree_of(parents), torch.tensor([size]))
        assert_same(cut, tree_of(parents[:size]))
        assert cut.scores is not None and cut.scores.shape == (1, size)

    def test_trim_by_row_and_without_scores(self) -> None:
        tree = trees.chain(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 1]))
        cut = trees.trim(tree, torch.tensor([2, 2]))
        assert cut.nodes == 2
        assert cut.sizes.tolist() == [2, 1]  # never more than there were
        assert cut.scores is None

    @given(parent_lists(), st.integers(1, 24))
    def test_pad_adds_inert_children_of_the_root(self, parents: list[int], nodes: int) -> None:
        tree = tree_of(parents)
        wide = trees.pad(tree, nodes)
        assert wide.nodes == max(nodes, tree.nodes)
        assert paths(wide) == paths(tree)
        rebuilt = trees.build(wide.tokens, wide.parents, wide.sizes)
        assert_same(wide, rebuilt)
        assert wide.scores is not None
        assert bool((wide.scores[:, tree.nodes :] == -torch.inf).all())
        assert_same(trees.trim(wide, tree.sizes), tree)

    def test_pad_without_scores(self) -> None:
        assert trees.pad(trees.root_only(torch.tensor([1])), 3).scores is None

    @given(st.lists(parent_lists(), min_size=1, max_size=4))
    def test_stack_keeps_every_tree(self, many: list[list[int]]) -> None:
        stacked = trees.stack([tree_of(parents) for parents in many])
        assert stacked.nodes == max(map(len, many))
        assert stacked.scores is not None
        for row, parents in enumerate(many):
            assert paths(stacked, row) == paths(tree_of(parents))

    def test_stack_drops_scores_unless_all_have_them(self) -> None:
        assert trees.stack([tree_of([0, 0]), trees.root_only(torch.tensor([1]))]).scores is None


class TestGrowth:
    def test_expand_grows_the_best_children(self) -> None:
        log_probs = torch.tensor([[[0.7, 0.2], [0.5, 0.3]]]).log()
        scores, frontier = trees.expand(torch.tensor([[0.6, 0.4]]).log(), log_probs)
        assert scores.exp()[0].tolist() == pytest.approx([0.42, 0.12, 0.20, 0.12])
        assert frontier.tolist() == [[0, 2]]

    def test_expand_breaks_ties_by_index(self) -> None:
        _, frontier = trees.expand(torch.zeros(1, 3), torch.full((1, 3, 2), 0.25).log())
        assert frontier.tolist() == [[0, 1]]

    @settings(deadline=None)
    @given(parent_lists(20), st.integers(1, 20), st.integers(0, 10**6))
    def test_rerank_keeps_the_best_and_their_ancestors(
        self, parents: list[int], nodes: int, seed: int
    ) -> None:
        """Candidates are the nodes below the root; steps of probability 1 and 1/2 make many ties."""
        count = len(parents) - 1
        if count == 0:
            return
        steps = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed)).float()
        scores = [0.0]
        for node in range(1, count + 1):
            scores.append(scores[parents[node]] - float(steps[node - 1]))
        tree = trees.rerank(
            torch.tensor([99]), torch.arange(1, count + 1)[None], torch.tensor(parents[1:])[None] - 1,
            torch.tensor(scores[1:])[None], nodes,
        )  # fmt: skip
        best = sorted(range(1, count + 1), key=lambda node: (-scores[node], node))[: nodes - 1]
        assert tree.tokens[0].tolist() == [99, *sorted(best)]
        for place, node in enumerate(tree.tokens[0].tolist()[1:], start=1):
            parent = parents[node]
            kept = int(tree.tokens[0, tree.parents[0, place]])
            assert kept == (parent if parent else 99), "a parent was dropped"
        assert tree.scores is not None
        assert tree.scores[0].tolist() == [0.0, *(scores[node] for node in sorted(best))]


def test_mask_reads_bits() -> None:
    words: Tensor = torch.tensor([[1, 5]])
    assert trees.mask(words, 3).tolist() == [[[True, False, False], [True, False, True]]]


def test_a_tree_promises_the_path_probabilities_of_its_own_nodes() -> None:
    parents = torch.tensor([[0, 0, 1], [0, 0, 0]])
    scores = torch.tensor([[0.0, 0.5, 0.25], [0.0, 0.75, 0.125]]).log()
    tree = trees.build(torch.zeros_like(parents), parents, sizes=torch.tensor([3, 2]), scores=scores)
    assert tree.promised() == pytest.approx(0.5 + 0.25 + 0.75)  # what pads the second tree promises nothing
    assert trees.root_only(torch.tensor([4])).promised() == 0
    assert trees.chain(torch.tensor([[1, 2]])).promised() == 0, "a chain without scores says nothing"
