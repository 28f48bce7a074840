"""From events to answers: one JSON body, or a stream of chunks. Both endpoints share this; their shapes differ.

Knows calls and the OpenAI envelope, nothing of messages or prompts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from specdec.engine.logprobs import TokenLogprob
from specdec.server.acceptance import acceptance, usage
from specdec.server.calls import Call
from specdec.server.disconnect import race
from specdec.server.events import Event
from specdec.server.schema import Generation, StreamOptions
from specdec.server.sse import KEEP_ALIVE, EventStream, event
from specdec.server.state import ServerState


@dataclass(slots=True)
class Progress:
    """One choice so far.

    Attributes:
        index: of the choice.
        text, logprobs: everything so far.
        tokens: emitted.
        finish: why it ended.
        said: characters that the log-probabilities sent so far stand for.
    """

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None
    said: int = 0

    def add(self, news: Event) -> None:
        self.text += news.piece.text
        self.logprobs += news.logprobs
        self.tokens += len(news.piece.tokens)
        self.finish = news.piece.finish


class Shape(Protocol):
    """How an endpoint spells its choices."""

    @property
    def body(self) -> str:
        """The answer's `object`."""
        ...

    @property
    def chunk(self) -> str:
        """A chunk's `object`."""
        ...

    def choice(self, progress: Progress) -> dict[str, Any]:
        """A whole choice."""
        ...

    def opening(self, progress: Progress) -> dict[str, Any] | None:
        """The choice of a first chunk that holds no new tokens, or None."""
        ...

    def delta(self, progress: Progress, text: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """The choice of a chunk with what is new."""
        ...


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in the making.

    Attributes:
        state: of the server.
        asked: what the client wrote.
        call: its sequences, submitted.
        shape: how the endpoint spells choices.
        id: of the answer.
        silent: the engine's tokens are not part of the answer (max_tokens 0).
    """

    state: ServerState
    asked: Generation
    call: Call
    shape: Shape
    id: str
    silent: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    async def respond(self, http: Request) -> Response:
        """The HTTP response the client asked for."""
        if self.asked.stream:
            return EventStream(self.chunks(), self.call.cancel)
        return JSONResponse(await race(http, self.body()))

    async def body(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError when a sequence failed."""
        progress = [Progress(index) for index in range(len(self.call.requests))]
        async with aclosing(self.call.events()) as events:
            async for news in events:
                if news is not None:
                    self._add(progress[news.index], news)
        return {
            **self._envelope(self.shape.body),
            "choices": [self.shape.choice(one) for one in progress],
            "usage": self._usage(progress),
            **self._metrics(),
        }

    async def chunks(self) -> AsyncGenerator[str, None]:
        """Events of the stream. Raises ApiError when a sequence failed."""
        options = self.asked.stream_options or StreamOptions()
        progress = [Progress(index) for index in range(len(self.call.requests))]
        opened = set[int]()
        async with aclosing(self.call.events(self.state.limits.keep_alive_seconds)) as events:
            async for news in events:
                if news is None:
                    yield KEEP_ALIVE
                    continue
                one = progress[news.index]
                self._add(one, news)
                for choice in self._choices(one, news, first=news.index not in opened):
                    yield event(self._chunk(choice, progress, options))
                opened.add(news.index)
        if options.include_usage:
            usage = {"choices": [], "usage": self._usage(progress), **self._metrics()}
            yield event({**self._envelope(self.shape.chunk), **usage})

    def _choices(self, one: Progress, news: Event, *, first: bool) -> list[dict[str, Any]]:
        """What an event adds to the stream; nothing while all of its text is held back."""
        opening = self.shape.opening(one) if first else None
        out = [] if opening is None else [opening]
        text, logprobs = ("", ()) if self.silent else (news.piece.text, news.logprobs)
        if text or logprobs or one.finish:
            choice = self.shape.delta(one, text, logprobs)
            if self.asked.return_spec_metrics:
                choice["specdec"] = {"runs": [] if self.silent else news.piece.runs()}
            out.append(choice)
        return out

    def _chunk(
        self, choice: Mapping[str, Any], progress: list[Progress], options: StreamOptions
    ) -> dict[str, Any]:
        chunk = {**self._envelope(self.shape.chunk), "choices": [choice]}
        if options.continuous_usage_stats:
            chunk["usage"] = self._usage(progress)
        elif options.include_usage:
            chunk["usage"] = None
        last = choice["finish_reason"] is not None and all(p.finish for p in progress)
        return {**chunk, **self._metrics()} if last and not options.include_usage else chunk

    def _add(self, one: Progress, news: Event) -> None:
        one.add(news)
        if self.silent:
            one.text, one.logprobs, one.tokens, one.finish = "", [], 0, one.finish and "length"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.state.name}

    def _usage(self, progress: list[Progress]) -> dict[str, Any]:
        firsts = self.call.requests[:: self.asked.choices]
        return usage(firsts, sum(one.tokens for one in progress))

    def _metrics(self) -> dict[str, Any]:
        """Acceptance, where asked for; of a single sequence only, as in vLLM."""
        if not self.asked.return_spec_metrics or len(self.call.requests) != 1:
            return {}
        return {"metrics": acceptance(self.call.requests[0], self.call.steps.get(0, []))}
