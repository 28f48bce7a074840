"""The draft step and the whole round as recorded programs, each against its floor: for `bench.steps`, given a head.

The floor of drafting is reading the head once for every level; that of a round is this and the verification's. Wall
time is that of a loop that launches one round ahead, so host work that is hidden does not show. Weights may be random:
acceptance is no concern here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.pairs import Pairs
from specdec.drafting.protocol import PLAIN, Context, Shape
from specdec.engine.build import make_drafter
from specdec.engine.engine import Limits
from specdec.engine.graphs import CudaRecording, Recording, Work, nothing
from specdec.engine.pipeline import Pipeline
from specdec.engine.request import Request
from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead
from specdec.layers.linear import Projection
from specdec.sampling import Sampling
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES

ROUNDS = 24  # timed in a row; the first few only warm up
WARM = 4


class Stepwise:
    """No recording: the work itself, launched again."""

    def record(self, work: Work, restore: Work = nothing) -> Work:
        return work


def randomise(model: torch.nn.Module) -> None:
    """Small normal matrices, norms of one."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1.0)


def random_head(target: Target, draft_vocab: int) -> DraftHead:
    """An EAGLE-3 head of the target's width with random weights."""
    info = target.info
    dim = info.cache.head_dim
    config = HeadConfig(
        hidden=info.hidden, target_hidden=info.hidden, taps=(0, info.layers // 2, info.layers),
        intermediate=7 * info.hidden // 2, heads=info.hidden // dim, kv_heads=info.cache.kv_heads, head_dim=dim,
        vocab=info.vocab, draft_vocab=min(draft_vocab, info.vocab), max_length=info.max_length,
        fingerprint=info.fingerprint,
    )  # fmt: skip
    head = DraftHead(config).to(info.device, info.dtype)
    randomise(head)
    head.ids.copy_(torch.arange(config.draft_vocab))
    head.freeze()
    return head


def head_bytes(head: DraftHead, levels: int) -> int:
    """Bytes that drafting reads: all matrices once a level, but `fc` once a round."""
    matrices = [m for m in head.modules() if isinstance(m, Projection) and m is not head.fc]
    level = sum(m.inputs * m.outputs for m in matrices)
    return (head.fc.inputs * head.fc.outputs + levels * level) * head.dtype.itemsize


def draft_step(
    target: Target, head: DraftHead, batch: int, shape: Shape, prefix: int, recording: Recording
) -> Work:
    """Reading two accepted pairs and growing trees."""
    drafter = make_drafter(target, "head", head, Limits(batch, prefix + 2 * MAX_NODES))
    assert isinstance(drafter, EagleDrafter)
    wide = head.config.target_hidden * len(head.config.taps)
    pairs = Pairs(drafter, batch, shape.depth + 1, wide, target.info.dtype)
    slots = torch.arange(batch, device=target.info.device)
    context = Context(slots, torch.ones_like(slots), torch.full_like(slots, prefix), fixed=True)

    def work() -> None:
        pairs.counts.fill_(2)
        drafter.grow(context, shape, pairs.read(context))

    return recording.record(work)


def round_ms(
    target: Target, head: DraftHead | None, batch: int, shape: Shape, prefix: int, recording: Recording
) -> float:
    """Milliseconds a round of a loop that reads one round late; without a head, of plain decoding."""
    length = prefix + 2 + (ROUNDS + 2) * (shape.depth + 1)
    drafter = make_drafter(target, "none" if head is None else "head", head, Limits(batch, length))
    cache = KVCache(target.info.cache, batch, length + MAX_NODES)
    pipeline = Pipeline(target, drafter, cache, shape.depth, recording)
    requests = []
    for slot in range(batch):
        request = Request(f"r{slot}", (1,) * prefix, Sampling(max_tokens=length), frozenset())
        request.slot, request.prefilled, request.output = slot, prefix, [1]
        if isinstance(drafter, EagleDrafter):
            lane = drafter.lanes[slot]
            lane.rows, lane.features, lane.tokens = prefix, [], []
        requests.append(request)
    started = 0.0
    for turn in range(ROUNDS):
        if turn == WARM:
            started = time.perf_counter()
        pipeline.launch(requests, shape)
        if len(pipeline.flights) > 1:
            pipeline.land()
    pipeline.land()
    return 1e3 * (time.perf_counter() - started) / (ROUNDS - WARM)


@torch.inference_mode()
def measure(
    target: Target, head: DraftHead, batches: list[int], shape: Shape, prefix: int,
    median_ms: Callable[[Callable[[], object], torch.device], float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per batch: drafting and whole rounds, step by step and recorded, and the bytes they must read."""
    info = target.info
    for batch in batches:
        row: dict[str, Any] = {"kind": "round", "target": info.name, "batch": batch, "nodes": shape.nodes,
                               "depth": shape.depth, "width": shape.width, "prefix": prefix,
                               "dtype": str(info.dtype), "draft_bytes": head_bytes(head, shape.depth)}  # fmt: skip
        recordings: dict[str, Recording] = {"plain": Stepwise()}
        if info.device.type == "cuda":
            recordings["captured"] = CudaRecording()
        for name, recording in recordings.items():
            step = draft_step(target, head, batch, shape, prefix, recording)
            row[f"{name}_draft_ms"] = round(median_ms(step, info.device), 4)
            row[f"{name}_round_ms"] = round(round_ms(target, head, batch, shape, prefix, recording), 4)
            row[f"{name}_token_ms"] = round(round_ms(target, None, batch, PLAIN, prefix, recording), 4)
        yield row
