"""Which tree attention this machine takes: each is tried, held against the reference, and timed.

Knows the shape of one layer, nothing of models.
Dimension legend: B requests, N rows, H heads, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specdec.attention.native import NativeAttention
from specdec.attention.protocol import Rows, TreeAttention, tree_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import CacheShape, KVCache
from specdec.tree import build

PREFIX, NODES = 1024, 32  # one request's committed tokens and tree while trying
TOLERANCE = 2e-2  # largest difference from the reference, relative to its largest value
REPEATS = 20

Maker = Callable[[], TreeAttention]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found.

    Attributes:
        attention: the fastest that is right.
        milliseconds: of one layer, by backend that is right.
        refused: why the others are out, by backend.
    """

    attention: TreeAttention
    milliseconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def told(self) -> str:
        """One line for people."""
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(self.milliseconds.items()))
        out = ", ".join(f"no {name}: {why}" for name, why in sorted(self.refused.items()))
        return self.attention.name + (f" ({'; '.join(filter(None, (times, out)))})" if times or out else "")


def choose_attention(
    shape: CacheShape,
    heads: int,
    windows: Sequence[int | None] = (None,),
    makers: Sequence[Maker] | None = None,
) -> Choice:
    """Try the backends of the device on one layer of this shape.

    Args:
        shape: of the cache; heads: of the queries.
        windows: sliding windows that some layers have; a backend must take all of them.
        makers: of the candidates beside the reference; None takes those made for the device.
    """
    reference = ReferenceAttention()
    candidates = _made_for(shape.device) if makers is None else makers
    if not candidates:
        return Choice(reference)
    cache, rows, query = _trial(shape, heads)
    wanted = [_run(reference, query, cache, rows, window) for window in windows]
    milliseconds = {reference.name: _time(reference, query, cache, rows)}
    refused: dict[str, str] = {}
    chosen: TreeAttention = reference
    for make in candidates:
        attention = make()
        try:
            got = [_run(attention, query, cache, rows, window) for window in windows]
            _compare(got, wanted)
            milliseconds[attention.name] = _time(attention, query, cache, rows)
        except Exception as error:  # whatever a missing or broken package does, the others still run
            refused[attention.name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        # the C kernels need not win: with them a node's result does not depend on its neighbours
        if isinstance(attention, NativeAttention) or milliseconds[attention.name] < milliseconds[chosen.name]:
            chosen = attention
    return Choice(chosen, milliseconds, refused)


def _made_for(device: torch.device) -> Sequence[Maker]:
    if device.type != "cuda":
        return (NativeAttention,)

    def triton() -> TreeAttention:
        from specdec.attention.triton import TritonAttention

        return TritonAttention()

    def flash() -> TreeAttention:
        from specdec.attention.flash import FlashAttention

        return FlashAttention()

    return (triton, flash)


def _trial(shape: CacheShape, heads: int) -> tuple[KVCache, Rows, Tensor]:
    """A filled cache, a tree of two children per node behind its prefix, and queries [1, N, H, D]."""
    cache = KVCache(replace(shape, layers=1), 1, PREFIX + NODES)
    generator = torch.Generator().manual_seed(0)
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=generator))
    parents = (torch.arange(NODES)[None] - 1).clamp(min=0) // 2
    tree = build(torch.zeros_like(parents), parents)
    tree = replace(tree, **{name: getattr(tree, name).to(shape.device)
                            for name in ("tokens", "parents", "depths", "ancestors", "sizes")})  # fmt: skip
    slots = torch.zeros(1, dtype=torch.int64, device=shape.device)
    query = torch.randn(1, NODES, heads, shape.head_dim, generator=generator).to(shape.device, shape.dtype)
    return cache, tree_rows(slots, torch.full_like(slots, PREFIX), tree), query


def _run(attention: TreeAttention, query: Tensor, cache: KVCache, rows: Rows, window: int | None) -> Tensor:
    plan = attention.plan(rows, cache, window)
    return attention.attend(query, cache, 0, plan, query.shape[-1] ** -0.5)


def _compare(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        off = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        if not off <= TOLERANCE:  # NaN too
            raise ValueError(f"differs from the reference by {off:.1e}")


def _time(attention: TreeAttention, query: Tensor, cache: KVCache, rows: Rows) -> float:
    """Milliseconds of one layer, the fastest of several."""
    plan = attention.plan(rows, cache, None)
    if query.device.type == "cuda":
        return _captured_ms(lambda: attention.attend(query, cache, 0, plan, query.shape[-1] ** -0.5))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        attention.attend(query, cache, 0, plan, query.shape[-1] ** -0.5)
        best = min(best, (time.perf_counter() - start) * 1e3)
    return best


def _captured_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one of REPEATS calls in a CUDA graph: as rounds will launch it, not as Python does."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    times = []
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) / REPEATS)
    return min(times)
