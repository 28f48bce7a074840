"""A plan that runs in seconds, and prompts of random tokens, for tests of reports."""

from __future__ import annotations

from dataclasses import replace

import torch

from specdec.drafting.protocol import Shape
from specdec.surplus.capture import Passage
from specdec.surplus.control import TableSettings
from specdec.surplus.plan import QUICK, Plan
from specdec.surplus.probe import ProbeSettings

SMALL = ProbeSettings(width=24, rank=12, token_width=8, epochs=2, patience=1, batch=128)

TINY_PLAN: Plan = replace(
    QUICK,
    budget="tiny",
    documents=70,
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
    slots=4,
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
