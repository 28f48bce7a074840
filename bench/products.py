"""`python -m bench.products`: a decoder layer's products for a few rows, our kernel against cuBLAS and the bus.

Per model, product, rows and block sizes: microseconds of cuBLAS alone, of norm or gate and cuBLAS and residual as
torch launches them, of our one launch, and of reading the matrix once. Rows go to `results/kernels.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import Ceiling, ceilings, layer_seconds
from bench.record import append
from specdec.fused import layer

FOOTPRINT = 256 * 2**20  # bytes of matrices walked by one graph, several times any L2
MOST = 128  # matrices
BLOCKS = ((2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (8, 1024, 8), (16, 256, 4))


@dataclass(frozen=True, slots=True)
class Product:
    """One of a layer's four products (or the LM head's)."""

    model: str
    name: str
    inputs: int
    outputs: int


def _layer(model: str, hidden: int, kv: int, intermediate: int, vocab: int) -> list[Product]:
    return [Product(model, "qkv", hidden, hidden + 2 * kv), Product(model, "out", hidden, hidden),
            Product(model, "gate_up", hidden, 2 * intermediate), Product(model, "down", intermediate, hidden),
            Product(model, "head", hidden, vocab)]  # fmt: skip


PRODUCTS = [*_layer("135m", 576, 192, 1536, 49152), *_layer("8b", 4096, 1024, 14336, 128256)]


def measure(
    product: Product, rows: int, blocks: Sequence[tuple[int, int, int]], ceiling: Ceiling, device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for cuBLAS and one per block sizes, those that the product picks by itself first."""
    size = product.inputs * product.outputs * dtype.itemsize
    count = min(MOST, max(2, -(-FOOTPRINT // size))) if device.type == "cuda" else 2
    weights = (
        torch.randn(count, product.outputs, product.inputs, device=device, dtype=dtype) / product.inputs**0.5
    )
    gate, norm = product.name == "down", product.name in ("qkv", "gate_up")
    x = torch.randn(1, rows, product.inputs * (2 if gate else 1), device=device, dtype=dtype)
    factor = torch.randn(product.inputs, device=device, dtype=dtype) if norm else None
    plus = (
        torch.randn(1, rows, product.outputs, device=device, dtype=dtype)
        if product.name in ("out", "down")
        else None
    )

    def blas(index: int) -> Tensor:
        return F.linear(before, weights[index])

    cuda = device.type == "cuda"
    before = x[..., : product.inputs]
    if cuda:
        before = layer.gate(x) if gate else layer.norm(x, factor, 1e-5) if factor is not None else x
    wanted = blas(0).double() if plus is None else blas(0).double() + plus.double()
    shared = {"kind": "product", "model": product.model, "product": product.name, "inputs": product.inputs,
              "outputs": product.outputs, "rows": rows, "floor_us": size / ceiling.bytes * 1e6}  # fmt: skip
    yield {**shared, "backend": "cublas", "us": layer_seconds(blas, count, device) * 1e6}
    if not cuda:
        return
    for cut in dict.fromkeys([layer.blocks_for(product.inputs, product.outputs, rows), *blocks]):

        def ours(index: int, cut: tuple[int, int, int] = cut) -> Tensor:
            return layer.product(
                x, weights[index], plus=plus, factor=factor, eps=1e-5, gated=gate, blocks=cut
            )

        error = float((ours(0).double() - wanted).norm() / wanted.norm())
        yield {**shared, "backend": f"ours {cut}", "us": layer_seconds(ours, count, device) * 1e6,
               "relative_error": error, "wrong": not error < 1e-2}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Microseconds: the floor, cuBLAS, what is picked, and the best of what was tried."""
    made = Table("model", "product", "rows", "floor us", "cublas", "picked", "best", "by")
    for key, group in itertools.groupby(rows, key=lambda r: (r["model"], r["product"], r["rows"])):
        blas, picked, *more = list(group)
        best = min((picked, *more), key=lambda r: float(r["us"]))
        made.add_row(*map(str, key), *(f"{v:.2f}" for v in (blas["floor_us"], blas["us"], picked["us"], best["us"])),
                     best["backend"] + (" WRONG" if best["wrong"] else ""))  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all; exit code 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="bench.products", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", default=["135m", "8b"])
    parser.add_argument("--try-blocks", action="store_true", help="also other block sizes than those picked")
    args = parser.parse_args(argv)
    device, ceiling = torch.device("cuda"), ceilings()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for product, count in itertools.product(PRODUCTS, args.rows):
            if product.model in args.models:
                fresh = list(measure(product, count, BLOCKS if args.try_blocks else (), ceiling, device))
                append("kernels", fresh)
                rows += fresh
    Console(width=140).print(table(rows))
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
