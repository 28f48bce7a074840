"""What a run would do, printed before it does anything: sizes, memory, time.

Estimates from sizes and one short matrix product; knows nothing of the loop.
"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead
from specdec.target.protocol import TargetInfo
from training.build import compute_dtype
from training.recipe import Recipe

PROMPT_TOKENS = 100  # of a prompt with its template, for want of better before tokenising
FLOPS = 6  # per parameter and token, forward and backward


def print_plan(
    console: Console, recipe: Recipe, info: TargetInfo, conversations: int, config: HeadConfig
) -> None:
    """Print the plan of a run over so many conversations that makes a head of this `config`."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DraftHead(config).parameters())
    tokens = conversations * (PROMPT_TOKENS + recipe.responses.max_tokens)
    row = (len(config.taps) + 1) * info.hidden * 2
    rate = matrix_rate(compute_dtype(recipe), info.device)
    visits = tokens * recipe.trainer.epochs * recipe.unroll.steps
    minutes = FLOPS * parameters * visits / rate / 60
    limit = recipe.trainer.max_minutes
    table = Table("what", "how much", title=f"plan for {escape(info.name)}")
    rows = {
        "conversations, at most tokens": f"{conversations:,}, {tokens:,}",
        "head": f"{parameters:,} parameters, {parameters * 2 / 1e6:.1f} MB as bfloat16",
        "start": recipe.head.start,
        "taps": ", ".join(map(str, config.taps)),
        "memory of head, masters, moments, gradients": f"{parameters * 18 / 1e6:,.0f} MB",
        "logit gradients of one micro-batch": f"{recipe.trainer.batch_tokens * config.draft_vocab * 4 / 1e6:,.0f} MB",
        "features": f"{tokens * row / 1e9:.2f} GB, of which kept at most {recipe.cache.gigabytes:g} GB",
        "measured product rate": f"{rate / 1e9:,.0f} GFLOP/s",
        "training, at least": f"{minutes:,.0f} minutes" + (f", cut at {limit:g}" if limit else ""),
    }
    for what, how_much in rows.items():
        table.add_row(what, how_much)
    console.print(table)


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """Floating-point operations per second of a square matrix product, the better of three."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # reading one number waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best
