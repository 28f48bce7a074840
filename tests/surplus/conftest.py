"""A tiny target, a head for it, and a plan that runs in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engines
import pytest
import torch

from specdec.drafting.protocol import Shape
from specdec.head.model import DraftHead
from specdec.surplus.capture import Passage
from specdec.surplus.control import TableSettings
from specdec.surplus.plan import QUICK, Plan
from specdec.surplus.probe import ProbeSettings
from specdec.target.protocol import Target

SMALL = ProbeSettings(width=24, rank=12, token_width=8, epochs=2, patience=1, batch=128)

TINY_PLAN: Plan = replace(
    QUICK,
    budget="tiny",
    documents=60,
    max_tokens=20,
    depths=(2, 3),
    rotations=1,
    symbols=40,
    probe=SMALL,
    small=replace(SMALL, width=8, rank=4),
    table=TableSettings(width=16, rank=8, epochs=1),
    draft_depth=3,
    shapes={"chain": Shape(3, 1, 4), "tree": Shape(3, 3, 10), "sampled chain": Shape(3, 1, 4, sampled=True)},
    shape_documents=2,
    draws=50,
    sigmas=(0.0, 2.0),
    least_events=3,
)


def make_passages(count: int, seed: int = 0, domains: tuple[str, ...] = ("maths", "talk")) -> list[Passage]:
    """Prompts of 4 to 9 random tokens, domains in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = 4 + int(torch.randint(6, (1,), generator=generator))
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        made.append(Passage(f"p{seed}-{i}", domains[i % len(domains)], tuple(ids)))
    return made


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The tiny Llama of the other tests: 8 layers, 128 tokens."""
    return engines.load(tmp_path_factory.mktemp("surplus"), "llama", "lean")


@pytest.fixture(scope="session")
def head(target: Target) -> DraftHead:
    """A random head on taps 1, 4 and 6 that drafts most of the vocabulary."""
    made = engines.random_head(target, range(3, 123))
    made.freeze()
    return made


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory."""
    return tmp_path / "work"
