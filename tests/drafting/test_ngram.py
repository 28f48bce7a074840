"""The suffix automaton against brute force, and the drafter's trees, estimates and floors."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import tree as trees
from specdec.accept import Verdict, walk
from specdec.drafting.automaton import COUNTED, FOLLOWERS, START, SuffixAutomaton
from specdec.drafting.ngram import MEMORY, MIXED, SOLE, Calibration, NgramDrafter
from specdec.drafting.protocol import PLAIN, Context, Drafter, Shape
from specdec.tree import DraftTree

WIDE = Shape(depth=7, width=6, nodes=32)
texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def index(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    return automaton


def longest_suffix(text: list[int]) -> int:
    """Length of the longest suffix that also ends earlier, by trying all."""
    n = len(text)
    return max(
        (k for k in range(n) if any(text[e - k : e] == text[n - k :] for e in range(k, n))),
        default=0,
    )  # fmt: skip


def followers(text: list[int], words: list[int]) -> Counter[int]:
    k = len(words)
    return Counter(text[e] for e in range(k, len(text)) if text[e - k : e] == words)


def context(drafter: NgramDrafter, roots: list[int]) -> Context:
    slots = torch.arange(len(roots))
    lengths = torch.tensor([len(drafter.text(slot)) - 1 for slot in range(len(roots))])
    return Context(slots, torch.tensor(roots), lengths)


def admit(*prompts: list[int]) -> tuple[NgramDrafter, Context]:
    drafter = NgramDrafter()
    for slot, text in enumerate(prompts):
        prompt = torch.tensor(text[:-1], dtype=torch.int64)
        drafter.admit(slot, prompt, torch.zeros(len(text) - 1, 0), text[-1])
    return drafter, context(drafter, [text[-1] for text in prompts])


def verdict(tokens: list[list[int]]) -> Verdict:
    """A round that emitted these tokens, through a chain tree."""
    width = max(len(row) for row in tokens)
    counts = torch.tensor([len(row) for row in tokens])
    padded = torch.tensor([row + [-1] * (width - len(row)) for row in tokens])
    kept = torch.minimum(torch.arange(width).expand(len(tokens), width), counts[:, None] - 1)
    return Verdict(kept, counts, padded, counts - 1)


def run(
    drafter: NgramDrafter, c: Context, tree: DraftTree, follow: list[list[int]]
) -> tuple[Context, Verdict]:
    """One round with a target that writes `follow[b]` on after the root, whatever the tree."""
    depths = tree.depths.tolist()
    chosen = torch.tensor([[follow[b][d] for d in row] for b, row in enumerate(depths)])
    seen = walk(tree, chosen)
    drafter.observe(c, torch.zeros(*tree.tokens.shape, 0), seen)
    last = seen.tokens.gather(1, seen.counts[:, None] - 1)[:, 0]
    return Context(c.slots, last, c.lengths + seen.counts), seen


def path(tree: DraftTree, row: int, node: int) -> list[int]:
    tokens: list[int] = []
    while node:
        tokens.append(int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return tokens[::-1]


class TestSuffixAutomaton:
    @given(texts)
    def test_match_is_the_longest_suffix_seen_before(self, text: list[int]) -> None:
        automaton = SuffixAutomaton()
        for end, token in enumerate(text, start=1):
            automaton.append(token)
            state, length = automaton.match()
            assert length == longest_suffix(text[:end])
            assert (state == START) == (length == 0)
        assert len(automaton) == len(text)

    @given(texts)
    def test_moves_are_what_followed_and_so_for_every_shorter_match(self, text: list[int]) -> None:
        automaton = index(text)
        state, length = automaton.match()
        for k in range(length, 0, -1):
            if k <= automaton.lengths[automaton.links[state]]:
                state = automaton.links[state]
            assert set(automaton.moves[state]) == set(followers(text, text[len(text) - k :]))

    @given(texts)
    def test_followers_are_counted(self, text: list[int]) -> None:
        automaton = index(text)
        for start in range(len(text)):
            state = START
            for end in range(start, len(text)):
                state = automaton.moves[state][text[end]]
                words = text[start : end + 1]
                want = followers(text, words)
                have = automaton.followers[state]
                assert set(have) <= set(want)
                assert all(have[token] <= count for token, count in want.items() if token in have)
        state, length = automaton.match()
        if length > 0 and len(text) <= COUNTED:  # no chain of suffixes is longer than the counted ones
            assert automaton.followers[state] == followers(text, text[len(text) - length :])

    def test_ranks_by_frequency_then_recency(self) -> None:
        automaton = index([9, 1, 9, 2, 9, 1, 9, 3, 9])
        state, length = automaton.match()
        assert length == 1
        assert automaton.ranked(state) == [1, 3, 2]

    def test_remembers_the_most_recent_followers(self) -> None:
        automaton = index([token for new in range(1, FOLLOWERS + 5) for token in (0, new)] + [0])
        state, _ = automaton.match()
        assert len(automaton.followers[state]) == FOLLOWERS
        assert automaton.ranked(state)[0] == FOLLOWERS + 4
        assert 1 not in automaton.followers[state]

    def test_size_is_linear(self) -> None:
        text = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(0)).tolist()
        assert len(index(text).lengths) <= 2 * len(text)

    def test_empty_text_matches_nothing(self) -> None:
        assert SuffixAutomaton().match() == (START, 0)
        assert len(SuffixAutomaton()) == 0


class TestTrees:
    @settings(deadline=None)
    @given(st.lists(texts, min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 4), st.integers(2, 20))
    def test_are_valid(self, prompts: list[list[int]], depth: int, width: int, nodes: int) -> None:
        drafter, c = admit(*prompts)
        tree = drafter.propose(c, Shape(depth, width, nodes))
        assert 1 <= tree.nodes == int(tree.sizes.max()) <= nodes
        assert tree.tokens[:, 0].tolist() == c.roots.tolist()
        assert int(tree.depths.max()) <= depth
        for row, text in enumerate(prompts):
            size = int(tree.sizes[row])
            offered = {tuple(path(tree, row, node)) for node in range(1, size)}
            assert len(offered) == size - 1, "siblings repeat a token"
            parents = tree.parents[row, 1:size].tolist()
            assert all(parent <= node for node, parent in enumerate(parents))
            assert max(Counter(parents).values(), default=0) <= width
            for words in offered:  # every offered token followed its parent somewhere
                assert followers(text, [text[-1], *words][-2:-1])[words[-1]] > 0

    @given(texts)
    def test_scores_fall_along_paths_and_siblings_share_one(self, text: list[int]) -> None:
        drafter, c = admit(text)
        tree = drafter.propose(c, WIDE)
        if tree.nodes == 1:
            return
        assert tree.scores is not None and tree.scores.dtype == torch.float32
        scores = tree.scores[0].tolist()
        parents = tree.parents[0].tolist()
        assert scores[0] == 0
        assert all(scores[node] < scores[parents[node]] for node in range(1, tree.nodes))
        for parent in set(parents):
            children = [node for node in range(1, tree.nodes) if parents[node] == parent]
            assert sum(math.exp(scores[node] - scores[parent]) for node in children) < 1

    def test_equal_what_build_and_pad_make(self) -> None:
        drafter, c = admit([1, 2, 3, 1, 2, 4, 1, 2], [1, 2, 3, 4], [5, 5, 5])
        tree = drafter.propose(c, Shape(7, 6, 64))
        assert tree.scores is not None
        singles = []
        for row in range(3):
            n = int(tree.sizes[row])
            built = trees.build(tree.tokens[row : row + 1, :n], tree.parents[row : row + 1, :n],
                                scores=tree.scores[row : row + 1, :n])  # fmt: skip
            singles.append(built)
        stacked = trees.stack(singles)
        for name in ("tokens", "parents", "depths", "ancestors", "sizes", "scores"):
            assert torch.equal(getattr(stacked, name), getattr(tree, name)), name

    def test_all_64_nodes_fit_their_words(self) -> None:
        drafter, c = admit([7] * 12)
        tree = drafter.propose(c, Shape(63, 6, 64))
        assert tree.nodes == 64
        assert torch.equal(tree.ancestors, trees.build(tree.tokens, tree.parents).ancestors)

    def test_nothing_to_say_is_a_root(self) -> None:
        drafter, c = admit([1, 2, 3, 4], [5])
        tree = drafter.propose(c, WIDE)
        assert tree.nodes == 1
        assert tree.tokens.tolist() == [[4], [5]]

    @pytest.mark.parametrize("shape", [PLAIN, Shape(7, 6, 1), Shape(0, 6, 8), Shape(7, 0, 8)])
    def test_small_shapes_are_plain(self, shape: Shape) -> None:
        drafter, c = admit([1, 2, 1, 2, 1])
        assert drafter.propose(c, shape).nodes == 1

    def test_alternatives_branch_the_most_frequent_first(self) -> None:
        drafter, c = admit([1, 2, 3, 1, 2, 4, 1, 2, 4, 1, 2])
        tree = drafter.propose(c, Shape(1, 6, 8))
        assert tree.tokens[0, :3].tolist() == [2, 4, 3]

    def test_shorter_matches_branch_last(self) -> None:
        drafter, c = admit([1, 2, 3, 9, 2, 5, 1, 2])
        tree = drafter.propose(c, Shape(1, 6, 8))
        assert tree.tokens.tolist() == [[2, 3, 5]]

    def test_a_batch_is_its_requests(self) -> None:
        together, c = admit([1, 2, 3, 1, 2], [4, 5, 4])
        alone, one = admit([1, 2, 3, 1, 2])
        pair, single = together.propose(c, WIDE), alone.propose(one, WIDE)
        n = int(single.sizes[0])
        assert pair.tokens[0, :n].tolist() == single.tokens[0].tolist()
        assert pair.sizes[0] == n


class TestAcceptance:
    def test_repetitive_text_gives_long_chains(self) -> None:
        words = [3, 1, 4, 1, 5, 9, 2, 6]
        drafter, c = admit(words * 3)
        emitted, rounds = 0, 0
        while emitted < 60:
            tree = drafter.propose(c, Shape(7, 6, 16))
            follow = [(words * 3)[(emitted + d) % 8] for d in range(9)]
            c, seen = run(drafter, c, tree, [follow])
            emitted, rounds = emitted + int(seen.counts[0]), rounds + 1
        assert emitted / rounds > 6

    def test_output_is_indexed_too(self) -> None:
        drafter, c = admit([1, 2])
        assert drafter.propose(c, WIDE).nodes == 1
        drafter.observe(c, torch.zeros(1, 3, 0), verdict([[7, 8, 2]]))
        tree = drafter.propose(context(drafter, [2]), Shape(2, 6, 8))
        assert path(tree, 0, int(tree.depths[0].argmax())) == [7, 8]

    def test_padding_of_the_verdict_is_not_text(self) -> None:
        drafter, c = admit([1, 2], [1, 2])
        drafter.observe(c, torch.zeros(2, 3, 0), verdict([[7], [7, 8, 9]]))
        assert [len(drafter.text(slot)) for slot in (0, 1)] == [3, 5]

    def test_what_nobody_asks_about_is_read_later_and_the_same(self) -> None:
        (read, c), (unread, _) = admit([1, 2, 3]), admit([1, 2, 3])
        for token in (1, 2, 3, 1, 2) * 2:
            seen = verdict([[token]])
            read.observe(c, torch.zeros(1, 1, 0), seen)
            read.text(0)
            unread.observe(c, torch.zeros(1, 1, 0), seen)
        assert len(unread._texts[0].indexed) == 3, "nobody has asked since"
        trees = [drafter.propose(context(drafter, [2]), WIDE) for drafter in (read, unread)]
        assert torch.equal(trees[0].tokens, trees[1].tokens) and torch.equal(trees[0].scores, trees[1].scores)

    def test_release_forgets(self) -> None:
        drafter, _ = admit([1, 2, 1, 2, 1])
        drafter.release(0)
        assert not drafter._texts
        drafter.release(0)
        drafter.admit(0, torch.tensor([4]), torch.zeros(1, 0), 1)
        assert drafter.propose(context(drafter, [1]), WIDE).nodes == 1

    def test_prompts_are_taken_over_whole(self) -> None:
        drafter: Drafter = NgramDrafter()
        assert drafter.reuse(0, 1, 12) == 12
        assert drafter.taps == ()


def exhaust(drafter: NgramDrafter, rounds: int, *, hold: bool) -> None:
    """Rounds over texts whose only repetition is one pair, which holds or does not."""
    for turn in range(rounds):
        drafter.admit(0, torch.tensor([1, 2, 3]), torch.zeros(3, 0), 1)
        follow = [2 if hold else 50 + turn]
        drafter.observe(context(drafter, [1]), torch.zeros(1, 1, 0), verdict([follow]))
        drafter.text(0)  # somebody asks
        drafter.release(0)


class TestCalibration:
    def test_rejections_cut_and_acceptances_restore(self) -> None:
        drafter, c = admit([1, 2, 3, 1])
        shape = Shape(1, 6, 8, node_floor=0.05)
        assert drafter.propose(c, shape).nodes == 2
        exhaust(drafter, 80, hold=False)
        drafter.admit(0, torch.tensor([1, 2, 3]), torch.zeros(3, 0), 1)
        assert drafter.propose(c, shape).nodes == 1
        exhaust(drafter, 80, hold=True)  # learnt from plain rounds: nothing was offered
        drafter.admit(0, torch.tensor([1, 2, 3]), torch.zeros(3, 0), 1)
        assert drafter.propose(c, shape).nodes == 2

    def test_estimates_are_frequencies(self) -> None:
        calibration = Calibration()
        bucket = Calibration.bucket(2, 0, MIXED)
        for turn in range(int(MEMORY) - 10):
            calibration.note(bucket, (0, 0, 1, None)[turn % 4])
        first, second, third, *_ = (math.exp(log) for log in calibration.logs(bucket))
        assert first == pytest.approx(0.5, abs=0.01)
        assert second == pytest.approx(0.25, abs=0.01)
        assert third < 0.01

    def test_old_traffic_fades(self) -> None:
        calibration = Calibration()
        bucket = Calibration.bucket(3, 1, SOLE)
        for _ in range(2000):
            calibration.note(bucket, None)
        for _ in range(600):
            calibration.note(bucket, 0)
        assert math.exp(calibration.logs(bucket)[0]) > 0.6

    def test_buckets_are_apart(self) -> None:
        places = {Calibration.bucket(length, depth, kind) for length in range(1, 40) for depth in range(64)
                  for kind in range(4)}  # fmt: skip
        calibration = Calibration()
        assert all(max(calibration.logs(place)) < 0 for place in places)
        assert Calibration.bucket(1, 0, 0) != Calibration.bucket(2, 0, 0) != Calibration.bucket(2, 1, 0)
        assert Calibration.bucket(17, 0, 0) == Calibration.bucket(900, 0, 0)

    @settings(deadline=None)
    @given(texts, st.floats(0.001, 0.9))
    def test_node_floor_is_respected_and_cuts_nothing_above_it(self, text: list[int], floor: float) -> None:
        drafter, c = admit(text)
        free, cut = drafter.propose(c, WIDE), drafter.propose(c, Shape(7, 6, 32, node_floor=floor))
        above = _above(free, floor)
        assert cut.tokens[0].tolist() == free.tokens[0][above].tolist()

    @settings(deadline=None)
    @given(texts, st.floats(0.01, 1.0))
    def test_level_floor_cuts_a_level_and_all_below(self, text: list[int], floor: float) -> None:
        drafter, c = admit(text)
        free, cut = drafter.propose(c, WIDE), drafter.propose(c, Shape(7, 6, 32, level_floor=floor))
        promises = [1.0] * 9
        if free.scores is not None:
            for depth in range(1, 9):
                promises[depth] = float(free.scores[0][free.depths[0] == depth].exp().sum())
        end = next((depth for depth in range(1, 9) if promises[depth] < floor - 1e-6), 9)
        assert int(cut.depths.max()) < end or free.nodes == 1
        assert cut.tokens[0].tolist() == free.tokens[0][free.depths[0] < end].tolist()


def _above(tree: DraftTree, floor: float) -> Tensor:
    if tree.scores is None:
        return torch.ones(1, dtype=torch.bool)
    return tree.scores[0] >= math.log(floor)
