"""Golden: with every drafter, tree shape, batch and prompt chunking, the tokens are those of plain decoding.

Plain decoding is one request alone in a fresh engine. Targets are random: their text soon repeats itself, so that
n-grams are accepted; heads are random over the tokens the target really emits, so that they are accepted too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import engines
import pytest
import torch
from torch import Tensor
from toy import FakeDrafter, around

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.mixed import MixedDrafter
from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import Context, Drafter, Shape
from specdec.engine.engine import Limits
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from specdec.sampling import Sampling
from specdec.target.protocol import Target
from specdec.tree import DraftTree

SHALLOW, WIDE, DEEP, FULL = Shape(1, 4, 5), Shape(2, 8, 24), Shape(8, 1, 9), Shape(7, 10, 60)
LEAN = [(arch, "lean") for arch in ("llama", "mistral", "qwen2", "qwen3")]
BOTH = [*LEAN, *((arch, "adapter") for arch, _ in LEAN)]
Targets = Callable[..., Target]


def _prompt(length: int, seed: int) -> tuple[int, ...]:
    """Random tokens, the middle said twice."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(3, 128, (length,), generator=generator).tolist()
    return tuple((tokens[: 2 * length // 3] + tokens)[-length:])


# mistral's window is 16: the longer prompts have left it before the first round
GREEDY = [(_prompt(37, 1), Sampling(max_tokens=22)), (_prompt(5, 2), Sampling(max_tokens=16)),
          (_prompt(21, 3), Sampling(max_tokens=10, repetition_penalty=1.2, frequency_penalty=0.4)),
          (_prompt(12, 4), Sampling(max_tokens=18, logit_bias={9: 2.0}))]  # fmt: skip
SAMPLED = [(_prompt(37, 1), Sampling(temperature=0.7, seed=5, max_tokens=18)),
           (_prompt(6, 6), Sampling(temperature=1.0, top_k=12, top_p=0.9, seed=6, max_tokens=14)),
           (_prompt(19, 7), Sampling(temperature=0.9, min_p=0.05, presence_penalty=0.5, seed=7, max_tokens=12)),
           (_prompt(5, 2), Sampling(max_tokens=12))]  # fmt: skip
Settings = Sequence[tuple[tuple[int, ...], Sampling]]


def _alone(target: Target, settings: Settings) -> list[list[int]]:
    out = []
    for prompt, sampling in settings:
        request = engines.request("alone", prompt, sampling)
        engines.run(engines.engine(target, limits=Limits(1, 128)), [request])
        out.append(request.output)
    return out


@pytest.fixture(scope="module")
def plain(target_of: Targets) -> Callable[[str, str, str], list[list[int]]]:
    """Plain answers to GREEDY or SAMPLED by target, computed once."""
    known: dict[tuple[str, str, str], list[list[int]]] = {}

    def get(arch: str, backend: str, kind: str) -> list[list[int]]:
        key = (arch, backend, kind)
        if key not in known:
            known[key] = _alone(target_of(arch, backend), GREEDY if kind == "greedy" else SAMPLED)
        return known[key]

    return get


def _batch(settings: Settings) -> list[engines.Request]:
    return [engines.request(f"r{i}", prompt, sampling) for i, (prompt, sampling) in enumerate(settings)]


def _together(target: Target, drafter: Drafter, shape: Shape, settings: Settings, apart: int = 0
              ) -> tuple[list[list[int]], float]:  # fmt: skip
    """Four requests over three slots; their tokens, and tau."""
    machine = engines.engine(target, drafter, shape)
    requests = _batch(settings)
    engines.run(machine, requests, apart)
    return [r.output for r in requests], machine.counters.tau


def _head_drafter(target: Target, answers: Sequence[Sequence[int]], **changes: Any) -> EagleDrafter:
    ids = {token for answer in answers for token in answer} | set(range(40, 48))
    return engines.eagle(target, engines.random_head(target, ids, **changes))


@pytest.mark.parametrize(("arch", "backend"), BOTH)
def test_none_and_ngram_equal_plain(target_of: Targets, plain: Callable, arch: str, backend: str) -> None:
    target, wanted = target_of(arch, backend), plain(arch, backend, "greedy")
    got, tau = _together(target, NoDrafter(), FULL, GREEDY)
    assert got == wanted
    assert tau == 1
    got, tau = _together(target, NgramDrafter(), WIDE if backend == "adapter" else FULL, GREEDY)
    assert got == wanted
    assert tau > 1.05, "nothing was accepted, so nothing was tested"


@pytest.mark.parametrize(("arch", "backend"), BOTH)
def test_a_random_head_equals_plain(target_of: Targets, plain: Callable, arch: str, backend: str) -> None:
    target, wanted = target_of(arch, backend), plain(arch, backend, "greedy")
    for shape in (SHALLOW, WIDE, DEEP, FULL) if arch == "llama" and backend == "lean" else (FULL,):
        got, tau = _together(target, _head_drafter(target, wanted), shape, GREEDY)
        assert got == wanted, shape
        assert tau > 1.02 or shape.width < 8, f"{shape}: nothing was accepted, so nothing was tested"
        assert _together(target, MixedDrafter(_head_drafter(target, wanted)), shape, GREEDY)[0] == wanted, (
            shape
        )


@pytest.mark.parametrize(("arch", "backend"), BOTH)
def test_trees_that_hold_the_answer_equal_plain(
    target_of: Targets, plain: Callable, arch: str, backend: str
) -> None:
    """Long accepted paths amid wrong nodes: compaction, windows and positions at every depth."""
    target, wanted = target_of(arch, backend), plain(arch, backend, "greedy")
    answers = {prompt: answer for (prompt, _), answer in zip(GREEDY, wanted, strict=True)}
    for seed, shape in enumerate((SHALLOW, WIDE, Shape(8, 1, 12), Shape(7, 10, 60))):
        got, tau = _together(target, FakeDrafter(around(answers, 128, seed)), shape, GREEDY)
        assert got == wanted, shape
        assert tau > 1.2


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_seeded_sampling_gives_plain_tokens_and_repeats(
    target_of: Targets, plain: Callable, arch: str
) -> None:
    target, wanted = target_of(arch), plain(arch, "lean", "sampled")
    answers = {prompt: answer for (prompt, _), answer in zip(SAMPLED, wanted, strict=True)}
    drafters = [
        NgramDrafter(), _head_drafter(target, wanted), MixedDrafter(_head_drafter(target, wanted)),
        FakeDrafter(around(answers, 128)),
    ]  # fmt: skip
    for drafter in drafters:
        for _ in range(2):
            assert _together(target, drafter, FULL, SAMPLED)[0] == wanted, drafter.name
    other = [(prompt, replace(s, seed=99) if s.temperature else s) for prompt, s in SAMPLED]
    assert _alone(target, other)[0] != wanted[0], "the seed is not looked at"


@pytest.mark.parametrize("apart", [1, 3])
def test_admission_time_does_not_matter(target_of: Targets, plain: Callable, apart: int) -> None:
    target, wanted = target_of("mistral"), plain("mistral", "lean", "greedy")
    assert _together(target, _head_drafter(target, wanted), FULL, GREEDY, apart)[0] == wanted
    assert _together(target, NgramDrafter(), WIDE, GREEDY[::-1], apart)[0] == wanted[::-1]


@pytest.mark.parametrize("chunk", [1, 5, 36])
def test_prompt_chunking_does_not_matter(target_of: Targets, plain: Callable, chunk: int) -> None:
    target, wanted = target_of("mistral"), plain("mistral", "lean", "greedy")
    limits = Limits(3, 128, chunk)
    machine = engines.engine(
        target, engines.eagle(target, engines.random_head(target, range(30))), WIDE, limits
    )
    requests = _batch(GREEDY)
    engines.run(machine, requests)
    assert [r.output for r in requests] == wanted


@pytest.mark.parametrize("name", ["none", "ngram", "eagle", "mixed"])
def test_equal_prompts_that_come_together_run_once(target_of: Targets, name: str) -> None:
    target, prompt = target_of("mistral"), _prompt(40, 8)
    settings = [(prompt, Sampling(temperature=0.8, seed=seed, max_tokens=12)) for seed in range(3)]
    settings[2] = (prompt[:30] + _prompt(9, 9), Sampling(max_tokens=12))
    wanted = _alone(target, settings)
    head = _head_drafter(target, wanted)
    drafters: dict[str, Drafter] = {"none": NoDrafter(), "ngram": NgramDrafter(), "mixed": MixedDrafter(head)}
    requests = _batch(settings)
    engines.run(engines.engine(target, drafters.get(name, head), FULL), requests)
    assert [r.output for r in requests] == wanted
    assert requests[0].reused == 0
    assert requests[1].reused >= 38
    assert requests[2].reused >= 28


@pytest.mark.parametrize("unread", [False, True], ids=["", "unread"])
@pytest.mark.parametrize("name", ["none", "ngram", "eagle", "mixed"])
def test_a_taken_over_prefix_equals_a_fresh_one(target_of: Targets, name: str, unread: bool) -> None:
    """Also where the head has not read it, because its request ran plainly."""
    target = target_of("mistral")
    first = _prompt(30, 8)
    sampling = Sampling(max_tokens=12)
    answer = _alone(target, [(first, sampling)])[0]
    prompts = [first, first[:20] + _prompt(9, 9), (*first, *answer, 7, 8, 9), first[:20] + _prompt(4, 10)]
    settings = [(prompt, sampling) for prompt in prompts]
    wanted = _alone(target, settings)
    head = _head_drafter(target, wanted)
    drafter: Drafter = {"none": NoDrafter(), "ngram": NgramDrafter(), "mixed": MixedDrafter(head)}.get(
        name, head
    )
    machine = engines.engine(target, drafter, FULL)
    requests = _batch(settings)
    requests[0].speculate = not unread
    for part in (requests[:1], requests[1:3], requests[3:]):
        engines.run(machine, part)
    assert [r.output for r in requests] == wanted
    assert requests[1].reused >= 19
    assert requests[2].reused >= 40
    assert requests[3].reused >= 19
    if name != "eagle":
        return
    for request, setting in zip(requests[1:], settings[1:], strict=True):
        fresh = _batch([setting])
        engines.run(engines.engine(target, _head_drafter(target, wanted), FULL), fresh)
        assert request.counters.accepted == fresh[0].counters.accepted, "the head saw something else"


def test_a_plain_request_among_speculating_ones_stays_plain(target_of: Targets, plain: Callable) -> None:
    target, wanted = target_of("llama"), plain("llama", "lean", "greedy")
    answers = {prompt: answer for (prompt, _), answer in zip(GREEDY, wanted, strict=True)}
    machine = engines.engine(target, FakeDrafter(around(answers, 128)), FULL)
    requests = _batch(GREEDY)
    requests[0].speculate = False
    engines.run(machine, requests)
    assert [r.output for r in requests] == wanted
    assert requests[0].counters.drafted == 0
    assert requests[1].counters.drafted > 0


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"max_length": 8}], ids=str)
def test_tree_scores_are_the_heads_own_along_every_path(
    target_of: Targets, plain: Callable, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth-k parity: what the drafter computes level by level over its cache, the head computes from nothing.

    Also where the head slides a window, and past the context its own config tells.
    """
    monkeypatch.setattr("specdec.head.model.SPARE", 1)
    target, wanted = target_of("llama"), plain("llama", "lean", "greedy")
    drafter = _head_drafter(target, wanted, **changes)
    machine = engines.engine(target, drafter, Shape(4, 6, 20))
    seen: list[tuple[tuple[int, ...], DraftTree, int]] = []
    propose = drafter.propose

    def watched(context: Context, shape: Shape) -> DraftTree:
        tree = propose(context, shape)
        for row, slot in enumerate(context.slots.tolist()):
            request = machine.active[slot]
            seen.append(((*request.prompt, *request.output), tree, row))
        return tree

    drafter.propose = watched  # type: ignore[method-assign]
    engines.run(machine, _batch(GREEDY))
    assert machine.counters.tau > 1.02
    assert len({tree.tokens.shape[0] for _, tree, _ in seen}) > 1, "batches of one size only"
    for text, tree, row in seen[::5]:
        assert tree.scores is not None
        leaf = int(tree.depths[row].argmax())
        got = []
        while leaf:
            got.insert(0, (int(tree.tokens[row, leaf]), float(tree.scores[row, leaf])))
            leaf = int(tree.parents[row, leaf])
        expected = _path_scores(target, drafter.head, text, [token for token, _ in got])
        assert [score for _, score in got] == pytest.approx(expected, abs=1e-4)


def _path_scores(target: Target, head: DraftHead, text: Sequence[int], path: Sequence[int]) -> list[float]:
    """Log-probability of every beginning of `path` after `text` under the head, by whole dense forwards."""
    slot, tokens = torch.tensor([0]), torch.tensor([text])
    length, attend = len(text) - 1, partial(_causal, head.config.window)
    with torch.inference_mode():
        cache = KVCache(target.info.cache, 1, length)
        features = target.forward(
            tokens[:, :-1], chunk_rows(slot, slot, length), cache, head.config.taps
        ).features
        g, after = head.fuse(features), tokens[:, 1:]
        scores, total = [], 0.0
        for token in path:
            y = head(target.embed(after), g, head.angles(torch.arange(after.shape[1])[None]), attend)
            column = int((head.ids == token).nonzero())
            total += float(head.logits(y)[0, -1].log_softmax(-1)[column])
            scores.append(total)
            g = torch.cat([g, head.feedback(y[:, -1:])], dim=1)
            after = torch.cat([after, torch.tensor([[token]])], dim=1)
    return scores


def _causal(window: int | None, heads: Heads, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in heads.turned())
    row = torch.arange(q.shape[2])
    back = row[:, None] - row
    sees = (back >= 0) & (back < (window or len(row)))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=sees, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)
