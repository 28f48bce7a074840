"""The library face: load a target and a drafter, generate, stream.

    >>> decoder = SpecDecoder.from_pretrained("smollm2-135m")               # doctest: +SKIP
    >>> decoder.generate("Why is the sky blue?")[0].text                    # doctest: +SKIP
    'The sky appears blue because ...'

Everything below is an `Engine`; this file only turns prompts into requests and pieces into answers.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN, Drafter, Shape
from specdec.engine.budget import Budget
from specdec.engine.costs import remembered
from specdec.engine.engine import Engine, Limits, check_request
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Finish, Piece, Request
from specdec.engine.text import TextStream
from specdec.errors import RequestError, SpecdecError, UnsupportedError
from specdec.head.checkpoint import load_head
from specdec.head.match import check_match
from specdec.head.pretrained import shipped_head
from specdec.sampling import Sampling
from specdec.stats import Counters
from specdec.target.load import LoadedTarget, load_target
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or chat messages."""

DEFAULT_TREE = Shape(depth=7, width=10, nodes=60)
"""EAGLE-2's tree: what heads are compared on, and the default on a GPU."""

CPU_LIMIT = Shape(depth=6, width=6, nodes=32)
"""The largest tree the measured budget may choose on a CPU, where nodes cost arithmetic."""


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
        """Decoding speed: tokens after the first, over the seconds they took."""
        return (len(self.token_ids) - 1) / self.seconds if self.seconds > 0 else float("nan")

    def stats(self) -> dict[str, Any]:
        """`stats` of the JSON output."""
        return {**self.counters.as_dict(), "tokens_per_second": round(self.tokens_per_second, 2)}


@dataclass(frozen=True, slots=True)
class Options:
    """How to load and run.

    Attributes:
        dtype: of the weights; None takes what a short measurement finds fastest on a CPU, the config's on a GPU.
        device: where to run; None takes CUDA when there is one.
        slots: requests at once.
        max_length: context length; None takes what the target was made for, at most 4096.
        tree: a fixed tree shape; None lets the measured budget choose.
        backend: "lean", "adapter" or "auto".
        taps: of a head whose checkpoint does not name them.
    """

    dtype: torch.dtype | None = None
    device: str | None = None
    slots: int = 4
    max_length: int | None = None
    tree: Shape | None = None
    backend: Literal["auto", "lean", "adapter"] = "auto"
    taps: tuple[int, ...] | None = None


def cache_directory() -> Path:
    """Where dequantised weights and cost tables are kept: $SPECDEC_CACHE, else the user's cache."""
    return Path(os.environ.get("SPECDEC_CACHE") or Path.home() / ".cache" / "specdec")


class SpecDecoder:
    """A loaded target with a drafter, ready to generate."""

    def __init__(self, loaded: LoadedTarget, engine: Engine) -> None:
        self.loaded, self.engine = loaded, engine
        self.tokenizer = loaded.tokenizer
        self._ids = itertools.count()
        self._mail: dict[str, deque[Piece]] = {}  # pieces by running request, until their reader comes

    @classmethod
    def from_pretrained(
        cls, target: str = "smollm2-135m", head: str | Path | None = "auto", options: Options | None = None
    ) -> SpecDecoder:
        """Load a target by name, directory, GGUF file or Hub id, and a drafter.

        Args:
            target: see `specdec.target.loading.resolve`.
            head: "auto" (the shipped head, else n-grams), "ngram", None or "none" for plain decoding, or a
                directory of a head.
            options: see `Options`.

        Raises:
            SpecdecError: unknown target or head, a head of another target, broken weights, too little memory.
        """
        options = options or Options()
        device = _usable(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_target(target, dtype=options.dtype, device=device, prefer=options.backend)
        return cls(loaded, make_engine(loaded.target, head, options))

    def with_drafter(self, head: str | Path | None, options: Options | None = None) -> SpecDecoder:
        """The same loaded target under another drafter or tree; weights are shared."""
        return SpecDecoder(self.loaded, make_engine(self.loaded.target, head, options or Options()))

    def encode(self, prompt: Prompt, *, chat: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt; text becomes a user turn of the chat template when there is one and `chat` is set."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("is empty", field="prompt", remedy="Give at least one character.")
            if not (chat and self.tokenizer.chat_template):
                _check_text(prompt)
                return tuple(self.tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if all(isinstance(part, int) for part in prompt):
            return tuple(prompt)  # type: ignore[arg-type]
        return self._render([dict(m) for m in prompt if isinstance(m, Mapping)])

    def _render(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        if not self.tokenizer.chat_template:
            raise RequestError("need a chat template, and this target has none", field="messages",
                               remedy="Give the text itself, without roles.")  # fmt: skip
        for message in messages:
            _check_text(str(message.get("content", "")))
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates raise what they like about roles they do not know
            raise RequestError(f"do not fit the chat template: {error}", field="messages") from error
        return tuple(rendered)

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
        settings = sampling or Sampling()
        requests = [self.request(p, settings, chat=chat, speculate=speculate) for p in _as_list(prompts)]
        errors: dict[str, str] = {}
        for piece in self._drive(requests):
            if piece.error:
                errors[piece.request] = piece.error
        return [answer_of(request, errors.get(request.id)) for request in requests]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, chat: bool = True, speculate: bool = True
    ) -> Iterator[Piece]:
        """Pieces of one answer as rounds finish; closing the iterator frees the slot."""
        yield from self._drive([self.request(prompt, sampling or Sampling(), chat=chat, speculate=speculate)])

    def run(self, request: Request) -> Iterator[Piece]:
        """Drive a request made with `request()`; its `output` and counters can be read meanwhile."""
        yield from self._drive([request])

    def _drive(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Pieces of these requests; those of others that run meanwhile are kept for their own readers."""
        engine = self.engine
        for request in requests:
            check_request(request, engine.limits.length, engine.target.info.vocab)
        mail = [self._mail.setdefault(request.id, deque()) for request in requests]
        try:
            for request in requests:
                engine.add(request)
            while any(request.finish is None for request in requests) or any(mail):
                yield from _emptied(mail)
                if any(request.finish is None for request in requests):
                    self._post(engine.step())
        finally:
            for request in requests:
                self._mail.pop(request.id, None)
            if unfinished := [request for request in requests if request.finish is None]:
                for request in unfinished:
                    engine.cancel(request.id)
                self._post(engine.step())

    def _post(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.request in self._mail:
                self._mail[piece.request].append(piece)

    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None
    ) -> list[Answer]:
        """`generate` in a thread; one call at a time per decoder."""
        return await asyncio.to_thread(self.generate, prompts, sampling)

    async def astream(self, prompt: Prompt, sampling: Sampling | None = None) -> AsyncIterator[Piece]:
        """`stream` in a thread; one call at a time per decoder."""
        pieces = self.stream(prompt, sampling)
        done = object()
        try:
            while (piece := await asyncio.to_thread(next, pieces, done)) is not done:
                yield piece  # type: ignore[misc]
        finally:
            pieces.close()  # type: ignore[attr-defined]


def _emptied(mail: Sequence[deque[Piece]]) -> Iterator[Piece]:
    for box in mail:
        while box:
            yield box.popleft()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates: bytes of an argument or a \ud800 in JSON
        raise RequestError(f"is not UTF-8 (character {error.start})", field="prompt") from None


def _usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise UnsupportedError(f"cannot be used here: {told}", field="device", value=device) from None
    return device


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many? A list of ints or of messages is one; a list of anything else is many."""
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int | Mapping):
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


def make_engine(target: Target, head: str | Path | None, options: Options) -> Engine:
    """An engine over a loaded target: drafter, cost table, budget."""
    length = min(target.info.max_length, 4096) if options.max_length is None else options.max_length
    if length > target.info.max_length:
        raise SpecdecError("is longer than the target was made for", field="max_length", value=length,
                           allowed=f"at most {target.info.max_length}")  # fmt: skip
    if length < 2 or options.slots < 1:
        raise SpecdecError("leave no room for a request", field="max_length, slots", value=(length, options.slots),
                           allowed="at least 2 tokens and 1 slot")  # fmt: skip
    limits = Limits(slots=options.slots, length=length)
    drafter = make_drafter(target, head, options, limits)
    return Engine(target, drafter, _budget(target, drafter, options, limits), limits)


def make_drafter(target: Target, head: str | Path | None, options: Options, limits: Limits) -> Drafter:
    """ "auto", "ngram", "none" or a head's directory, checked against the target."""
    if head == "auto":
        head = shipped_head(target.info.name) or "ngram"
    if head is None or head == "none":
        return NoDrafter()
    if head == "ngram":
        return NgramDrafter()
    info = target.info
    weights = load_head(
        Path(head), taps=options.taps, target_layers=info.layers, dtype=info.dtype, device=info.device
    )
    check_match(
        weights.config,
        vocab=info.vocab,
        hidden=info.hidden,
        layers=info.layers,
        fingerprint=info.fingerprint,
        name=info.name,
    )
    weights.freeze()
    return EagleDrafter(weights, target.embed, ReferenceAttention(), limits.slots, limits.length)


def _budget(target: Target, drafter: Drafter, options: Options, limits: Limits) -> Budget:
    if isinstance(drafter, NoDrafter):
        return Budget(None, PLAIN, adaptive=False)
    if options.tree is not None:
        if options.tree.sampled and not isinstance(drafter, EagleDrafter):
            raise SpecdecError(
                "needs a draft head to draw from", field="tree", value="sampled", remedy="Give a head."
            )
        return Budget(None, options.tree, adaptive=False)
    scratch = KVCache(target.info.cache, limits.slots, min(limits.length, 512) + MAX_NODES)
    costs = remembered(target, drafter, scratch, cache_directory() / "costs")
    limit = CPU_LIMIT if target.info.device.type == "cpu" else DEFAULT_TREE
    return Budget(costs, limit)


def parse_tree(text: str) -> Shape | None:
    """ "auto", "depth/top-k/nodes" such as 7/10/60, or "sampled/depth" for chains drawn from the draft distribution
    and block-verified. Raises SpecdecError otherwise."""
    if text == "auto":
        return None
    kind, _, length = text.partition("/")
    try:
        depth, width, nodes = (
            (int(length), 1, int(length) + 1)
            if kind == "sampled"
            else (int(part) for part in text.split("/"))
        )
    except ValueError:
        raise SpecdecError(
            "is not a tree", field="tree", value=text, allowed="auto, depth/top-k/nodes or sampled/depth"
        ) from None
    if depth < 1 or width < 1 or not 2 <= nodes <= MAX_NODES:
        raise SpecdecError(
            "is out of range",
            field="tree",
            value=text,
            allowed=f"depth and top-k of at least 1, 2 to {MAX_NODES} nodes",
        )
    return Shape(depth, width, nodes, sampled=kind == "sampled")
