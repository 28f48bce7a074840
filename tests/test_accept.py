"""Acceptance: the walk against a slow reference, block verification against the target's law."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import tree as trees
from specdec.accept import FEW, Verdict, verify_block, walk
from specdec.tree import DraftTree


@st.composite
def cases(draw: st.DrawFn) -> tuple[DraftTree, Tensor]:
    """Random trees with distinct siblings, some nodes beyond `sizes`, and a target that often agrees."""
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    tokens, parents = torch.zeros(b, n, dtype=torch.int64), torch.zeros(b, n, dtype=torch.int64)
    for row in range(b):
        children: dict[int, int] = {}
        for node in range(1, n):
            parent = draw(st.integers(0, node - 1))
            parents[row, node] = parent
            tokens[row, node] = children.get(parent, 0)
            children[parent] = children.get(parent, 0) + 1
    sizes = torch.tensor([draw(st.integers(1, n)) for _ in range(b)])
    chosen = torch.tensor([[draw(st.integers(0, 2)) for _ in range(n)] for _ in range(b)])
    return trees.build(tokens, parents, sizes), chosen


def slow_walk(tree: DraftTree, chosen: Tensor, row: int) -> tuple[list[int], list[int]]:
    """Kept nodes and emitted tokens, one step at a time."""
    node, kept, emitted = 0, [0], []
    while True:
        wanted = int(chosen[row, node])
        emitted.append(wanted)
        children = [
            child
            for child in range(1, int(tree.sizes[row]))
            if int(tree.parents[row, child]) == node and int(tree.tokens[row, child]) == wanted
        ]
        if not children:
            return kept, emitted
        node = children[0]
        kept.append(node)


def emitted(verdict: Verdict, row: int) -> list[int]:
    out: list[int] = verdict.tokens[row, : int(verdict.counts[row])].tolist()
    return out


Walk = Callable[[DraftTree, Tensor], Verdict]


def in_tensors(tree: DraftTree, chosen: Tensor) -> Verdict:
    """The walk as devices do it."""
    return walk(tree, chosen, int(tree.depths.max()) + 1)


@pytest.mark.parametrize("walks", [walk, in_tensors], ids=["host", "tensors"])
class TestWalk:
    def test_docstring_example(self, walks: Walk) -> None:
        tree = trees.build(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 0, 2]]))
        verdict = walks(tree, torch.tensor([[7, 1, 8, 9]]))
        assert verdict.tokens.tolist() == [[7, 8, 9]]
        assert verdict.kept.tolist() == [[0, 2, 3]]
        assert verdict.counts.tolist() == [3]
        assert verdict.offered.tolist() == [2]

    @settings(deadline=None)
    @given(cases())
    def test_equals_the_slow_walk(self, walks: Walk, case: tuple[DraftTree, Tensor]) -> None:
        tree, chosen = case
        verdict = walks(tree, chosen)
        for row in range(chosen.shape[0]):
            kept, tokens = slow_walk(tree, chosen, row)
            count = len(tokens)
            assert verdict.counts[row] == count
            assert emitted(verdict, row) == tokens
            assert bool((verdict.tokens[row, count:] == -1).all())
            assert verdict.kept[row, :count].tolist() == kept
            assert bool((verdict.kept[row, count:] == kept[-1]).all())
            used = tree.depths[row, : int(tree.sizes[row])]
            assert verdict.offered[row] == used.max()

    @settings(deadline=None)
    @given(cases())
    def test_keeps_a_root_chain_of_at_most_depth_plus_one(
        self, walks: Walk, case: tuple[DraftTree, Tensor]
    ) -> None:
        tree, chosen = case
        verdict = walks(tree, chosen)
        assert bool((verdict.counts >= 1).all())
        assert bool((verdict.counts <= tree.depths.amax(dim=1) + 1).all())
        for row in range(chosen.shape[0]):
            kept = verdict.kept[row, : int(verdict.counts[row])].tolist()
            assert kept[0] == 0
            assert [int(tree.parents[row, node]) for node in kept[1:]] == kept[:-1]

    @settings(deadline=None)
    @given(cases(), st.integers(0, 10**6))
    def test_sibling_order_is_irrelevant(
        self, walks: Walk, case: tuple[DraftTree, Tensor], seed: int
    ) -> None:
        tree, chosen = case
        tree = trees.DraftTree(tree.tokens[:1], tree.parents[:1], tree.depths[:1], tree.ancestors[:1],
                               torch.tensor([tree.nodes]))  # fmt: skip
        weights = torch.rand(tree.nodes, generator=torch.Generator().manual_seed(seed))
        order = sorted(range(tree.nodes), key=lambda node: (int(tree.depths[0, node]), float(weights[node])))
        place = {node: at for at, node in enumerate(order)}
        parents = torch.tensor([[place[int(tree.parents[0, node])] for node in order]])
        other = trees.build(tree.tokens[:, order], parents)
        assert emitted(walks(other, chosen[:1, order]), 0) == emitted(walks(tree, chosen[:1]), 0)

    @settings(deadline=None)
    @given(cases(), st.integers(0, 5))
    def test_padding_is_inert(self, walks: Walk, case: tuple[DraftTree, Tensor], extra: int) -> None:
        tree, chosen = case
        wide = trees.pad(tree, tree.nodes + extra)
        first = torch.cat([chosen, torch.zeros(chosen.shape[0], extra, dtype=torch.int64)], dim=1)
        padded, plain = walks(wide, first), walks(tree, chosen)
        assert torch.equal(padded.counts, plain.counts)
        assert torch.equal(padded.offered, plain.offered)
        for row in range(chosen.shape[0]):
            assert emitted(padded, row) == emitted(plain, row)

    def test_all_64_nodes(self, walks: Walk) -> None:
        tree = trees.chain(torch.arange(64)[None])
        assert walks(tree, torch.arange(1, 65)[None]).counts.tolist() == [64]
        chosen = torch.arange(1, 65)[None].clone()
        chosen[0, 62] = 0
        assert walks(tree, chosen).counts.tolist() == [63]


def test_many_trees_are_walked_alike() -> None:
    tree = trees.chain(torch.randint(0, 2, (FEW // 8 + 1, 8), generator=torch.Generator().manual_seed(0)))
    chosen = torch.randint(0, 2, tree.tokens.shape, generator=torch.Generator().manual_seed(1))
    halves = [walk(trees.chain(tree.tokens[half]), chosen[half]) for half in (slice(0, 9), slice(9, None))]
    together = walk(tree, chosen)
    assert torch.equal(together.counts, torch.cat([half.counts for half in halves]))
    assert torch.equal(together.tokens, torch.cat([half.tokens for half in halves]))


# Block verification: whole sequences over a toy vocabulary
V, DRAFTS, LENGTH, DRAWS = 5, 2, 3, 40_000
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Verdict]


def toy(seed: int, sharpness: float = 1.0) -> list[Tensor]:
    """A law over sequences: next-token tables after every prefix of 0, 1, 2 tokens. float64 [V ** i, V]"""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(V**i, V, generator=generator, dtype=torch.float64) for i in range(LENGTH)]
    return [torch.softmax(one * sharpness, dim=-1) for one in logits]


def codes(tokens: Tensor) -> Tensor:
    """Prefixes as row numbers of `toy` tables. tokens [B, i] -> [B]"""
    code = torch.zeros(tokens.shape[0], dtype=torch.int64)
    for column in tokens.T:
        code = code * V + column
    return code


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def emit(rule: Rule, p: list[Tensor], q: list[Tensor]) -> Tensor:
    """DRAWS sequences of LENGTH tokens: one verified block, then plainly from the target. [DRAWS, LENGTH]"""
    generator = torch.Generator().manual_seed(7)
    drafts = torch.zeros(DRAWS, 0, dtype=torch.int64)
    draft_probs, target_probs = [], [p[0].expand(DRAWS, V)]
    for i in range(DRAFTS):
        draft_probs.append(q[i][codes(drafts)])
        drafts = torch.cat([drafts, draw(draft_probs[-1], generator)[:, None]], dim=1)
        target_probs.append(p[i + 1][codes(drafts)])
    uniforms = torch.rand(DRAWS, DRAFTS + 1, generator=generator, dtype=torch.float64)
    verdict = rule(drafts, torch.stack(draft_probs, 1), torch.stack(target_probs, 1), uniforms)
    tokens = verdict.tokens.clone()
    for i in range(LENGTH):
        missing = tokens[:, i] < 0
        tokens[missing, i] = draw(p[i][codes(tokens[missing, :i])], generator)
    return tokens


def chi_square(tokens: Tensor, p: list[Tensor]) -> float:
    """Distance from the target's law over whole sequences, in standard deviations of the chi-square law."""
    every = itertools.product(range(V), repeat=LENGTH)
    law = torch.stack([p[0][0, a] * p[1][a, b] * p[2][a * V + b, c] for a, b, c in every]) * tokens.shape[0]
    counts = torch.bincount(codes(tokens), minlength=V**LENGTH).double()
    rare = law < 5
    law = torch.cat([law[~rare], law[rare].sum()[None].clamp(min=1e-9)])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    freedom = law.numel() - 1
    return float((((counts - law) ** 2 / law).sum() - freedom) / (2 * freedom) ** 0.5)


def tokenwise(drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor,
              residual: Callable[[Tensor, Tensor], Tensor]) -> Verdict:  # fmt: skip
    """Leviathan et al.: stop at the first rejected draft, with a residual law of the caller's."""
    b, g = drafts.shape
    rows = torch.arange(b)
    alive, count = torch.ones(b, dtype=torch.bool), torch.zeros(b, dtype=torch.int64)
    for i in range(g):
        ratio = target_probs[rows, i, drafts[:, i]] / draft_probs[rows, i, drafts[:, i]]
        alive &= uniforms[:, i] < ratio
        count += alive
    full = torch.cat([draft_probs, torch.zeros_like(draft_probs[:, :1])], dim=1)
    bonus = draw(residual(target_probs[rows, count], full[rows, count]), torch.Generator().manual_seed(3))
    tokens = torch.full((b, g + 1), -1)
    tokens[:, :g] = torch.where(torch.arange(g) < count[:, None], drafts, -1)
    tokens[rows, count] = bonus
    return Verdict(tokens, count + 1, tokens, count)


def exact_tokenwise(drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Right, but keeps fewer."""
    return tokenwise(drafts, draft_probs, target_probs, uniforms, lambda p, q: (p - q).clamp(min=0))


def greedy_residual(drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Wrong: resamples from the target itself instead of the residual."""
    return tokenwise(drafts, draft_probs, target_probs, uniforms, lambda p, q: p)


def swapped(drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Wrong: block verification told that the drafts came from another distribution."""
    return verify_block(drafts, draft_probs.flip(-1), target_probs, uniforms)


def block_with_plain_bonus(
    drafts: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor
) -> Verdict:
    """Wrong: block lengths, but the token after a rejection drawn with weight 1, as token by token."""
    verdict = verify_block(drafts, draft_probs, target_probs, uniforms)
    rows, at = torch.arange(drafts.shape[0]), verdict.counts - 1
    full = torch.cat([draft_probs, torch.zeros_like(draft_probs[:, :1])], dim=1)
    left = (target_probs[rows, at] - full[rows, at]).clamp(min=0) + 1e-12
    tokens = verdict.tokens.clone()
    tokens[rows, at] = draw(left, torch.Generator().manual_seed(3))
    return Verdict(verdict.kept, verdict.counts, tokens, verdict.offered)


class TestVerifyBlock:
    @pytest.mark.parametrize("seeds", [(1, 2), (3, 4), (5, 6)])
    def test_emits_the_targets_law(self, seeds: tuple[int, int]) -> None:
        p, q = toy(seeds[0], 1.5), toy(seeds[1])
        assert abs(chi_square(emit(verify_block, p, q), p)) < 4

    @pytest.mark.parametrize("rule", [greedy_residual, swapped, block_with_plain_bonus])
    def test_the_same_test_rejects_wrong_rules(self, rule: Rule) -> None:
        p, q = toy(3, 1.5), toy(4)
        assert chi_square(emit(rule, p, q), p) > 8

    def test_accepts_at_least_as_much_as_token_by_token(self) -> None:
        p, q = toy(1, 1.5), toy(2)
        assert abs(chi_square(emit(exact_tokenwise, p, q), p)) < 4
        generator = torch.Generator().manual_seed(0)
        drafts = torch.stack([draw(q[0].expand(DRAWS, V), generator) for _ in range(3)], dim=1)
        q3, p4 = q[0].expand(DRAWS, 3, V), p[0].expand(DRAWS, 4, V)
        uniforms = torch.rand(DRAWS, 4, generator=generator, dtype=torch.float64)
        block = verify_block(drafts, q3, p4, uniforms).counts.double().mean()
        single = exact_tokenwise(drafts, q3, p4, uniforms).counts.double().mean()
        assert block > single + 0.02

    def test_the_targets_own_drafts_are_all_kept(self) -> None:
        p = toy(9)
        generator = torch.Generator().manual_seed(0)
        drafts = draw(p[0].expand(500, V), generator)[:, None]
        probs = p[0].expand(500, 1, V)
        uniforms = torch.rand(500, 2, generator=generator)
        verdict = verify_block(drafts, probs, p[0].expand(500, 2, V), uniforms)
        assert bool((verdict.counts == 2).all())
        assert verdict.kept.tolist() == [[0, 1]] * 500
        assert verdict.offered.tolist() == [1] * 500

    def test_shapes_and_padding_of_the_verdict(self) -> None:
        p, q = toy(1), toy(2)
        generator = torch.Generator().manual_seed(0)
        drafts = torch.randint(0, V, (200, 3), generator=generator)
        uniforms = torch.rand(200, 4, generator=generator)
        verdict = verify_block(drafts, q[0].expand(200, 3, V), p[0].expand(200, 4, V), uniforms)
        for row in range(200):
            count = int(verdict.counts[row])
            assert 1 <= count <= 4
            assert verdict.tokens[row, : count - 1].tolist() == drafts[row, : count - 1].tolist()
            assert 0 <= int(verdict.tokens[row, count - 1]) < V
            assert bool((verdict.tokens[row, count:] == -1).all())
            assert verdict.kept[row].tolist() == [min(i, count - 1) for i in range(4)]

    def test_an_impossible_draft_is_never_kept_even_at_uniform_zero(self) -> None:
        target = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
        verdict = verify_block(torch.tensor([[0]]), torch.tensor([[[1.0, 0.0]]]), target, torch.zeros(1, 2))
        assert verdict.tokens.tolist() == [[1, -1]]

    def test_no_residual_mass_falls_back_to_the_target(self) -> None:
        """Equal p and q leave nothing over; a rejection can then only be rounding, and p is the law."""
        same = torch.tensor([[[0.5, 0.5]]])
        target = torch.cat([same, same], dim=1)
        shy = torch.tensor([[[0.5, 0.5]]]) * (1 + 1e-3)  # a draft law that rounding made too large
        verdict = verify_block(torch.tensor([[0]]), shy, target, torch.tensor([[0.99999, 0.75]]))
        assert verdict.tokens.tolist() == [[1, -1]]
