"""LeanTarget: our own decoder for Llama-shaped families (Llama, SmolLM, Mistral, Qwen2, Qwen3).

One module, driven by a config; QKV and gate-up are packed into one product each; keys and values are
arguments. It knows how to compute, not where files come from (files.py) nor who is asking (engine).
Dimension legend: B requests, N rows, H hidden, A taps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.attention.protocol import Rows, TreeAttention
from specdec.cache import CacheShape, KVCache
from specdec.errors import CheckpointError, UnsupportedError
from specdec.layers.embedding import embedded
from specdec.layers.heads import Heads
from specdec.layers.linear import Projection, pack
from specdec.layers.norm import RMSNorm
from specdec.layers.rope import SCALINGS, Angles, Rope, frequencies
from specdec.layers.whole import Parts, Whole, whole
from specdec.target.protocol import States
from specdec.target.stated import stated_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BIASED = (
    "llama",
    "qwen3",
)  # families whose `attention_bias` means something; qwen2 always has it on q, k and v
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""That a config must name: the defaults are of one model."""


@dataclass(frozen=True, slots=True)
class LeanConfig:
    """The numbers of one decoder, read from a Hugging Face `config.json`."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    scaling: Mapping[str, Any] | None
    max_length: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]

    @staticmethod
    def read(config: Mapping[str, Any]) -> LeanConfig:
        """Raises UnsupportedError naming what this decoder lacks, where the adapter may still run it; CheckpointError
        for a size that is not there."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedError("not a family of the lean decoder", field="model_type", value=family,
                                   allowed=", ".join(FAMILIES))  # fmt: skip
        for size in SIZES:
            _check_size(config, size)
        c = stated_config(config).to_dict()
        _refuse_extras(c)
        rope, layers, heads = c["rope_parameters"], c["num_hidden_layers"], c["num_attention_heads"]
        bias = family in BIASED and bool(c.get("attention_bias", False))
        return LeanConfig(
            vocab=c["vocab_size"],
            hidden=c["hidden_size"],
            intermediate=c["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=int(c["num_key_value_heads"]),
            head_dim=int(c.get("head_dim") or c["hidden_size"] // heads),
            eps=float(c["rms_norm_eps"]),
            theta=float(rope["rope_theta"]),
            scaling=rope if rope["rope_type"] != "default" else None,
            max_length=int(c["max_position_embeddings"]),
            qkv_bias=family == "qwen2" or bias,
            out_bias=bias,
            qk_norm=family == "qwen3",
            tied=bool(c["tie_word_embeddings"]),
            windows=_windows(c, layers),
        )


def _check_size(config: Mapping[str, Any], field: str) -> None:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError("says no size", field=f"{field} in config.json", value=value,
                              allowed="a whole number from 1", remedy="Fetch the weights again.")  # fmt: skip


def _refuse_extras(config: Mapping[str, Any]) -> None:
    rope = config["rope_parameters"]
    needs = {
        "hidden_act": (config["hidden_act"], ("silu",)),
        "mlp_bias": (bool(config.get("mlp_bias", False)), (False,)),
        "rope_type": (rope.get("rope_type"), SCALINGS),
        "partial_rotary_factor": (float(rope.get("partial_rotary_factor", 1.0)), (1.0,)),
    }
    for field, (value, allowed) in needs.items():
        if value not in allowed:
            raise UnsupportedError("not in the lean decoder", field=field, value=value,
                                   allowed=", ".join(map(str, allowed)))  # fmt: skip


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer: where the layer types say so; in all of a Mistral that names none; never in a Llama."""
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    if config["model_type"] == "llama":
        return (None,) * layers
    return tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        c = config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.input_norm = RMSNorm(c.hidden, c.eps)
        self.qkv = Projection(c.hidden, q + 2 * kv, bias=c.qkv_bias)
        self.out = Projection(q, c.hidden, bias=c.out_bias)
        self.mlp_norm = RMSNorm(c.hidden, c.eps)
        self.gate_up = Projection(c.hidden, 2 * c.intermediate)
        self.down = Projection(c.intermediate, c.hidden)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.scale = 1.0 / math.sqrt(c.head_dim)

    def parts(self) -> Parts:
        """For the call that runs all layers."""
        return Parts(self.input_norm, self.qkv, self.out, self.mlp_norm, self.gate_up, self.down, self.kv_heads,
                     self.head_dim, self.scale, q_norm=self.q_norm, k_norm=self.k_norm)  # fmt: skip

    def forward(self, x: Tensor, step: Step, layer: int, plan: Any) -> Tensor:
        """x: [B, N, H] -> [B, N, H]; the memory of x may be overwritten."""
        heads = Heads(self._heads(x), self.kv_heads, step.angles)
        queries = heads.store(step.cache, layer, step.rows.index, self.out.weight)
        seen = step.attention.attend(queries, step.cache, layer, plan, self.scale)
        x = self.out(seen.flatten(2), plus=x, reuse=True)
        y: Tensor = self.down(self.gate_up(x, norm=self.mlp_norm, activated=True), plus=x, reuse=True)
        return y

    def _heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values before they are turned: [B, N, heads + 2 * kv_heads, D]."""
        heads: Tensor = self.qkv(x, norm=self.input_norm)
        heads = heads.view(*x.shape[:2], self.heads + 2 * self.kv_heads, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            return heads
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], dim=2)


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward share."""

    rows: Rows
    cache: KVCache
    attention: TreeAttention
    angles: Angles


class LeanDecoder(nn.Module):
    """Embedding, blocks, final norm, LM head. Weights only; see `LeanTarget` in load.py for the protocol.

    Parameters start as NaN, so that one a checkpoint fails to fill cannot go unnoticed.
    """

    def __init__(self, config: LeanConfig, attention: TreeAttention) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.embedding = nn.Parameter(torch.full((config.vocab, config.hidden), torch.nan))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        self.head = Projection(config.hidden, config.vocab)
        self.whole: Whole | None = None
        self._rope: Rope | None = None

    def rope(self) -> Rope:
        """The tables, made at first use, once dtype and device are settled."""
        if self._rope is None:
            c = self.config
            inverse = frequencies(c.head_dim, c.theta, c.scaling)
            # trees may look past the last position a request can use: leave room for one
            self._rope = Rope(inverse, c.max_length + 128, self.embedding.dtype, self.embedding.device)
        return self._rope

    def cache_shape(self) -> CacheShape:
        c = self.config
        return CacheShape(c.layers, c.kv_heads, c.head_dim, self.embedding.dtype, self.embedding.device)

    def freeze(self) -> None:
        """Ready for decoding: no gradients, projections packed, all layers one call where they can be."""
        self.requires_grad_(False)
        pack(self)
        self.whole = whole([block.parts() for block in self.blocks if isinstance(block, Block)])

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        """tokens int64 [B, N] at `rows`; writes `cache`; returns final states and the taps."""
        x = embedded(tokens, self.embedding)
        step = Step(rows, cache, self.attention, Angles(self.rope(), rows.positions))
        plans = {w: self.attention.plan(rows, cache, w) for w in set(self.config.windows)}
        features = x.new_empty(*x.shape[:2], len(taps) * self.config.hidden)
        each = [plans[window] for window in self.config.windows]
        if self.whole is not None and self.whole.takes(x, cache, each):
            x = self.whole.run(x, step.angles, cache, rows.index, each, taps=taps, features=features)
            return States(self.norm(x), features)
        for layer, block in enumerate(self.blocks):
            _tap(features, taps, layer, x)
            x = block(x, step, layer, each[layer])
        _tap(features, taps, len(self.blocks), x)
        return States(self.norm(x), features)


def _tap(features: Tensor, taps: tuple[int, ...], layer: int, x: Tensor) -> None:
    """Copy the states before a layer to where its taps stand among the features; a tap may be asked for twice."""
    hidden = x.shape[-1]
    for place, tap in enumerate(taps):
        if tap == layer:
            features[..., place * hidden : (place + 1) * hidden] = x
