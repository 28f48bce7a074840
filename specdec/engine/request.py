"""One request: what was asked, what has been emitted, how it ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Literal, Protocol

import torch
from torch import Tensor

from specdec.engine.logprobs import TokenLogprob
from specdec.engine.text import TextStream
from specdec.errors import RequestError
from specdec.sampling import Sampling, generator, uniforms
from specdec.stats import Counters
from specdec.tree import MAX_NODES, DraftTree

Finish = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """A grammar over tokens; applied at every node of a tree, so constrained decoding stays lossless."""

    def allowed(self, tree: DraftTree, row: int) -> Tensor:
        """bool [N, V]: tokens permitted after each node of tree `row`, given everything accepted so far."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were emitted."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave one request.

    Attributes:
        request: its id.
        tokens: newly emitted ids.
        drafted: for each, was it drafted (True) or the target's bonus (False)?
        texts: for each, the text that became certain with it; a last piece without tokens may have one as well, what
            was held back until then.
        finish: how the answer ended, None while it goes on.
        error: what went wrong when finish is "error".
    """

    request: str
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    texts: tuple[str, ...]
    finish: Finish | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    def __add__(self, later: Piece) -> Piece:
        """This piece and the one after it, as one."""
        return Piece(
            self.request,
            self.tokens + later.tokens,
            self.drafted + later.drafted,
            self.texts + later.texts,
            later.finish,
            later.error,
        )

    def split(self, count: int) -> tuple[Piece, Piece]:
        """Its first `count` tokens, and the rest with how it ended."""
        first = replace(
            self,
            tokens=self.tokens[:count],
            drafted=self.drafted[:count],
            texts=self.texts[:count],
            finish=None,
            error=None,
        )
        rest = replace(
            self, tokens=self.tokens[count:], drafted=self.drafted[count:], texts=self.texts[count:]
        )
        return first, rest

    def runs(self) -> list[tuple[str, bool]]:
        """Its text by where it came from: [("the cat", True), (" sat", False)]; what was held back is not drafted."""
        drafted = self.drafted or (False,) * len(self.texts)
        pairs = [(text, was) for text, was in zip(self.texts, drafted, strict=True) if text]
        return [("".join(text for text, _ in run), was) for was, run in groupby(pairs, key=itemgetter(1))]


@dataclass(slots=True, eq=False)
class Request:
    """A request and its progress; owned and changed by the engine alone.

    Attributes:
        id: unique in its engine.
        prompt: token ids.
        sampling: its settings.
        stop_ids: token ids that end it (the target's own unless ignored, and the request's).
        text: its text, or None when nobody wants text.
        constraint: a grammar or None.
        speculate: False runs this request plainly.
        group: what came together and shares slots fairly with others, such as the choices of one call.
        only: the one source of drafts it wants (see `Drafter.sources`), None for all.
        prompt_logprobs: score the prompt's own tokens and this many alternatives of each; None: nothing.
        prompt_scores: of the prompt's tokens from the second on, once prefilled (see `prompt_logprobs`).
        output: emitted ids, the stop token included.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int]
    text: TextStream | None = None
    constraint: Constraint | None = None
    speculate: bool = True
    only: str | None = None
    group: str = ""
    prompt_logprobs: int | None = None
    prompt_scores: list[TokenLogprob] = field(default_factory=list)
    slot: int = -1
    prefilled: int = 0
    reused: int = 0
    features: list[Tensor] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    counters: Counters = field(default_factory=Counters)
    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None

    _seed: int | None = None
    _generator: torch.Generator | None = None
    _uniforms: Tensor | None = None

    @property
    def uniforms(self) -> Tensor | None:
        """u_t of every output position, float64; None for a greedy request. Drawn at first use, after `check_request`:
        before it, max_tokens may be any number."""
        if self._uniforms is None and not self.sampling.greedy:
            self._uniforms = uniforms(self.seed, self.sampling.max_tokens + MAX_NODES + 1)
        return self._uniforms

    @property
    def seed(self) -> int:
        """The request's own seed; drawn once when none was given."""
        if self._seed is None:
            self._seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed
        return self._seed

    def fresh(self, count: int) -> Tensor:
        """Random numbers never handed out before, float64 [count]: what a sampled chain and its tests consume."""
        if self._generator is None:
            self._generator = generator(self.seed, stream=1)
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    @property
    def root(self) -> int:
        return self.output[-1]

    @property
    def length(self) -> int:
        """Committed tokens: all but the newest emitted one."""
        return len(self.prompt) + len(self.output) - 1

    @property
    def running(self) -> bool:
        return self.slot >= 0 and self.prefilled == len(self.prompt) and self.finish is None

    def emit(self, tokens: Sequence[int]) -> list[str]:
        """Append emitted tokens up to the one that ends the answer; returns the text of each that was kept."""
        texts = []
        for token in tokens:
            self.output.append(token)
            last = len(self.output) >= self.sampling.max_tokens
            if token in self.stop_ids or (self.text is not None and self.text.push(token, last=last)):
                self.finish = "stop"
            elif last:
                self.finish = "length"
            texts.append(self.release())
            if self.finish:
                break
        return texts

    def release(self) -> str:
        """Text that became certain since the last call; all of it once the answer has ended."""
        return "" if self.text is None else self.text.release(final=self.finish is not None)


def check_request(request: Request, length: int, vocab: int) -> None:
    """Raises RequestError for what no engine of this length and vocabulary can serve."""
    if request.finish is not None:
        raise RequestError("has run already", field="request", value=request.id, remedy="Make a new one.")
    prompt, wanted = len(request.prompt), request.sampling.max_tokens
    if prompt == 0:
        raise RequestError("is empty", field="prompt", remedy="Give at least one token.")
    if prompt >= length:
        raise RequestError(
            "is longer than the context",
            field="prompt",
            value=f"{prompt} tokens",
            allowed=f"at most {length - 1}",
            remedy="Shorten it or raise max_length.",
        )
    if prompt + wanted > length:
        raise RequestError(
            "reaches past the context",
            field="max_tokens",
            value=wanted,
            allowed=f"at most {length - prompt} after a prompt of {prompt} tokens",
        )
    if not all(0 <= token < vocab for token in request.prompt):
        raise RequestError("holds ids outside the vocabulary", field="prompt", allowed=f"0 to {vocab - 1}")
    for token in request.sampling.logit_bias:
        if token >= vocab:
            raise RequestError(
                "names a token outside the vocabulary",
                field="logit_bias",
                value=token,
                allowed=f"ids below {vocab}",
            )
