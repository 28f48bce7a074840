"""A target that is three tables, samples it might have written, and a training task over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tiny_head import HIDDEN, VOCAB, Embed, tiny_head
from torch import Tensor

from specdec.attention.protocol import Rows
from specdec.cache import CacheShape, KVCache
from specdec.target.protocol import States, TargetInfo
from training.data import Sample
from training.features import Capture, Features
from training.losses import Loss
from training.objective import Objective, Settings
from training.optim import Optimizer, Rates
from training.recipe import parse_recipe
from training.trainer import Task

RECIPE = """
data: {max_length: 24}
unroll: {steps: 2}
optimizer: {lr: 3.0e-3, clip: 1.0}
trainer: {batch_tokens: 96, precision: fp32, epochs: 4}
"""


class TableTarget:
    """Taps and final state depend on the token alone; so does what comes next. Counts its forwards."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.taps = torch.randn(VOCAB, 3 * HIDDEN, generator=generator)
        self.final = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.matrix = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.embed = Embed()
        self.forwards = 0
        self.info = TargetInfo(
            "tables", "Tables", VOCAB, HIDDEN, 8, 64, (0,), torch.float32, torch.device("cpu"), "f" * 16,
            CacheShape(1, 1, 2, torch.float32, torch.device("cpu")),
        )  # fmt: skip

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        self.forwards += 1
        return States(self.final[tokens], self.taps[tokens][..., : len(taps) * HIDDEN])

    def logits(self, final: Tensor) -> Tensor:
        return final @ self.matrix.T

    def output_embedding(self) -> Tensor:
        return self.matrix

    def final_norm(self) -> tuple[Tensor, float]:
        return torch.ones(HIDDEN), 1e-5


def samples(count: int = 24, seed: int = 0) -> list[Sample]:
    """Texts of 8 to 24 tokens that the tables write greedily after a random first half."""
    random = np.random.default_rng(seed)
    target = TableTarget()
    after = target.logits(target.final).argmax(-1).numpy()
    out = []
    for number in range(count):
        ids = random.integers(VOCAB, size=int(random.integers(8, 25))).astype(np.int32)
        half = len(ids) // 2
        for place in range(half, len(ids)):
            ids[place] = after[ids[place - 1]]
        out.append(Sample(f"s{number}", ids, np.arange(len(ids)) >= half))
    return out


def task(texts: Sequence[Sample], *overrides: str, **settings: Any) -> Task:
    """The same task every time it is called."""
    recipe = parse_recipe(RECIPE, overrides)
    target = TableTarget()
    head = tiny_head(spread=0.05)
    rates = Rates(
        recipe.optimizer.lr, recipe.optimizer.matrix_lr if recipe.optimizer.name == "muon" else None
    )
    optimizer = Optimizer(head, head.config, rates)
    rows = target.matrix[head.ids]
    loss = Settings(Loss(recipe.loss.kind), **settings)
    objective = Objective(head, target.embed, rows, torch.ones(3 * HIDDEN), loss)
    features = Features(texts, Capture(target, (1, 2, 3)))
    return Task(
        recipe, objective, optimizer, texts, features, 0, {"target": "f" * 16, "recipe": recipe.hash()}
    )


def alone() -> Accelerator:
    return Accelerator(cpu=True)
