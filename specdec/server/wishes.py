"""From what a client wrote to what the engine runs: sampling settings and requests.

Knows schema and engine, nothing of answers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec.engine.request import Request
from specdec.engine.text import TextStream
from specdec.errors import RequestError
from specdec.sampling import Sampling
from specdec.server.grammar import TreeGrammar
from specdec.server.schema import Generation
from specdec.server.state import ServerState

LIKE_OPENAI = 1.0  # temperature of requests that name none
BATCH_SEED = 2**63  # seeds of further choices wrap here, where Sampling's range ends


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts for a request: nobody (`speculate` False), the one source `only`, or all that the server has."""

    speculate: bool = True
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What every sequence of a call has in common.

    Attributes:
        id: of the answer.
        sampling: settings; choice i takes seed + i, and each prompt has its own max_tokens.
        choices: n.
        grammar: at its start, or None.
        drafting: whether and how.
        prompt_logprobs: alternatives per prompt token, None without log-probabilities of the prompt.
    """

    id: str
    sampling: Sampling
    choices: int
    grammar: TreeGrammar | None
    drafting: Drafting
    prompt_logprobs: int | None = None


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def drafting_of(state: ServerState, asked: Generation) -> Drafting:
    """Who drafts. Raises RequestError for a source that this server does not have."""
    sources = state.decoder.engine.drafter.sources
    if asked.speculate is False or asked.draft == "none":
        return Drafting(speculate=False)
    if asked.draft in (None, "auto"):
        return Drafting()
    if asked.draft not in sources:
        raise RequestError("does not draft on this server", field="draft", value=asked.draft,
                           allowed=", ".join(("auto", "none", *sources)),
                           remedy="Start it with another --draft.")  # fmt: skip
    return Drafting(only=asked.draft)


def sampling_of(asked: Generation, logprobs: int | None, max_tokens: int) -> Sampling:
    """Settings with defaults filled in. Raises RequestError naming the field that is out of range."""
    default = Sampling()
    given = {
        name: value
        for name in ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(asked, name)) is not None
    }
    if given.get("top_k") == -1:  # vLLM's way of keeping all
        given["top_k"] = default.top_k
    return Sampling(
        temperature=LIKE_OPENAI if asked.temperature is None else asked.temperature,
        logit_bias=_bias(asked.logit_bias or {}),
        seed=asked.seed,
        max_tokens=max_tokens,
        stop=tuple(asked.stop or ()),
        stop_token_ids=tuple(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        logprobs=logprobs,
        **given,
    )


def _bias(asked: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in asked):
        raise RequestError("wants token ids as keys", field="logit_bias", allowed='such as {"42": -100}')
    return {int(key): value for key, value in asked.items()}


def max_tokens_of(asked: Generation, length: int, prompt: int, default: int | None) -> int:
    """Tokens to emit at most; `default` None goes up to the context's end.

    Raises:
        RequestError: for a prompt that fills the context, or a wish that reaches past it (checked here, before
            anything of that size is made).
    """
    room = room_after(prompt, length)
    if asked.limit is None:
        return room if default is None else min(default, room)
    if asked.limit > room:
        raise RequestError("reaches past the context", field="max_tokens", value=asked.limit,
                           allowed=f"at most {room} after a prompt of {prompt} tokens")  # fmt: skip
    return asked.limit


def room_after(prompt: int, length: int) -> int:
    """Tokens that the context has left. Raises RequestError for a prompt that fills it."""
    if prompt >= length:
        raise RequestError("is longer than the context", field="prompt", value=f"{prompt} tokens",
                           allowed=f"at most {length - 1}")  # fmt: skip
    return length - prompt


def requests_of(
    state: ServerState, wish: Wish, prompts: Sequence[tuple[int, ...]], limits: Sequence[int]
) -> list[Request]:
    """The engine's requests, `choices` for each prompt and its limit, in the order of the answer's choices."""
    out: list[Request] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        limited = replace(wish, sampling=replace(wish.sampling, max_tokens=limit))
        for choice in range(wish.choices):
            out.append(_request(state, limited, prompt, choice, len(out)))
    return out


def _request(state: ServerState, wish: Wish, prompt: tuple[int, ...], choice: int, index: int) -> Request:
    sampling, decoder = wish.sampling, state.decoder
    if sampling.seed is not None and choice:
        sampling = replace(sampling, seed=(sampling.seed + choice) % BATCH_SEED)
    own = () if sampling.ignore_eos else decoder.engine.target.info.stop_ids
    return Request(
        f"{wish.id}-{index}",
        prompt,
        sampling,
        frozenset((*own, *sampling.stop_token_ids)),
        text=TextStream(decoder.decode, sampling.stop),
        constraint=None if wish.grammar is None else wish.grammar.fork(),
        speculate=wish.drafting.speculate,
        only=wish.drafting.only,
        group=wish.id,
        prompt_logprobs=wish.prompt_logprobs,
    )


def check_grammar(asked: Generation) -> None:
    """Raises RequestError where a grammar and the end of the answer contradict each other."""
    if asked.response_format is not None and asked.response_format.type != "text" and asked.ignore_eos:
        raise RequestError("cannot go on after a complete grammar; leave it out", field="ignore_eos")
