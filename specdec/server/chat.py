"""POST /v1/chat/completions: messages in, a message or a stream of its pieces out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from specdec.engine.logprobs import TokenLogprob
from specdec.server import wishes
from specdec.server.answers import Progress, Reply
from specdec.server.logprobs import chat_logprobs
from specdec.server.schema import ChatRequest
from specdec.server.state import ServerState
from specdec.target.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Choices of a chat."""

    vocabulary: Vocabulary
    logprobs: bool
    body: str = "chat.completion"
    chunk: str = "chat.completion.chunk"

    def choice(self, progress: Progress) -> dict[str, Any]:
        """See `Shape`."""
        message = {"role": "assistant", "content": progress.text, "refusal": None}
        logprobs = chat_logprobs(self.vocabulary, progress.logprobs) if self.logprobs else None
        return {"index": progress.index, "message": message, "logprobs": logprobs,
                "finish_reason": progress.finish}  # fmt: skip

    def opening(self, progress: Progress) -> dict[str, Any] | None:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": progress.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, progress: Progress, text: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """See `Shape`."""
        told = chat_logprobs(self.vocabulary, logprobs) if self.logprobs else None
        delta = {"content": text} if text else {}
        return {"index": progress.index, "delta": delta, "logprobs": told, "finish_reason": progress.finish}


def routes(state: ServerState) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        state.check_model(asked.model)
        wishes.check_grammar(asked)
        with state.arriving(asked.choices) as deadline:
            grammar = await state.read(http, deadline, state.grammars.compile, asked.response_format)
            prompt = await state.read(http, deadline, state.reader.messages, asked.messages)
        limit = wishes.max_tokens_of(asked, state.length, len(prompt), None)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = wishes.sampling_of(asked, logprobs, limit)
        drafting = wishes.drafting_of(state, asked)
        wish = wishes.Wish(wishes.new_id("chatcmpl"), sampling, asked.choices, grammar, drafting)
        call = state.start(
            wishes.requests_of(state, wish, [prompt], [limit]), deadline, stream=bool(asked.stream)
        )
        shape = ChatShape(state.vocabulary, bool(asked.logprobs))
        return await Reply(state, asked, call, shape, wish.id).respond(http)

    return router
