"""The library's face over a tiny saved model: prompts in all forms, streams, batches, and what is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engines
import numpy as np
import pytest
import tiny
import torch

from specdec import Answer, Options, Sampling, SpecdecError, SpecDecoder
from specdec.drafting.protocol import Shape
from specdec.engine.build import parse_tree
from specdec.errors import MismatchError, RequestError, UnsupportedError
from specdec.head.config import HeadConfig
from specdec.head.export import TargetNames, save_raw
from specdec.head.model import DraftHead
from specdec.target.files import resolve
from specdec.target.load import check_room

OPTIONS = Options(dtype=torch.float32, device="cpu", slots=2, tree=Shape(3, 4, 12))
SHORT = Sampling(max_tokens=12, ignore_eos=True)
NAMES = TargetNames("tiny/llama")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(model: Path) -> SpecDecoder:
    return SpecDecoder.from_pretrained(str(model), None, OPTIONS)


@pytest.fixture(scope="module")
def head(plain: SpecDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = engines.random_head(plain.engine.target, range(20, 60))
    return save_raw(made, tmp_path_factory.mktemp("heads") / "good", target=NAMES, dtype=torch.float32)


def test_every_drafter_gives_the_same_answers(plain: SpecDecoder, head: Path) -> None:
    prompts = ["abc abc abc", "What is it?", "x"]
    wanted = plain.generate(prompts, SHORT)
    assert [a.finish_reason for a in wanted] == ["length"] * 3
    assert plain.engine.drafter.name == "none"
    for draft in ("ngram", head):
        fast = plain.with_drafter(draft, OPTIONS)
        assert fast.engine.target is plain.engine.target, "weights were loaded twice"
        answers = fast.generate(prompts, SHORT)
        assert [a.token_ids for a in answers] == [a.token_ids for a in wanted]
        assert [a.text for a in answers] == [a.text for a in wanted]
        assert sum(a.counters.drafted for a in answers) > 0


def test_an_answer_says_what_happened(plain: SpecDecoder) -> None:
    (answer,) = plain.generate("hello", Sampling(max_tokens=6, ignore_eos=True, logprobs=1))
    assert isinstance(answer, Answer)
    assert len(answer.token_ids) == len(answer.logprobs) == 6
    assert answer.text == plain.decode(answer.token_ids)
    assert answer.prompt_tokens == len(plain.encode("hello"))
    assert answer.seconds > 0
    assert answer.tokens_per_second > 0
    assert {"tau", "alpha", "rounds", "tokens_per_second", "seconds"} <= answer.stats().keys()
    assert answer.stats()["rounds"] == 5
    assert answer.error is None


def test_text_messages_and_ids_are_prompts(plain: SpecDecoder) -> None:
    ids = plain.encode("hi")
    assert plain.decode(ids) == "u:hi\na:"
    assert plain.encode([{"role": "user", "content": "hi"}]) == ids
    assert plain.encode(list(ids)) == ids
    assert plain.decode(plain.encode("hi", chat=False)) == "hi"
    answers = [
        plain.generate(p, SHORT)[0].token_ids for p in ("hi", [{"role": "user", "content": "hi"}], ids)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_stop_strings_and_seeds_work_through_the_face(plain: SpecDecoder) -> None:
    text = plain.generate("hello", SHORT)[0].text
    stop = text[4:6]
    (answer,) = plain.generate("hello", Sampling(max_tokens=12, ignore_eos=True, stop=(stop,)))
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]
    warm = [plain.generate("hello", Sampling(temperature=1.0, seed=s, max_tokens=12))[0] for s in (1, 1, 2)]
    assert warm[0].token_ids == warm[1].token_ids != warm[2].token_ids


def test_the_targets_own_stop_ends_unless_ignored(plain: SpecDecoder) -> None:
    assert plain.engine.target.info.stop_ids == (2,)
    assert 2 in plain.request("x", Sampling()).stop_ids
    assert plain.request("x", Sampling(ignore_eos=True, stop_token_ids=(7,))).stop_ids == {7}


def test_a_stream_is_the_answer_in_pieces(plain: SpecDecoder) -> None:
    (wanted,) = plain.generate("abcabc", SHORT)
    fast = plain.with_drafter("ngram", OPTIONS)
    pieces = [*fast.stream("abcabc", SHORT)]
    assert "".join(p.text for p in pieces) == wanted.text
    assert tuple(t for p in pieces for t in p.tokens) == wanted.token_ids
    assert [p.finish for p in pieces][-1] == "length"


def test_leaving_a_stream_frees_its_slot(plain: SpecDecoder) -> None:
    pieces = plain.stream("abcabc", Sampling(max_tokens=100, ignore_eos=True))
    next(pieces)
    assert plain.engine.busy
    pieces.close()  # type: ignore[attr-defined]
    assert not plain.engine.busy


def test_two_streams_at_once_keep_to_themselves(plain: SpecDecoder) -> None:
    prompts, texts = ("first one", "second"), ["", ""]
    wanted = [a.text for a in plain.generate(prompts, SHORT)]
    streams = [plain.stream(prompt, SHORT) for prompt in prompts]
    going = [0, 1]
    while going:
        for i in list(going):
            piece = next(streams[i], None)
            if piece is None:
                going.remove(i)
            else:
                texts[i] += piece.text
    assert texts == wanted
    assert not plain.engine.busy


def test_asynchronous_faces(plain: SpecDecoder) -> None:
    async def both() -> tuple[str, str]:
        text = "".join([piece.text async for piece in plain.astream("abc", SHORT)])
        return text, (await plain.agenerate("abc", SHORT))[0].text

    streamed, whole = asyncio.run(both())
    assert streamed == whole == plain.generate("abc", SHORT)[0].text


def test_a_timeout_frees_the_slot_and_leaves_others_alone(
    plain: SpecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads cannot be interrupted: the round that runs has to end before anybody else touches the engine."""
    step = plain.engine.step
    monkeypatch.setattr(plain.engine, "step", lambda: (time.sleep(0.01), step())[1])
    long = Sampling(max_tokens=100, ignore_eos=True)

    async def left() -> list[str]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await plain.agenerate("abcabc", long)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                async for _ in plain.astream("abcabc", long):
                    pass
        assert not plain.engine.busy
        both = await asyncio.gather(plain.agenerate("abc", SHORT), plain.agenerate("second", SHORT))
        return [answers[0].text for answers in both]

    assert asyncio.run(left()) == [answer.text for answer in plain.generate(["abc", "second"], SHORT)]


def test_leaving_a_stream_does_not_hold_up_the_event_loop(
    plain: SpecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is freed by a turn of the engine, which others may be in the middle of."""
    step, threads = plain.engine.step, set[int]()
    monkeypatch.setattr(plain.engine, "step", lambda: (threads.add(threading.get_ident()), step())[1])

    async def left() -> None:
        stream = plain.astream("abcabc", Sampling(max_tokens=100, ignore_eos=True))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # a generator, though only an iterator is promised

    asyncio.run(left())
    assert not plain.engine.busy
    assert threads and threading.get_ident() not in threads


def test_threads_share_a_decoder(plain: SpecDecoder) -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    wanted = [answer.text for answer in plain.generate(prompts, SHORT)]
    with ThreadPoolExecutor(4) as pool:
        assert [a[0].text for a in pool.map(lambda p: plain.generate(p, SHORT), prompts)] == wanted
    assert not plain.engine.busy


def test_numbers_come_in_many_kinds(plain: SpecDecoder) -> None:
    ids = [40, 41, 42]
    wanted = plain.generate(ids, SHORT)[0].text
    for kind in (torch.tensor(ids), np.array(ids), [np.int64(i) for i in ids]):
        assert plain.generate(kind, SHORT)[0].text == wanted
    assert len(plain.generate(torch.tensor([ids, ids]), SHORT)) == 2  # type: ignore[arg-type]


def test_an_answer_of_one_token_has_no_speed(plain: SpecDecoder) -> None:
    assert plain.generate("abc", Sampling(max_tokens=1))[0].stats()["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("", "prompt: is empty"), ([{"role": "user", "content": "a"}, "b"], "neither"), ([1, 2.0], "float, int"),
     ([], "prompt: is empty"), ("\ud800", "not UTF-8"), ([1, 500], "outside the vocabulary"),
     (None, "NoneType"), (7, "int"), (b"abc", "bytes"), (1.5, "float"), ({"role": "user", "content": "a"}, "dict"),
     ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "content: wants text"),
     ("x" * 600, "longer than the context"), ([{"role": "user", "content": "\udcff"}], "not UTF-8")],
)  # fmt: skip
def test_a_bad_prompt_is_refused_before_anything_runs(plain: SpecDecoder, prompt: object, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        plain.generate(["fine", prompt], SHORT)  # type: ignore[list-item]
    assert not plain.engine.busy, "the good prompt was left behind"
    with pytest.raises(RequestError, match=told):
        plain.generate(prompt, SHORT)  # type: ignore[arg-type]


def test_a_request_runs_once(plain: SpecDecoder) -> None:
    request = plain.request("abc", SHORT)
    list(plain.run(request))
    answer = list(request.output)
    with pytest.raises(RequestError, match="has run already"):
        list(plain.run(request))
    assert not plain.engine.busy
    plain.generate("x", SHORT)
    assert request.output == answer


def test_more_tokens_than_any_memory_are_refused_before_numbers_are_drawn(plain: SpecDecoder) -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        plain.generate("abc", Sampling(max_tokens=10**13, temperature=1.0))


def test_messages_want_a_template_that_takes_them(model: Path) -> None:
    decoder = SpecDecoder.from_pretrained(str(model), "none", OPTIONS)
    decoder.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        decoder.encode("hi")
    decoder.tokenizer.chat_template = None
    assert decoder.decode(decoder.encode("hi")) == "hi"
    with pytest.raises(RequestError, match="chat template"):
        decoder.encode([{"role": "user", "content": "hi"}])


def test_a_head_of_another_target_is_refused(plain: SpecDecoder, tmp_path: Path) -> None:
    made = engines.random_head(plain.engine.target, range(20))
    config = HeadConfig(**{**_fields(made.config), "fingerprint": "of another"})
    other = DraftHead(config)
    other.load_state_dict(made.state_dict())
    save_raw(other, tmp_path / "other", target=NAMES)
    with pytest.raises(MismatchError, match="another target"):
        plain.with_drafter(tmp_path / "other", OPTIONS)


def _fields(config: HeadConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in HeadConfig.__slots__}


@pytest.mark.parametrize(
    ("options", "told"),
    [(Options(max_length=513), "max_length: is longer"), (Options(max_length=0), "no room"),
     (Options(slots=0), "no room"), (Options(device="cuda:77"), "device: cannot be used here")],
)  # fmt: skip
def test_sizes_and_devices_that_cannot_be_are_refused(model: Path, options: Options, told: str) -> None:
    with pytest.raises(SpecdecError, match=told):
        SpecDecoder.from_pretrained(str(model), "none", options)


def test_sizes_follow_the_memory(model: Path) -> None:
    """A tiny Llama's token is 1 KiB and a slot's logits 96 KiB: half a MiB holds one slot of 320 tokens."""
    tight = SpecDecoder.from_pretrained(
        str(model), "none", Options(torch.float32, memory=2**19)
    ).engine.limits
    assert (tight.slots, tight.length) == (1, 320)
    with pytest.raises(UnsupportedError, match=r"2 x 512.*Lower slots to 1 or lower max_length"):
        SpecDecoder.from_pretrained(
            str(model), "none", Options(torch.float32, slots=2, max_length=512, memory=5 * 2**18)
        )


def test_weights_that_do_not_fit_are_refused_before_they_are_read(model: Path) -> None:
    files = resolve(str(model))
    check_room(files, torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"GiB for weights in float32, 0\.00 GiB are free"):
        check_room(files, torch.float32, torch.device("cpu"), free=1000)


def test_trees_are_read_from_text() -> None:
    assert parse_tree("auto") is None
    assert parse_tree("7/10/60") == Shape(7, 10, 60)
    assert parse_tree("1000000/4/8") == Shape(7, 4, 8), "eight nodes reach seven deep"
    for text in ("", "7/10", "a/b/c", "0/1/4", "7/10/65", "7/0/60", "7/10/1"):
        with pytest.raises(SpecdecError, match="tree"):
            parse_tree(text)
