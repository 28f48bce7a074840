"""What a device can do at most, and how long a call takes on it.

Knows nothing of attention or models. On CUDA every figure is a median over replays of a graph or of one large launch,
timed by device events; on a CPU, over plain calls: enough to try a bench there, not to judge by.
"""

from __future__ import annotations

import statistics
import time
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


def ceilings(device: str = "cuda", copied: int = COPIED, side: int = SIDE) -> Ceiling:
    """Copy bandwidth and bf16 matrix rate of a device, on random data.

    Args:
        copied: elements; side: of the matrices, 2 x side^2 <= copied.
    """
    source = torch.randn(copied, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)
    left, right = source[: side**2].view(side, side), source[side**2 : 2 * side**2].view(side, side)
    return Ceiling(moved, 2 * side**3 / median_seconds(lambda: left @ right, device))


def layer_seconds(call: Callable[[int], Any], layers: int, device: torch.device) -> float:
    """Median seconds of one of `layers` calls: captured in one graph on CUDA, plain elsewhere."""
    if device.type == "cuda":
        return graph_seconds(call, layers)
    return median_seconds(lambda: [call(layer) for layer in range(layers)], device.type) / layers


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


def median_seconds(call: Callable[[], Any], device: str = "cuda") -> float:
    """Median seconds of a call, after warm-ups."""
    timed = _device_seconds if device.startswith("cuda") else _host_seconds
    for _ in range(WARM_UPS):
        call()
    return statistics.median(timed(call) for _ in range(REPLAYS))


def _device_seconds(call: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
