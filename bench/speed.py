"""`specdec bench speed`: tokens per second of every system on every prompt set, in one process, in turn.

Wall time includes prefill. Systems take turns on each prompt, in an order that rotates, so drift of the machine
hits all alike; speedups are ratios of totals over the same prompts, with bootstrap intervals over prompts.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.intervals import SEED, interval
from bench.record import append, digest
from bench.sets import first_turns
from bench.systems import Run, System, our_systems, transformers_systems
from specdec.engine.build import Options
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling
from specdec.stats import total


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt set of a bench run."""

    name: str
    file: Path
    prompts: list[tuple[int, ...]]


def load_job(path: Path, decoder: SpecDecoder, limit: int | None) -> Job:
    """First turns of a prompt file as token ids."""
    return Job(path.stem, path, [decoder.encode(turn) for turn in first_turns(path, limit)])


def measure(
    job: Job, systems: Sequence[System], sampling: Sampling, repeats: int, tick: Callable[[], None]
) -> dict[str, list[list[Run]]]:
    """Runs by system: a list per prompt of `repeats` runs. Each system warms up on the first prompt."""
    for system in systems:
        system.answer(job.prompts[0], sampling)
    runs: dict[str, list[list[Run]]] = {s.name: [] for s in systems}
    for number, prompt in enumerate(job.prompts):
        for s in systems:
            runs[s.name].append([])
        for repeat in range(repeats):
            turn = (number + repeat) % len(systems)
            for system in [*systems[turn:], *systems[:turn]]:
                runs[system.name][-1].append(system.answer(prompt, sampling))
                tick()
    return runs


def summarise(job: Job, runs: dict[str, list[list[Run]]], baseline: str = "plain") -> list[dict[str, Any]]:
    """One row per system: tokens/s, speedup over the baseline and over transformers, tau, alpha, ms by phase."""
    rows = []
    for name, answers in runs.items():
        speed = [_median_speed(answer) for answer in answers]
        counters = total(run.counters for answer in answers for run in answer)
        row: dict[str, Any] = {
            "set": job.name,
            "system": name,
            "prompts": len(answers),
            "prompt_hash": digest(job.file),
        }
        row["tokens_per_second"], row["tokens_per_second_ci"] = interval(speed, speed, ratio=False)
        for other in (baseline, "transformers"):
            if other in runs and other != name:
                base = [_median_speed(answer) for answer in runs[other]]
                row[f"over_{other}"], row[f"over_{other}_ci"] = interval(speed, base, ratio=True)
                row[f"same_tokens_as_{other}"] = _same(answers, runs[other])
        if ours := _decode(answers):
            row["decode_tokens_per_second"], row["decode_tokens_per_second_ci"] = interval(
                ours, ours, ratio=False
            )
        if name != baseline and ours and (base := _decode(runs[baseline])):
            row[f"decode_over_{baseline}"], row[f"decode_over_{baseline}_ci"] = interval(
                ours, base, ratio=True
            )
        if counters.rounds:
            row |= {k: v for k, v in counters.as_dict().items() if k != "seconds"}
            row["ms_per_round"] = {
                k: round(v / counters.rounds * 1e3, 3) for k, v in counters.seconds.items()
            }
        rows.append(row)
    return rows


def _median_speed(answer: list[Run]) -> tuple[float, float]:
    """(tokens, median seconds) of one prompt."""
    return float(len(answer[0].tokens)), statistics.median(run.seconds for run in answer)


def _decode(answers: list[list[Run]]) -> list[tuple[float, float]]:
    """(tokens after the first, median seconds they took) per prompt; empty for systems that do not say."""
    times = [[run.decode_seconds for run in answer if run.decode_seconds] for answer in answers]
    if not all(times):
        return []
    return [
        (float(len(answer[0].tokens) - 1), statistics.median(seconds))
        for answer, seconds in zip(answers, times, strict=True)
    ]


def _same(left: list[list[Run]], right: list[list[Run]]) -> float:
    """Share of prompts whose tokens are equal in both systems."""
    same = [a[0].tokens == b[0].tokens for a, b in zip(left, right, strict=True)]
    return round(sum(same) / len(same), 4)


def first_divergences(
    decoder: SpecDecoder, job: Job, runs: dict[str, list[list[Run]]], baseline: str = "plain"
) -> list[dict[str, Any]]:
    """Where tokens differ from the baseline's in low precision: position and the top-2 logit gap there."""
    rows = []
    for name, answers in runs.items():
        for number, (answer, base) in enumerate(zip(answers, runs[baseline], strict=True)):
            ours, theirs = answer[0].tokens, base[0].tokens
            if ours == theirs:
                continue
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            rows.append(
                {
                    "system": name,
                    "prompt": number,
                    "position": at,
                    "gap": _gap(decoder, job.prompts[number] + theirs[:at]),
                }
            )
    return rows


def _gap(decoder: SpecDecoder, context: tuple[int, ...]) -> float:
    """Difference of the two largest logits after a context."""
    probe = Sampling(max_tokens=1, logprobs=2, ignore_eos=True)
    answer = decoder.generate([list(context)], probe, speculate=False)[0]
    (_, first), (_, second) = answer.logprobs[0].top
    return round(first - second, 4)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_peak_mb() -> float:
    """Most that torch has held on the CUDA device so far, MB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def run(
    files: Sequence[Path],
    target: str,
    drafters: Sequence[str],
    options: Options,
    sampling: Sampling,
    *,
    limit: int | None,
    repeats: int,
    with_transformers: bool,
    tick: Callable[[str, int], Callable[[], None]],
) -> list[dict[str, Any]]:
    """The whole bench; returns rows, and appends those of a set to bench/results/speed.jsonl once it is done."""
    decoder = SpecDecoder.from_pretrained(target, "none", options)
    systems = own = our_systems(decoder, drafters, options)
    decoder.generate("Tell me a story.", Sampling(max_tokens=32))
    memory, device_memory = peak_memory_mb(), device_peak_mb()  # of ours: transformers is not loaded yet
    info = decoder.engine.target.info
    if with_transformers:
        systems = own + transformers_systems(
            decoder.loaded.files.directory, info.dtype, info.stop_ids, info.device
        )
    shared = {
        "target": info.name,
        "dtype": str(info.dtype),
        "device": str(info.device),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "repeats": repeats,
        "seed": SEED,
        "generate_peak_mb": round(memory),
    }
    if info.device.type == "cuda":
        shared["device_peak_mb"] = round(device_memory)
    rows: list[dict[str, Any]] = []
    for path in files:
        job = load_job(path, decoder, limit)
        if info.device.type == "cuda":  # programs of all shapes are recorded before anything is timed
            measure(job, own, sampling, 1, lambda: None)
        runs = measure(
            job, systems, sampling, repeats, tick(job.name, len(job.prompts) * repeats * len(systems))
        )
        diverged = first_divergences(decoder, job, runs) if sampling.greedy else []
        made = []
        for row in summarise(job, runs):
            mine = [d for d in diverged if d["system"] == row["system"]]
            made.append({**shared, **row, "divergences": mine[:10], "diverged": len(mine)})
        append("speed", made)  # set by set: what was measured is kept, whatever comes after
        rows += made
    return rows
