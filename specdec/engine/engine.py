"""The engine: requests join and leave between rounds; prompts are prefilled in chunks; one failure stays alone.

`step()` is the whole machine: cancel, admit, prefill a little, run one round. With a pipeline attached, rounds that fit
are launched ahead and handed out one step late. It knows token ids and slots, nothing of HTTP or terminals.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specdec.cache import KVCache
from specdec.drafting.protocol import PLAIN, Drafter, Shape
from specdec.engine.batch import Batch
from specdec.engine.budget import Budget
from specdec.engine.logprobs import TokenLogprob, token_logprobs
from specdec.engine.pipeline import Pipeline
from specdec.engine.prefill import Prefill
from specdec.engine.request import Finish, Piece, Request, check_request
from specdec.engine.round import Emitted, Outcome, Rounds
from specdec.memory import current
from specdec.stats import Counters, Recorder, Round, Watcher
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
        self.watcher: Watcher | None = None
        self.pipeline: Pipeline | None = None
        self.refused: str | None = None  # why rounds are not device programs, where that was tried

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
        with current(self.target.info.device):
            return self._step()

    def _step(self) -> list[Piece]:
        pieces = self._land_all() if self._about_to_change() else []
        pieces += self._drop_cancelled()
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
            request = self._next()
            free = [slot for slot in range(self.limits.slots) if slot not in self.active]
            self.budget.welcome(len(self.active))
            self.prefill.place(request, free)
            self.active[request.slot] = request

    def _next(self) -> Request:
        """Take the oldest waiting request of those whose group has fewest slots, so that a call of many sequences does
        not shut others out; one that has none left is as good as a newcomer again."""
        held = Counter(request.group for request in self.active.values() if request.group)
        chosen = min(self.waiting, key=lambda request: held[request.group])
        self.waiting.remove(chosen)
        return chosen

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

    def _about_to_change(self) -> bool:
        """Will somebody leave, join or read a prompt before the next round?"""
        joining = self.waiting and len(self.active) < self.limits.slots
        return bool(self.cancelled or joining) or not all(r.running for r in self.active.values())

    def _round(self, running: list[Request]) -> list[Piece]:
        speculate = [r.speculate for r in running]
        shape = self.budget.shape(len(running)) if any(speculate) else PLAIN
        if shape.sampled and not all(r.speculate and r.only in (None, "head") for r in running):
            shape = PLAIN  # a sampled chain comes of a head, and is verified as a whole batch or not at all
        if self.pipeline is not None and self.recorder is None and self.pipeline.fits(running, shape):
            return self._launch(self.pipeline, running, shape)
        pieces = self._land_all()
        if self.pipeline is not None:
            self.pipeline.hand_back()
        return pieces + self._run([r for r in running if r.running], shape)

    def _run(self, running: list[Request], shape: Shape) -> list[Piece]:
        """A round step by step."""
        if not running:
            return []
        try:
            batch = Batch.of(running, self.target.info.vocab, self.target.info.device, chains=shape.sampled)
            outcome = self.rounds.run(batch, shape)
        except Exception as error:
            if len(running) == 1:
                return [self._end(running[0], "error", _told(error))]
            return [piece for r in running for piece in self._run([r], shape)]  # find the culprit alone
        emitted = Emitted.of(outcome)
        # a device runs behind the host, whose clock this is
        seconds = outcome.seconds if self.target.info.device.type == "cpu" else None
        self.budget.note(shape, outcome.tree, sum(emitted.counts), seconds)
        if self.recorder is not None:
            self.recorder.record(_as_round(batch, outcome))
        return self._settle(batch.requests, emitted, outcome)

    def _launch(self, pipeline: Pipeline, running: list[Request], shape: Shape) -> list[Piece]:
        """Start a round and hand out the one before it, if there is one."""
        pieces = []
        if pipeline.must_land(running, shape):
            pieces += self._land_all()
            running = [r for r in running if r.running]
        unfinished = any(len(r.output) + len(pipeline.flights) < r.sampling.max_tokens for r in running)
        if unfinished:
            try:
                pipeline.launch(running, shape)
            except Exception as error:  # whatever a driver refuses, rounds still run step by step
                warnings.warn(f"rounds are no longer captured: {_told(error)}", stacklevel=2)
                pieces += self._land_all()
                pipeline.hand_back()
                self.pipeline, self.refused = None, _told(error)
                return pieces + self._run([r for r in running if r.running], shape)
        if len(pipeline.flights) > unfinished:
            pieces += self._land(pipeline)
        return pieces

    def _land_all(self) -> list[Piece]:
        """Hand out every round that is in flight."""
        pieces = []
        while self.pipeline is not None and self.pipeline.flights:
            pieces += self._land(self.pipeline)
        return pieces

    def _land(self, pipeline: Pipeline) -> list[Piece]:
        """Hand out the oldest round in flight."""
        flight, emitted = pipeline.land()
        if flight.shape.nodes > 1:
            size, shape = len(flight.requests), flight.shape
            self.budget.earned(size, shape.nodes, shape.depth, emitted.promised, sum(emitted.counts))
        pieces = self._settle(flight.requests, emitted)
        pipeline.forget_finished()
        return pieces

    def _settle(
        self, requests: Sequence[Request], emitted: Emitted, outcome: Outcome | None = None
    ) -> list[Piece]:
        """Hand tokens to their requests and count; who has ended meanwhile gets nothing."""
        pieces = []
        for row, request in enumerate(requests):
            if request.finished is not None:
                continue
            _add_seconds(request.counters, emitted.seconds)
            if emitted.sick[row]:
                pieces.append(self._end(request, "error", "the target's logits are not numbers (NaN)"))
                continue
            count = emitted.counts[row]
            given, drafted = emitted.tokens[row][:count], [True] * (count - 1) + [False]
            if self.watcher is not None:
                self.watcher.saw(request.id, emitted.sizes[row], emitted.offered[row])
            before = len(request.output)
            pieces.append(self._hand_out(request, given, drafted, _logprobs(outcome, row, request)))
            if request.finish == "error":
                continue
            cut = len(request.output) - before < count
            for counters in (request.counters, self.counters):
                counters.add_round(count, emitted.offered[row], emitted.sizes[row], cut=cut)
        _add_seconds(self.counters, emitted.seconds)
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
        texts, kept, error = list[str](), tokens[:0], None
        try:
            texts = request.emit(tokens)
            kept = tokens[: len(texts)]
            request.logprobs += logprobs[: len(kept)]
            if request.constraint is not None:
                request.constraint.accept(kept)
        except Exception as failure:  # a tokenizer or a grammar that fails must not take the others down
            request.finish, error = "error", _told(failure)
        if request.finish:
            self._leave(request)
        return Piece(
            request.id, tuple(kept), tuple(drafted[: len(kept)]), tuple(texts), request.finish, error
        )

    def _end(self, request: Request, finish: Finish, error: str | None = None) -> Piece:
        """End a request between two rounds."""
        request.finish = finish
        self._leave(request)
        left = request.release()
        return Piece(request.id, (), (), (left,) if left else (), finish, error)

    def _leave(self, request: Request) -> None:
        """A request has ended: free its slot."""
        request.finished = time.perf_counter()
        if request.slot < 0:
            return
        if self.pipeline is not None:
            self.pipeline.leave(request.slot)
        self.prefill.release(request)
        if request.finish == "error":
            self.prefill.wipe(request.slot)
            if self.pipeline is not None:
                self.pipeline.wipe(request.slot)
        self.drafter.release(request.slot)
        del self.active[request.slot]


def _as_round(batch: Batch, outcome: Outcome) -> Round:
    ids = tuple(r.id for r in batch.requests)
    return Round(ids, outcome.tree, outcome.chosen, outcome.verdict, outcome.logits, outcome.features)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _add_seconds(counters: Counters, seconds: dict[str, float]) -> None:
    for phase, spent in seconds.items():
        counters.seconds[phase] += spent


def _logprobs(outcome: Outcome | None, row: int, request: Request) -> list[TokenLogprob]:
    """Log-probabilities of the emitted tokens from the target's own logits at the kept nodes."""
    wanted = request.sampling.logprobs
    if wanted is None or outcome is None:
        return []
    count = int(outcome.verdict.counts[row])
    nodes = outcome.verdict.kept[row, :count]
    return token_logprobs(outcome.logits[row, nodes], outcome.verdict.tokens[row, :count].tolist(), wanted)
