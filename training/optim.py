"""AdamW and Muon over float32 master weights, whatever the dtype the head computes in.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves every matrix but the LM head along the nearest
orthogonal matrix to its momentum; matrices that are several packed into one are taken apart first. Everything else
is AdamW's. Knows nothing of losses or schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.head.config import HeadConfig
from specdec.layers.linear import multiplies_bfloat16

STEPS = 5  # Newton-Schulz iterations
A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic that Muon iterates
MOMENTUM = 0.95


@dataclass(frozen=True, slots=True)
class Rates:
    """How weights move.

    Attributes:
        lr: AdamW's peak rate.
        matrix_lr: Muon's, or None for AdamW everywhere.
        betas, weight_decay: decay applies to matrices.
    """

    lr: float
    matrix_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0


class Optimizer:
    """Keeps a float32 master of each parameter; `step` moves masters and copies them back.

    Args:
        head: its parameters must be float32 when this is made (no precision is lost); cast it afterwards.
        rates: see `Rates`.
    """

    def __init__(self, head: nn.Module, config: HeadConfig, rates: Rates) -> None:
        self.rates = rates
        self.parameters = dict(head.named_parameters())
        self.masters = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}
        self._blocks = blocks(config) if rates.matrix_lr is not None else {}
        self.momenta = {name: torch.zeros_like(self.masters[name]) for name in self._blocks}
        rest = [name for name in self.masters if name not in self._blocks]
        groups: list[dict[str, Any]] = [
            {"params": [self.masters[n] for n in rest if self.masters[n].ndim > 1],
             "weight_decay": rates.weight_decay},
            {"params": [self.masters[n] for n in rest if self.masters[n].ndim == 1], "weight_decay": 0.0},
        ]  # fmt: skip
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=rates.lr, betas=rates.betas)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the peak rates; gradients are taken and cleared."""
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            self.masters[name].grad = torch.zeros_like(self.masters[name]) if grad is None else grad.float()
            parameter.grad = None
        for group in self._adam.param_groups:
            group["lr"] = self.rates.lr * factor
        self._adam.step()
        for name in self._blocks:
            self._muon(name, (self.rates.matrix_lr or 0.0) * factor)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
            self.masters[name].grad = None

    def _muon(self, name: str, lr: float) -> None:
        master, momentum = self.masters[name], self.momenta[name]
        assert master.grad is not None
        momentum.lerp_(master.grad, 1 - MOMENTUM)
        update = master.grad.lerp(momentum, MOMENTUM)
        master.mul_(1 - lr * self.rates.weight_decay)
        rows, columns = self._blocks[name]
        for strip, target in zip(torch.split(update, rows), torch.split(master, rows), strict=True):
            for part, weight in zip(
                torch.split(strip, columns, 1), torch.split(target, columns, 1), strict=True
            ):
                gain = max(1.0, part.shape[0] / part.shape[1]) ** 0.5
                weight.add_(orthogonal(part), alpha=-lr * gain)

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters, "momenta": self.momenta, "adam": self._adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of an equal optimizer; parameters follow their masters."""
        for held, saved in ((self.masters, state["masters"]), (self.momenta, state["momenta"])):
            if held.keys() != saved.keys():
                raise KeyError(f"optimizer state differs: {sorted(held.keys() ^ saved.keys())}")
            for name, tensor in held.items():
                tensor.copy_(saved[name])
        self._adam.load_state_dict(state["adam"])
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])


def blocks(config: HeadConfig) -> dict[str, tuple[list[int], list[int]]]:
    """The head's matrices that Muon moves, each with the rows and columns where packed matrices meet."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "fc.weight": ([c.hidden], [c.target_hidden] * len(c.taps)),
        "qkv.weight": ([q, kv, kv], [c.hidden, c.hidden]),
        "out.weight": ([c.hidden], [q]),
        "gate_up.weight": ([c.intermediate, c.intermediate], [c.hidden]),
        "down.weight": ([c.hidden], [c.intermediate]),
    }


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V' of matrix = U S V': singular values land between 0.7 and 1.2. float32 [m, n] -> float32."""
    x = matrix.bfloat16() if multiplies_bfloat16(matrix.device) else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        inner = x @ x.T
        x = A * x + (B * inner + C * (inner @ inner)) @ x
    out: Tensor = (x.T if tall else x).float()
    return out
