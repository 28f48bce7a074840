"""Sampling: validation, the order of processing, truncation against brute force, draws by inverse CDF."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import sampling as module
from specdec import tree as trees
from specdec.errors import RequestError
from specdec.sampling import BatchSampling, Sampling, Seen, choose, draw, process, uniforms
from specdec.tree import DraftTree

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 101, NAN, INF, "hot", None, True, 10**400),
    "top_p": (0.0, -1, 1.1, NAN, "all", False),
    "min_p": (-0.1, 1.5, NAN, []),
    "repetition_penalty": (0, 0.0, 1e-40, -1, 101, NAN, "x"),
    "presence_penalty": (-101, 101, NAN, -INF, "x"),
    "frequency_penalty": (-101, 101, NAN, INF, {}),
    "top_k": (-1, 1.5, "5", True, None),
    "max_tokens": (0, -5, 2.0, None, True),
    "seed": (1.5, "s", 2**64, -(2**63) - 1, True),
    "logprobs": (-1, 101, 0.5, True),
    "stop": ("text", ["a"], ("",), (1,), None),
    "stop_token_ids": ([1], (-1,), (1.5,), ("a",), (True,), None),
    "logit_bias": (
        None, [1], {"1": 2.0}, {-1: 0.0}, {1: NAN}, {1: INF}, {1: "a"}, {1: 1e300}, {1: 10**400},
        {True: 1.0}, {1: True},
    ),
}  # fmt: skip


def batch(*requests: Sampling, vocab: int) -> BatchSampling:
    return BatchSampling.of(requests, vocab, CPU)


def roots(rows: int) -> DraftTree:
    return trees.root_only(torch.zeros(rows, dtype=torch.int64))


def processed(logits: list[float] | Tensor, request: Sampling) -> Tensor:
    """One request, one node. [V]"""
    row = torch.as_tensor(logits, dtype=torch.float32)
    return process(row[None, None], roots(1), batch(request, vocab=row.numel()))[0, 0]


def finite(row: Tensor) -> list[bool]:
    kept: list[bool] = row.isfinite().tolist()
    return kept


def no_counts(rows: int, vocab: int) -> Seen:
    zeros = torch.zeros(rows, vocab, dtype=torch.int32)
    return Seen(zeros, zeros.clone())


class TestValidation:
    @pytest.mark.parametrize(
        ("field", "bad"), [(field, bad) for field, values in BAD.items() for bad in values]
    )
    def test_names_the_field(self, field: str, bad: object) -> None:
        with pytest.raises(RequestError) as caught:
            Sampling(**{field: bad})  # type: ignore[arg-type]  # wrong on purpose
        assert caught.value.field == field
        assert caught.value.allowed

    @pytest.mark.parametrize(
        ("field", "good"),
        [
            ("temperature", 0), ("temperature", 100.0), ("top_p", 1), ("top_p", 1e-9), ("min_p", 1.0),
            ("repetition_penalty", 0.5), ("presence_penalty", -2), ("frequency_penalty", 2.0),
            ("top_k", 10**9),
            ("max_tokens", 1), ("seed", -(2**63)), ("seed", 2**64 - 1), ("logprobs", 0), ("stop", ("a", "b")),
            ("stop_token_ids", (0, 5)), ("logit_bias", {0: -100, 7: 3.5}), ("ignore_eos", True),
        ],
    )  # fmt: skip
    def test_takes_what_is_allowed(self, field: str, good: object) -> None:
        assert getattr(Sampling(**{field: good}), field) == good  # type: ignore[arg-type]  # one field at a time

    def test_says_what_it_is(self) -> None:
        assert Sampling().greedy
        assert not Sampling(temperature=0.1).greedy
        assert not Sampling().penalised
        for field in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert Sampling(**{field: 1.5}).penalised  # type: ignore[arg-type]  # one field at a time

    def test_biased_token_outside_the_vocabulary(self) -> None:
        with pytest.raises(RequestError, match="ids below 4") as caught:
            batch(Sampling(logit_bias={4: 1.0}), vocab=4)
        assert caught.value.value == 4


class TestProcess:
    def test_greedy_without_settings_is_the_logits(self) -> None:
        assert processed([1.0, -2.0, 0.5], Sampling()).tolist() == [1.0, -2.0, 0.5]

    def test_low_precision_becomes_float32(self) -> None:
        out = process(
            torch.zeros(1, 1, 3, dtype=torch.bfloat16), roots(1), batch(Sampling(temperature=1.0), vocab=3)
        )
        assert out.dtype == torch.float32

    def test_plain_greedy_is_not_copied(self) -> None:
        logits = torch.zeros(1, 1, 3, dtype=torch.bfloat16)
        assert process(logits, roots(1), batch(Sampling(), vocab=3)) is logits

    def test_temperature_divides_only_those_who_ask(self) -> None:
        logits = torch.tensor([[[2.0, 4.0]]]).expand(2, 1, 2)
        out = process(logits, roots(2), batch(Sampling(), Sampling(temperature=0.5), vocab=2))
        assert out[:, 0].tolist() == [[2.0, 4.0], [4.0, 8.0]]

    @pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-12])
    def test_tiny_temperatures_are_greedy_not_nan(self, temperature: float) -> None:
        request = Sampling(temperature=temperature, logit_bias={2: 1.0})
        out = processed([1.0, 300.0, -300.0, 299.0], request)
        assert torch.softmax(out, dim=-1).tolist() == [0.0, 1.0, 0.0, 0.0]

    @pytest.mark.parametrize("top_p", [5e-324, 1e-40])
    def test_the_smallest_nuclei_keep_the_likeliest(self, top_p: float) -> None:
        kept = finite(processed([1.0, 3.0, 2.0], Sampling(temperature=1, top_p=top_p)))
        assert kept == [False, True, False]

    def test_bias_is_added_by_row(self) -> None:
        logits = torch.zeros(2, 1, 3)
        out = process(logits, roots(2), batch(Sampling(logit_bias={1: 2.5, 2: -1}), Sampling(), vocab=3))
        assert out[:, 0].tolist() == [[0.0, 2.5, -1.0], [0.0, 0.0, 0.0]]

    def test_grammar_rules_out_before_bias_can_help(self) -> None:
        allowed = torch.tensor([[[True, False]]])
        one = batch(Sampling(logit_bias={1: 100.0}), vocab=2)
        out = process(torch.zeros(1, 1, 2), roots(1), one, allowed=allowed)
        assert out[0, 0].tolist() == [0.0, -INF]

    def test_order_bias_penalty_temperature_truncation(self) -> None:
        """Bias 3 on token 1, then repetition halves it, temperature 0.5 doubles all, top-k keeps two."""
        request = Sampling(temperature=0.5, top_k=2, repetition_penalty=2.0, logit_bias={1: 3.0})
        counts = no_counts(1, 3)
        counts.prompt[0, 1] = 1
        tree = trees.root_only(torch.tensor([2]))  # the root is output: token 2 is known too
        out = process(torch.tensor([[[1.0, 1.0, -1.0]]]), tree, batch(request, vocab=3), counts)
        assert out[0, 0].tolist() == [2.0, 4.0, -INF]

    def test_truncations_follow_one_another(self) -> None:
        """Top-p works on what top-k left: of 4:3:2:1, top-3 makes 4/9, 3/9, 2/9, of which 0.5 needs two."""
        logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
        both = Sampling(temperature=1, top_k=3, top_p=0.5)
        assert finite(processed(logits, both)) == [True, True, False, False]
        narrow = Sampling(temperature=1, top_p=0.35)
        assert finite(processed(logits, narrow)) == [True, False, False, False]
        wide = Sampling(temperature=1, top_p=0.8, min_p=0.6)
        assert finite(processed(logits, wide)) == [True, True, False, False]

    def test_top_k_beyond_the_vocabulary_keeps_all(self) -> None:
        assert all(finite(processed([1.0, 2.0, 3.0], Sampling(temperature=1, top_k=10**30))))

    def test_truncation_is_by_request(self) -> None:
        logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log().expand(4, 1, 4)
        cuts: list[dict[str, Any]] = [{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.7}]
        mixed = batch(*(Sampling(temperature=1, **cut) for cut in cuts), vocab=4)
        assert process(logits, roots(4), mixed)[:, 0].isfinite().sum(-1).tolist() == [4, 1, 2, 2]


# eighths: rows tie often, and float32 and float64 never disagree about what ties
logit_rows = st.lists(st.integers(-40, 40).map(lambda eighths: eighths / 8), min_size=2, max_size=12)


class TestTruncation:
    @settings(deadline=None, max_examples=60)
    @given(logit_rows, st.integers(1, 15))
    def test_top_k(self, row: list[float], k: int) -> None:
        kept = finite(processed(row, Sampling(temperature=1, top_k=k)))
        edge = sorted(row, reverse=True)[min(k, len(row)) - 1]
        assert kept == [value >= edge for value in row]  # ties at the edge stay

    @pytest.mark.parametrize("head", [2, 1024])
    @settings(deadline=None, max_examples=60)
    @given(row=logit_rows, top_p=st.floats(0.01, 0.99))
    def test_top_p(self, head: int, row: list[float], top_p: float) -> None:
        """Both with the short sort alone and where it does not suffice."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "NUCLEUS_HEAD", head)
            kept = finite(processed(row, Sampling(temperature=1, top_p=top_p)))
        probs = torch.softmax(torch.tensor(row, dtype=torch.float64), dim=-1)
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(0) - ordered
        if bool(((before - top_p).abs() < 1e-5).any()):
            return  # float32 may decide either way there
        edge = float(ordered[before < top_p][-1])
        for value, stays in zip(probs.tolist(), kept, strict=True):
            assert stays == (value >= edge * (1 - 1e-9))

    def test_a_nucleus_does_not_depend_on_the_rows_beside(self) -> None:
        """A row alone is summed by several threads; here `top_p` falls where the order of summation decides."""
        threads, tree = torch.get_num_threads(), trees.chain(torch.tensor([[0, 0]]))
        rows = 3 * torch.randn(40, 49152, generator=torch.Generator().manual_seed(0))
        torch.set_num_threads(2)
        try:
            for row, beside in zip(rows, rows.logsumexp(dim=-1), strict=True):
                sums = row.logsumexp(dim=-1), beside
                mass = [(row.topk(64).values - total).exp().cumsum(dim=-1) for total in sums]
                for top_p in torch.maximum(*mass)[mass[0] != mass[1]].tolist()[:3]:
                    settings = batch(Sampling(temperature=1, top_p=top_p), vocab=49152)
                    alone, together = (row.expand(1, n, -1) for n in (1, 2))
                    alone, together = process(alone, roots(1), settings), process(together, tree, settings)
                    assert torch.equal(alone[0, 0], together[0, 1])
        finally:
            torch.set_num_threads(threads)

    @settings(deadline=None, max_examples=60)
    @given(logit_rows, st.floats(0.01, 0.99))
    def test_min_p(self, row: list[float], min_p: float) -> None:
        kept = finite(processed(row, Sampling(temperature=1, min_p=min_p)))
        for value, stays in zip(row, kept, strict=True):
            ratio = math.exp(value - max(row))
            assert stays == (ratio >= min_p) or ratio == pytest.approx(min_p, rel=1e-5)


class TestPenalties:
    def test_see_the_tokens_along_the_path_and_no_others(self) -> None:
        """Root 0 with children 1 and 2, and 1 -> 1: each node counts its own path, siblings do not leak."""
        tree = trees.build(torch.tensor([[0, 1, 2, 1]]), torch.tensor([[0, 0, 0, 1]]))
        request = Sampling(frequency_penalty=1.0, presence_penalty=10.0)
        out = process(torch.zeros(1, 4, 4), tree, batch(request, vocab=4), no_counts(1, 4))
        assert out[0].tolist() == [[-11, 0, 0, 0], [-11, -11, 0, 0], [-11, 0, -11, 0], [-11, -12, 0, 0]]

    def test_equal_what_the_emitted_text_would_count(self) -> None:
        """A node two below the root equals a root whose output already holds the path."""
        request = Sampling(
            temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2
        )
        logits = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0))
        seen = no_counts(1, 6)
        seen.prompt[0, 5], seen.output[0, 3] = 2, 1
        deep = process(logits, trees.chain(torch.tensor([[3, 1, 4]])), batch(request, vocab=6), seen)
        seen.output[0, 3] += 1
        seen.output[0, 1] += 1
        plain = process(logits[:, 2:], trees.root_only(torch.tensor([4])), batch(request, vocab=6), seen)
        assert torch.allclose(deep[:, 2:], plain)

    def test_repetition_counts_the_prompt_and_the_others_do_not(self) -> None:
        seen = no_counts(1, 3)
        seen.prompt[0, 1] = seen.prompt[0, 2] = 1
        tree = roots(1)
        logits = torch.tensor([[[0.0, 2.0, -2.0]]])
        rep = process(logits, tree, batch(Sampling(repetition_penalty=2.0), vocab=3), seen)
        assert rep[0, 0].tolist() == [0.0, 1.0, -4.0]
        others = process(logits, tree, batch(Sampling(presence_penalty=1.0), vocab=3), seen)
        assert others[0, 0].tolist() == [-1.0, 2.0, -2.0]

    def test_neighbours_are_not_punished(self) -> None:
        two = batch(Sampling(frequency_penalty=1.0), Sampling(), vocab=2)
        assert process(torch.zeros(2, 1, 2), roots(2), two, no_counts(2, 2))[:, 0].tolist() == [
            [-1, 0],
            [0, 0],
        ]

    def test_want_counts(self) -> None:
        with pytest.raises(AssertionError, match="counts"):
            process(torch.zeros(1, 1, 2), roots(1), batch(Sampling(presence_penalty=1.0), vocab=2))


class TestChoose:
    def test_greedy_takes_the_argmax(self) -> None:
        logits = torch.tensor([[[0.0, 3.0, 1.0]]])
        assert choose(logits, roots(1), batch(Sampling(), vocab=3), torch.zeros(1, 2)).tolist() == [[1]]

    def test_greedy_rows_stay_greedy_beside_sampled_ones(self) -> None:
        two = batch(Sampling(), Sampling(temperature=1.0), vocab=3)
        logits = torch.tensor([[[0.0, 1.0, 0.5]]]).expand(2, 1, 3)
        numbers = torch.full((2, 2), 0.999, dtype=torch.float64)
        assert choose(logits, roots(2), two, numbers).tolist() == [[1], [2]]

    def test_inverts_the_distribution(self) -> None:
        logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(5, 1, 4)
        numbers = torch.tensor([[0.05], [0.15], [0.45], [0.75], [0.9999999]], dtype=torch.float64)
        warm = batch(*[Sampling(temperature=1.0)] * 5, vocab=4)
        assert choose(logits, roots(5), warm, numbers)[:, 0].tolist() == [0, 1, 2, 3, 3]

    def test_zero_never_draws_an_excluded_token(self) -> None:
        logits = torch.tensor([[[-INF, 0.0, -INF]]])
        warm = batch(Sampling(temperature=1.0), vocab=3)
        for number in (0.0, 1 - 2**-53):
            drawn = choose(logits, roots(1), warm, torch.tensor([[number]], dtype=torch.float64))
            assert drawn.tolist() == [[1]]

    @pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000, 5 * 256])
    def test_blocks_change_no_draw(self, vocab: int) -> None:
        """Against one cumulative sum over the whole row; tokens without mass are never drawn, block edges included."""
        source = torch.Generator().manual_seed(vocab)
        mass = torch.rand(40, vocab, generator=source)
        mass = mass * (torch.rand(40, vocab, generator=source) < 0.3)
        mass[:, vocab // 2] += 0.1
        level = torch.rand(40, generator=source, dtype=torch.float64)
        level[:2] = torch.tensor([0.0, 1 - 2**-53])
        heights = mass.double().cumsum(-1)
        drawn = draw(mass, level)
        assert bool((mass.gather(1, drawn[:, None]) > 0).all())
        above = heights.gather(1, drawn[:, None])[:, 0] / heights[:, -1]
        below = above - mass.double().gather(1, drawn[:, None])[:, 0] / heights[:, -1]
        assert bool(((below - 1e-6 <= level) & (level <= above + 1e-6)).all())

    @pytest.mark.parametrize("honest", [True, False])
    def test_draws_follow_the_law(self, honest: bool) -> None:
        """Chi-square of 20,000 draws; squared uniforms, a wrong law, fail the same test."""
        count = 20_000
        logits = torch.randn(8, generator=torch.Generator().manual_seed(1))
        numbers = uniforms(5, count)[:, None]
        warm = batch(Sampling(temperature=0.8, top_k=6), vocab=8)
        row = process(logits[None, None], roots(1), warm)
        many = replace(warm, temperature=warm.temperature.expand(count))
        drawn = choose(row.expand(count, 1, 8), roots(count), many, numbers if honest else numbers**2)
        counts = torch.bincount(drawn[:, 0], minlength=8).double()
        law = torch.softmax(row[0, 0].double(), -1) * count
        inside = law > 0
        assert int(counts[~inside].sum()) == 0
        distance = float(((counts - law)[inside] ** 2 / law[inside]).sum())
        assert distance < 25 if honest else distance > 100

    def test_same_seed_same_tokens_for_any_tree(self) -> None:
        """A toy target whose logits depend on the last token, decoded plainly, by chains and by bushes."""
        table = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
        numbers, warm = uniforms(11, 40)[None], batch(Sampling(temperature=1.0, top_p=0.9), vocab=6)

        def decode(draft: list[int], parents: list[int]) -> list[int]:
            out = [3]
            while len(out) < 30:
                tree = trees.build(torch.tensor([[out[-1], *draft]]), torch.tensor([[0, *parents]]))
                row = process(table[tree.tokens], tree, warm)
                chosen = choose(row, tree, warm, numbers[:, len(out) - 1 :])[0].tolist()
                node: int | None = 0
                while node is not None:
                    out.append(chosen[node])
                    below = [i for i in range(1, tree.nodes) if tree.parents[0, i] == node]
                    node = next((i for i in below if int(tree.tokens[0, i]) == out[-1]), None)
            return out[:30]

        plain = decode([], [])
        assert len(set(plain)) > 2
        assert decode([1, 2, 3], [0, 1, 2]) == plain
        assert decode([0, 1, 2, 3, 4, 5, 0, 1, 2], [0, 0, 0, 0, 0, 0, 1, 2, 7]) == plain


class TestUniforms:
    def test_depend_on_the_seed_and_the_position_alone(self) -> None:
        for count in (1, 5, 15, 16, 17, 100):
            assert torch.equal(uniforms(9, count), uniforms(9, 300)[:count])
        assert not torch.equal(uniforms(9, 8), uniforms(10, 8))

    def test_take_every_allowed_seed(self) -> None:
        for seed in (-(2**63), -1, 0, 2**64 - 1):
            numbers = uniforms(seed, 4)
            assert numbers.dtype == torch.float64
            assert bool(((numbers >= 0) & (numbers < 1)).all())


def test_the_largest_is_the_fused_kernel_s_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.fused.available.runs", lambda device: True)
    monkeypatch.setattr("specdec.fused.largest.largest", lambda scores: (scores, torch.tensor([7])))
    assert module.likeliest(torch.zeros(1, 9)).tolist() == [7]
