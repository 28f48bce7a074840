"""The target as the engine sees it: facts, a forward over rows, logits on demand. State stays with the engine.

Taps follow the layer-input convention: tap k is the residual stream entering layer k (0 the embeddings,
`layers` the last layer's output before the final norm).
Dimension legend: B requests, N rows, H hidden size, A taps, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.attention.protocol import Rows
from specdec.cache import CacheShape, KVCache


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What never changes about a loaded target.

    Attributes:
        name: as the user gave it.
        architecture: of its config, such as LlamaForCausalLM.
        vocab, hidden, layers: sizes.
        max_length: positions it was made for.
        stop_ids: its own end-of-sequence tokens; its tokenizer's where its configs name none.
        dtype, device: of its weights.
        fingerprint: hash of sizes and of the output embedding; a head stores the one it was trained on.
        cache: what a KV cache for it looks like.
        weight_bytes: of all its parameters.
    """

    name: str
    architecture: str
    vocab: int
    hidden: int
    layers: int
    max_length: int
    stop_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    cache: CacheShape
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class States:
    """What one forward leaves behind.

    Attributes:
        final: [B, N, H] input of the LM head (after the final norm).
        features: [B, N, A * H] the taps, concatenated; width 0 without taps.
    """

    final: Tensor
    features: Tensor


class Target(Protocol):
    """A frozen model whose output distribution is law."""

    info: TargetInfo

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        """Run tokens int64 [B, N] at `rows`; their keys and values are written to `cache`."""
        ...

    def logits(self, final: Tensor) -> Tensor:
        """[..., H] -> [..., V], in the target's dtype."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings [..., H] as a head consumes them (before any scaling the target applies)."""
        ...

    def output_embedding(self) -> Tensor:
        """The LM head's matrix [V, H]; a float copy, for training and reports. Its product with a final state is the
        logits, but for what `HFTarget.finishing` tells of a few families."""
        ...

    def final_norm(self) -> tuple[Tensor, float]:
        """Weight [H] and eps of the norm before the LM head."""
        ...
