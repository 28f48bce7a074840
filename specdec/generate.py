"""The library face: load a target and a drafter, generate, stream.

    >>> decoder = SpecDecoder.from_pretrained("smollm2-135m")               # doctest: +SKIP
    >>> decoder.generate("Why is the sky blue?")[0].text                    # doctest: +SKIP
    'The sky appears blue because ...'

Everything below is an `Engine`; this file only turns prompts into requests and pieces into answers.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from math import isnan
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from specdec.engine.build import Options, make_engine
from specdec.engine.engine import Engine
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Finish, Piece, Request, check_request
from specdec.engine.text import TextStream
from specdec.errors import RequestError
from specdec.sampling import Sampling
from specdec.stats import Counters
from specdec.target.load import LoadedTarget, load_target
from specdec.unicode import lone_surrogate

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or chat messages."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer.

    Attributes:
        id: of its request.
        text: without stop strings and special tokens.
        token_ids: emitted ids, the stop token included.
        finish_reason: "stop", "length", "cancelled" or "error".
        prompt_tokens: length of the prompt.
        counters: acceptance and seconds by phase.
        seconds: from the first token to the last.
        logprobs: of the emitted tokens when asked for.
        error: what went wrong when finish_reason is "error".
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish
    prompt_tokens: int
    counters: Counters
    seconds: float
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the seconds they took; NaN where none came after it."""
        after = len(self.token_ids) - 1
        return after / self.seconds if after > 0 and self.seconds > 0 else float("nan")

    def stats(self) -> dict[str, Any]:
        """`stats` of the JSON output, which has no NaN."""
        speed = self.tokens_per_second
        return {**self.counters.as_dict(), "tokens_per_second": None if isnan(speed) else round(speed, 2)}


class SpecDecoder:
    """A loaded target with a drafter, ready to generate."""

    def __init__(self, loaded: LoadedTarget, engine: Engine) -> None:
        self.loaded, self.engine = loaded, engine
        self.tokenizer = loaded.tokenizer
        self._ids = itertools.count()
        self._turn = threading.Lock()  # around what touches the engine: threads take turns
        self._mail: dict[str, deque[Piece]] = {}  # pieces by running request, until their reader comes

    @classmethod
    def from_pretrained(
        cls, target: str = "smollm2-135m", head: str | Path | None = "auto", options: Options | None = None
    ) -> SpecDecoder:
        """Load a target by name, directory, GGUF file or Hub id, and a drafter.

        Args:
            target: see `specdec.target.files.resolve`.
            head: "auto" (the shipped head with lookups, else lookups alone), "ngram", None or "none" for plain
                decoding, "head" (the shipped one) or a head's directory; both may end in "+ngram".
            options: see `Options`.

        Raises:
            SpecdecError: unknown target or head, a head of another target, broken weights, too little memory.
        """
        options = options or Options()
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_target(
            target, dtype=options.dtype, device=device, prefer=options.backend, device_map=options.device_map
        )
        return cls(loaded, make_engine(loaded.target, head, options))

    def with_drafter(self, head: str | Path | None, options: Options | None = None) -> SpecDecoder:
        """The same loaded target under another drafter or tree; weights are shared."""
        other = SpecDecoder(self.loaded, make_engine(self.loaded.target, head, options or Options()))
        other._turn = self._turn  # one target, one forward at a time
        return other

    def encode(self, prompt: Prompt, *, chat: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt; text becomes a user turn of the chat template when there is one and `chat` is set."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("is empty", field="prompt", remedy="Give at least one character.")
            if not (chat and self.tokenizer.chat_template):
                _check_text(prompt)
                return tuple(self.tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        prompt = _unpacked(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise _no_prompt([prompt])
        if all(isinstance(part, Integral) for part in prompt):
            return tuple(int(part) for part in prompt)  # type: ignore[arg-type]
        if not all(isinstance(part, Mapping) for part in prompt):
            raise _no_prompt(prompt)
        return render(self.loaded, [_message(part) for part in prompt])  # type: ignore[arg-type]

    def request(
        self, prompt: Prompt, sampling: Sampling, *, chat: bool = True, speculate: bool = True
    ) -> Request:
        """A request for the engine with text and the target's own stop tokens."""
        ids = self.encode(prompt, chat=chat)
        own = () if sampling.ignore_eos else self.engine.target.info.stop_ids
        text = TextStream(self.decode, sampling.stop)
        stops = frozenset((*own, *sampling.stop_token_ids))
        return Request(f"r{next(self._ids)}", ids, sampling, stops, text=text, speculate=speculate)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens skipped."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
        speculate: bool = True,
    ) -> list[Answer]:
        """Answer one prompt or many, batched continuously; answers come in the order of the prompts.

        Raises:
            RequestError: for a prompt or settings that cannot be served, before anything runs.
        """
        requests = self._requests(prompts, sampling, chat, speculate)
        errors = {piece.request: piece.error for piece in self._drive(requests) if piece.error}
        return [answer_of(request, errors.get(request.id)) for request in requests]

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None, chat: bool, speculate: bool
    ) -> list[Request]:
        settings = sampling or Sampling()
        return [self.request(p, settings, chat=chat, speculate=speculate) for p in _as_list(prompts)]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, chat: bool = True, speculate: bool = True
    ) -> Iterator[Piece]:
        """Pieces of one answer as rounds finish; closing the iterator frees the slot."""
        yield from self._drive([self.request(prompt, sampling or Sampling(), chat=chat, speculate=speculate)])

    def run(self, request: Request) -> Iterator[Piece]:
        """Drive a request made with `request()`, once; its `output` and counters can be read meanwhile."""
        yield from self._drive([request])

    def _drive(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Pieces of these requests; those of others that run meanwhile are kept for their own readers."""
        engine = self.engine
        for request in requests:
            check_request(request, engine.limits.length, engine.target.info.vocab)
        mail = [self._mail.setdefault(request.id, deque()) for request in requests]
        try:
            with self._turn:
                for request in requests:
                    engine.add(request)
            going = True
            while going:
                with self._turn:
                    if not any(mail) and any(request.finish is None for request in requests):
                        self._post(engine.step())
                    pieces = list(_emptied(mail))
                    going = any(request.finish is None for request in requests)
                yield from pieces
        finally:
            with self._turn:
                self._leave(requests)

    def _leave(self, requests: Sequence[Request]) -> None:
        """Whoever drove them has gone: forget their mail, and free the slots of those that are unfinished."""
        for request in requests:
            self._mail.pop(request.id, None)
        if unfinished := [request for request in requests if request.finish is None]:
            for request in unfinished:
                self.engine.cancel(request.id)
            self._post(self.engine.step())

    def _post(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.request in self._mail:
                self._mail[piece.request].append(piece)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
        speculate: bool = True,
    ) -> list[Answer]:
        """`generate` in threads; calls may overlap, and cancelling one frees its slots."""
        requests = await asyncio.to_thread(self._requests, prompts, sampling, chat, speculate)
        errors = {p.request: p.error async for p in _in_threads(self._drive(requests)) if p.error}
        return [answer_of(request, errors.get(request.id)) for request in requests]

    async def astream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, chat: bool = True, speculate: bool = True
    ) -> AsyncIterator[Piece]:
        """`stream` in threads; calls may overlap, and leaving one frees its slot."""
        pieces = _in_threads(self.stream(prompt, sampling, chat=chat, speculate=speculate))
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece


async def _in_threads(pieces: Iterator[Piece]) -> AsyncGenerator[Piece, None]:
    """What a generator gives, each step in a thread. A thread cannot be interrupted: whoever is cancelled waits for the
    end of its round, then closes the generator."""
    done, step = object(), None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, pieces, done))
            piece = await asyncio.shield(step)
            if piece is done:
                return
            assert isinstance(piece, Piece)
            yield piece
    finally:
        if step is not None:
            await asyncio.wait([step])
        # which takes a turn of the engine: the event loop must not wait for that
        await asyncio.to_thread(pieces.close)  # type: ignore[attr-defined]


def _emptied(mail: Sequence[deque[Piece]]) -> Iterator[Piece]:
    for box in mail:
        while box:
            yield box.popleft()


def render(loaded: LoadedTarget, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """Token ids of a conversation that awaits its answer. Raises as `rendered`."""
    return tuple(loaded.tokenizer.encode(rendered(loaded, messages), add_special_tokens=False))


def rendered(loaded: LoadedTarget, messages: list[dict[str, str]]) -> str:
    """Text of a conversation that awaits its answer, control tokens spelled out.

    Raises:
        RequestError: there is no chat template, or it does not take them; a text is none.
    """
    if not loaded.tokenizer.chat_template:
        raise RequestError("need a chat template, and this target has none", field="messages",
                           remedy="Give the text itself, without roles.")  # fmt: skip
    for message in messages:
        _check_text(str(message.get("content", "")))
    try:
        return str(loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise what they like about roles they do not know
        raise RequestError(f"do not fit the chat template: {error}", field="messages") from error


def _check_text(text: str) -> None:
    """Bytes of an argument or a \\ud800 in JSON may be no text."""
    if (at := lone_surrogate(text)) is not None:
        raise RequestError(f"is not UTF-8 (character {at})", field="prompt")


def _message(given: Mapping[str, Any]) -> dict[str, str]:
    """Templates would print a list of parts as Python does."""
    if not isinstance(given.get("content"), str | None):
        raise RequestError("wants text", field="messages content", value=given["content"], allowed="a string")
    return dict(given)


def _no_prompt(parts: Sequence[Any]) -> RequestError:
    kinds = sorted({type(part).__name__ for part in parts})
    return RequestError("is neither ids nor messages", field="prompt", value=", ".join(kinds),
                        allowed="a text, or a list of whole numbers or of mappings with role and content")  # fmt: skip


def _unpacked(prompts: Any) -> Any:
    """Tensors and arrays as lists."""
    return prompts.tolist() if hasattr(prompts, "tolist") else prompts


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many? A list of ints or of messages is one; a list of anything else is many. Arrays are lists."""
    prompts = _unpacked(prompts)
    many = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes) and len(prompts) > 0
    if not many or isinstance(prompts[0], Integral | Mapping):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def answer_of(request: Request, error: str | None = None) -> Answer:
    """The finished request as a value."""
    assert request.finish is not None, "still running"
    start = request.first_token or request.arrived
    return Answer(
        request.id,
        request.text.text if request.text else "",
        tuple(request.output),
        request.finish,
        len(request.prompt),
        request.counters,
        (request.finished or start) - start,
        tuple(request.logprobs),
        error,
    )
