"""`python -m bench.soak --minutes 10`: mixed load on a server of its own, greedy answers held against offline text.

Starts `specdec serve` in float32, then lets clients ask for a while: greedy answers of known text, sampled ones with
random settings, a fifth of all streams dropped by their client, a tenth of all requests bad. Counts answers that are
wrong or lost, slots that leak, the server's memory over time, and the seconds of the drain. One row in
`results/soak.jsonl`; exit code 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import Progress

from bench.record import append
from bench.servers import Server, Setup, command, running
from bench.sets import SETS, file_of, first_turns
from specdec.engine.build import Options
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling

ASKED = [name for name in SETS if name != "summarize"]  # whose prompts are long
LENGTHS = (8, 24, 64)
DROPPED, BAD = 0.2, 0.1  # shares of all requests
WARM_UP = 0.2  # of the time, before memory is compared
BAD_BODIES: tuple[Any, ...] = (
    {"prompt": ""}, {"prompt": "x", "max_tokens": 0}, {"prompt": "x", "max_tokens": 10**9},
    {"prompt": "x", "temperature": -1}, {"prompt": "x", "temperature": "hot"}, {"prompt": [10**7]}, {"prompt": None},
    {"prompt": "x", "n": 10**6}, {"prompt": "x", "stop": [""]}, {"prompt": "x", "no_such_field": 1},
    {"prompt": "x", "logit_bias": {"a": 1}}, [], "text", {},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and what plain offline decoding makes of it: text by number of tokens."""

    prompt: tuple[int, ...]
    texts: dict[int, str]


@dataclass(slots=True)
class Tally:
    """What clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def wrong(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if len(self.problems) < 10:
            self.problems.append(f"{kind}: {text}")


def offline(target: str, each: int) -> list[Known]:
    """Plain greedy answers in float32 to the first prompts of each set."""
    decoder = SpecDecoder.from_pretrained(target, "none", Options(dtype=torch.float32, slots=8))
    prompts = [decoder.encode(turn) for name in ASKED for turn in first_turns(file_of(name), each)]
    answers = decoder.generate(prompts, Sampling(max_tokens=max(LENGTHS)))
    return [
        Known(prompt, {n: decoder.decode(answer.token_ids[:n]) for n in LENGTHS})
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


async def client(
    web: httpx.AsyncClient, model: str, known: Sequence[Known], until: float, tally: Tally, seed: int
) -> None:
    """One client: asks until the time is up."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        one, length, dice = draw.choice(known), draw.choice(LENGTHS), draw.random()
        body: dict[str, Any] = {"model": model, "prompt": list(one.prompt), "max_tokens": length}
        try:
            if dice < BAD:
                await _bad(web, draw.choice(BAD_BODIES), tally)
            elif dice < BAD + DROPPED:
                await _dropped(web, body | {"stream": True, "ignore_eos": True}, draw.randrange(6), tally)
            elif dice < 0.65:
                await _greedy(web, body | {"temperature": 0}, one.texts[length], tally)
            else:
                await _sampled(web, body, length, draw, tally)
        except httpx.HTTPError as error:
            tally.wrong("lost", repr(error))


async def _bad(web: httpx.AsyncClient, body: Any, tally: Tally) -> None:
    answer = await web.post("/v1/completions", json=body)
    tally.counts["bad"] += 1
    if not 400 <= answer.status_code < 500:
        tally.wrong("bad request let in", f"{body!r}: {answer.status_code}")


async def _dropped(web: httpx.AsyncClient, body: dict[str, Any], after: int, tally: Tally) -> None:
    tally.counts["dropped"] += 1
    async with web.stream("POST", "/v1/completions", json=body) as answer:
        seen = 0
        async for _ in answer.aiter_lines():
            seen += 1
            if seen > after:
                return


async def _greedy(web: httpx.AsyncClient, body: dict[str, Any], wanted: str, tally: Tally) -> None:
    answer = await web.post("/v1/completions", json=body)
    tally.counts["greedy"] += 1
    if answer.status_code != 200:
        tally.wrong("lost", f"{answer.status_code} {answer.text[:200]}")
    elif answer.json()["choices"][0]["text"] != wanted:
        tally.wrong("wrong", f"{answer.json()['choices'][0]['text']!r} is not {wanted!r}")


async def _sampled(
    web: httpx.AsyncClient, body: dict[str, Any], length: int, draw: random.Random, tally: Tally
) -> None:
    law = {"temperature": draw.uniform(0.2, 1.5), "top_p": draw.uniform(0.5, 1), "seed": draw.randrange(2**31),
           "presence_penalty": draw.choice([0, 0.5]), "n": draw.choice([1, 1, 2])}  # fmt: skip
    answer = await web.post("/v1/completions", json=body | law)
    tally.counts["sampled"] += 1
    if answer.status_code != 200:
        tally.wrong("lost", f"{answer.status_code} {answer.text[:200]}")
        return
    told = answer.json()
    if len(told["choices"]) != law["n"] or not 1 <= told["usage"]["completion_tokens"] <= length * law["n"]:
        tally.wrong("wrong", str(told)[:300])


async def watch(pid: int, until: float, tally: Tally, tick: Any) -> None:
    """The server's resident memory, every second."""
    began = time.monotonic()
    while time.monotonic() < until:
        pages = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        tally.memory.append((time.monotonic() - began, int(pages[1]) / 1024 if pages else 0.0))
        tick()
        await asyncio.sleep(1)


async def load(server: Server, known: Sequence[Known], minutes: float, clients: int, tick: Any) -> Tally:
    """All clients at once; afterwards the server must hold nothing."""
    tally, until = Tally(), time.monotonic() + 60 * minutes
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as web:
        model = (await web.get("/v1/models")).json()["data"][0]["id"]
        asking = [client(web, model, known, until, tally, seed) for seed in range(clients)]
        await asyncio.gather(watch(server.process.pid, until, tally, tick), *asking)
        await asyncio.sleep(2)
        text = (await web.get("/metrics")).text
        for name in ("running", "waiting"):
            held = re.search(rf"vllm:num_requests_{name}\S* ([0-9.]+)", text)
            if held is None or float(held[1]) != 0:
                tally.wrong("leaked", f"{held[1] if held else 'no'} requests {name}")
    return tally


def drift(memory: Sequence[tuple[float, float]]) -> float:
    """Growth of resident memory from after the warm-up to the end, medians over a tenth of the time each."""
    span = memory[-1][0]

    def median(low: float, high: float) -> float:
        inside = sorted(mb for at, mb in memory if low * span <= at <= high * span)
        return inside[len(inside) // 2]

    return median(0.9, 1.0) / median(WARM_UP, WARM_UP + 0.1) - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run; exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2-135m", help="name, directory, .gguf file or Hub id")
    parser.add_argument("--draft", default="auto", help="as for specdec serve")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (default: 10)")
    parser.add_argument("--clients", type=int, default=8, help="that ask side by side (default: 8)")
    parser.add_argument("--slots", type=int, default=8, help="requests that run at once (default: 8)")
    parser.add_argument("--prompts-each", type=int, default=4, help="prompts of each set (default: 4)")
    args = parser.parse_args(argv)
    known = offline(args.target, args.prompts_each)
    setup = Setup(args.target, args.draft, "float32", args.slots)
    with running(*command("specdec", setup)) as server, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("load", total=60 * args.minutes)
        work = load(server, known, args.minutes, args.clients, lambda: progress.advance(bar))
        tally = asyncio.run(work)
        started = time.monotonic()
        code = server.stop()
        drained = time.monotonic() - started
    if code != 0:
        tally.wrong("drain", f"exit code {code}")
    grown = drift(tally.memory)
    row = {
        "target": args.target, "draft": args.draft, "minutes": args.minutes, "clients": args.clients,
        "slots": args.slots, "counts": dict(tally.counts), "problems": tally.problems,
        "memory_mb": [round(mb) for _, mb in tally.memory[::30]], "memory_drift": round(grown, 4),
        "drain_seconds": round(drained, 2),
    }  # fmt: skip
    append("soak", [row])
    Console().print(row)
    return int(bool(tally.problems) or grown > 0.02)


if __name__ == "__main__":
    sys.exit(main())
