"""The engine's housekeeping: who runs when, how answers end, and that one failure stays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import engines
import pytest
import torch
from torch import Tensor
from toy import VOCAB, FakeDrafter, ToyTarget, around, neighbours, table

from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.protocol import Shape
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Piece, Request
from specdec.engine.text import TextStream
from specdec.errors import RequestError
from specdec.sampling import Sampling
from specdec.stats import Round
from specdec.target.protocol import Target
from specdec.tree import DraftTree

TREE = Shape(2, 3, 10)
PROMPT = (3, 4)


def _toy(logits: Tensor | None = None, slots: int = 2, chunk: int = 512) -> Engine:
    return engines.engine(ToyTarget(logits), FakeDrafter(neighbours), TREE, Limits(slots, 64, chunk))


def _plain(prompt: Sequence[int], sampling: Sampling, logits: Tensor | None = None) -> list[int]:
    request = engines.request("plain", prompt, sampling)
    engines.run(engines.engine(ToyTarget(logits), limits=Limits(1, 64)), [request])
    return request.output


def _many(count: int, sampling: Sampling) -> list[Request]:
    return [engines.request(f"r{i}", (i % VOCAB, (3 * i) % VOCAB), sampling) for i in range(count)]


def test_requests_join_and_leave_between_rounds() -> None:
    machine, sampling = _toy(), Sampling(max_tokens=7)
    requests = _many(5, sampling)
    pieces = engines.run(machine, requests)
    assert all(r.finish == "length" and len(r.output) == 7 for r in requests)
    assert [r.output for r in requests] == [_plain(r.prompt, sampling) for r in requests]
    assert not machine.busy
    assert machine.active == {}
    for request in requests:
        mine = [p for p in pieces if p.request == request.id]
        assert [t for p in mine for t in p.tokens] == request.output
        assert [p.finish for p in mine][-1] == "length"
        assert all(p.finish is None for p in mine[:-1])
        assert all(len(p.drafted) == len(p.tokens) for p in mine)


def test_never_more_requests_than_slots() -> None:
    machine = _toy(slots=2)
    for request in _many(5, Sampling(max_tokens=5)):
        machine.add(request)
    while machine.busy:
        machine.step()
        assert len(machine.active) <= 2


def test_a_call_of_many_sequences_does_not_shut_others_out() -> None:
    machine = _toy(slots=2)
    crowd, others = _many(6, Sampling(max_tokens=6)), _many(2, Sampling(max_tokens=6))
    for number, request in enumerate(crowd):
        request.id, request.group = f"crowd{number}", "crowd"
    for number, request in enumerate(others):
        request.id, request.group = f"other{number}", f"other{number}"
    ended = [piece.request for piece in engines.run(machine, [*crowd, *others]) if piece.finish]
    assert len(ended) == 8
    assert ended.index("other0") < ended.index("crowd2"), "it came later, but held nothing"
    assert ended.index("other1") < ended.index("crowd3")
    assert [name for name in ended if name.startswith("crowd")] == [f"crowd{i}" for i in range(6)]


def test_cancellation_frees_the_slot_before_the_next_round() -> None:
    machine = _toy(slots=1)
    first, second = _many(2, Sampling(max_tokens=40))
    machine.add(first)
    machine.add(second)
    for _ in range(3):
        machine.step()
    kept = list(first.output)
    machine.cancel(first.id)
    pieces = machine.step()
    assert pieces[0] == Piece(first.id, (), (), (), "cancelled")
    assert first.output == kept
    assert second.slot == 0
    assert second.output, "the freed slot was not used in the same step"


def test_a_waiting_request_can_be_cancelled_and_strangers_are_ignored() -> None:
    machine = _toy(slots=1)
    first, second = _many(2, Sampling(max_tokens=5))
    machine.add(first)
    machine.add(second)
    machine.step()
    machine.cancel(second.id)
    machine.cancel("nobody")
    engines.run(machine, [])
    assert (first.finish, second.finish, second.output) == ("length", "cancelled", [])


def test_a_prompt_half_read_can_be_cancelled() -> None:
    machine = _toy(slots=1, chunk=4)
    request = engines.request("long", (1, 2, 3, 4, 5, 6, 7) * 4, Sampling(max_tokens=4))
    machine.add(request)
    machine.step()
    assert 0 < request.prefilled < len(request.prompt)
    machine.cancel(request.id)
    assert [p.finish for p in machine.step()] == ["cancelled"]
    assert not machine.busy


def test_long_prompts_are_read_between_rounds() -> None:
    machine = _toy(slots=2, chunk=4)
    running, long = (
        _many(1, Sampling(max_tokens=30))[0],
        engines.request("long", (1, 2) * 10, Sampling(max_tokens=2)),
    )
    machine.add(running)
    machine.step()
    before = len(running.output)
    machine.add(long)
    machine.step()
    assert 0 < long.prefilled < 20
    assert len(running.output) > before, "the running request had to wait for the prompt"


def _answers(sampling: Sampling, requests: Sequence[Request]) -> list[list[int]]:
    return [_plain(r.prompt, sampling) for r in requests]


@pytest.mark.parametrize("length", [0, 8])
def test_logits_that_are_not_numbers_fail_one_request_alone(length: int) -> None:
    """At the end of its prompt, and in the middle of its answer."""
    sampling = Sampling(max_tokens=12)
    requests = _many(3, sampling)
    for request in requests:
        request.prompt = (5, *request.prompt)
    wanted = _answers(sampling, requests)
    machine = _toy(slots=3)
    assert isinstance(machine.target, ToyTarget)
    machine.target.broken = (1, length)
    pieces = engines.run(machine, requests)
    assert [r.slot for r in requests] == [0, 1, 2]
    assert [r.finish for r in requests] == ["length", "error", "length"]
    assert [requests[0].output, requests[2].output] == [wanted[0], wanted[2]]
    assert requests[1].output == wanted[1][: len(requests[1].output)]
    assert len(requests[1].output) >= length - 2
    assert "NaN" in next(p.error or "" for p in pieces if p.finish == "error")


def test_nan_below_an_accepted_draft_is_noticed() -> None:
    """The root's logits are numbers, those of an accepted node are not."""
    sampling, logits = Sampling(max_tokens=12), table()
    wanted = _plain(PROMPT, sampling)
    logits[wanted[1], wanted[2]] = torch.nan
    drafter = FakeDrafter(around({PROMPT: wanted}, VOCAB, seed=1))
    machine = engines.engine(ToyTarget(logits), drafter, Shape(6, 2, 16), Limits(1, 64))
    request = engines.request("r", PROMPT, sampling)
    engines.run(machine, [request])
    assert request.finish == "error"
    assert request.output == wanted[: len(request.output)]


def test_rows_of_a_failed_request_do_not_spoil_its_slots_next_tenant(
    target_of: Callable[..., Target],
) -> None:
    """NaN rows behind a mask would still spoil sums of the requests they are batched with."""
    target, sampling = target_of("llama"), Sampling(max_tokens=8)
    prompts = [tuple(range(5, 45)), tuple(range(50, 80)), (9, 8, 7, 6)]
    alone = []
    for prompt in prompts:
        alone.append(engines.request("alone", prompt, sampling))
        engines.run(engines.engine(target, limits=Limits(1, 128)), alone[-1:])
    machine = engines.engine(target, NgramDrafter(), Shape(3, 3, 8), Limits(2, 128))
    requests = [engines.request(str(i), p, replace(sampling, max_tokens=40 if i == 0 else 8))
                for i, p in enumerate(prompts)]  # fmt: skip
    machine.add(requests[0])
    machine.add(requests[1])
    while not requests[1].running:
        machine.step()
    machine.cache.kv[:, :, requests[1].slot] = torch.nan
    engines.run(machine, requests[2:])
    assert requests[1].finish == "error"
    assert requests[0].output[:8] == alone[0].output
    assert requests[2].output == alone[2].output
    assert requests[2].slot == requests[1].slot


class _Grammar:
    """Permits `permitted` everywhere; raises where told to."""

    def __init__(self, permitted: Sequence[int], fails: str = "", after: int = 3) -> None:
        self.permitted, self.fails, self.after = permitted, fails, after
        self.accepted: list[int] = []

    def allowed(self, tree: DraftTree, row: int) -> Tensor:
        if self.fails == "allowed" and len(self.accepted) >= self.after:
            raise RuntimeError("the grammar is at its end")
        mask = torch.zeros(tree.nodes, VOCAB, dtype=torch.bool)
        mask[:, list(self.permitted)] = True
        return mask

    def accept(self, tokens: Sequence[int]) -> None:
        self.accepted += tokens
        if self.fails == "accept" and len(self.accepted) >= self.after:
            raise RuntimeError("")


@pytest.mark.parametrize("fails", ["allowed", "accept"])
def test_a_constraint_that_raises_fails_alone(fails: str) -> None:
    sampling = Sampling(max_tokens=12)
    requests = _many(3, sampling)
    requests[1].constraint = _Grammar(range(VOCAB), fails)
    wanted = _answers(sampling, requests)
    machine = _toy(slots=3)
    pieces = engines.run(machine, requests)
    assert [r.finish for r in requests] == ["length", "error", "length"]
    assert [requests[0].output, requests[2].output] == [wanted[0], wanted[2]]
    assert requests[1].output == wanted[1][: len(requests[1].output)]
    told = next(p.error for p in pieces if p.finish == "error")
    assert told == ("the grammar is at its end" if fails == "allowed" else "RuntimeError")
    assert machine.active == {}


@pytest.mark.parametrize("first", [True, False])
def test_a_tokenizer_that_raises_fails_alone(first: bool) -> None:
    """As those written in Python do for ids that only the logits know."""
    sampling = Sampling(max_tokens=12)
    requests = _many(3, sampling)
    wanted = _answers(sampling, requests)
    known = () if first else wanted[1][:1]

    def decode(ids: Sequence[int]) -> str:
        if not set(ids) <= set(known):
            raise TypeError("sequence item 0: expected str instance, NoneType found")
        return "".join(map(str, ids))

    requests[1].text = TextStream(decode)
    machine = _toy(slots=3)
    pieces = engines.run(machine, requests)
    assert [r.finish for r in requests] == ["length", "error", "length"]
    assert [requests[0].output, requests[2].output] == [wanted[0], wanted[2]]
    assert [p.error for p in pieces if p.error] == ["sequence item 0: expected str instance, NoneType found"]
    assert machine.active == {}


def test_a_grammar_rules_every_node_and_hears_every_token() -> None:
    request = engines.request("r", PROMPT, Sampling(temperature=1.0, seed=3, max_tokens=20))
    grammar = request.constraint = _Grammar((1, 4, 6, 7))
    engines.run(_toy(), [request])
    assert set(request.output) <= {1, 4, 6, 7}
    assert grammar.accepted == request.output
    alone = engines.request("r", PROMPT, request.sampling)
    alone.constraint = _Grammar((1, 4, 6, 7))
    engines.run(engines.engine(ToyTarget(), limits=Limits(1, 64)), [alone])
    assert alone.output == request.output


def test_stop_ids_end_an_answer_within_a_round() -> None:
    wanted = _plain(PROMPT, Sampling(max_tokens=12))
    stop = wanted[4]
    first = wanted.index(stop)
    drafter = FakeDrafter(around({PROMPT: wanted}, VOCAB))
    machine = engines.engine(ToyTarget(), drafter, Shape(6, 2, 16), Limits(1, 64))
    request = engines.request("r", PROMPT, Sampling(max_tokens=12, stop_token_ids=(stop,)))
    engines.run(machine, [request])
    assert request.finish == "stop"
    assert request.output == wanted[: first + 1]
    assert sum(request.counters.accepted) == request.counters.emitted - request.counters.rounds


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_max_tokens_cuts_the_round_and_the_cut_round_is_not_counted(wanted: int) -> None:
    answer = _plain(PROMPT, Sampling(max_tokens=12))
    grow = around({PROMPT: answer}, VOCAB)
    machine = engines.engine(ToyTarget(), FakeDrafter(grow), Shape(6, 1, 7), Limits(1, 64))
    request = engines.request("r", PROMPT, Sampling(max_tokens=wanted))
    engines.run(machine, [request])
    assert request.output == answer[:wanted]
    assert request.finish == "length"
    counters = request.counters
    assert counters.emitted + 1 <= wanted
    assert (counters.cut == 0) == (counters.emitted + 1 == wanted)


def test_log_probabilities_are_the_targets_own() -> None:
    sampling = Sampling(temperature=0.7, top_k=2, seed=2, max_tokens=10, logprobs=2, logit_bias={5: 3.0})
    request = engines.request("r", PROMPT, sampling)
    engines.run(_toy(), [request])
    logits, text = ToyTarget().table, (*PROMPT, *request.output)
    assert [entry.token for entry in request.logprobs] == request.output
    for i, entry in enumerate(request.logprobs):
        row = logits[text[i], text[i + 1]].log_softmax(-1)
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)


def test_more_alternatives_than_there_are_tokens_are_all_tokens() -> None:
    request = engines.request("r", PROMPT, Sampling(max_tokens=5, logprobs=VOCAB + 12))
    request.prompt_logprobs = VOCAB + 12
    engines.run(_toy(), [request])
    assert request.finish == "length"
    for entry in (*request.prompt_scores, *request.logprobs):
        assert sorted(token for token, _ in entry.top) == list(range(VOCAB))


def test_penalties_see_tokens_accepted_within_the_round() -> None:
    sampling = Sampling(max_tokens=20, frequency_penalty=1.0, presence_penalty=0.4, repetition_penalty=1.5)
    wanted = _plain(PROMPT, sampling)
    drafter = FakeDrafter(around({PROMPT: wanted}, VOCAB))
    machine = engines.engine(ToyTarget(), drafter, Shape(6, 2, 16), Limits(1, 64))
    request = engines.request("r", PROMPT, sampling)
    engines.run(machine, [request])
    assert request.output == wanted
    assert machine.counters.tau > 1.3
    assert wanted != _plain(PROMPT, Sampling(max_tokens=20))


def test_text_ends_at_a_stop_string_and_comes_in_pieces() -> None:
    answer = _plain(PROMPT, Sampling(max_tokens=12))
    text = "".join("abcdefgh"[t] for t in answer)
    stop = text[5:7]
    request = engines.request("r", PROMPT, Sampling(max_tokens=12, stop=(stop,)))
    request.text = TextStream(lambda ids: "".join("abcdefgh"[t] for t in ids), (stop,))
    drafter = FakeDrafter(around({PROMPT: answer}, VOCAB))
    machine = engines.engine(ToyTarget(), drafter, Shape(6, 2, 16), Limits(1, 64))
    pieces = engines.run(machine, [request])
    assert request.finish == "stop"
    assert request.text.text == text[: text.index(stop)] == "".join(p.text for p in pieces)


def test_a_recorder_hears_every_round() -> None:
    heard: list[Round] = []

    class Listener:
        def record(self, round: Round) -> None:
            heard.append(round)

    machine, request = _toy(), engines.request("r", PROMPT, Sampling(max_tokens=9))
    machine.recorder = Listener()
    engines.run(machine, [request])
    assert [r.requests for r in heard] == [("r",)] * (request.counters.rounds + request.counters.cut)
    emitted = [t for r in heard for t in r.verdict.tokens[0, : r.verdict.counts[0]].tolist()]
    assert emitted[: len(request.output) - 1] == request.output[1:]


REFUSED = {
    "prompt: is empty": engines.request("r", (), Sampling()),
    "longer than the context": engines.request("r", (1,) * 64, Sampling(max_tokens=1)),
    "max_tokens: reaches past": engines.request("r", (1,) * 10, Sampling(max_tokens=55)),
    "outside the vocabulary": engines.request("r", (1, VOCAB), Sampling(max_tokens=1)),
    "logit_bias: names": engines.request("r", (1,), Sampling(max_tokens=1, logit_bias={VOCAB: 1.0})),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_can_never_be_served_is_refused_at_the_door(told: str) -> None:
    machine = _toy()
    with pytest.raises(RequestError, match=told):
        machine.add(REFUSED[told])
    assert not machine.busy


def test_the_context_can_be_filled_to_its_end() -> None:
    machine = _toy()
    request = engines.request("r", (1,) * 10, Sampling(max_tokens=54))
    engines.run(machine, [request])
    assert len(request.output) == 54
