"""Measures the cost table of a target and a drafter on this machine, in seconds, and remembers it.

The table is cached by machine, thread count, versions, model and drafter; deleting the file measures anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from specdec.accept import Verdict
from specdec.attention.protocol import tree_rows
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Context, Drafter, Shape
from specdec.engine.budget import CostTable
from specdec.target.protocol import Target
from specdec.tree import chain

NODES = (1, 2, 4, 8, 16, 32, 64)
PREFIX = 256  # committed tokens while measuring
REPEATS = 7
MOST_ROWS = 256  # batch x nodes beyond which a cell is left to extrapolation
WIDTH = 8


@torch.inference_mode()
def measure(target: Target, drafter: Drafter, cache: KVCache) -> CostTable:
    """Time target forwards and drafting levels; clobbers the cache and the drafter's slots."""
    batches = [b for b in (1, 2, 4, 8, 16, 32, 64) if b <= cache.slots]
    prefix = min(PREFIX, cache.length // 2)
    verify = {}
    for b in batches:
        cells = [n for n in NODES if n == 1 or b * n <= MOST_ROWS]
        verify[b] = {n: _verify_ms(target, cache, b, n, prefix, drafter.taps) for n in cells}
        for low, high in pairwise(cells):  # noise must not make more nodes look cheaper
            verify[b][high] = max(verify[b][high], verify[b][low])
    if not isinstance(drafter, EagleDrafter):
        return CostTable(verify, {}, {})
    extend, level = {}, {}
    for b in batches:
        extend[b], level[b] = _draft_ms(drafter, target, b, prefix)
    return CostTable(verify, level, extend)


def _least_ms(work: Callable[[], object]) -> float:
    """The fastest of several: what else the machine does only ever adds, and prices must not follow its noise."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def _slots(b: int, prefix: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(b, device=device), torch.full((b,), prefix, device=device)


def _verify_ms(target: Target, cache: KVCache, b: int, n: int, prefix: int, taps: tuple[int, ...]) -> float:
    slots, lengths = _slots(b, prefix, target.info.device)
    tree = chain(torch.ones(b, n, dtype=torch.int64, device=target.info.device))

    def work() -> object:
        states = target.forward(tree.tokens, tree_rows(slots, lengths, tree), cache, taps)
        return target.logits(states.final)

    return _least_ms(work)


def _draft_ms(drafter: EagleDrafter, target: Target, b: int, prefix: int) -> tuple[float, float]:
    """(extension and first level, one further level) in milliseconds."""
    slots, lengths = _slots(b, prefix, target.info.device)
    wide = drafter.head.config.target_hidden * len(drafter.taps)
    context = Context(slots, torch.ones_like(slots), lengths)
    features = torch.zeros(b, 2, wide, dtype=target.info.dtype, device=slots.device)
    kept = torch.tensor([[0, 1]], device=slots.device).expand(b, 2)
    verdict = Verdict(kept, torch.full_like(slots, 2), torch.ones_like(kept), torch.ones_like(slots))

    def work(depth: int) -> Callable[[], object]:
        def once() -> object:
            for slot in range(b):
                drafter.lanes[slot].rows = prefix - 2
                drafter.lanes[slot].features, drafter.lanes[slot].tokens = [], []
            drafter.observe(context, features, verdict)
            return drafter.propose(context, Shape(depth, WIDTH, 16))

        return once

    one, three = _least_ms(work(1)), _least_ms(work(3))
    for slot in range(b):
        drafter.release(slot)
        drafter.lanes[slot].rows = 0
    return one, max((three - one) / 2, 1e-3)


def remembered(target: Target, drafter: Drafter, cache: KVCache, directory: Path) -> CostTable:
    """The cached table of this machine, model and drafter; measured if there is none or it is broken."""
    path = directory / f"{_key(target, drafter, cache)}.json"
    try:
        return CostTable.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        table = measure(target, drafter, cache)
    with contextlib.suppress(
        OSError
    ):  # a cache that cannot be written costs seconds at the next start, no more
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            json.dump(table.as_dict(), file)
        Path(file.name).replace(path)
    return table


def _key(target: Target, drafter: Drafter, cache: KVCache) -> str:
    info = target.info
    device = (
        torch.cuda.get_device_name()
        if info.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    head = drafter.head.config if isinstance(drafter, EagleDrafter) else ()
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
        drafter.name,
        str(head),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
