"""Measures the cost table of a target and a drafter on this machine, in seconds, and remembers it.

The table is cached by machine, thread count, versions, model and drafter, and held against a few runs before it is
believed; deleting the file measures anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from specdec.accept import Verdict
from specdec.attention.protocol import tree_rows
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.mixed import MixedDrafter
from specdec.drafting.pairs import Pairs
from specdec.drafting.protocol import Context, Drafter, Shape
from specdec.engine.cost_table import CostTable
from specdec.engine.graphs import GraphedTarget, Recording
from specdec.native.library import identity
from specdec.places import replacing
from specdec.sampling import likeliest
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES, chain

NODES = (1, 2, 4, 8, 16, 32, 64)
PREFIX = 256  # committed tokens while measuring
LEAST, MOST = 2, 24  # runs of a cell
ENOUGH_MS = 400.0  # spent on a cell, after which it is run no more
REPLAYS = 8  # of a recorded work in a row
MOST_ROWS = 256  # batch x nodes beyond which a cell is left to extrapolation
CHECKED = (1, 8)  # nodes of the forwards that a remembered table is held against
FASTER, FASTER_MS = 1.5, 1.0  # how much faster than remembered: factor and milliseconds
WIDTH = 8
LEVELS = 7  # of the trees whose pairs a captured round reads


@torch.inference_mode()
def measure(
    target: Target, drafter: Drafter, cache: KVCache, recording: Recording | None = None
) -> CostTable:
    """Time target forwards and drafting levels; clobbers the cache and the drafter's slots.

    Args:
        recording: forwards and drafting are replayed, as in rounds that are device programs; None runs them step by
            step.
    """
    batches = [b for b in (1, 2, 4, 8, 16, 32, 64) if b <= cache.slots]
    prefix = _prefix(cache)
    if recording is not None and isinstance(target, GraphedTarget):
        target = target.inner  # whole forwards are recorded, as in a round
    replays = 1 if recording is None else REPLAYS
    cells = {(b, n): _verify(target, cache, b, n, prefix, drafter.taps, recording)
             for b in batches for n in NODES if n == 1 or b * n <= MOST_ROWS}  # fmt: skip
    times = _least_ms(cells, replays)
    verify: dict[int, dict[int, float]] = {b: {} for b in batches}
    for b, n in cells:  # noise must not make more nodes look cheaper
        verify[b][n] = max(times[b, n], *verify[b].values(), 0.0)
    eagle = _asks_head(drafter)
    if eagle is None:
        return CostTable(verify, {}, {})
    drafts = {(b, depth): _draft(eagle, target, b, depth, prefix, recording)
              for b in batches for depth in (1, 3)}  # fmt: skip
    times = _least_ms(drafts, replays)
    _clear(eagle, max(batches))
    level = {b: max((times[b, 3] - times[b, 1]) / 2, 1e-3) for b in batches}
    return CostTable(verify, level, {b: times[b, 1] for b in batches})


@torch.inference_mode()
def busy_then(table: CostTable, target: Target, drafter: Drafter, cache: KVCache) -> bool:
    """Was the machine busy when the table was taken? Whatever else it does only ever adds, and adds most to the many
    small works of drafting: where something is clearly faster now, the table is not to be believed. What is slower now
    says nothing."""
    prefix = _prefix(cache)
    told = {(1, n): table.verify_ms(1, n) for n in CHECKED}
    works = {(1, n): _verify(target, cache, 1, n, prefix, drafter.taps, None) for n in CHECKED}
    eagle = _asks_head(drafter)
    if eagle is not None:
        told[1, 0], works[1, 0] = table.draft_ms(1, 3), _draft(eagle, target, 1, 3, prefix, None)
    now = _least_ms(works, 1, LEAST)
    if eagle is not None:
        _clear(eagle, 1)
    return any(now[name] < told[name] / FASTER and told[name] - now[name] > FASTER_MS for name in told)


def _clear(eagle: EagleDrafter, slots: int) -> None:
    """Forget what was only measured."""
    for slot in range(slots):
        eagle.release(slot)
        eagle.lanes[slot].rows = 0


def _asks_head(drafter: Drafter) -> EagleDrafter | None:
    if isinstance(drafter, MixedDrafter):
        return drafter.head
    return drafter if isinstance(drafter, EagleDrafter) else None


def _least_ms(
    works: Mapping[tuple[int, int], Callable[[], object]], in_a_row: int, most: int = MOST
) -> dict[tuple[int, int], float]:
    """The fastest of several runs each: what else the machine does only ever adds, and prices must not follow it.

    The works take turns, so that a busy moment falls on all of them; short ones take more turns, because decisions
    hang on them most often, and a long one cannot be measured much in seconds.

    Args:
        in_a_row: calls of a run before it waits for the device. Rounds that are launched ahead never wait, and waiting
            takes as long for a token as for a tree: timed with it, a token would look too dear.
        most: runs of each.
    """
    least, spent = dict.fromkeys(works, math.inf), dict.fromkeys(works, 0.0)
    for turn in range(most + 1):
        for name, work in works.items():
            if turn > LEAST and spent[name] > ENOUGH_MS:
                continue
            start = time.perf_counter()
            for _ in range(in_a_row):
                work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken = (time.perf_counter() - start) * 1e3
            if turn:  # the first turn warms up
                least[name], spent[name] = min(least[name], taken / in_a_row), spent[name] + taken
    return least


def _prefix(cache: KVCache) -> int:
    """Committed tokens behind which the largest tree still fits, in a short context, too."""
    return min(PREFIX, cache.length // 2, cache.length - MAX_NODES)


def _slots(b: int, prefix: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(b, device=device), torch.full((b,), prefix, device=device)


def _verify(
    target: Target,
    cache: KVCache,
    b: int,
    n: int,
    prefix: int,
    taps: tuple[int, ...],
    recording: Recording | None,
) -> Callable[[], object]:
    """A forward over B trees of N nodes, and the target's greedy choice after each."""
    slots, lengths = _slots(b, prefix, target.info.device)
    tree = chain(torch.ones(b, n, dtype=torch.int64, device=target.info.device))

    def work() -> None:
        rows = tree_rows(slots, lengths, tree, spans=recording is None)
        likeliest(target.logits(target.forward(tree.tokens, rows, cache, taps).final))

    return work if recording is None else recording.record(work)


def _draft(drafter: EagleDrafter, target: Target, b: int, depth: int, prefix: int,
           recording: Recording | None) -> Callable[[], object]:  # fmt: skip
    """Reading two accepted tokens and growing trees of so many levels."""
    slots, lengths = _slots(b, prefix, target.info.device)
    wide = drafter.head.config.target_hidden * len(drafter.taps)
    if recording is not None:
        pairs = Pairs(drafter, b, LEVELS + 1, wide, target.info.dtype)
        fixed = Context(slots, torch.ones_like(slots), lengths, fixed=True)

        def program() -> None:
            pairs.counts.fill_(2)
            drafter.grow(fixed, Shape(depth, WIDTH, 16), pairs.read(fixed))

        return recording.record(program)
    context = Context(slots, torch.ones_like(slots), lengths)
    features = torch.zeros(b, 2, wide, dtype=target.info.dtype, device=slots.device)
    kept = torch.tensor([[0, 1]], device=slots.device).expand(b, 2)
    verdict = Verdict(kept, torch.full_like(slots, 2), torch.ones_like(kept), torch.ones_like(slots))

    def work() -> object:
        for slot in range(b):
            drafter.lanes[slot].rows = prefix - 2
            drafter.lanes[slot].features, drafter.lanes[slot].tokens = [], []
        drafter.observe(context, features, verdict)
        return drafter.propose(context, Shape(depth, WIDTH, 16))

    return work


def remembered(target: Target, drafter: Drafter, cache: KVCache, directory: Path,
               recording: Recording | None = None) -> CostTable:  # fmt: skip
    """The cached table of this machine, model and drafter; measured if there is none, if it is broken or if the machine
    was busy when it was taken."""
    path = directory / f"{_key(target, drafter, cache, recording is not None)}.json"
    with contextlib.suppress(OSError, ValueError):
        table = CostTable.from_dict(json.loads(path.read_text()))
        # device programs are timed by the device, whatever else this machine does
        if recording is not None or not busy_then(table, target, drafter, cache):
            return table
    table = measure(target, drafter, cache, recording)
    # a cache that cannot be written costs seconds at the next start, no more
    with contextlib.suppress(OSError), replacing(path) as fresh:
        fresh.write_text(json.dumps(table.as_dict()))
    return table


def _key(target: Target, drafter: Drafter, cache: KVCache, recorded: bool) -> str:
    info = target.info
    device = (
        torch.cuda.get_device_name()
        if info.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    eagle = _asks_head(drafter)
    head = () if eagle is None else eagle.head.config
    parts = (
        platform.node(),
        device,
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        type(target).__name__,
        info.fingerprint,
        str(info.dtype),
        cache.slots,
        drafter.name if eagle is None else eagle.name,
        str(head),
        *(["recorded"] if recorded else []),
        identity(),
        (LEAST, MOST, ENOUGH_MS),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
