"""DraftHead: EAGLE-3's one decoder layer, weights only. Training and decoding run this same forward.

Who attends to whom is the caller's business (a cache when decoding, a causal-plus-diagonal mask when training), as
are token embeddings (the target's own). Dimension legend: B requests, N rows, H hidden, A taps, Vd draft vocabulary.

    row at position t:   feature(t), token(t+1)  ->  token(t+2)

    g = fc(taps)                                   only for rows the target has seen; else the head's own output
    x = [input_norm(E[token]), hidden_norm(g)]     2H wide
    a = g + out(attention(x))                      the residual is the un-normed g
    y = a + mlp(mlp_norm(a))                       fed back as the next g (before the norm)
    logits = lm_head(norm(y))
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from specdec.cache import CacheShape
from specdec.head.config import HeadConfig
from specdec.layers.heads import Heads
from specdec.layers.linear import Projection, pack
from specdec.layers.norm import RMSNorm, normed
from specdec.layers.rope import Angles, Rope, frequencies
from specdec.layers.whole import Parts, Whole, whole

SPARE = 128  # positions behind the last that a request can use: trees look past it

Attend = Callable[[Heads, float], Tensor]
"""(the rows' queries, keys and values, not yet turned; scale) -> [B, N, heads, D]."""


class DraftHead(nn.Module):
    """The module. Parameters start as NaN, so that one a checkpoint fails to fill cannot go unnoticed.

    Buffers:
        ids: int64 [Vd], target id of each draft-vocabulary entry, strictly increasing.
    """

    ids: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        c = self.config = config
        fused = len(c.taps) * c.target_hidden
        self.fc = Projection(fused, c.hidden)
        self.fc_norm = nn.ModuleList(RMSNorm(c.target_hidden, c.eps) for _ in c.taps) if c.fc_norm else None
        self.tap_norm = RMSNorm(fused, c.eps) if c.norm_before_fc else None
        self.input_norm = RMSNorm(c.hidden, c.eps)
        self.hidden_norm = RMSNorm(c.hidden, c.eps)
        self.qkv = Projection(2 * c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.out = Projection(c.heads * c.head_dim, c.hidden)
        self.mlp_norm = RMSNorm(c.hidden, c.eps)
        self.gate_up = Projection(c.hidden, 2 * c.intermediate)
        self.down = Projection(c.intermediate, c.hidden)
        self.norm = RMSNorm(c.hidden, c.eps)
        self.lm_head = Projection(c.hidden, c.draft_vocab)
        self.register_buffer("ids", torch.full((c.draft_vocab,), -1, dtype=torch.int64))
        self.scale = 1.0 / math.sqrt(c.head_dim)
        self.whole: Whole | None = None
        self._rope: Rope | None = None
        self._positions = config.max_length + SPARE

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def angles(self, positions: Tensor) -> Angles:
        """Rotary tables at positions int64 [B, N]; made at first use, once dtype and device are settled."""
        if self._rope is None:
            c = self.config
            inverse = frequencies(c.head_dim, c.theta, c.scaling)
            self._rope = Rope(inverse, self._positions, self.dtype, self.device)
        return Angles(self._rope, positions)

    def reserve(self, positions: int) -> None:
        """Make the rotary tables reach so far. A head follows its target: those of EAGLE's authors say 2048 whatever
        the target's context, and engines raise it."""
        if positions > self._positions:
            self._positions, self._rope = positions, None

    def cache_shape(self) -> CacheShape:
        return CacheShape(1, self.config.kv_heads, self.config.head_dim, self.dtype, self.device)

    def freeze(self) -> None:
        """Ready for decoding: no gradients, projections packed where that helps, the layer one call where it can be."""
        self.requires_grad_(False)
        pack(self)
        c = self.config
        if not c.norm_before_residual:
            parts = Parts(self.hidden_norm, self.qkv, self.out, self.mlp_norm, self.gate_up, self.down, c.kv_heads,
                          c.head_dim, self.scale, embedded_norm=self.input_norm)  # fmt: skip
            self.whole = whole([parts])

    def fuse(self, features: Tensor) -> Tensor:
        """Target taps [B, N, A * Ht] -> g [B, N, H]."""
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            norms = [norm for norm in self.fc_norm if isinstance(norm, RMSNorm)]
            features = normed(norms, parts)
        fused: Tensor = self.fc(features, norm=self.tap_norm)
        return fused

    def forward(self, embedded: Tensor, g: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """One step over rows.

        Args:
            embedded: [B, N, H] embedding of token t + 1.
            g: [B, N, H] fused feature of position t, or the fed-back output of the step before.
            angles: rotary tables of the rows.
            attend: turns and keeps the heads it is given, and attends.

        Returns:
            y [B, N, H], before the output norm; see `feedback` and `logits`.
        """
        c = self.config
        b, n, _ = g.shape
        x = normed((self.input_norm, self.hidden_norm), (embedded, g))
        residual = x[..., c.hidden :] if c.norm_before_residual else g
        packed = self.qkv(x).view(b, n, c.heads + 2 * c.kv_heads, c.head_dim)
        seen = attend(Heads(packed, c.kv_heads, angles), self.scale)
        a = self.out(seen.reshape(b, n, -1), plus=residual)
        y: Tensor = self.down(self.gate_up(a, norm=self.mlp_norm, activated=True), plus=a, reuse=True)
        return y

    def feedback(self, y: Tensor) -> Tensor:
        """What the next step takes for g."""
        return self.norm(y) if self.config.norm_output else y

    def logits(self, y: Tensor) -> Tensor:
        """[..., H] -> [..., Vd] over the draft vocabulary."""
        out: Tensor = self.lm_head(y, norm=self.norm)
        return out
