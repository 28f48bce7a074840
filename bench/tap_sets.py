"""F3: does a ranking of tap sets by probe gap, made before any head exists, order heads that were really trained?

Run as `python -m bench.tap_sets --work WORK --taps 29 --taps 1,2,3 ... --prompts FILE ...` on the working directory of
`specdec report --work WORK --taps ...`. One small head per tap set is trained with identical settings on the captured
text (its states are on disk, so no target runs), then decodes, in simulation, text that the target wrote for other
prompts. The row in `results/tap_sets.jsonl` has gap and accepted length of every tap set, Kendall's tau with its
interval (documents of both sides resampled, paired over tap sets), and what ranking cost against training. Heads that
were trained before are not trained again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from bench.record import append
from specdec.cli.prompts import read_dialogues
from specdec.surplus.capture import CaptureSettings, Document, Passage, capture, documents, target_head
from specdec.surplus.claims import claim_f3
from specdec.surplus.interval import resamples
from specdec.surplus.plan import TapSet, name_of
from specdec.surplus.rows import load_tensors
from specdec.surplus.shards import Manifest, read_manifest, write_text
from specdec.surplus.values import claim_row
from specdec.target.load import LoadedTarget, load_target
from specdec.target.loading import load_config
from training.build import build, choose_vocabulary, head_config
from training.data import Sample
from training.evaluate import Growth, simulate
from training.features import Capture, Captured, Features
from training.measuring import DevSplit
from training.objective import Objective
from training.recipe import load_recipe
from training.trainer import Task, Trainer

BASE = (
    "unroll.steps=2", "unroll.curriculum=[]", "vocab.size=8192", "trainer.epochs=1000", "trainer.max_minutes=null",
    "trainer.tracker=none", "trainer.save_every_minutes=1000",
    "trainer.precision=fp32", "evaluation.every_minutes=1000",
)  # fmt: skip
SHAPES = {"chain": Growth(5, 1, 6), "tree": Growth(5, 4, 12)}
GROUP_TOKENS = 700  # padded tokens of a group of held-out documents, the unit that is resampled
DRAWS = 1000
FULL_MINUTES = 22.0  # of training in `specdec train --recipe cpu`, for the ratio of computes


class Kept(Capture):
    """Taps and final states of captured documents: what training reads, with no target behind it."""

    def __init__(self, target: Any, taps: TapSet, layers: Sequence[int], texts: dict[str, Document]) -> None:
        super().__init__(target, taps)
        self.columns, self.texts, self.head = [layers.index(t) for t in taps], texts, target_head(target, 1.0)

    def __call__(self, samples: Sequence[Sample]) -> list[Captured]:
        """States of the samples, from their documents."""
        found = [self.texts[sample.id] for sample in samples]
        return [
            Captured(
                text.taps[:, self.columns].flatten(1).float(),
                self.head.normed(text.final),
            )
            for text in found
        ]


def sample_of(text: Document) -> Sample:
    """A captured document as a training sample; the answer begins after `start`."""
    ids = text.ids.numpy().astype(np.int32)
    return Sample(f"doc-{text.doc}", ids, np.arange(len(ids)) > text.start)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all heads share."""

    loaded: LoadedTarget
    layers: tuple[int, ...]
    train: dict[str, Document]
    heldout: dict[str, Document]
    tokens: int
    seed: int


def trained(bench: Bench, taps: TapSet) -> tuple[Objective, dict[str, Any]]:
    """One small head and what it cost."""
    recipe = load_recipe(
        "cpu", [*BASE, f"trainer.max_tokens={bench.tokens}", f"trainer.seed={bench.seed}",
                "head.taps=" + str(list(taps)).replace(" ", "")],
    )  # fmt: skip
    target, samples = bench.loaded.target, [sample_of(text) for text in bench.train.values()]
    vocabulary = choose_vocabulary(samples, target, recipe)
    config = head_config(target, load_config(bench.loaded.files.directory), recipe, len(vocabulary.ids))
    features = Features(samples, Kept(target, taps, bench.layers, bench.train))
    started = time.process_time()
    objective, optimizer = build(target, config, vocabulary, features, recipe)
    task = Task(recipe, objective, optimizer, samples, features, 0, {"taps": str(taps)})
    with tempfile.TemporaryDirectory() as place:
        progress = Trainer(task, Path(place), accelerator=Accelerator(cpu=True)).run()
    cost = {"steps": progress.step, "visited": progress.tokens, "cpu_seconds": time.process_time() - started}
    return objective, cost


def lengths(bench: Bench, taps: TapSet, objective: Objective) -> dict[str, list[tuple[int, int]]]:
    """(tokens, rounds) of simulated decoding by shape, one pair per group of held-out documents."""
    samples = [sample_of(text) for text in bench.heldout.values()]
    kept = Kept(bench.loaded.target, taps, bench.layers, bench.heldout)
    split = DevSplit(Features(samples, kept), objective.scale, GROUP_TOKENS)
    found: dict[str, list[tuple[int, int]]] = {}
    for name, growth in SHAPES.items():
        counts = [simulate(objective.head, bench.loaded.target.embed, text, growth) for text in split.texts]
        found[name] = [(c.emitted, c.rounds) for c in counts]
    return found


def measured(bench: Bench, taps: TapSet, place: Path) -> dict[str, Any]:
    """One tap set's head, from disk where it was trained before with the same settings."""
    key = {
        "tokens": bench.tokens,
        "seed": bench.seed,
        "text": len(bench.train),
        "heldout": len(bench.heldout),
    }
    path = place / f"head-{name_of(taps)}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(kept.get(name) == value for name, value in key.items()):
            return kept
    objective, cost = trained(bench, taps)
    row = {**key, "taps": name_of(taps), **cost, **lengths(bench, taps, objective)}
    write_text(path, json.dumps(row))
    return row


def held_out(loaded: LoadedTarget, files: Sequence[Path], like: Manifest, used: set[tuple[int, ...]], count: int,
             place: Path) -> dict[str, Document]:  # fmt: skip
    """Text of the target for prompts that the report did not use, its states with it."""
    from specdec.cli.report import encode

    queues = [[(path.stem, row) for row in read_dialogues(path)] for path in files]
    mixed = [row for rows in zip(*queues, strict=False) for row in rows]
    found = [Passage(row.id, name, encode(loaded, row)) for name, row in mixed]
    fresh = [p for p in found if p.prompt not in used and len(p.prompt) < 1024][:count]
    settings = CaptureSettings(
        like.layers, like.temperature, max_tokens=96, seed=like.seed + 1, slots=16, per_shard=16
    )
    manifest = capture(loaded.target, fresh, settings, place)
    return {f"doc-{text.doc}": text for text in documents(place, manifest)}


def gaps_of(work: Path, names: Sequence[str]) -> tuple[Tensor, float]:
    """[DRAWS + 1, c] probe gap of each tap set, documents resampled and paired; and the ranking's CPU seconds."""
    columns, seconds = [], 0.0
    for name in names:
        kept = load_tensors(work / "stages" / f"estimate-ranking-{name}.safetensors")
        if kept is None:
            raise SystemExit(f"the report's working directory has no ranking of {name}")
        tensors, told = kept
        keys = sorted(key for key in tensors if key.endswith(".gap"))
        gap, doc = (torch.cat([tensors[key.replace("gap", what)] for key in keys]) for what in ("gap", "doc"))
        drawn = resamples(doc, draws=DRAWS)
        columns.append(torch.cat([gap.double().mean()[None], drawn.means(gap)]))
        seconds += told["seconds"]
    return torch.stack(columns, dim=1), seconds


def drawn_lengths(rows: Sequence[dict[str, Any]], shape: str) -> Tensor:
    """[DRAWS + 1, c] tau of each tap set, groups of documents resampled and paired."""
    sums = torch.tensor([row[shape] for row in rows], dtype=torch.float64)  # [c, groups, 2]
    picks = torch.randint(sums.shape[1], (DRAWS, sums.shape[1]), generator=torch.Generator().manual_seed(0))
    whole = torch.arange(sums.shape[1])[None]
    totals = torch.cat([sums[:, some].sum(2) for some in (whole, picks)], dim=1)
    return (totals[..., 0] / totals[..., 1]).T


def judged(gaps: Tensor, tau: Tensor) -> dict[str, Any]:
    """F3's row and the numbers behind it, tap set by tap set."""

    def ends(draws: Tensor) -> list[list[float]]:
        quantiles = draws[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T
        return [
            [round(float(v), 4) for v in (value, *pair)]
            for value, pair in zip(draws[0], quantiles, strict=True)
        ]

    return {"claim": claim_row(claim_f3(gaps, tau)), "gap": ends(gaps), "tau": ends(tau)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--work", type=Path, required=True, help="working directory of a report")
    parser.add_argument(
        "--taps", action="append", required=True, metavar="I,J,K", help="a tap set (repeatable)"
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="files to take held-out prompts from"
    )
    parser.add_argument("--heldout", type=int, default=48, help="documents to decode (default: 48)")
    parser.add_argument("--tokens", type=int, default=16_000, help="visited by every head (default: 16,000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = load_target(args.target, dtype=torch.float32)
    manifest = read_manifest(args.work / "capture")
    train = {f"doc-{text.doc}": text for text in documents(args.work / "capture", manifest)}
    used = {tuple(text.ids[: text.start + 1].tolist()) for text in train.values()}
    heldout = held_out(loaded, args.prompts, manifest, used, args.heldout, args.work / "heldout")
    bench = Bench(loaded, manifest.layers, train, heldout, args.tokens, args.seed)
    rows = []
    for taps in (tuple(map(int, text.split(","))) for text in args.taps):
        rows.append(measured(bench, taps, args.work))
        taus = ", ".join(f"{name} {_tau(rows[-1][name]):.3f}" for name in SHAPES)
        Console().print(f"{name_of(taps)}: {taus}; {rows[-1]['cpu_seconds']:.0f} s of training")
    gaps, seconds = gaps_of(args.work, [row["taps"] for row in rows])
    training = sum(row["cpu_seconds"] for row in rows)
    told = {name: judged(gaps, drawn_lengths(rows, name)) for name in SHAPES}
    append("tap_sets", [{
        "target": args.target, "taps": [row["taps"] for row in rows], "documents": len(train), "heldout": len(heldout),
        "visited": rows[0]["visited"], "ranking_cpu_seconds": round(seconds, 1),
        "training_cpu_seconds": round(training, 1), "ranking_over_training": round(seconds / training, 4),
        "ranking_over_recipe": round(seconds / (60 * FULL_MINUTES * len(rows)), 4), **told,
    }])  # fmt: skip
    for name, found in told.items():
        Console().print(f"F3, {name}: {found['claim']['number']} {found['claim']['verdict']}")


def _tau(groups: Sequence[tuple[int, int]]) -> float:
    return sum(tokens for tokens, _ in groups) / sum(rounds for _, rounds in groups)


if __name__ == "__main__":
    main()
