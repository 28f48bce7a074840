"""Which dtype decodes fastest on this CPU for these matrices: measured in milliseconds, never believed.

bfloat16 halves the bytes a product reads, but not every CPU multiplies it well, and some shapes fall off a
cliff. Measured on one thread: a thread that waits for a core that something else keeps busy would be all that is seen.
Knows matrix shapes, not models.
"""

from __future__ import annotations

import functools
import time

import torch

from specdec.layers.linear import Projection

Shape = tuple[int, int]
"""(outputs, inputs) of one projection."""

ROWS = (1, 16)  # plain decoding and a small tree
COLD_BYTES = 64 * 2**20  # read this much per pass (in float32), so that caches do not hide the memory bus
COPIES = 6  # of one block, at most
PASSES = 5
MARGIN = 0.97  # bfloat16 must win by more than noise


@functools.cache
def fastest_dtype(shapes: tuple[Shape, ...]) -> torch.dtype:
    """bfloat16 when it beats float32 at one row and at 16 rows alike, else float32.

    Args:
        shapes: the projections of one block.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wide, narrow = seconds(shapes, torch.float32), seconds(shapes, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    wins = all(n < w * MARGIN for n, w in zip(narrow, wide, strict=True))
    return torch.bfloat16 if wins else torch.float32


@torch.inference_mode()
def seconds(shapes: tuple[Shape, ...], dtype: torch.dtype) -> tuple[float, ...]:
    """Best time of one block for each of `ROWS`; by projection, so that a busy machine does little harm."""
    block = sum(outputs * inputs for outputs, inputs in shapes) * 4
    copies = min(max(-(-COLD_BYTES // block), 1), COPIES)
    blocks = [[_projection(shape, dtype) for shape in shapes] for _ in range(copies)]
    return tuple(_best_block(blocks, rows) for rows in ROWS)


def _best_block(blocks: list[list[Projection]], rows: int) -> float:
    """Sum over the block of each projection's best time; other copies run between, so none stays in cache."""
    passes = [[_timed(layer, rows) for layer in block] for _ in range(PASSES) for block in blocks]
    return float(sum(min(times) for times in zip(*passes, strict=True)))


def _projection(shape: Shape, dtype: torch.dtype) -> Projection:
    outputs, inputs = shape
    with torch.device("meta"):
        projection = Projection(inputs, outputs)
    projection.weight = torch.nn.Parameter(torch.ones(outputs, inputs, dtype=dtype), requires_grad=False)
    projection.pack()
    return projection


def _timed(layer: Projection, rows: int) -> float:
    x = torch.ones(rows, layer.inputs, dtype=layer.weight.dtype)
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start
