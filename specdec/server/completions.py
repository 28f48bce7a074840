"""POST /v1/completions: text or token ids in, their continuation out; with `echo` and `logprobs` the prompt's too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Request as EngineRequest
from specdec.errors import RequestError
from specdec.server import wishes
from specdec.server.answers import Progress, Reply
from specdec.server.logprobs import completion_logprobs
from specdec.server.schema import CompletionRequest
from specdec.server.state import ServerState
from specdec.target.vocabulary import Vocabulary

DEFAULT_TOKENS = 16  # OpenAI's for this endpoint


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """Choices of a completion.

    Attributes:
        vocabulary: of the target.
        requests: of the call, for the prompts' scores.
        echoes: text of each choice's prompt, or None without `echo`.
        logprobs: whether the client wants them.
    """

    vocabulary: Vocabulary
    requests: Sequence[EngineRequest]
    echoes: Sequence[str] | None
    logprobs: bool
    body: str = "text_completion"
    chunk: str = "text_completion"

    def choice(self, progress: Progress) -> dict[str, Any]:
        """See `Shape`."""
        echo = "" if self.echoes is None else self.echoes[progress.index]
        told = [*self._prompt(progress.index), *progress.logprobs]
        return self._spell(progress, echo + progress.text, told, progress.finish)

    def opening(self, progress: Progress) -> dict[str, Any] | None:
        """The prompt, where it is echoed."""
        if self.echoes is None:
            return None
        return self._spell(progress, self.echoes[progress.index], self._prompt(progress.index), None)

    def delta(self, progress: Progress, text: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """See `Shape`."""
        return self._spell(progress, text, logprobs, progress.finish)

    def _prompt(self, index: int) -> list[TokenLogprob | int]:
        """The prompt's own tokens, the first without a value, where they are echoed with log-probabilities."""
        if self.echoes is None or not self.logprobs:
            return []
        request = self.requests[index]
        return [request.prompt[0], *request.prompt_scores]

    def _spell(
        self, progress: Progress, text: str, logprobs: Sequence[TokenLogprob | int], finish: str | None
    ) -> dict[str, Any]:
        told = completion_logprobs(self.vocabulary, logprobs, progress.said) if self.logprobs else None
        if told is not None:
            progress.said += sum(map(len, told["tokens"]))
        return {"index": progress.index, "text": text, "logprobs": told, "finish_reason": finish}


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is to be continued: ids, and the text that `echo` repeats."""

    ids: list[tuple[int, ...]]
    texts: list[str]


def read_prompts(state: ServerState, asked: CompletionRequest) -> Prompts:
    """Token ids and text of every prompt. Raises RequestError for an empty one."""
    ids, texts = [], []
    special = asked.add_special_tokens is not False
    for prompt in asked.prompts():
        if isinstance(prompt, str):
            tokens = state.reader.text(prompt, special=special)
        else:
            tokens = _checked(prompt, state.vocabulary.size)
        if not tokens:
            raise RequestError("is empty", field="prompt", remedy="Give at least one token.")
        wishes.room_after(len(tokens), state.length)  # before more of them are read
        ids.append(tokens)
        texts.append(
            prompt if isinstance(prompt, str) else state.decoder.decode(tokens) if asked.echo else ""
        )
    return Prompts(ids, texts)


def _checked(ids: Sequence[int], vocab: int) -> tuple[int, ...]:
    if not all(0 <= token < vocab for token in ids):
        raise RequestError("holds ids outside the vocabulary", field="prompt", allowed=f"0 to {vocab - 1}")
    return tuple(ids)


def _limits(state: ServerState, asked: CompletionRequest, prompts: Prompts) -> list[int]:
    """Tokens to emit at most behind each prompt; none asked for is one, unseen. Raises RequestError: no room."""
    if asked.limit == 0 and not asked.echo:
        raise RequestError("must be at least 1 without echo", field="max_tokens", value=0)
    limits = [wishes.max_tokens_of(asked, state.length, len(ids), DEFAULT_TOKENS) for ids in prompts.ids]
    return [limit or 1 for limit in limits]


def routes(state: ServerState) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        """Continue prompts."""
        state.check_model(asked.model)
        wishes.check_grammar(asked)
        with state.arriving(asked.choices * max(len(asked.prompts()), 1)) as deadline:
            grammar = await state.read(http, deadline, state.grammars.compile, asked.response_format)
            prompts = await state.read(http, deadline, read_prompts, state, asked)
        limits = _limits(state, asked, prompts)
        wish = wishes.Wish(
            wishes.new_id("cmpl"),
            wishes.sampling_of(asked, asked.logprobs, limits[0]),
            asked.choices,
            grammar,
            wishes.drafting_of(state, asked),
            asked.logprobs if asked.echo else None,
        )
        requests = wishes.requests_of(state, wish, prompts.ids, limits)
        call = state.start(requests, deadline, stream=bool(asked.stream))
        echoes = [text for text in prompts.texts for _ in range(asked.choices)] if asked.echo else None
        shape = CompletionShape(state.vocabulary, call.requests, echoes, asked.logprobs is not None)
        return await Reply(state, asked, call, shape, wish.id, silent=asked.limit == 0).respond(http)

    return router
