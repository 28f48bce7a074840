"""Engines over tiny real models: targets of the promised architectures, random heads, requests run to their end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tiny
import torch

from specdec.attention.reference import ReferenceAttention
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN, Drafter, Shape
from specdec.engine.budget import Budget
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Piece, Request
from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead
from specdec.sampling import Sampling
from specdec.target.load import LeanTarget, load_target
from specdec.target.protocol import Target

LIMITS = Limits(slots=3, length=128, chunk=16)


def load(directory: Path, arch: str, backend: Literal["lean", "adapter"], device: str = "cpu") -> Target:
    """The tiny model of an architecture in float32, saved under `directory` at first use."""
    path = directory / arch
    if not path.is_dir():
        tiny.save(arch, directory)
    return load_target(str(path), dtype=torch.float32, device=device, prefer=backend).target


def attention_of(target: Target) -> str:
    """Name of the tree attention of a lean target."""
    assert isinstance(target, LeanTarget)
    return target.decoder.attention.name


def random_head(target: Target, ids: Iterable[int], seed: int = 0, **changes: Any) -> DraftHead:
    """A head for a tiny target with random weights, whose draft vocabulary is `ids`; its config with `changes`."""
    kept, info = sorted(set(ids)), target.info
    config = HeadConfig(hidden=info.hidden, target_hidden=info.hidden, taps=(1, 4, 6), intermediate=64, heads=4,
                        kv_heads=2, head_dim=12, vocab=info.vocab, draft_vocab=len(kept), max_length=512,
                        fingerprint=info.fingerprint)  # fmt: skip
    head, generator = DraftHead(replace(config, **changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
    head.ids.copy_(torch.tensor(kept))
    return head


def eagle(target: Target, head: DraftHead, limits: Limits = LIMITS) -> EagleDrafter:
    """A drafter over a frozen head."""
    head.to(target.info.device).freeze()
    return EagleDrafter(head, target.embed, ReferenceAttention(), limits.slots, limits.length)


def engine(
    target: Target, drafter: Drafter | None = None, shape: Shape = PLAIN, limits: Limits = LIMITS
) -> Engine:
    """An engine with trees of one fixed shape; plain decoding without a drafter."""
    return Engine(target, drafter or NoDrafter(), Budget(None, shape, adaptive=False), limits)


def request(name: str, prompt: Sequence[int], sampling: Sampling, *, speculate: bool = True) -> Request:
    """A request without text that ends at `sampling`'s own stops."""
    return Request(name, tuple(prompt), sampling, frozenset(sampling.stop_token_ids), speculate=speculate)


def run(machine: Engine, requests: Sequence[Request], apart: int = 0) -> list[Piece]:
    """Run requests to their end, one more joining every `apart` steps; all pieces in order."""
    waiting, pieces = list(requests), []
    while waiting or machine.busy:
        machine.add(waiting.pop(0)) if waiting else None
        while waiting and not apart:
            machine.add(waiting.pop(0))
        for _ in range(max(apart, 1)):
            pieces += machine.step()
    return pieces
