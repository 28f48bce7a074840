"""`python -m bench.stages NAME`: one measurement of `bench.gpu` in a process of its own, so that a fault stays alone.

Every stage appends rows as it makes them. `smoke` runs it with tiny sizes anywhere: nothing to judge by, only proof
that it does not crash. Knows what to run with which sizes; how is the business of the benches it calls.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import kernels, products, speed, steps, warm, whole_round
from bench import sweep as sweeps
from bench.ceilings import Ceiling, ceilings
from bench.kernels import Point
from bench.record import append
from bench.sets import SETS, file_of
from bench.systems import our_systems
from specdec.attention.choose import choose_attention
from specdec.attention.protocol import TreeAttention
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.drafting.protocol import Shape
from specdec.engine.build import DEFAULT_TREE, Options
from specdec.engine.graphs import CudaRecording, graphed
from specdec.fused.cuts import ROWS, Kind, candidates
from specdec.fused.trial import Trial
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling
from specdec.target.lean import LeanConfig

FEWER = ("--batches", "1", "--nodes", "1", "4", "8", "16", "32", "64")  # of the steps
TOUCHED = (products.Product("135m", "qkv", 576, 960, norm=True), products.Product("8b", "down", 14336, 4096, plus=True),
           products.Product("1.5b", "gate_up", 1536, 8960, norm=True, paired=True))  # fmt: skip
TINY = replace(steps.EIGHT_B, vocab=97, hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8,
               max_length=512, windows=(None,) * 2)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how a stage runs.

    Attributes:
        device: "cuda" or "cpu".
        target, head: a model and the directory of its head (or "ngram").
        also: further models, for their steps alone.
        smoke: tiny sizes.
    """

    device: str = "cuda"
    target: str = "smollm2-135m"
    head: str = "head"
    also: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def shape(self) -> LeanConfig:
        """Of the random target."""
        return TINY if self.smoke else steps.EIGHT_B

    @property
    def dtype(self) -> torch.dtype:
        """Of random targets; the CPU's interpreter is happier with float32."""
        return torch.float32 if self.smoke else torch.bfloat16

    def ceiling(self) -> Ceiling:
        return ceilings(self.device, 2**16, 64) if self.smoke else ceilings(self.device)

    def options(self, **changes: Any) -> Options:
        """Of the real target."""
        size = 256 if self.smoke else 2048
        return replace(Options(torch.bfloat16, self.device, 1, size), **changes)

    def prompts(self) -> list[Path]:
        return [file_of(name) for name in (SETS[:1] if self.smoke else SETS)]


def note(kind: str, row: dict[str, Any]) -> None:
    """One row of `gpu.jsonl`."""
    append("gpu", [{"kind": kind, **row}])


def run_ceilings(setting: Setting) -> None:
    """Copy bandwidth and matrix rate."""
    note("ceiling", asdict(setting.ceiling()))


def run_compile(setting: Setting) -> None:
    """Fill Triton's cache by all cores, before anything is timed."""
    # the second of these fails
    jobs = warm.commands() if not setting.smoke else [("bench.ceilings",), ("bench.missing",)]
    start = time.monotonic()
    told = warm.run(jobs)
    note("compile", {"seconds": round(time.monotonic() - start, 1), "jobs": len(jobs),
                     "failed": {" ".join(job): how for job, how in told.items() if how != "done"}})  # fmt: skip


def run_kernels(setting: Setting) -> None:
    """Tree attention: triton, flash, flex and SDPA at three lengths, three batches, N 16 to 64."""
    if not setting.smoke:
        # flex compiles for half a minute a point, so it comes last and at batch 1 alone
        kernels.main(
            ["--minutes", "1.5", "--nodes", "64", "16", "32", "--backends", "triton", "flash", "sdpa"]
        )
        kernels.main(
            ["--minutes", "0.8", "--models", "8b", "--batches", "1", "--nodes", "64", "--backends", "flex"]
        )
        return
    args = argparse.Namespace(backends=["triton", "flash", "sdpa"], nodes=[4], splits=[2])
    for row in kernels.measure(Point("135m", 128, 1, 4), setting.ceiling(), args, setting.place):
        append("kernels", [row])


def run_products(setting: Setting) -> None:
    """A layer's products for one row and more, ours against cuBLAS."""
    if not setting.smoke:
        products.main(["--try-blocks", "--rows", "1", "16", "32", "64"])
        return
    size = products.Product("tiny", "down", 32, 16)
    append("kernels", list(products.measure(size, False, setting.ceiling(), setting.place, setting.dtype)))


def run_steps(setting: Setting) -> None:
    """One forward over 1 to 64 nodes, plain and captured, for every target."""
    if not setting.smoke:
        steps.main(
            ["--targets", setting.target, *setting.also, steps.RANDOM, "--device", setting.device, *FEWER]
        )
        return
    args = argparse.Namespace(batches=[1], nodes=[1, 4], prefix=16)
    target = steps.random_target(TINY, setting.place, setting.dtype)
    for row in steps.measure(target, args, setting.ceiling().bytes):
        append("steps", [row])


def run_speed(setting: Setting) -> None:
    """Tokens per second on the evaluation sets against our plain loop and transformers."""
    few, tokens, small = (1, 8, Shape(2, 2, 4)) if setting.smoke else (2, 96, None)
    speed.run(
        setting.prompts(), setting.target, [setting.head], setting.options(tree=small), Sampling(max_tokens=tokens),
        limit=few, repeats=1, with_transformers=True, tick=lambda _name, _steps: lambda: None,
    )  # fmt: skip


def run_sweep(setting: Setting) -> None:
    """Batches of the real target, the budget choosing."""
    batches = (1, 2) if setting.smoke else sweeps.BATCHES
    size = 256 if setting.smoke else 2048
    options = setting.options(slots=max(batches), max_length=size)
    tokens = 16 if setting.smoke else 128
    pair = sweeps.real_pair(setting.target, setting.head, setting.prompts(), options, tokens)
    _sweep(pair, batches, {"target": setting.target, "draft": setting.head})


def run_replay(setting: Setting) -> None:
    """Batches of the random target, drafts as a profile says, the budget choosing."""
    batches = (1, 2) if setting.smoke else (1, 2, 4, 8, 16, 32)
    tokens = 12 if setting.smoke else 96
    pair = sweeps.replay_pair(
        setting.shape, sweeps.PROFILE, setting.place, setting.dtype, max(batches), tokens
    )
    _sweep(pair, batches, {"target": steps.RANDOM, "draft": "replay", "profile": sweeps.PROFILE.alpha,
                           "note": "mechanics, never a model's result"})  # fmt: skip


def _sweep(pair: sweeps.Pair, batches: tuple[int, ...], shared: dict[str, Any]) -> None:
    for row in sweeps.sweep(pair, batches, 1):
        append("sweep", [{**shared, "dtype": str(pair.plain.target.info.dtype), **row}])


def run_round(setting: Setting) -> None:
    """Whole rounds of the engine at batch 1 over a fixed tree: what users get, host included."""
    shape = Shape(3, 2, 6) if setting.smoke else DEFAULT_TREE
    pair = sweeps.replay_pair(setting.shape, sweeps.PROFILE, setting.place, setting.dtype, 1,
                              12 if setting.smoke else 96, shape)  # fmt: skip
    for row in sweeps.sweep(pair, [1], 2):
        note("round", {"target": steps.RANDOM, "draft": "replay", **row})


def run_greedy(setting: Setting) -> None:
    """Drafted tokens against plain ones, greedily: equal in float32, else the top-2 gap where they part."""
    tree, few, tokens = (Shape(2, 2, 4), 1, 8) if setting.smoke else (DEFAULT_TREE, 2, 96)
    for dtype, shape in ((torch.float32, tree), (torch.bfloat16, tree), (torch.bfloat16, None)):
        options = setting.options(dtype=dtype, tree=shape)
        decoder = SpecDecoder.from_pretrained(setting.target, "none", options)
        systems = our_systems(decoder, [setting.head], options)
        for path in setting.prompts():
            job = speed.load_job(path, decoder, few)
            runs = speed.measure(job, systems, Sampling(max_tokens=tokens), 1, lambda: None)
            apart = speed.first_divergences(decoder, job, runs)
            note("greedy", {"set": job.name, "dtype": str(dtype), "tree": "budget" if shape is None else str(shape),
                            "prompts": len(job.prompts), "divergences": apart})  # fmt: skip
        del decoder, systems


def run_profile(setting: Setting) -> None:
    """Kernels a layer takes in a plain and in a captured step of one and of many nodes, and those of drafting."""
    real = steps.any_target(setting.target, setting.place, torch.bfloat16)
    random = steps.random_target(setting.shape, setting.place, setting.dtype)
    for target, nodes in itertools.product((real, random), (1, 4 if setting.smoke else 60)):
        captured = graphed(target)[0] if setting.device == "cuda" else target
        for name, one in {"plain": target, "captured": captured}.items():
            counted = _profiled(steps.step(one, KVCache(one.info.cache, 1, 128), 1, nodes, 64), setting)
            note("profile", {"target": one.info.name, "step": name, "nodes": nodes, "layers": one.info.layers,
                             "per_layer": round(counted["kernels"] / one.info.layers, 2), **counted})  # fmt: skip
    recording = CudaRecording() if setting.device == "cuda" else whole_round.Stepwise()
    shape = Shape(3, 2, 6) if setting.smoke else DEFAULT_TREE
    for target in (real, random):
        head = whole_round.random_head(target, steps.DRAFT_VOCAB)
        with torch.inference_mode():
            drafting = whole_round.draft_step(target, head, 1, shape, 64, recording)
        counted = _profiled(drafting, setting)
        note("profile", {"target": target.info.name, "step": "drafting", "levels": shape.depth,
                         "per_level": round(counted["kernels"] / shape.depth, 2), **counted})  # fmt: skip


@torch.inference_mode()
def _profiled(work: Callable[[], object], setting: Setting) -> dict[str, Any]:
    """Kernels (on a CPU: operators) of one call, their time, and the ten that take longest."""
    for _ in range(2):
        work()
    cuda = setting.device == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True
    ) as seen:
        work()
        if cuda:
            torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if not cuda or e.device_type == DeviceType.CUDA]
    times = {e.key: float(e.self_device_time_total if cuda else e.self_cpu_time_total) for e in events}
    top = sorted(times, key=times.__getitem__, reverse=True)[:10]
    return {"kernels": sum(e.count for e in events), "us": round(sum(times.values()), 1),
            "top": {name[:80]: round(times[name], 1) for name in top}}  # fmt: skip


def run_touch(setting: Setting) -> None:
    """What the memory checker watches: every kind of launch of the tree attention, small, and products."""
    points = [Point("135m", 70, 2, 5), Point("135m", 1, 1, 1)]
    points += [] if setting.smoke else [Point("8b", 513, 3, 64), Point("1.5b", 64, 1, 33)]
    for point in points:
        problem = kernels.make_problem(point, setting.place, setting.dtype)
        for attention in _backends(setting):
            out = kernels.through(attention, problem)(0)
            error = kernels.relative_error(problem, out)
            note("touch", {**asdict(point), "backend": attention.name, "relative_error": error})
    for product, rows in itertools.product(TOUCHED, () if setting.smoke else ROWS):
        _touch_product(product, rows, setting)


@torch.inference_mode()
def _touch_product(product: products.Product, rows: int, setting: Setting) -> None:
    """Every cut that a start-up tries, of a matrix that others stand behind."""
    kind = Kind(product.inputs, product.outputs, setting.dtype, setting.place, product.norm, product.paired,
                product.plus, rows)  # fmt: skip
    trial = Trial.of(kind)
    wanted = trial.theirs(0).double()
    for cut in candidates(kind):
        error = float((trial.ours(0, cut).double() - wanted).norm() / wanted.norm())
        note("touch", {**asdict(product), "rows": rows, "cut": tuple(cut), "relative_error": error})


def _backends(setting: Setting) -> Iterator[TreeAttention]:
    if setting.smoke:
        yield ReferenceAttention()
        return
    from specdec.attention.triton import TritonAttention

    yield TritonAttention()


def run_choice(setting: Setting) -> None:
    """What the start-up choice picks for the shapes at hand, and why."""
    for name, heads in kernels.MODELS.items():
        shape = kernels.make_problem(Point(name, 16, 1, 2), setting.place, setting.dtype).cache.shape
        choice = choose_attention(shape, heads.query)
        note("choice", {"model": name, "picked": choice.attention.name, "milliseconds": choice.milliseconds,
                        "refused": choice.refused})  # fmt: skip


STAGES: dict[str, Callable[[Setting], None]] = {
    "ceilings": run_ceilings, "compile": run_compile, "choice": run_choice, "steps": run_steps, "speed": run_speed,
    "round": run_round, "greedy": run_greedy, "kernels": run_kernels, "products": run_products, "sweep": run_sweep,
    "replay": run_replay, "profile": run_profile, "touch": run_touch,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="bench.stages")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--head", default="head")
    parser.add_argument("--also", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    STAGES[args.stage](Setting(args.device, args.target, args.head, tuple(args.also), args.smoke))
    return 0


if __name__ == "__main__":
    sys.exit(main())
