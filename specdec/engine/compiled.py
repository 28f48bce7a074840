"""The lean layer through a compiler: tried once, held against the plain layer and timed, kept where it is faster.

What stands before and after attention are functions of tensors alone, so that one graph serves all layers; attention
and the cache stay as they are. Compiled code runs inside the recorded programs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.attention.protocol import tree_rows
from specdec.cache import KVCache
from specdec.engine.graphs import TOLERANCE, Recording, Work
from specdec.target.lean import Block
from specdec.target.load import LeanTarget
from specdec.tree import MAX_NODES, chain

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
PREFIX, NODES, REPEATS = 64, 8, 20


@torch.inference_mode()
def compile_layers(target: LeanTarget, recording: Recording, compiler: Compiler = torch.compile) -> str:
    """Compile the target's layers if that is right and pays. Returns what was found, for people.

    Args:
        recording: of the forwards that are compared, as rounds will be recorded.
    """
    plain, plain_ms = _step(target, recording)
    try:
        for block in target.decoder.blocks:
            assert isinstance(block, Block)
            block.__dict__ |= {"enter": compiler(block.enter), "leave": compiler(block.leave)}
        made, made_ms = _step(target, recording)
        off = float((made - plain).abs().max() / plain.std())
        found = f"{made_ms:.3f} ms compiled, {plain_ms:.3f} ms plain"
        if off <= TOLERANCE and made_ms < plain_ms:
            return f"compiled ({found})"
        why = found if off <= TOLERANCE else f"compiled logits differ by {off:.1e}"
    except Exception as error:  # no compiler, or one that fails: the plain layer still runs
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    for block in target.decoder.blocks:
        block.__dict__.pop("enter", None)
        block.__dict__.pop("leave", None)
    return f"plain ({why})"


def _step(target: LeanTarget, recording: Recording) -> tuple[Tensor, float]:
    """Logits after a chain of nodes, float32, and the milliseconds of the recorded forward."""
    device = target.info.device
    cache = KVCache(target.info.cache, 1, PREFIX + MAX_NODES)
    tree = chain(torch.arange(1, NODES + 1, device=device)[None])
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    rows = tree_rows(slots, torch.full_like(slots, PREFIX), tree)
    out: list[Tensor] = []

    def work() -> None:
        out[:] = [target.logits(target.forward(tree.tokens, rows, cache, ()).final)]

    replay = recording.record(work)
    return out[0].float().clone(), min(_ms(replay, device) for _ in range(REPEATS))


def _ms(work: Work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
