"""What a CUDA device can do at most, and how long a captured call takes on it.

Knows nothing of attention or models. Every figure is a median over replays of a CUDA graph or of one large
launch, timed by device events.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS = 3
REPLAYS = 15
COPIED = 2**31  # elements: 4 GiB of bf16, far beyond any cache
SIDE = 8192


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Measured bytes (read plus written by a copy) and bf16 matrix operations per second."""

    bytes: float
    operations: float

    def seconds(self, moved: float, done: float) -> float:
        """The floor of work that moves so many bytes and does so many operations."""
        return max(moved / self.bytes, done / self.operations)


def ceilings() -> Ceiling:
    """Copy bandwidth and bf16 matrix rate of the current CUDA device, on random data."""
    source = torch.randn(COPIED, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    left, right = source[: SIDE**2].view(SIDE, SIDE), source[SIDE**2 : 2 * SIDE**2].view(SIDE, SIDE)
    return Ceiling(copied, 2 * SIDE**3 / median_seconds(lambda: left @ right))


def graph_seconds(call: Callable[[int], Any], layers: int) -> float:
    """Median seconds of one of `layers` calls captured in one graph: launches cost nothing.

    Args:
        call: launches the work of one layer; two of them warm up (compilation, workspaces) beforehand.
        layers: calls in the graph; enough of them, each on its own memory, keep the L2 cache out of it.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(min(2, layers)):
            call(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            call(layer)
    return median_seconds(graph.replay) / layers


def median_seconds(call: Callable[[], Any]) -> float:
    """Median device seconds of a call, after warm-ups."""
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) / 1e3)
    return statistics.median(times)
