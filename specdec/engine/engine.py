"""The engine: requests join and leave between rounds; prompts are prefilled in chunks; one failure stays alone.

`step()` is the whole machine: cancel, admit, prefill a little, run one round. It knows token ids and slots, nothing
of HTTP or terminals.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specdec.cache import KVCache
from specdec.drafting.protocol import PLAIN, Drafter
from specdec.engine.batch import Batch
from specdec.engine.budget import Budget
from specdec.engine.logprobs import TokenLogprob, token_logprobs
from specdec.engine.prefill import Prefill
from specdec.engine.request import Finish, Piece, Request
from specdec.engine.round import Outcome, Rounds
from specdec.errors import RequestError
from specdec.stats import Counters, Recorder, Round
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of an engine: requests at once, context length, prompt tokens prefilled between two rounds."""

    slots: int = 4
    length: int = 2048
    chunk: int = 512


class Engine:
    """Runs requests over slots.

    Args:
        target, drafter: see their protocols; `drafter` must have been made for the same slots and length.
        budget: chooses tree shapes.
        limits: sizes.
    """

    def __init__(self, target: Target, drafter: Drafter, budget: Budget, limits: Limits) -> None:
        self.target, self.drafter, self.budget, self.limits = target, drafter, budget, limits
        self.cache = KVCache(target.info.cache, limits.slots, limits.length + MAX_NODES)
        self.rounds = Rounds(target, drafter, self.cache)
        self.prefill = Prefill(target, drafter, self.cache, limits.chunk)
        self.waiting: deque[Request] = deque()
        self.active: dict[int, Request] = {}
        self.cancelled: set[str] = set()
        self.counters = Counters()
        self.recorder: Recorder | None = None

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never be served."""
        check_request(request, self.limits.length, self.target.info.vocab)
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request before the next round; its slot is free then. Unknown ids are ignored."""
        self.cancelled.add(request_id)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One turn: cancellations, admissions, a chunk of prefill, one round. Returns what each request got."""
        pieces = self._drop_cancelled()
        self._admit()
        pieces += self._prefill_one()
        running = [self.active[slot] for slot in sorted(self.active) if self.active[slot].running]
        if running:
            pieces += self._round(running)
        return pieces

    def _drop_cancelled(self) -> list[Piece]:
        pieces = []
        for request in [*self.waiting, *self.active.values()] if self.cancelled else []:
            if request.id in self.cancelled:
                if request.slot < 0:
                    self.waiting.remove(request)
                pieces.append(self._end(request, "cancelled"))
        self.cancelled.clear()
        return pieces

    def _admit(self) -> None:
        """Give free slots to waiting requests, each the slot that shares most with its prompt."""
        while self.waiting and len(self.active) < self.limits.slots:
            request = self.waiting.popleft()
            free = [slot for slot in range(self.limits.slots) if slot not in self.active]
            self.prefill.place(request, free)
            self.active[request.slot] = request

    def _prefill_one(self) -> list[Piece]:
        """Advance the oldest unfinished prompt by one chunk; with nothing else to do, finish it."""
        for request in self.active.values():
            if request.prefilled == len(request.prompt):
                continue
            started = time.perf_counter()
            try:
                token, logprob = self.prefill.advance(request)
            except Exception as error:  # one bad request must not take the others down
                return [self._end(request, "error", _told(error))]
            request.counters.seconds["prefill"] += time.perf_counter() - started
            self.counters.seconds["prefill"] += time.perf_counter() - started
            return [] if token is None else [self._hand_out(request, [token], [False], logprob)]
        return []

    def _round(self, running: list[Request]) -> list[Piece]:
        speculate = [r.speculate for r in running]
        shape = self.budget.shape(len(running)) if any(speculate) else PLAIN
        if shape.sampled and not all(speculate):
            shape = PLAIN  # a sampled chain is verified as a whole batch or not at all
        try:
            batch = Batch.of(running, self.target.info.vocab, self.target.info.device, chains=shape.sampled)
            outcome = self.rounds.run(batch, shape)
        except Exception as error:
            if len(running) == 1:
                return [self._end(running[0], "error", _told(error))]
            return [
                piece for request in running for piece in self._round([request])
            ]  # find the culprit alone
        emitted = int(outcome.verdict.counts.sum())
        self.budget.note(shape, outcome.tree, emitted)
        if self.recorder is not None:
            self.recorder.record(_as_round(batch, outcome))
        return self._settle(batch, outcome)

    def _settle(self, batch: Batch, outcome: Outcome) -> list[Piece]:
        """Hand tokens to their requests and count."""
        counts, tokens = outcome.verdict.counts.tolist(), outcome.verdict.tokens.tolist()
        offered, sizes = outcome.verdict.offered.tolist(), outcome.tree.sizes.tolist()
        sick = _sick(outcome)
        pieces = []
        for row, request in enumerate(batch.requests):
            _add_seconds(request.counters, outcome)
            if sick[row]:
                pieces.append(self._end(request, "error", "the target's logits are not numbers (NaN)"))
                continue
            given = tokens[row][: counts[row]]
            drafted = [True] * (counts[row] - 1) + [False]
            before = len(request.output)
            pieces.append(self._hand_out(request, given, drafted, _logprobs(outcome, row, request)))
            if request.finish == "error":
                continue
            cut = len(request.output) - before < counts[row]
            for counters in (request.counters, self.counters):
                counters.add_round(counts[row], offered[row], sizes[row], cut=cut)
        _add_seconds(self.counters, outcome)
        return pieces

    def _hand_out(
        self,
        request: Request,
        tokens: Sequence[int],
        drafted: Sequence[bool],
        logprobs: Sequence[TokenLogprob],
    ) -> Piece:
        if request.first_token is None:
            request.first_token = time.perf_counter()
        kept = request.emit(tokens)
        request.logprobs += logprobs[: len(kept)]
        try:
            if request.constraint is not None:
                request.constraint.accept(kept)
        except Exception as error:  # a grammar that fails must not take the others down
            return self._end(request, "error", _told(error), tokens=kept, drafted=drafted)
        if request.finish:
            return self._end(request, request.finish, tokens=kept, drafted=drafted)
        text = request.text.release() if request.text else ""
        return Piece(request.id, tuple(kept), tuple(drafted[: len(kept)]), text)

    def _end(
        self,
        request: Request,
        finish: Finish,
        error: str | None = None,
        *,
        tokens: Sequence[int] = (),
        drafted: Sequence[bool] = (),
    ) -> Piece:
        """Close a request and free its slot."""
        request.finish, request.finished = finish, time.perf_counter()
        if request.slot >= 0:
            self.prefill.release(request)
            if finish == "error":
                self.prefill.wipe(request.slot)
            self.drafter.release(request.slot)
            del self.active[request.slot]
        text = request.text.release(final=True) if request.text else ""
        return Piece(request.id, tuple(tokens), tuple(drafted[: len(tokens)]), text, finish, error)


def _as_round(batch: Batch, outcome: Outcome) -> Round:
    ids = tuple(r.id for r in batch.requests)
    return Round(ids, outcome.tree, outcome.chosen, outcome.verdict, outcome.logits, outcome.features)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _sick(outcome: Outcome) -> list[bool]:
    """Which requests met logits that are not numbers at a node their answer goes through."""
    kept = outcome.verdict.kept
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    bad: list[bool] = outcome.logits[rows, kept].amax(dim=-1).isnan().any(dim=1).tolist()
    return bad


def _add_seconds(counters: Counters, outcome: Outcome) -> None:
    counters.seconds["draft"] += outcome.draft_seconds
    counters.seconds["verify"] += outcome.verify_seconds
    counters.seconds["accept"] += outcome.accept_seconds


def _logprobs(outcome: Outcome, row: int, request: Request) -> list[TokenLogprob]:
    """Log-probabilities of the emitted tokens from the target's own logits at the kept nodes."""
    wanted = request.sampling.logprobs
    if wanted is None:
        return []
    count = int(outcome.verdict.counts[row])
    nodes = outcome.verdict.kept[row, :count]
    return token_logprobs(outcome.logits[row, nodes], outcome.verdict.tokens[row, :count].tolist(), wanted)


def check_request(request: Request, length: int, vocab: int) -> None:
    """Raises RequestError for what no engine of this length and vocabulary can serve."""
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
