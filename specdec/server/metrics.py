"""Prometheus metrics: vLLM's names verbatim, so that dashboards and benchmarks read them, and `specdec:*` beside them.

Counters of requests and speculation are fed from the engine's thread; gauges and the engine's own sums are read when
somebody scrapes. For trees, vLLM's four speculation counters describe the accepted path: a draft is a round in which
something was on offer, its draft tokens are the depth on offer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specdec.engine.request import Piece, Request
from specdec.engine.worker import EngineWorker
from specdec.server.events import Step
from specdec.tree import MAX_NODES

LABELS = ("engine", "model_name")
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
DEPTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Metrics:
    """The registry of one server; the engine's watcher and the calls' observer.

    Args:
        worker: whose engine is described.
        model: name on the wire.
    """

    def __init__(self, worker: EngineWorker, model: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = ("0", model)
        self._offered: dict[str, deque[int]] = {}  # a step may land several rounds before their pieces leave
        self._last: dict[str, float] = {}
        self._speculation()
        self._traffic()
        self._latency()
        self._load(worker)
        self.registry.register(EngineSums(worker, self.labels))

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(name, text, (*LABELS, *more), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, LABELS, buckets=buckets, registry=self.registry)
        return made.labels(*self.labels)

    def _speculation(self) -> None:
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Rounds with drafts").labels(*self.labels)
        self._draft_tokens = self._counter(
            "vllm:spec_decode_num_draft_tokens", "Depth on offer, summed over drafts"
        ).labels(*self.labels)
        self._accepted = self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens"
        ).labels(*self.labels)
        by_position = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by position", "position"
        )
        self._positions = [by_position.labels(*self.labels, str(p)) for p in range(8)]
        self._by_position = by_position
        self._nodes = self._histogram("specdec:nodes", "Nodes of a verified tree, root included", NODES)
        self._depth = self._histogram("specdec:depth", "Depth of a verified tree", DEPTHS)

    def _traffic(self) -> None:
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens").labels(*self.labels)
        self._generated = self._counter("vllm:generation_tokens", "Emitted tokens").labels(*self.labels)
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up").labels(
            *self.labels
        )
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens taken over").labels(*self.labels)
        finished = self._counter("vllm:request_success", "Ended requests by reason", "finished_reason")
        self._finished = {key: finished.labels(*self.labels, value) for key, value in REASONS.items()}

    def _latency(self) -> None:
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token", FIRST)
        self._itl = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two pieces of an answer", BETWEEN
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Decoding seconds per token", BETWEEN
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", WHOLE)

    def _load(self, worker: EngineWorker) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, LABELS, registry=self.registry).labels(*self.labels)

        def usage() -> float:
            engine = worker.engine
            rows = sum(len(r.prompt) + len(r.output) for r in list(engine.active.values()))
            return rows / (engine.limits.slots * engine.limits.length)

        gauge("vllm:num_requests_running", "Requests in slots").set_function(lambda: worker.load[0])
        gauge("vllm:num_requests_waiting", "Requests in the queue").set_function(lambda: worker.load[1])
        gauge("vllm:kv_cache_usage_perc", "Used share of the KV cache, 0 to 1").set_function(usage)

    def saw(self, request: str, nodes: int, offered: int) -> None:
        """The engine's watcher: what a tree offered; what came of it is counted with its piece."""
        self._nodes.observe(nodes)
        self._depth.observe(offered)
        self._offered.setdefault(request, deque()).append(offered)

    def _position(self, position: int) -> Counter:
        while position >= len(self._positions):
            label = str(len(self._positions))
            self._positions.append(self._by_position.labels(*self.labels, label))
        return self._positions[position]

    def observe(self, request: Request, piece: Piece) -> Step | None:
        """A piece is about to leave the engine's thread; returns what speculation did for it."""
        now = time.perf_counter()
        before = self._last.get(request.id)
        self._generated.inc(len(piece.tokens))
        if piece.tokens:
            self._last[request.id] = now
        step = None
        if piece.tokens and before is None:
            self._start(request, now)
        elif piece.tokens and before is not None:
            self._itl.observe(now - before)
            step = self._step(request, piece)
        if piece.finish:
            self._end(request, piece)
        return step

    def _step(self, request: Request, piece: Piece) -> Step | None:
        """What a round did; the first piece comes of the prefill, though a round may have followed already."""
        waiting = self._offered.get(request.id)
        offered = waiting.popleft() if waiting else 0
        if not offered:
            return None
        step = Step(sum(piece.drafted), offered)
        self._count(step)
        return step

    def _count(self, step: Step) -> None:
        self._drafts.inc()
        self._draft_tokens.inc(step.offered)
        self._accepted.inc(step.accepted)
        for position in range(step.accepted):
            self._position(position).inc()

    def _start(self, request: Request, now: float) -> None:
        self._ttft.observe(now - request.arrived)
        self._prompt.inc(len(request.prompt))
        self._queries.inc(len(request.prompt))
        self._hits.inc(request.reused)

    def _end(self, request: Request, piece: Piece) -> None:
        self._last.pop(request.id, None)
        self._offered.pop(request.id, None)
        self._finished[str(piece.finish)].inc()
        if request.finished is None or request.first_token is None:
            return
        self._e2e.observe(request.finished - request.arrived)
        if len(request.output) > 1:
            self._per_token.observe((request.finished - request.first_token) / (len(request.output) - 1))

    def text(self) -> bytes:
        """The exposition, as /metrics serves it."""
        return generate_latest(self.registry)


class EngineSums(Collector):
    """The engine's own counters and its current budget, read at the scrape."""

    def __init__(self, worker: EngineWorker, labels: tuple[str, str]) -> None:
        self.worker, self.labels = worker, labels

    def collect(self) -> Iterator[Metric]:
        counters = self.worker.engine.counters
        yield self._sum("specdec:rounds", "Target forwards, cut ones left out", counters.rounds)
        yield self._sum("specdec:round_tokens", "Tokens these rounds emitted", counters.emitted)
        yield self._sum("specdec:draft_nodes", "Draft nodes verified in them", counters.drafted)
        yield self._by_depth(
            "specdec:reached", "Rounds that reached depth d - 1 and offered d", counters.reached
        )
        yield self._by_depth("specdec:accepted", "Rounds that accepted at depth d", counters.accepted)
        seconds = CounterMetricFamily("specdec:phase_seconds", "Seconds by phase", labels=[*LABELS, "phase"])
        for phase, value in counters.seconds.items():
            seconds.add_metric([*self.labels, phase], value)
        yield seconds
        yield from self._derived()

    def _derived(self) -> Iterator[Metric]:
        engine = self.worker.engine
        counters, limit = engine.counters, engine.budget.limit
        yield self._now("specdec:tau", "Tokens per target forward since the start", counters.tau)
        alpha = GaugeMetricFamily("specdec:alpha", "Conditional acceptance rate", labels=[*LABELS, "depth"])
        for depth, value in enumerate(counters.alpha(), start=1):
            alpha.add_metric([*self.labels, str(depth)], value)
        yield alpha
        rounds = max(counters.rounds, 1)
        for phase in ("draft", "verify", "accept"):
            value = 1000 * counters.seconds[phase] / rounds
            yield self._now(f"specdec:{phase}_ms", f"Milliseconds of the phase {phase} per round", value)
        yield self._now("specdec:budget_nodes", "Largest tree the budget may choose", limit.nodes)
        yield self._now("specdec:budget_depth", "Deepest tree the budget may choose", limit.depth)
        yield self._now(
            "specdec:budget_paused", "Batch sizes for which speculation is off now", self._paused()
        )
        yield self._now("specdec:slots", "Requests that run at once", engine.limits.slots)

    def _paused(self) -> int:
        return sum(trial.paused > 0 for trial in list(self.worker.engine.budget.trials.values()))

    def _sum(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self.labels, value)
        return family

    def _now(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self.labels, value)
        return family

    def _by_depth(self, name: str, text: str, values: list[int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=[*LABELS, "depth"])
        deepest = max((d for d, value in enumerate(values) if value), default=0)
        for depth in range(1, min(deepest, MAX_NODES) + 1):
            family.add_metric([*self.labels, str(depth)], values[depth])
        return family
