"""Clients of an OpenAI-compatible server and what they see: streams with their times, closed and open loops, figures.

Any server that streams chat completions with `usage` in its chunks can be asked. Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.sets import Messages

COUNTERS = {  # what tau is made of, ours first
    "specdec:round_tokens_total": "tokens",
    "specdec:rounds_total": "rounds",
    "vllm:spec_decode_num_drafts_total": "drafts",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}


@dataclass(frozen=True, slots=True)
class System:
    """Who is asked, and how.

    Attributes:
        name: in the results.
        url, model: the server's root and the model's name on it.
        plain: ask our own server to answer without speculation (`speculate: false`).
    """

    name: str
    url: str
    model: str
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What every request of a point has in common.

    Attributes:
        max_tokens, temperature: the end of sequence is ignored, so that all answers are equally long.
        first_slo, token_slo: seconds to the first token and per token after it that make a request good.
        seed: of arrivals.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    first_slo: float = 2.0
    token_slo: float = 0.1
    seed: int = 0


@dataclass(slots=True)
class Trace:
    """One request as its client saw it, in seconds of one clock.

    Attributes:
        chunks: arrivals that held text, each with the tokens emitted by then (0 where the server does not say).
        ended: when the stream was over.
    """

    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    tokens: int = 0
    ended: float = 0.0
    error: str | None = None

    @property
    def first(self) -> float:
        return self.chunks[0][0] - self.sent

    @property
    def per_token(self) -> float:
        """Seconds per token after the first chunk's."""
        return (self.chunks[-1][0] - self.chunks[0][0]) / max(self.tokens - max(self.chunks[0][1], 1), 1)

    def gaps(self) -> list[tuple[float, int]]:
        """Seconds between two arrivals of text, and the tokens the later one brought."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(self.chunks)]


async def ask(web: httpx.AsyncClient, load: Load, system: System, messages: Messages) -> Trace:
    """One streamed request."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": system.model, "messages": messages, "max_tokens": load.max_tokens, "stream": True,
            "temperature": load.temperature, "ignore_eos": True, "stream_options": options}  # fmt: skip
    if system.plain:
        body["speculate"] = False
    trace = Trace(time.perf_counter())
    try:
        async with web.stream("POST", f"{system.url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                trace.error = f"{answer.status_code} {(await answer.aread()).decode()[:200]}"
            else:
                async for line in answer.aiter_lines():
                    _read(trace, line)
    except httpx.HTTPError as error:
        trace.error = repr(error)
    trace.ended = time.perf_counter()
    if trace.error is None and not trace.chunks:
        trace.error = "no text"
    return trace


def _read(trace: Trace, line: str) -> None:
    """Note what one line of a stream says."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return
    chunk = json.loads(data)
    if "error" in chunk:
        trace.error = str(chunk["error"]["message"])
        return
    if chunk.get("usage"):
        trace.tokens = chunk["usage"]["completion_tokens"]
    if any(choice["delta"].get("content") for choice in chunk["choices"]):
        trace.chunks.append((time.perf_counter(), trace.tokens))


Ask = Callable[[Messages], Awaitable[Trace]]


async def closed(one: Ask, asked: Sequence[Messages], clients: int) -> list[Trace]:
    """`clients` at a time, each asking again as soon as it is answered. Traces come in the order of `asked`."""
    left = iter(enumerate(asked))
    traces: dict[int, Trace] = {}

    async def loop() -> None:
        for number, messages in left:
            traces[number] = await one(messages)

    await asyncio.gather(*(loop() for _ in range(clients)))
    return [traces[number] for number in range(len(asked))]


async def arriving(one: Ask, asked: Sequence[Messages], rate: float, seed: int) -> list[Trace]:
    """Poisson arrivals at `rate` per second; nobody waits for anybody."""
    draw, waiting = random.Random(seed), list[asyncio.Future[Trace]]()
    for messages in asked:
        waiting.append(asyncio.ensure_future(one(messages)))
        await asyncio.sleep(draw.expovariate(rate))
    return await asyncio.gather(*waiting)


@asynccontextmanager
async def browser() -> AsyncIterator[httpx.AsyncClient]:
    """A client that opens as many connections as it is asked for."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as web:
        yield web


def summarise(load: Load, traces: Sequence[Trace], seconds: float) -> dict[str, Any]:
    """Latencies in milliseconds, throughput, goodput.

    `itl_chunk_ms` are the gaps between two arrivals of text, as a reader sees them: with speculation fewer, and each
    of several tokens. `itl_token_ms` spreads each gap over the tokens it brought, one entry per token.
    """
    good = [trace for trace in traces if trace.error is None]
    gaps = [gap for trace in good for gap in trace.gaps()]
    each = [seconds / tokens for seconds, tokens in gaps if tokens > 0 for _ in range(tokens)]
    met = [t for t in good if t.first <= load.first_slo and t.per_token <= load.token_slo]
    tokens = sum(trace.tokens for trace in good)
    return {
        "requests": len(traces),
        "errors": len(traces) - len(good),
        "first_error": next((trace.error for trace in traces if trace.error), None),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "goodput_per_second": round(len(met) / seconds, 4),
        **_spread("ttft_ms", [trace.first for trace in good]),
        **_spread("itl_chunk_ms", [seconds for seconds, _ in gaps]),
        **_spread("itl_token_ms", each),
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile in milliseconds."""
    if len(seconds) < 2:
        value = round(1000 * seconds[0], 3) if seconds else None
        return {f"{name}_p50": value, f"{name}_p99": value}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"{name}_p50": round(1000 * cuts[49], 3), f"{name}_p99": round(1000 * cuts[98], 3)}


async def scrape(web: httpx.AsyncClient, url: str) -> dict[str, float]:
    """The counters behind tau; those a server does not have are missing."""
    answer = await web.get(f"{url}/metrics")
    found: dict[str, float] = {}
    for line in answer.text.splitlines() if answer.status_code == 200 else ():
        name = COUNTERS.get(line.split("{", 1)[0])
        if name is not None:
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def tau(deltas: dict[str, float]) -> float | None:
    """Tokens per target forward; from drafts alone where a server counts no rounds."""
    if deltas.get("rounds"):
        return round(deltas["tokens"] / deltas["rounds"], 4)
    if deltas.get("drafts"):
        return round(1 + deltas["accepted"] / deltas["drafts"], 4)
    return None


def since(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What counters grew by."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def in_turn(sets: Sequence[Sequence[Messages]], requests: int) -> list[Messages]:
    """Conversations of several sets, one of each in turn, from the start again where they run out."""
    turns: Iterator[Messages] = itertools.cycle(
        m for row in itertools.zip_longest(*sets) for m in row if m is not None
    )
    return list(itertools.islice(turns, requests))
