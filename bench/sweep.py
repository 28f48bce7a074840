"""`python -m bench.sweep`: tokens/s of drafting over plain decoding at every batch, the budget choosing.

Measured while exactly B requests run: from the moment all prompts are read until the first answer is whole. Plain and
drafted runs take turns; the first of each warms up. With `--replay`, drafts follow a stated acceptance profile on a
random target: mechanics, never a model's result. Rows go to `results/sweep.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.record import append
from bench.replay import Profile, ReplayDrafter, ReplayHead
from bench.sets import SETS, file_of, first_turns
from bench.steps import DRAFT_VOCAB, EIGHT_B, random_target
from bench.systems import settle
from bench.whole_round import random_head
from specdec.cache import KVCache
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN, Drafter, Shape
from specdec.engine.ahead import run_ahead
from specdec.engine.budget import Budget
from specdec.engine.build import CPU_LIMIT, DEFAULT_TREE, Options
from specdec.engine.costs import measure as measure_costs
from specdec.engine.engine import Engine, Limits
from specdec.engine.graphs import CudaRecording, graphed
from specdec.engine.request import Request
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling
from specdec.target.lean import LeanConfig
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROFILE = Profile((0.78, 0.76, 0.74, 0.72, 0.70, 0.68, 0.66))
PROMPT = 256  # tokens of a random prompt
AHEAD = 5  # tokens a round, at most about


@dataclass(frozen=True, slots=True)
class Window:
    """What happened while all requests ran: tokens, seconds, rounds of the batch, and the answers' ids."""

    tokens: int
    seconds: float
    rounds: int
    texts: tuple[tuple[int, ...], ...]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two engines over one target, and what they answer."""

    plain: Engine
    drafted: Engine
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int


def window(engine: Engine, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> Window:
    """Run one request per prompt, all at once, and time the part in which every one of them decodes."""
    engine.prefill.forget()
    requests = [
        Request(f"sweep-{i}", prompt, Sampling(max_tokens=max_tokens + room(len(prompts) - 1 - i), ignore_eos=True),
                frozenset())
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    for request in requests:
        engine.add(request)
    while any(request.first_token is None and request.finish is None for request in requests):
        _step(engine)
    settle()
    start, before, rounds = time.perf_counter(), _emitted(requests), 0
    while all(request.finish is None for request in requests):
        _step(engine)
        rounds += 1
    settle()
    seconds, tokens = time.perf_counter() - start, _emitted(requests) - before
    while engine.busy:
        engine.step()
    return Window(tokens, seconds, rounds, tuple(tuple(request.output) for request in requests))


def _step(engine: Engine) -> None:
    """One turn. Raises RuntimeError when a request fails: what is left would be timed as if nothing had happened."""
    if wrong := next((piece.error for piece in engine.step() if piece.error), None):
        raise RuntimeError(f"a request of the sweep failed: {wrong}")


def room(later: int) -> int:
    """Tokens a request may emit while so many later ones are still read, one a round."""
    return AHEAD * later


def _emitted(requests: Sequence[Request]) -> int:
    return sum(len(request.output) for request in requests)


def sweep(pair: Pair, batches: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """One row per batch."""
    for batch in batches:
        prompts = list(itertools.islice(itertools.cycle(pair.prompts), batch))
        runs: dict[str, list[Window]] = {"plain": [], "drafted": []}
        for _ in range(repeats + 1):
            for name, engine in (("plain", pair.plain), ("drafted", pair.drafted)):
                runs[name].append(window(engine, prompts, pair.max_tokens))
        plain, drafted = (_joined(runs[name][1:]) for name in ("plain", "drafted"))
        yield {
            "batch": batch, "plain_tokens_per_second": round(plain.rate, 2),
            "tokens_per_second": round(drafted.rate, 2), "over_plain": round(drafted.rate / plain.rate, 4),
            "tau": round(drafted.tokens / drafted.rounds / batch, 3) if drafted.rounds else None,
            "ms_per_round": round(1e3 * drafted.seconds / max(drafted.rounds, 1), 4),
            "plain_ms_per_round": round(1e3 * plain.seconds / max(plain.rounds, 1), 4),
            "same_texts": sum(a == b for a, b in zip(plain.texts, drafted.texts, strict=True)) / batch,
            "max_tokens": pair.max_tokens, "repeats": repeats,
        }  # fmt: skip


def _joined(windows: Sequence[Window]) -> Window:
    return Window(sum(w.tokens for w in windows), sum(w.seconds for w in windows), sum(w.rounds for w in windows),
                  windows[-1].texts)  # fmt: skip


def real_pair(target: str, draft: str, files: Sequence[Path], options: Options, max_tokens: int) -> Pair:
    """A model with its drafter, as `specdec generate` would run them, over the first turns of prompt files."""
    plain = SpecDecoder.from_pretrained(target, "none", options)
    drafted = plain.with_drafter(draft, options)
    mixed = [
        turn for group in zip(*map(first_turns, files), strict=False) for turn in group
    ]  # one of each, in turn
    longest = plain.engine.limits.length - max_tokens - room(plain.engine.limits.slots) - 1
    prompts = [plain.encode(turn) for turn in mixed]
    return Pair(plain.engine, drafted.engine, tuple(p for p in prompts if len(p) <= longest), max_tokens)


def replay_pair(config: LeanConfig, profile: Profile, device: torch.device, dtype: torch.dtype, slots: int,
                max_tokens: int, shape: Shape | None = None) -> Pair:  # fmt: skip
    """A random target, and a replay drafter that also asks a random head of EAGLE-3's form for its time.

    Args:
        shape: a fixed tree; None lets the budget choose.
    """
    lean = random_target(config, device, dtype, steady=True)
    target: Target = graphed(lean)[0] if device.type == "cuda" else lean
    generator = torch.Generator().manual_seed(0)
    length = min(PROMPT, config.max_length // 4)
    prompts = [
        tuple(row) for row in torch.randint(config.vocab, (slots, length), generator=generator).tolist()
    ]
    reach = (shape or DEFAULT_TREE).depth + 2
    limits = Limits(slots, length + max_tokens + 2 * reach + room(slots))
    plain = _captured(Engine(target, NoDrafter(), Budget(None, PLAIN, adaptive=False), limits))
    texts = dict(zip(prompts, _texts(plain, prompts, max_tokens + reach), strict=True))
    replay = ReplayDrafter(texts, profile, slots, config.vocab, device)
    drafter = ReplayHead(
        random_head(lean, DRAFT_VOCAB), target.embed, lean.decoder.attention, slots, limits.length, replay
    )
    drafted = _captured(Engine(target, drafter, Budget(None, shape or DEFAULT_TREE, adaptive=False), limits))
    drafted.budget = _budget(target, drafter, shape, limits)
    return Pair(plain, drafted, tuple(prompts), max_tokens)


def _captured(engine: Engine) -> Engine:
    """On a GPU, with rounds as device programs, as `make_engine` makes them."""
    if engine.target.info.device.type == "cuda" and (refused := run_ahead(engine)) is not None:
        warnings.warn(f"rounds run step by step: {refused}", stacklevel=2)
    return engine


def _texts(engine: Engine, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    """Greedy continuations, long enough for the earliest of all requests."""
    sampling = Sampling(max_tokens=tokens + room(len(prompts)), ignore_eos=True)
    requests = [Request(f"text-{i}", prompt, sampling, frozenset()) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    return [tuple(request.output) for request in requests]


def _budget(target: Target, head: Drafter, shape: Shape | None, limits: Limits) -> Budget:
    if shape is not None:
        return Budget(None, shape, adaptive=False)
    device = target.info.device
    scratch = KVCache(target.info.cache, limits.slots, min(limits.length, 512) + MAX_NODES)
    if device.type == "cpu":
        return Budget(measure_costs(target, head, scratch), CPU_LIMIT)
    return Budget(measure_costs(target, head, scratch, CudaRecording()), DEFAULT_TREE, fixed=True)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per batch."""
    made = Table("target", "batch", "plain tok/s", "drafted tok/s", "over plain", "tau", "ms a round", "plain ms",
                 title="drafting over plain decoding, the budget choosing")  # fmt: skip
    for row in rows:
        made.add_row(row["target"], str(row["batch"]), f"{row['plain_tokens_per_second']:.1f}",
                     f"{row['tokens_per_second']:.1f}", f"{row['over_plain']:.2f}", str(row["tau"]),
                     f"{row['ms_per_round']:.2f}", f"{row['plain_ms_per_round']:.2f}")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every batch; rows are kept as they come."""
    args = _arguments(argv)
    device = torch.device(args.device)
    if args.replay:
        pair = replay_pair(EIGHT_B, PROFILE, device, torch.bfloat16, max(args.batches), args.max_tokens)
        shared: dict[str, Any] = {"target": "random-8b", "draft": "replay", "profile": PROFILE.alpha,
                                  "note": "mechanics, never a model's result"}  # fmt: skip
    else:
        options = Options(None, args.device, max(args.batches), args.max_length)
        pair = real_pair(args.target, args.draft, args.prompts, options, args.max_tokens)
        shared = {"target": args.target, "draft": args.draft}
    rows = []
    for row in sweep(pair, args.batches, args.repeats):
        rows.append({**shared, "dtype": str(pair.plain.target.info.dtype), "device": str(device), **row})
        append("sweep", rows[-1:])
    Console().print(table(rows))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.sweep", description="Drafting over plain decoding at every batch."
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="head")
    parser.add_argument(
        "--replay", action="store_true", help="an 8B-shaped random target and a replay drafter"
    )
    parser.add_argument("--prompts", type=Path, nargs="+", default=[file_of(name) for name in SETS])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
