"""Answers written by the target itself, turn by turn, into a store that survives any interruption.

A head learns the target's law, so what it trains on has to be the target's own draws. Who generates them is
behind `Answerer`: our batched engine, or an OpenAI-compatible endpoint (`training.endpoint`).
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from specdec.errors import SpecdecError
from training.data import Conversation, Message, Skipped
from training.mask import TemplateRefusal
from training.store import Response, ResponseStore


class Answer(NamedTuple):
    """The answer to one prompt, by its index: its ids with the end-of-turn token, and stop or length."""

    prompt: int
    token_ids: Sequence[int]
    finish_reason: str


class Answerer(Protocol):
    """Whoever continues prompts as the target would."""

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        seeds: Sequence[int],
        max_tokens: int,
    ) -> Iterator[Answer]:
        """Each prompt's answer once, in any order, as soon as it is there."""
        ...


class Chat(Protocol):
    """Messages to prompt ids and answers back to text; `training.mask.ChatMasker` is one."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]: ...
    def text(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How answers are written.

    Attributes:
        max_tokens: of one answer.
        max_length: positions the target has; a longer prompt and answer is skipped and counted.
        batch: prompts handed to the answerer at once.
        sampled_fraction: share of conversations answered at `temperature`, the rest greedily; by id.
        seed: of the sampled answers.
        max_minutes: hand out no more prompts after this long; None answers all.
    """

    max_tokens: int
    max_length: int
    batch: int = 64
    sampled_fraction: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("batch", self.batch)):
            if value < 1:
                raise SpecdecError("must be positive", field=f"responses.{name}", value=value, allowed=">= 1")
        if not 0 <= self.sampled_fraction <= 1:
            raise SpecdecError("is no share", field="responses.sampled_fraction", value=self.sampled_fraction,
                               allowed="0 to 1")  # fmt: skip

    def temperature_of(self, id: str) -> float:
        """The same for every turn of a conversation, every run and every machine."""
        return self.temperature if _hash(f"sampled/{id}") < self.sampled_fraction * 2**63 else 0.0

    def seed_of(self, id: str, turn: int) -> int:
        """Of one answer, from 0 to 2**63 - 1: resuming, order and batch change no answer."""
        return _hash(f"{self.seed}/{turn}/{id}")


@dataclass(slots=True)
class Written:
    """What a call of `write_responses` did.

    Attributes:
        answers, tokens: written by this call, not those found in the store.
        seconds: it took.
        skipped: conversations left unfinished, by reason.
        complete: every turn was answered or skipped; False when time ran out.
    """

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: Skipped = field(default_factory=Skipped)
    complete: bool = True


@dataclass(slots=True)
class _Talk:
    """A conversation in progress: what has been said and which turn comes next."""

    conversation: Conversation
    messages: list[Message]
    turn: int = 0

    @property
    def finished(self) -> bool:
        return self.turn >= len(self.conversation.pending_turns)

    def ask(self) -> list[Message]:
        return [*self.messages, Message("user", self.conversation.pending_turns[self.turn])]

    def hear(self, answer: str) -> None:
        self.messages = [*self.ask(), Message("assistant", answer)]
        self.turn += 1


def write_responses(
    conversations: Sequence[Conversation],
    answerer: Answerer,
    store: ResponseStore,
    chat: Chat,
    plan: AnswerPlan,
    console: Console | None = None,
) -> Written:
    """Answer every pending turn that the store does not hold yet; each sees the target's earlier answers.

    Args:
        conversations: with pending turns (see `Conversation.without_answers`).
        answerer: continues prompts.
        store: where answers go at once, one by one; what it holds is not asked again.
        chat: the target's template and tokenizer.
        plan: lengths, batch, mix of greedy and sampled.
        console: for the progress bar; None writes to stderr.

    Raises:
        SpecdecError: from the answerer or the disk; what was answered until then is in the store.
    """
    writing = _Writing(answerer, store, chat, plan)
    started = time.monotonic()
    with _progress(console) as progress:
        bar = progress.add_task("answers", total=_missing(conversations, store), speed="")
        talks = _open_talks(conversations, store, chat, writing.written.skipped)
        going: deque[_Talk] = deque()
        while batch := writing.next_batch(going, talks):
            if plan.max_minutes is not None and time.monotonic() - started > plan.max_minutes * 60:
                writing.written.complete = False
                break
            for talk in writing.answer(batch):
                _show(progress, bar, writing.written, time.monotonic() - started)
                if not talk.finished:
                    going.append(talk)
    writing.written.seconds = time.monotonic() - started
    return writing.written


@dataclass(slots=True)
class _Writing:
    """The hands of `write_responses`: take a batch of talks, get it answered, store it."""

    answerer: Answerer
    store: ResponseStore
    chat: Chat
    plan: AnswerPlan
    written: Written = field(default_factory=Written)

    def next_batch(self, going: deque[_Talk], talks: Iterator[_Talk]) -> list[tuple[_Talk, list[int]]]:
        """Talks with their prompt ids, those already begun first, so that few are open at any time."""
        batch: list[tuple[_Talk, list[int]]] = []
        while len(batch) < self.plan.batch:
            talk = going.popleft() if going else next(talks, None)
            if talk is None:
                break
            if (prompt := self._prompt(talk)) is not None:
                batch.append((talk, prompt))
        return batch

    def _prompt(self, talk: _Talk) -> list[int] | None:
        try:
            prompt = self.chat.prompt_ids(talk.ask())
        except TemplateRefusal as refusal:
            self.written.skipped.add(f"refused by the chat template: {refusal}")
            return None
        if len(prompt) + self.plan.max_tokens > self.plan.max_length:
            self.written.skipped.add("longer than the context")
            return None
        return prompt

    def answer(self, batch: list[tuple[_Talk, list[int]]]) -> Iterator[_Talk]:
        """Have a batch answered; each talk comes back once its answer is stored."""
        ids = [talk.conversation.id for talk, _ in batch]
        temperatures = [self.plan.temperature_of(id) for id in ids]
        seeds = [self.plan.seed_of(id, talk.turn) for id, (talk, _) in zip(ids, batch, strict=True)]
        prompts = [prompt for _, prompt in batch]
        heard: set[int] = set()
        for found in self.answerer.answer(prompts, temperatures, seeds, self.plan.max_tokens):
            assert found.prompt not in heard, f"prompt {found.prompt} was answered twice"
            heard.add(found.prompt)
            talk, prompt = batch[found.prompt]
            self._keep(talk, prompt, temperatures[found.prompt], found)
            yield talk
        self.written.skipped.add("not answered", len(batch) - len(heard))

    def _keep(self, talk: _Talk, prompt: list[int], temperature: float, found: Answer) -> None:
        who = talk.conversation
        answer = tuple(found.token_ids)
        self.store.append(Response(who.id, who.source, who.licence, temperature, tuple(prompt), answer,
                                   found.finish_reason, talk.turn))  # fmt: skip
        self.written.answers += 1
        self.written.tokens += len(answer)
        talk.hear(self.chat.text(answer))


def _open_talks(
    conversations: Sequence[Conversation], store: ResponseStore, chat: Chat, skipped: Skipped
) -> Iterator[_Talk]:
    """Conversations with something left to answer, wound forward over what the store holds."""
    for conversation in conversations:
        skipped.read += 1
        if not conversation.pending_turns:
            skipped.add("nothing to answer")
            continue
        talk = _Talk(conversation, list(conversation.messages))
        while not talk.finished and (conversation.id, talk.turn) in store:
            talk.hear(chat.text(store.get(conversation.id, talk.turn).response_ids))
        if not talk.finished:
            yield talk


def _missing(conversations: Sequence[Conversation], store: ResponseStore) -> int:
    return sum((c.id, turn) not in store for c in conversations for turn in range(len(c.pending_turns)))


def _hash(text: str) -> int:
    """63 bits that depend on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _progress(console: Console | None) -> Progress:
    times = (TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn())
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*bar, *times, console=console or Console(stderr=True))


def _show(progress: Progress, bar: TaskID, written: Written, seconds: float) -> None:
    speed = written.tokens / max(seconds, 1e-9)
    progress.update(bar, advance=1, speed=f"{written.tokens:,} tokens, {speed:,.0f}/s")
