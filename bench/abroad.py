"""`python -m bench.abroad FILE`: compile here what an H100 or H200 elsewhere will launch.

A device that is lent by the minute should not spend them compiling. The engine's own code runs over tensors that hold
nothing (torch's "meta"), a driver that is none tells Triton of sm_90, and a launch ends when its kernel is compiled.
There, with the same Triton for the same Python:

    tar xJf FILE -C / && export TRITON_CACHE_DIR=/tmp/specdec-kernels

Which kernels there are depends on a target's sizes and dtype; these are of the shapes that `bench.gpu` measures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import products, steps, whole_round
from specdec.attention import triton as attention
from specdec.attention.choose import Choice
from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.pairs import Pairs
from specdec.drafting.protocol import PLAIN
from specdec.engine import costs
from specdec.engine.budget import Budget
from specdec.engine.build import DEFAULT_TREE
from specdec.engine.program import Program, Seats, Standing
from specdec.fused import available, cuts, keys, layer, trial
from specdec.head.checkpoint import load_head
from specdec.head.model import DraftHead
from specdec.head.pretrained import shipped_head
from specdec.layers import linear
from specdec.target.load import LeanTarget

CACHE = Path("/tmp/specdec-kernels")  # at both ends: Triton notes whole paths
NOWHERE = torch.device("meta")
REAL = "smollm2-135m"  # whose head ships
PROCESSORS, CACHE_BYTES = 132, 60 * 2**20  # of an H200
LENGTH, PROMPT, BATCHES = 2048, 64, (1, 2, 4, 8, 16, 32, 64)
NEEDED = (".cubin", ".json")  # of what Triton leaves


class Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Kernels:
    """What was asked for, by key; and how what could not be compiled failed.

    Args:
        compiled: False only counts.
    """

    def __init__(self, compiled: bool = True) -> None:
        self.compiled = compiled
        self.names: dict[Any, str] = {}
        self.failed: list[str] = []

    def launch(
        self, run: Callable[..., Any], kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any
    ) -> None:
        """Stands in for a launch."""
        try:
            run(kernel, *given, grid=grid, warmup=True, **named)
        except Exception as error:  # triton's own kinds
            self.failed.append(f"{kernel.__name__}: {error}"[:300])

    def make(self, make: Callable[..., Any], kernel: Any, key: Any, *given: Any) -> Any:
        """Stands in for compiling a kernel for arguments of a kind that it has not met."""
        known, self.names[kernel.__name__, key] = (kernel.__name__, key) in self.names, kernel.__name__
        return make(kernel, key, *given) if self.compiled and not known else None


@contextlib.contextmanager
def abroad(kernels: Kernels) -> Iterator[None]:
    """Tensors that hold nothing pass for a device's, and what is launched over them is compiled. For a process of its
    own: kernels once made for a device stay so."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, make = JITFunction.run, JITFunction._do_compile
    applies, own = available.applies, attention._kernels
    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (driver, "_active", Driver()),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (available, "runs", lambda _: True),
            (attention, "_multiprocessors", lambda _: PROCESSORS),
            (attention, "_kernels", lambda _: own("cuda")),
            (layer, "_cache_bytes", lambda _: CACHE_BYTES),
            (trial.Trial, "of", staticmethod(_trial)),
            (linear, "cut_for", _try_all),
            (steps, "choose_attention", lambda *_: Choice(attention.TritonAttention())),
            (JITFunction, "run", lambda kernel, *a, **n: kernels.launch(run, kernel, *a, **n)),
            (JITFunction, "_do_compile", lambda kernel, key, *a: kernels.make(make, kernel, key, *a)),
        ):
            stack.enter_context(patch.object(target, name, stand_in))
        for module in [one for name, one in sys.modules.items() if name.startswith("specdec.")]:
            if getattr(module, "applies", None) is applies:
                stack.enter_context(
                    patch.object(module, "applies", lambda x, *_: x.dtype in available.DTYPES)
                )
        keys.settle_all()
        with torch.inference_mode():
            yield


def _trial(kind: cuts.Kind, _weight: Tensor | None = None) -> trial.Trial:
    """`Trial.of`, of nothing."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind.dtype, device=NOWHERE)

    return trial.Trial(kind, empty(1, kind.lines, kind.inputs), empty(1, kind.rows, kind.inputs),
                       empty(kind.inputs) if kind.norm else None,
                       empty(1, kind.rows, kind.outputs) if kind.plus else None)  # fmt: skip


def _try_all(x: Tensor, weight: Tensor, *, norm: bool, paired: bool, plus: bool) -> None:
    """`cut_for`: launch all that a trial would, and take none."""
    rows = x.numel() // x.shape[-1]
    if rows <= cuts.ROWS[-1]:
        outputs = weight.shape[0] // (2 if paired else 1)
        _try(cuts.Kind(weight.shape[1], outputs, x.dtype, NOWHERE, norm, paired, plus, cuts.enough(rows)))


def _try(kind: cuts.Kind) -> None:
    one = _trial(kind)
    one.theirs(0)
    for cut in cuts.candidates(kind):
        one.ours(0, cut)


def head_of(target: LeanTarget, shipped: bool) -> DraftHead:
    """A random head, or the shipped one, without its weights."""
    path = shipped_head(REAL)
    if not shipped or path is None:
        return whole_round.random_head(target, steps.DRAFT_VOCAB)
    config = load_head(
        path, target_layers=target.info.layers, dtype=torch.bfloat16, device=torch.device("cpu")
    ).config
    with NOWHERE:
        head = DraftHead(config).to(target.info.dtype)
    head.freeze()
    return head


def rounds(target: LeanTarget, head: DraftHead, batch: int, slots: int) -> None:
    """All that an engine launches at one batch size: prompts, rounds of every size, what its cost table times."""
    drafter = EagleDrafter(head, target.embed, attention.TritonAttention(), slots, LENGTH)
    cache = KVCache(target.info.cache, slots, LENGTH + 64)
    wide = head.config.target_hidden * len(head.config.taps)
    pairs = Pairs(drafter, slots, DEFAULT_TREE.depth + 1, wide, target.info.dtype)
    standing = Standing.of(slots, cache.length, NOWHERE)
    seats = Seats.of(batch, DEFAULT_TREE.depth + 1, NOWHERE)
    program = Program(target, cache, standing, pairs)
    for shape in (*Budget(None, DEFAULT_TREE).sizes(), PLAIN):
        program.run(seats, shape, True)
    program.run(seats, DEFAULT_TREE, False)
    Program(target, cache, standing, None).run(seats, PLAIN, True)
    for nodes in costs.NODES:
        if nodes == 1 or batch * nodes <= costs.MOST_ROWS:
            costs._verify(target, cache, batch, nodes, PROMPT, drafter.taps, whole_round.Stepwise())()
    first = torch.zeros(1, dtype=torch.int64, device=NOWHERE)
    prompt, rows = first.expand(1, PROMPT), chunk_rows(first, first, PROMPT, spans=False)
    target.forward(prompt, rows, cache, drafter.taps)
    drafter.forward(prompt, head.fuse(torch.empty(1, PROMPT, wide, dtype=head.dtype, device=NOWHERE)), rows)


def everything(models: Sequence[str], batches: Sequence[int]) -> None:
    """Launch what `bench.gpu` does for these shapes; of the real model in float32, too, where greedy answers are
    compared."""
    for name in models:
        target, small = steps.any_target(name, NOWHERE, torch.bfloat16), name == steps.SMALL
        for head in [head_of(target, shipped) for shipped in ([False, True] if small else [False])]:
            for batch in batches:
                rounds(target, head, batch, max(batches))
        if small:
            exact = steps.any_target(name, NOWHERE, torch.float32)
            rounds(exact, head_of(exact, True), 1, 1)
    for product in products.PRODUCTS:
        if f"random-{product.model}" in models:
            for count in cuts.ROWS:
                _try(cuts.Kind(product.inputs, product.outputs, torch.bfloat16, NOWHERE, product.norm, product.paired,
                               product.plus, count))  # fmt: skip


def pack(archive: Path, cache: Path = CACHE) -> int:
    """Archive what Triton needs to find its kernels again; how many files."""
    files = sorted(path for path in cache.rglob("*") if path.suffix in NEEDED)
    with tarfile.open(archive, "w:xz") as tar:
        for path in files:
            tar.add(path, arcname=str(path).lstrip("/"))
    return len(files)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and pack; exit code 1 where a kernel failed."""
    parser = argparse.ArgumentParser(prog="bench.abroad", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("archive", type=Path, metavar="FILE", help="a .tar.xz to be written")
    parser.add_argument("--models", nargs="+", choices=list(steps.SHAPES), default=list(steps.SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="requests at once")
    parser.add_argument("--count", action="store_true", help="only tell how many kernels there are")
    args = parser.parse_args(argv)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    kernels, start = Kernels(not args.count), time.monotonic()
    with abroad(kernels):
        everything(args.models, args.batches)
    for name, count in Counter(kernels.names.values()).most_common():
        sys.stdout.write(f"{count:5} {name}\n")
    for failure in kernels.failed:
        sys.stderr.write(f"{failure}\n")
    told = f"{len(kernels.names)} kernels, {time.monotonic() - start:.0f} s"
    if not args.count:
        told += f", {pack(args.archive)} files in {args.archive}"
    sys.stdout.write(f"{told}\n")
    return int(bool(kernels.failed))


if __name__ == "__main__":
    sys.exit(main())
