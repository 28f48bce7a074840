"""Rotary positions: frequencies from a config and their application to query and key heads.

Knows the scalings that are a fixed change of frequencies (default, linear, llama3); others are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnsupportedError

SCALINGS = ("default", "linear", "llama3")


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Inverse frequencies, float32 [head_dim / 2].

    Args:
        head_dim: size of one head, even.
        theta: base of the geometric series.
        scaling: `rope_scaling` of a config: {"rope_type": "linear", "factor": ...} or Llama-3.1's block.

    Raises:
        UnsupportedError: for a scaling this file does not know.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = str((scaling or {}).get("rope_type", (scaling or {}).get("type", "default")))
    if kind not in SCALINGS:
        raise UnsupportedError(
            "unknown rope scaling", field="rope_scaling.rope_type", value=kind, allowed=", ".join(SCALINGS)
        )
    if scaling is None or kind == "default":
        return inverse
    factor = float(scaling["factor"])
    return inverse / factor if kind == "linear" else _llama3(inverse, factor, scaling)


def _llama3(inverse: Tensor, factor: float, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, the middle blended."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    trained = float(scaling["original_max_position_embeddings"])
    wave = 2 * math.pi / inverse
    blend = ((trained / wave - low) / (high - low)).clamp(0, 1)
    return inverse * (blend + (1 - blend) / factor)


class Rope:
    """Cosines and sines for every position up to `length`, made once; sines of the first half are negated.

    Args:
        inverse: inverse frequencies [head_dim / 2].
        length: positions 0 .. length - 1.
        dtype, device: of the tables; the angles are computed in float32.
    """

    def __init__(self, inverse: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse[None].cpu()
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(device, dtype)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin for positions [B, N], each [B, N, 1, head_dim], ready for `rotate`."""
        flat, shape = positions.reshape(-1), (*positions.shape, 1, self.cos.shape[1])
        # indexing takes twice as long
        return self.cos.index_select(0, flat).view(shape), self.sin.index_select(0, flat).view(shape)


class Angles:
    """The rotary tables at the positions int64 [B, N] of some rows; read when somebody asks for the values."""

    def __init__(self, rope: Rope, positions: Tensor) -> None:
        self.rope, self.positions = rope, positions
        self._values: tuple[Tensor, Tensor] | None = None

    def values(self) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each [B, N, 1, head_dim]; looked up once for all layers."""
        if self._values is None:
            self._values = self.rope.at(self.positions)
        return self._values


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [B, N, heads, head_dim] by half-split pairs (the layout of Hugging Face checkpoints)."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return torch.addcmul(x * cos, swapped, sin)  # the sine of the first half carries the minus
