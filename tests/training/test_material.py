"""What a run trains on and is measured by: ids of any kind keep their place, dev texts end with their first answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny

from training.data import Conversation, Message, Sample, Skipped, split_dev
from training.mask import ChatMasker
from training.material import Texts, from_store, given, held_out, shared_prefix
from training.recipe import load_recipe
from training.store import Response, ResponseStore


def ids(pattern: str, count: int, *, dev: bool) -> list[str]:
    """So many ids of this pattern that belong to the dev split, or to the other."""
    named = (pattern.format(n) for n in range(100_000))
    fitting = (id for id in named if split_dev(id) == dev)
    return [next(fitting) for _ in range(count)]


def response(id: str, prompt: tuple[int, ...], answer: tuple[int, ...] = (8, 9, 2), turn: int = 0,
             temperature: float = 0.0) -> Response:  # fmt: skip
    return Response(id, "", "", temperature, prompt, answer, "stop", turn)


def texts_of(path: Path, *responses: Response) -> Texts:
    with ResponseStore(path) as store:
        for one in responses:
            store.append(one)
        return from_store(store, load_recipe("cpu"), Skipped())


def test_ids_may_hold_any_character(tmp_path: Path) -> None:
    """An @ once filed greedy answers as sampled ones, a # whole texts as later windows."""
    cold, warm = ids("user{}@mail", 4, dev=True)[:2], ids("user{}@mail", 4, dev=True)[2:]
    train = [response(id, (1, 5, 10 + n, 7)) for n, id in enumerate(ids("set#{}", 3, dev=False))]
    texts = texts_of(
        tmp_path / "r.jsonl",
        *(response(id, (1, 5, 6)) for id in cold),
        *(response(id, (1, 5, 6), temperature=1.0) for id in warm),
        *train,
    )
    assert [s.id for s in texts.greedy] == cold
    assert [s.id for s in texts.sampled] == warm
    assert texts.skip == 2


def test_a_dev_text_ends_with_its_first_answer(tmp_path: Path) -> None:
    """What the user says next is not the target's law; tau on it would be tau of nothing."""
    (dev,), (other,) = ids("t{}", 1, dev=True), ids("t{}", 1, dev=False)
    texts = texts_of(
        tmp_path / "r.jsonl",
        response(dev, (1, 5), (8, 2)),
        response(dev, (1, 5, 8, 2, 40, 41, 42), (9, 2), turn=1),
        response(other, (1, 5)),
    )
    (text,) = texts.greedy
    assert text.ids.tolist() == [1, 5, 8, 2]
    assert text.loss_mask.tolist() == [False, False, True, True]


def test_a_single_row_is_trained_on_wherever_its_id_falls() -> None:
    (dev,), (other,) = ids("r{}", 1, dev=True), ids("r{}", 1, dev=False)
    assert not held_out([dev])(dev)
    assert held_out([dev, other])(dev) and not held_out([dev, other])(other)


def test_a_dev_conversation_that_the_template_refuses_is_counted() -> None:
    tokenizer = tiny.tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tiny.CHAT
    asked = (Message("user", "a"), Message("assistant", "b"))
    (bad, good), (train,) = ids("r{}", 2, dev=True), ids("r{}", 1, dev=False)
    talks = [Conversation(bad, "", "", (Message("system", "x"), *asked)),
             *(Conversation(id, "", "", asked) for id in (good, train))]  # fmt: skip
    texts = given(talks, ChatMasker(tokenizer, (2,)), load_recipe("cpu"), 64, skipped := Skipped())
    assert [s.id for s in texts.greedy] == [good]
    assert skipped.total == 1


def test_a_given_text_is_split_where_the_target_ends() -> None:
    """Positions beyond its last are none that it was made for; the last two tokens of 66 are nothing to draft."""
    (dev,), train = ids("r{}", 1, dev=True), ids("r{}", 2, dev=False)
    talks = [
        Conversation(id, "", "", (Message("text", "a" * (32 if id == dev else 66)),)) for id in (dev, *train)
    ]
    chat = ChatMasker(tiny.tokenizer(), (2,))
    texts = given(talks, chat, load_recipe("cpu"), 16, skipped := Skipped())
    assert [len(window) for window in texts.train] == [16] * 8
    assert texts.greedy == [] and skipped.reasons == {"window too short to draft in": 2}


def test_only_beginnings_share_a_prefix() -> None:
    """A first window without answers is left out: the sample that is first then begins in the middle of its text."""

    def sample(window: int, *tokens: int) -> Sample:
        return Sample("a", np.array(tokens, dtype=np.int32), np.ones(len(tokens), dtype=np.bool_), 0, window)

    assert shared_prefix([sample(1, 9, 9), sample(0, 1, 2, 3), sample(0, 1, 2, 4)]) == 2
    assert shared_prefix([sample(0, 1, 2, 3), sample(1, 9, 9)]) == 0
