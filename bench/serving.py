"""`python -m bench.serving --start specdec plain`: servers under load, side by side.

Starts the servers it is told to (or takes running ones by URL) and measures three things:

    each set, one client     every prompt is answered by every system, in an order that rotates from prompt to prompt
    closed loop              so many clients, each asking again when answered; block by block, systems in turn
    open loop                Poisson arrivals that wait for nobody; block by block, systems in turn

A system is a server asked in one way; `specdec` is asked with and without speculation, so that one process is
compared with itself (of loops only, where a plain server is there: who is asked a prompt for the second time need not
read it). Ratios are of tokens per second, of latency over the same prompts for one client and of whole blocks in loops,
with bootstrap intervals; blocks are short, because a machine has faster and slower minutes.
Rows are appended to `results/serving.jsonl` as they are measured. Knows no engine, only `load` and `servers`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.intervals import Timed, interval
from bench.load import (
    Load,
    System,
    Trace,
    arriving,
    ask,
    browser,
    closed,
    in_turn,
    scrape,
    since,
    summarise,
    tau,
)
from bench.record import append, digest
from bench.servers import KINDS, VLLM_ENV, Setup, command, running, systems_at
from bench.sets import SETS, Messages, file_of, first_turns
from specdec.cli.options import DTYPES
from specdec.errors import SpecdecError

WARM_UP: Messages = [{"role": "user", "content": "Tell me a story about a lighthouse."}]


@dataclass(frozen=True, slots=True)
class Bench:
    """What stays the same: who is asked and how.

    Attributes:
        systems: in the order of the command line.
        load: of every request.
        common: what every row says.
    """

    systems: Sequence[System]
    load: Load
    common: Mapping[str, Any]

    def alone(self) -> list[System]:
        """Whom a single client asks: no server twice where a plain one is there to compare with."""
        compared = any(system.name == "plain" for system in self.systems)
        return [system for system in self.systems if not (compared and system.plain)]

    def rows(
        self, point: Mapping[str, Any], timed: Mapping[str, Sequence[Timed | None]], told: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """One row per system, with its ratio over every other; appended to the results.

        Args:
            timed: of each system, per prompt or block; None where it failed.
        """
        rows = []
        for name, mine in timed.items():
            row = {**self.common, **point, "system": name, **told[name]}
            for other, theirs in timed.items():
                if other != name and (pair := _both(mine, theirs)):
                    row[f"over_{other}"], row[f"over_{other}_ci"] = interval(*pair, ratio=True)
            rows.append(row)
        append("serving", rows)
        return rows


def _both(
    mine: Sequence[Timed | None], theirs: Sequence[Timed | None]
) -> tuple[list[Timed], list[Timed]] | None:
    """What both have done; None when there is nothing."""
    good = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return ([a for a, _ in good], [b for _, b in good]) if good else None


async def warm_up(bench: Bench) -> None:
    """One answer of every system, which nobody counts. Raises SpecdecError when one of them fails."""
    async with browser() as web:
        for system in bench.systems:
            trace = await ask(web, bench.load, system, WARM_UP)
            if trace.error is not None:
                raise SpecdecError(f"does not answer: {trace.error}", field="server", value=system.url)


async def one_by_one(bench: Bench, name: str, asked: Sequence[Messages]) -> list[dict[str, Any]]:
    """One client: each prompt goes to every system before the next prompt, in an order that rotates."""
    systems = bench.alone()
    traces: dict[str, list[Trace]] = {system.name: [] for system in systems}
    grown: dict[str, dict[str, float]] = {system.name: {} for system in systems}
    async with browser() as web:
        for number, messages in enumerate(asked):
            for system in _rotated(systems, number):
                before = await scrape(web, system.url)
                traces[system.name].append(await ask(web, bench.load, system, messages))
                _add(grown[system.name], since(before, await scrape(web, system.url)))
    timed: dict[str, list[Timed | None]] = {}
    told = {}
    for who, mine in traces.items():
        busy = sum(trace.ended - trace.sent for trace in mine)
        told[who] = {**summarise(bench.load, mine, busy), "tau": tau(grown[who])}
        timed[who] = [None if t.error else (float(t.tokens), t.ended - t.sent) for t in mine]
    return bench.rows({"set": name, "loop": "closed", "clients": 1}, timed, told)


async def together(
    bench: Bench, blocks: Sequence[Sequence[Messages]], *, clients: int = 1, rate: float | None = None
) -> list[dict[str, Any]]:
    """`clients` in a closed loop or arrivals at `rate`: each block goes to every system before the next one does."""
    timed: dict[str, list[Timed | None]] = {system.name: [] for system in bench.systems}
    traces: dict[str, list[Trace]] = {system.name: [] for system in bench.systems}
    grown: dict[str, dict[str, float]] = {system.name: {} for system in bench.systems}
    async with browser() as web:
        for number, asked in enumerate(blocks):
            for system in _rotated(bench.systems, number):
                before, began = await scrape(web, system.url), time.perf_counter()

                async def one(messages: Messages, system: System = system) -> Trace:
                    return await ask(web, bench.load, system, messages)

                mine = await (
                    closed(one, asked, clients)
                    if rate is None
                    else arriving(one, asked, rate, bench.load.seed + number)
                )
                seconds = time.perf_counter() - began
                _add(grown[system.name], since(before, await scrape(web, system.url)))
                traces[system.name] += mine
                timed[system.name].append((float(sum(t.tokens for t in mine if t.error is None)), seconds))
    told = {}
    for name, mine in traces.items():
        busy = sum(block[1] for block in timed[name] if block is not None)
        told[name] = {**summarise(bench.load, mine, busy), "blocks": len(blocks), "tau": tau(grown[name])}
    point = {"loop": "closed", "clients": clients} if rate is None else {"loop": "open", "rate": rate}
    return bench.rows({"set": "mixed", **point}, timed, told)


def _rotated(systems: Sequence[System], turn: int) -> list[System]:
    """Each in its turn the first."""
    first = turn % len(systems)
    return [*systems[first:], *systems[:first]]


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_argument_group("servers")
    where.add_argument("--start", nargs="*", default=[], choices=KINDS, help="servers to start")
    where.add_argument(
        "--url", action="append", default=[], metavar="KIND=URL", help="a server that runs already"
    )
    where.add_argument("--target", default="smollm2-135m", help="of the servers that are started")
    where.add_argument("--draft", default="auto", help="of our server")
    where.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights")
    where.add_argument("--slots", type=int, default=16, help="requests at once")
    where.add_argument("--vllm-env", type=Path, default=VLLM_ENV, help="a virtual environment with vLLM")
    where.add_argument("--head", type=Path, default=None, help="vLLM's draft head (default: the shipped one)")
    where.add_argument("--chain", type=int, default=3, help="drafts of vLLM's chain")
    what = parser.add_argument_group("load")
    what.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS, help="of bench/prompts")
    what.add_argument(
        "--each", type=int, default=8, help="prompts of each set for one client; 0 leaves this out"
    )
    what.add_argument(
        "--clients", nargs="*", type=int, default=[2, 4, 8, 16], help="closed loop over all sets"
    )
    what.add_argument("--rates", nargs="*", type=float, default=[], help="open loop, requests per second")
    what.add_argument("--requests", type=int, default=32, help="per block of a loop")
    what.add_argument("--blocks", type=int, default=4, help="per point of a loop")
    what.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: 128)")
    what.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    what.add_argument("--first-slo", type=float, default=2.0, metavar="SECONDS", help="to the first token")
    what.add_argument("--token-slo", type=float, default=0.1, metavar="SECONDS", help="per token after it")
    what.add_argument("--seed", type=int, default=0, help="of arrivals")
    return parser.parse_args(argv)


async def measure(bench: Bench, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every point, printed as it ends."""
    rows: list[dict[str, Any]] = []
    await warm_up(bench)

    def note(made: list[dict[str, Any]]) -> None:
        rows.extend(made)
        console.print(table(made))

    for name in args.sets if args.each else ():
        note(await one_by_one(bench, name, first_turns(file_of(name), args.each)))
    asked = in_turn([first_turns(file_of(name)) for name in args.sets], args.requests * args.blocks)
    blocks = [asked[at : at + args.requests] for at in range(0, len(asked), args.requests)]
    for clients in args.clients:
        note(await together(bench, blocks, clients=clients))
    for rate in args.rates:
        note(await together(bench, blocks, rate=rate))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every point; exit code 1 when a request failed."""
    args = _arguments(argv)
    load = Load(args.max_tokens, args.temperature, args.first_slo, args.token_slo, args.seed)
    common = {"target": args.target, "dtype": args.dtype, "draft": args.draft, "slots": args.slots, "seed": args.seed,
              "max_tokens": args.max_tokens, "temperature": args.temperature, "slo": [args.first_slo, args.token_slo],
              "prompt_hashes": {name: digest(file_of(name)) for name in args.sets}}  # fmt: skip
    setup = Setup(args.target, args.draft, args.dtype, args.slots, args.vllm_env, args.head, args.chain)
    with ExitStack() as stack:
        places = [tuple(one.split("=", 1)) for one in args.url]
        for kind in args.start:
            places.append((kind, stack.enter_context(running(*command(kind, setup))).url))
        systems = [system for kind, url in places for system in systems_at(kind, url)]
        if not systems:
            raise SpecdecError("no server is named", field="start, url", remedy="Try --start specdec plain.")
        rows = asyncio.run(measure(Bench(systems, load, common), args, Console()))
    return int(any(row["errors"] for row in rows))


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One point, a column per system."""
    first = rows[0]
    loop = f"{first['clients']} clients" if first["loop"] == "closed" else f"{first['rate']:g} requests/s"
    shown = ("tokens_per_second", "goodput_per_second", "ttft_ms_p50", "ttft_ms_p99", "itl_chunk_ms_p50",
             "itl_chunk_ms_p99", "itl_token_ms_p50", "itl_token_ms_p99", "tau", "errors")  # fmt: skip
    ratios = dict.fromkeys(
        key for row in rows for key in row if key.startswith("over_") and key + "_ci" in row
    )
    made = Table("", *(row["system"] for row in rows), title=f"{first['set']}, {loop}")
    for key in (*shown, *ratios):
        values = (f"{row.get(key, '')} {row.get(key + '_ci', '')}".strip() for row in rows)
        made.add_row(key.replace("_", " "), *values)
    return made


if __name__ == "__main__":
    sys.exit(main())
