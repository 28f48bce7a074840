"""`python -m bench.products`: a decoder layer's products for one row, our kernel against cuBLAS and the bus.

Per model, product and cut: microseconds of cuBLAS with the norm or gate before it and the residual behind it, of our
one launch, and of reading the matrix once. Rows go to `results/kernels.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import Ceiling, ceilings, layer_seconds
from bench.record import append
from specdec.fused.cuts import PROCESSORS, ROWS, Cut, Kind, candidates
from specdec.fused.trial import Trial

BLOCKS = (
    Cut(1, 2048, 4), Cut(2, 1024, 4), Cut(2, 2048, 8), Cut(4, 2048, 8), Cut(8, 1024, 8), Cut(2, 4096, 8),
    Cut(4, 4096, 8), Cut(1, 4096, 4), Cut(4, 512, 4), Cut(8, 512, 4),
)  # fmt: skip
TILES = ((32, 128, 4, 4), (64, 64, 4, 6), (64, 64, 8, 4), (64, 128, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4),
         (128, 64, 8, 6), (128, 128, 8, 4), (256, 64, 8, 4), (256, 64, 8, 5))  # fmt: skip
"""Of several rows: lines of the matrix, inputs of a step, warps, stages; inputs are split to fill a GPU."""
ROOM = 227 * 1024  # bytes of shared memory that a multiprocessor of an H200 has
LEAST = 2 * PROCESSORS // 3  # programs that are worth trying


def tiles(kind: Kind) -> list[Cut]:
    """Cuts for several rows whose programs all run at once, by what shared memory holds."""
    cuts = []
    for lines, into, warps, stages in TILES:
        # programs of a multiprocessor
        held = ROOM // (stages * into * kind.dtype.itemsize * (lines + kind.rows))
        blocks, out = -(-kind.lines // lines), lines // (2 if kind.paired else 1)
        most = PROCESSORS * min(held, 4)
        if not held or kind.outputs % out:
            continue
        for splits in {1, max(1, min(8, most // blocks)), max(1, min(8, most // 2 // blocks))}:
            if blocks * splits >= LEAST and (splits == 1 or kind.inputs // splits >= 4 * into):
                cuts.append(Cut(out, into, warps, stages, splits))
    return cuts


@dataclass(frozen=True, slots=True)
class Product:
    """One of a layer's four products (or the LM head's)."""

    model: str
    name: str
    inputs: int
    outputs: int
    norm: bool = False
    paired: bool = False
    plus: bool = False


def _layer(model: str, hidden: int, kv: int, intermediate: int, vocab: int) -> list[Product]:
    return [Product(model, "qkv", hidden, hidden + 2 * kv, norm=True), Product(model, "out", hidden, hidden, plus=True),
            Product(model, "gate_up", hidden, intermediate, norm=True, paired=True),
            Product(model, "down", intermediate, hidden, plus=True),
            Product(model, "head", hidden, vocab)]  # fmt: skip


PRODUCTS = [*_layer("8b", 4096, 1024, 14336, 128256), *_layer("135m", 576, 192, 1536, 49152)]


def measure(
    product: Product, more: bool, ceiling: Ceiling, device: torch.device,
    dtype: torch.dtype = torch.bfloat16, rows: int = 1,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for cuBLAS with its company, one for each cut, of which there are `more` than a start-up tries; on a CPU
    for the plain product alone."""
    kind = Kind(
        product.inputs, product.outputs, dtype, device, product.norm, product.paired, product.plus, rows
    )
    size = kind.nbytes
    shared = {"kind": "product", **asdict(product), "rows": rows, "floor_us": size / ceiling.bytes * 1e6}
    if device.type != "cuda":
        x, weight = torch.randn(1, product.inputs), torch.randn(product.outputs, product.inputs)
        yield {
            **shared,
            "backend": "cublas",
            "us": layer_seconds(lambda _: F.linear(x, weight), 1, device) * 1e6,
        }
        return
    trial = Trial.of(kind)
    wanted, count = trial.theirs(0).double(), len(trial.weights)
    yield {**shared, "backend": "cublas", "us": layer_seconds(trial.theirs, count, device) * 1e6}
    for cut in _cuts(kind, more):

        def ours(index: int, cut: Cut = cut) -> Tensor:
            return trial.ours(index, cut)

        try:
            error = float((ours(0).double() - wanted).norm() / wanted.norm())
        except Exception as refusal:  # triton's own kinds, of a device that lacks room or an instruction
            yield {**shared, "backend": f"ours {tuple(cut)}", "refused": str(refusal).splitlines()[0][:200]}
            continue
        yield {**shared, "backend": f"ours {tuple(cut)}", "us": layer_seconds(ours, count, device) * 1e6,
               "relative_error": error, "wrong": not error < 1e-2}  # fmt: skip


def _cuts(kind: Kind, more: bool) -> list[Cut]:
    """Those that a start-up tries, and where `more`, others."""
    others = [] if not more else BLOCKS if kind.rows == 1 else tiles(kind)
    return list(dict.fromkeys([*candidates(kind), *others]))


def compile_all(product: Product, more: bool, device: torch.device, rows: int) -> None:
    """Launch every cut once; those that the device refuses are left to `measure`."""
    kind = Kind(product.inputs, product.outputs, torch.bfloat16, device, product.norm, product.paired, product.plus,
                rows)  # fmt: skip
    trial = Trial.of(kind)
    for cut in _cuts(kind, more):
        with contextlib.suppress(Exception):
            trial.ours(0, cut)
    torch.cuda.synchronize()


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Microseconds: the floor, cuBLAS, and the best of what was tried."""
    made = Table("model", "product", "rows", "floor us", "cublas", "best", "by")
    for key, group in itertools.groupby(rows, key=lambda r: (r["model"], r["name"], r["rows"])):
        blas, *more = list(group)
        best = min((r for r in more if "us" in r), key=lambda r: float(r["us"]), default=blas)
        made.add_row(*map(str, key), *(f"{v:.2f}" for v in (blas["floor_us"], blas["us"], best["us"])),
                     best["backend"] + (" WRONG" if best.get("wrong") else ""))  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all; exit code 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="bench.products", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["135m", "8b"], help="whose matrix shapes")
    parser.add_argument(
        "--products", nargs="+", default=["qkv", "out", "gate_up", "down", "head"], help="of a layer"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1], choices=ROWS, help="tokens of a forward")
    parser.add_argument(
        "--try-blocks", action="store_true", help="also other cuts than those a start-up tries"
    )
    parser.add_argument("--compile-only", action="store_true", help="launch every cut once, and time nothing")
    args = parser.parse_args(argv)
    device, rows = torch.device("cuda"), list[dict[str, Any]]()
    wanted = [p for p in PRODUCTS if p.model in args.models and p.name in args.products]
    with torch.inference_mode():
        if args.compile_only:
            for product, count in itertools.product(wanted, args.rows):
                compile_all(product, args.try_blocks, device, count)
            return 0
        ceiling = ceilings()
        for product, count in itertools.product(wanted, args.rows):
            fresh = list(measure(product, args.try_blocks, ceiling, device, rows=count))
            append("kernels", fresh)
            rows += fresh
    Console(width=140).print(table(rows))
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
