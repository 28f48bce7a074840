"""HeadConfig: the numbers and switches of one draft head, checked on creation.

Taps are layer-input ids (tap k is the residual stream entering layer k); draft-vocabulary ids live in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdec.errors import SpecdecError


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """An EAGLE-3 head (Li et al. 2503.01840) and its portable neighbours.

    Attributes:
        hidden, target_hidden: width of the head and of the target.
        taps: layer-input ids of the target states that `fc` fuses.
        intermediate, heads, kv_heads, head_dim, eps: the one decoder layer.
        theta, scaling: rotary positions, never inherited silently from the target.
        vocab, draft_vocab: sizes of the target's and the head's vocabularies.
        max_length: positions it serves.
        norm_before_residual: the residual is the normed feature (some RedHat heads).
        norm_before_fc: one RMSNorm over the concatenated taps (NVIDIA gpt-oss heads).
        fc_norm, norm_output: EAGLE-3.1: a norm per tap, and feedback after the output norm.
        window: sliding window of the layer, None for full attention.
        fingerprint: of the target it was trained on, None when the checkpoint does not say.
    """

    hidden: int
    target_hidden: int
    taps: tuple[int, ...]
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int
    eps: float = 1e-5
    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None
    max_length: int = 2048
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    window: int | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "hidden",
            "target_hidden",
            "intermediate",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab",
            "draft_vocab",
            "max_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SpecdecError("must be a positive whole number", field=name, value=value)
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 0:
            raise SpecdecError(
                "must be distinct layer ids in rising order",
                field="taps",
                value=self.taps,
                remedy="Taps are layer-input ids: k is the state entering layer k.",
            )
        if self.heads % self.kv_heads:
            raise SpecdecError(
                "must divide the attention heads",
                field="kv_heads",
                value=self.kv_heads,
                allowed=f"a divisor of {self.heads}",
            )
        if self.head_dim % 2:
            raise SpecdecError(
                "must be even: rotary positions turn pairs", field="head_dim", value=self.head_dim
            )
        if self.draft_vocab > self.vocab:
            raise SpecdecError(
                "is larger than the target's vocabulary",
                field="draft_vocab",
                value=self.draft_vocab,
                allowed=f"<= {self.vocab}",
            )
        if self.fc_norm and self.norm_before_fc:
            raise SpecdecError("excludes norm_before_fc", field="fc_norm", value=True)
        if not (math.isfinite(self.eps) and self.eps > 0 and self.theta > 0):
            raise SpecdecError(
                "eps and theta must be positive", field="eps, theta", value=(self.eps, self.theta)
            )


def default_taps(layers: int) -> tuple[int, ...]:
    """EAGLE-3's choice: inputs of layers 2, n // 2 and n - 3. Raises SpecdecError when they collapse (n < 7)."""
    taps = (2, layers // 2, layers - 3)
    if len(set(taps)) != 3 or sorted(taps) != list(taps):
        raise SpecdecError(
            "too few layers for the default taps",
            field="taps",
            value=taps,
            allowed=f"distinct rising ids up to {layers}",
            remedy="Name the taps.",
        )
    return taps
