"""What buys tau: the same small training run with one thing changed at a time, on answers that are already there.

Run as `python -m bench.curves --responses RUN/run/responses.jsonl`, on the answers of a `specdec train` run. Every run
draws the same number of tokens from the same text, at most once each, and is graded by simulated tau on the same
held-out answers (tree 7/10/60 and chain). Rows go to `results/curves.jsonl`, one per run, with its seed; runs that
stand there already for the same settings are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from bench.record import append, digest, file_for
from specdec.target.load import LoadedTarget, load_target
from training.data import Skipped
from training.material import Texts, from_store
from training.recipe import Recipe, load_recipe
from training.run import RUN, train_on
from training.store import ResponseStore
from training.watch import read_log

BASE = (
    "unroll.steps=3", "unroll.curriculum=[]", "vocab.size=8192", "head.taps=[2,15,29]", "trainer.epochs=1000",
    "trainer.max_minutes=null", "trainer.tracker=none", "trainer.save_every_minutes=1000", "cache.gigabytes=8",
    "evaluation.every_minutes=1000", "evaluation.prompts=16", "evaluation.max_tokens=96",
)  # fmt: skip
SEEDS = 3  # runs of the base, which tell how far chance goes


def curves(tokens: int) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(curve, value, overrides) of every run; the base is part of most curves and run once."""
    yield "seed", 0, ("trainer.seed=0",)
    for share in (0.125, 0.25, 0.5, 2.0):
        yield "tokens", int(share * tokens), (f"trainer.max_tokens={int(share * tokens)}",)
    for steps in (1, 5, 7):
        yield "unroll", steps, (f"unroll.steps={steps}",)
    for kind in ("tv", "lk"):
        yield "loss", kind, (f"loss.kind={kind}",)
    yield "warm start", False, ("head.start=random",)
    for taps in ([2, 15, 27], [29], [15, 22, 29], [10, 20, 28], [2, 8, 15, 22, 29]):
        yield "taps", taps, (f"head.taps={taps}".replace(" ", ""),)
    for norm in ("fc_norm", "norm_output"):
        yield "norms", norm, (f"head.{norm}=true",)
    yield "norms", "fc_norm and norm_output", ("head.fc_norm=true", "head.norm_output=true")
    for size in (2048, 4096, 16384):
        yield "vocabulary", size, (f"vocab.size={size}",)
    for seed in range(1, SEEDS):
        yield "seed", seed, (f"trainer.seed={seed}",)


def one(
    loaded: LoadedTarget, responses: Path, overrides: Sequence[str], most: int, cache: Path
) -> dict[str, Any]:
    """Train and grade one head on the first `most` tokens; features of the same taps are shared between runs."""
    recipe = load_recipe("cpu", [*BASE, *overrides])
    texts = _texts(responses, loaded, recipe, most)
    shared = cache / "-".join(map(str, recipe.head.taps))
    shared.mkdir(exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache) as place:
        out = Path(place)
        (out / RUN).mkdir()
        (out / RUN / "features").symlink_to(shared)
        train_on(texts, loaded, recipe, out, Console(quiet=True), Accelerator(cpu=True))
        graded = read_log(out / "train_log.jsonl", "evaluation")[-1]
        steps = read_log(out / "train_log.jsonl", "step")
    return {
        "seed": recipe.trainer.seed, "windows": len(texts.train), "text_tokens": sum(map(len, texts.train)),
        "visited": steps[-1]["tokens"], "steps": steps[-1]["step"], "loss": steps[-1]["loss"][0],
        "tau": graded.get("tau"), "greedy": graded.get("greedy"), "sampled": graded.get("sampled"),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def _texts(responses: Path, loaded: LoadedTarget, recipe: Recipe, most: int) -> Texts:
    with ResponseStore(responses, loaded.target.info.fingerprint, readonly=True) as store:
        texts = from_store(store, recipe, Skipped())
    ends = itertools.accumulate(map(len, texts.train))
    return replace(
        texts, train=[sample for sample, end in zip(texts.train, ends, strict=True) if end <= most]
    )


def _known(path: Path, key: dict[str, Any]) -> set[str]:
    """Overrides of the runs that are there already for the same answers and tokens."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {json.dumps(row["overrides"]) for row in rows if all(row.get(name) == key[name] for name in key)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2-135m", help="whose answers they are")
    parser.add_argument("--responses", type=Path, required=True, help="answers of a training run")
    parser.add_argument("--tokens", type=int, default=100_000, help="visited by every run (default: 100,000)")
    parser.add_argument("--only", default=None, help="one curve: seed, tokens, unroll, loss, taps, ...")
    args = parser.parse_args()
    loaded = load_target(args.target)
    key = {"target": args.target, "responses": digest(args.responses), "tokens": args.tokens}
    done = _known(file_for("curves"), key)
    with tempfile.TemporaryDirectory() as cache:
        for curve, value, overrides in curves(args.tokens):
            if args.only not in (None, curve) or json.dumps(list(overrides)) in done:
                continue
            full = (f"trainer.max_tokens={args.tokens}", *overrides)
            row = one(loaded, args.responses, full, 2 * args.tokens, Path(cache))
            append("curves", [{**key, "curve": curve, "value": value, "overrides": list(overrides), **row}])
            Console().print(
                f"{curve} = {value}: tau {row['tau']} after {row['visited']:,} tokens, {row['seconds']} s"
            )


if __name__ == "__main__":
    main()
