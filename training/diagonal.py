"""Attention of the unroll: causal over the first step's keys, plus a few keys that belong to one row alone.

No score matrix is ever built. The causal part runs through the fused kernel, which also gives each row's
log-sum-exp; the diagonal keys are one dot product each; both meet in one softmax. The backward pass of a fused
kernel needs only the output and log-sum-exp of the *whole* softmax to give the causal part its exact share of the
gradient (as in ring attention, Liu et al. 2310.01889), so the same kernel serves again.
Dimension legend: B sequences, H heads, G kv heads, T positions, S diagonal keys, D head size.

    row t sees    causal keys 0 .. t    and    diagonal keys (t, 1) .. (t, S)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def causal_with_diagonals(query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor,
                          scale: float) -> Tensor:  # fmt: skip
    """The fast path where there is one, else the plain one.

    Args:
        query: [B, H, T, D].
        key, value: [B, G, T, D] of the first step.
        own_key, own_value: [B, G, T, S, D]; entry s of row t is seen by row t alone. S may be 0.
        scale: of the scores.

    Returns:
        [B, H, T, D].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if not own_key.shape[3]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    own_key, own_value = own_key.repeat_interleave(groups, 1), own_value.repeat_interleave(groups, 1)
    if query.device.type == "cpu":
        out: Tensor = _Merged.apply(query, key, value, own_key, own_value, scale)  # type: ignore[no-untyped-call]  # torch
        return out
    return flex(query, key, value, own_key, own_value, scale)


def plain(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, scale: float
) -> Tensor:
    """One explicit softmax over [T] + [S] columns; all heads given. The oracle of the fast paths."""
    t = query.shape[2]
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    later = torch.ones(t, t, dtype=torch.bool, device=query.device).triu(1)
    own = (query.float()[:, :, :, None] * own_key.float()).sum(-1) * scale
    weights = torch.cat([scores.masked_fill(later, -torch.inf), own], dim=-1).softmax(-1)
    out = weights[..., :t] @ value.float() + (weights[..., t:, None] * own_value.float()).sum(3)
    return out.to(query.dtype)


def flex(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, scale: float
) -> Tensor:
    """The same by FlexAttention, compiled on CUDA: own keys lie behind the causal ones, step after step.

    key column   0 .. T - 1 causal | T + s T + t seen by row t alone
    """
    t, own = query.shape[2], own_key.shape[3]
    keys = torch.cat([key, own_key.transpose(2, 3).flatten(2, 3)], dim=2)
    values = torch.cat([value, own_value.transpose(2, 3).flatten(2, 3)], dim=2)
    mask = _block_mask(t, own, query.device)
    run = _compiled_flex() if query.device.type == "cuda" else _plain_flex
    out = run(query, keys, values, block_mask=mask, scale=scale)
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=32)
def _block_mask(t: int, own: int, device: torch.device) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return ((column < t) & (column <= row)) | ((column >= t) & ((column - t) % t == row))

    return create_block_mask(sees, None, None, t, t * (1 + own), device=device)


def _plain_flex(*arguments: Any, **options: Any) -> object:
    return flex_attention(*arguments, **options)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., object]:
    # dynamic: lengths differ from batch to batch, and every new one would compile again
    return torch.compile(flex_attention, dynamic=True)


class _Merged(torch.autograd.Function):
    """Fused causal kernel and diagonal keys in one softmax (CPU)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor,
                scale: float) -> Tensor:  # fmt: skip
        causal, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        own = (query[:, :, :, None] * own_key).sum(-1, dtype=torch.float32) * scale
        total = torch.logaddexp(lse, own.logsumexp(-1))
        shares = (own - total[..., None]).exp().to(query.dtype)
        out = causal * (lse - total).exp().to(query.dtype)[..., None] + (shares[..., None] * own_value).sum(3)
        ctx.save_for_backward(query, key, value, own_key, own_value, out, total, shares)
        ctx.scale = scale
        merged: Tensor = out
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, out, total, shares = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, total, 0.0, True, scale=ctx.scale
        )
        inner = (grad * out).sum(-1, dtype=torch.float32, keepdim=True)
        weight = shares[..., None]
        d_own_value = weight * grad[:, :, :, None]
        d_share = (grad[:, :, :, None] * own_value).sum(-1, dtype=torch.float32) - inner
        d_score = (shares * d_share * ctx.scale).to(query.dtype)[..., None]
        d_query = d_query + (d_score * own_key).sum(3)
        d_own_key = d_score * query[:, :, :, None]
        return d_query, d_key, d_value, d_own_key, d_own_value, None
