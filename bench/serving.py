"""`python -m bench.serving --url http://127.0.0.1:8000`: load on a running OpenAI-compatible server.

Closed loop (a fixed number of clients, each asking again when answered) and open loop (Poisson arrivals that wait for
nobody). Every point runs with and without speculation on the same server, in alternating order, and is appended to
`results/serving.jsonl` as it ends. Any server that streams chat completions with `usage` can be measured with
`--modes speculative`; `plain` uses our field `speculate`. Knows nothing of engines.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.record import append, digest
from specdec.cli.prompts import read_dialogues
from specdec.errors import SpecdecError

PROMPTS = Path(__file__).parent / "prompts" / "chat.jsonl"
MODES = ("speculative", "plain")
COUNTERS = {  # what tau is made of, ours first
    "specdec:round_tokens_total": "tokens",
    "specdec:rounds_total": "rounds",
    "vllm:spec_decode_num_drafts_total": "drafts",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server.

    Attributes:
        url, model: the server's root and the model's name on it.
        conversations: first turns, taken in turn.
        max_tokens, temperature: of every request; the end of sequence is ignored, so that answers are equally long.
        requests: per point.
        first_slo, token_slo: seconds to the first token and per token after it that make a request good.
        seed: of arrivals and of the order of conversations.
    """

    url: str
    model: str
    conversations: Sequence[Messages]
    max_tokens: int
    temperature: float
    requests: int
    first_slo: float
    token_slo: float
    seed: int


@dataclass(slots=True)
class Trace:
    """One request as its client saw it, in seconds of one clock; `chunks` are arrivals that held text."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.tokens - 1, 1)


async def ask(client: httpx.AsyncClient, load: Load, mode: str, messages: Messages) -> Trace:
    """One streamed request."""
    body = {"model": load.model, "messages": messages, "max_tokens": load.max_tokens, "stream": True,
            "temperature": load.temperature, "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
    if mode == "plain":
        body["speculate"] = False
    trace = Trace(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                trace.error = f"{answer.status_code} {(await answer.aread()).decode()[:200]}"
            async for line in answer.aiter_lines():
                _read(trace, line)
    except httpx.HTTPError as error:
        trace.error = repr(error)
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
        trace.error = chunk["error"]["message"]
        return
    if any(choice["delta"].get("content") for choice in chunk["choices"]):
        trace.chunks.append(time.perf_counter())
    if chunk.get("usage"):
        trace.tokens = chunk["usage"]["completion_tokens"]


Ask = Callable[[], Awaitable[Trace]]


async def closed(one: Ask, clients: int, requests: int) -> list[Trace]:
    """`clients` at a time, each asking again as soon as it is answered."""
    left, traces = iter(range(requests)), list[Trace]()

    async def loop() -> None:
        for _ in left:
            traces.append(await one())

    await asyncio.gather(*(loop() for _ in range(clients)))
    return traces


async def arriving(one: Ask, rate: float, requests: int, seed: int) -> list[Trace]:
    """Poisson arrivals at `rate` per second; nobody waits for anybody."""
    draw, waiting = random.Random(seed), list[asyncio.Future[Trace]]()
    for _ in range(requests):
        waiting.append(asyncio.ensure_future(one()))
        await asyncio.sleep(draw.expovariate(rate))
    return await asyncio.gather(*waiting)


async def measure(
    load: Load, mode: str, *, clients: int | None = None, rate: float | None = None
) -> dict[str, Any]:
    """One point: `clients` in a closed loop, or arrivals at `rate`."""
    order = list(load.conversations)
    random.Random(load.seed).shuffle(order)
    turns: Iterator[Messages] = itertools.cycle(order)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=load.url, timeout=600, limits=limits) as client:
        before, began = await scrape(client), time.perf_counter()

        def one() -> Awaitable[Trace]:
            return ask(client, load, mode, next(turns))

        if rate is None:
            traces = await closed(one, clients or 1, load.requests)
        else:
            traces = await arriving(one, rate, load.requests, load.seed)
        seconds, after = time.perf_counter() - began, await scrape(client)
    where = {"loop": "closed", "clients": clients} if rate is None else {"loop": "open", "rate": rate}
    return {"mode": mode, **where, **summarise(load, traces, seconds), "tau": tau(before, after)}


def summarise(load: Load, traces: Sequence[Trace], seconds: float) -> dict[str, Any]:
    """Latencies in milliseconds, throughput, goodput.

    Gaps are between arrivals of text, as a reader sees them: with speculation fewer, and each of several tokens.
    """
    good = [trace for trace in traces if trace.error is None]
    gaps = [b - a for trace in good for a, b in itertools.pairwise(trace.chunks)]
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
        **_spread("itl_ms", gaps),
        **_spread("per_token_ms", [trace.per_token for trace in good]),
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile in milliseconds."""
    if len(seconds) < 2:
        value = round(1000 * seconds[0], 3) if seconds else None
        return {f"{name}_p50": value, f"{name}_p99": value}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"{name}_p50": round(1000 * cuts[49], 3), f"{name}_p99": round(1000 * cuts[98], 3)}


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """The counters behind tau; those a server does not have are missing."""
    answer = await client.get("/metrics")
    found: dict[str, float] = {}
    for line in answer.text.splitlines() if answer.status_code == 200 else ():
        name = COUNTERS.get(line.split("{", 1)[0])
        if name is not None:
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def tau(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Tokens per target forward between two scrapes; from drafts alone where a server counts no rounds."""
    since = {key: value - before.get(key, 0.0) for key, value in after.items()}
    if since.get("rounds"):
        return round(since["tokens"] / since["rounds"], 4)
    if since.get("drafts"):
        return round(1 + since["accepted"] / since["drafts"], 4)
    return None


def model_of(url: str) -> str:
    """The first model a server lists. Raises SpecdecError when there is no server."""
    try:
        return str(httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise SpecdecError(f"no OpenAI-compatible server answers: {error}", field="url", value=url) from None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.serving", description="Load on an OpenAI-compatible server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--label", default="specdec", help="name of the server in the results")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 2, 4, 8, 16], help="closed loop")
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="open loop, requests per second")
    parser.add_argument("--requests", type=int, default=32, help="per point")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--first-slo", type=float, default=2.0, metavar="SECONDS", help="to the first token")
    parser.add_argument("--token-slo", type=float, default=0.1, metavar="SECONDS", help="per token after it")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every point; exit code 1 when a request failed."""
    args = _arguments(argv)
    firsts: list[Messages] = [
        [*row.messages, {"role": "user", "content": row.turns[0]}] for row in read_dialogues(args.prompts)
    ]
    load = Load(args.url, model_of(args.url), firsts, args.max_tokens, args.temperature, args.requests,
                args.first_slo, args.token_slo, args.seed)  # fmt: skip
    common = {"server": args.label, "model": load.model, "prompts": args.prompts.name, "seed": args.seed,
              "prompts_hash": digest(args.prompts), "max_tokens": args.max_tokens,
              "temperature": args.temperature}  # fmt: skip
    points: list[dict[str, Any]] = [{"clients": n} for n in args.clients] + [{"rate": r} for r in args.rates]
    rows = []
    for turn, point in enumerate(points):
        for mode in args.modes if turn % 2 == 0 else reversed(args.modes):
            rows.append({**common, **asyncio.run(measure(load, mode, **point))})
            append("serving", rows[-1:])
    Console().print(table(rows))
    return int(any(row["errors"] for row in rows))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The points, one per line."""
    shown = ("mode", "loop", "clients", "rate", "tokens_per_second", "goodput_per_second", "ttft_ms_p50",
             "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "tau", "errors")  # fmt: skip
    made = Table(*shown)
    for row in rows:
        made.add_row(*("" if row.get(key) is None else str(row[key]) for key in shown))
    return made


if __name__ == "__main__":
    sys.exit(main())
