"""Tree attention around flash-attn: its kernel reads the prefix, a dense block the tree, merged by LSE.

Knows nothing of models or trees beyond their ancestor bits, and imports flash_attn only inside functions
(FA3's `flash_attn_interface` first, then FA2's `flash_attn`; see the `flash` extra).

    keys    [0 ............... lengths)[ lengths .......... lengths + offset + N )
            flash, every row sees all   dense float32 [N, offset + N], by ancestor bit

Sliding windows and soft caps are refused: a row's window depends on its node's depth, which flash-attn cannot
express, and trimmed builds of flash-attn ignore both arguments without a word.

Dimension legend: B requests, N new rows, T = offset + N stored tree rows, Hq query heads, Hkv KV heads,
S cache rows of a slot, D head size.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.attention.merge import Partial, merge
from specdec.attention.protocol import Rows
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.tree import MAX_NODES

MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn")  # FA3 upstream, FA3 forward wheel, FA2


@dataclass(frozen=True, slots=True)
class TreePlan:
    """What all layers of one forward share.

    Attributes:
        slots, lengths: int32 [B], as flash-attn wants them.
        stored: int64 [B, T] cache rows of the tree.
        sees: bool [B, 1, 1, N, T] by ancestor bit; None for a causal chunk, whose `lengths` include it.
    """

    slots: Tensor
    lengths: Tensor
    stored: Tensor
    sees: Tensor | None


def plan_of(rows: Rows) -> TreePlan:
    """Index tensors and the tree's mask, for all layers.

    Raises:
        UnsupportedError: more tree rows than an ancestor word has bits.
    """
    slots, n = rows.slots.int(), rows.positions.shape[1]
    if rows.ancestors is None:
        stored = rows.lengths + rows.offset
        return TreePlan(slots, (stored + n).int(), stored[:, None], None)
    total = rows.offset + n
    if total > MAX_NODES:
        raise UnsupportedError("more tree rows than bits in an ancestor word", field="nodes", value=total,
                               allowed=f"at most {MAX_NODES}")  # fmt: skip
    row = torch.arange(total, device=rows.lengths.device)
    sees = ((rows.ancestors[:, :, None] >> row) & 1).bool()
    return TreePlan(slots, rows.lengths.int(), rows.lengths[:, None] + row, sees[:, None, None])


def attend(q: Tensor, keys: Tensor, values: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """q [B, N, Hq, D] over one layer's keys and values [slots, Hkv, S, D]; [B, N, Hq, D]."""
    return (_causal if plan.sees is None else _over_tree)(q, keys, values, plan, scale)


def _over_tree(q: Tensor, keys: Tensor, values: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Prefix by flash-attn without a causal mask, tree beside it, merged. All [B, N, Hq, D]."""
    out, lse, *_ = _kvcache()(
        q, keys.transpose(1, 2), values.transpose(1, 2),
        cache_seqlens=plan.lengths, cache_batch_idx=plan.slots, softmax_scale=scale, causal=False,
        return_softmax_lse=True,
    )  # fmt: skip
    prefix = Partial(out, lse.transpose(1, 2))
    return merge([prefix, _tree_block(q, keys, values, plan, scale)]).out.to(q.dtype)


def _causal(q: Tensor, keys: Tensor, values: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """flash-attn aligns a causal mask at the end of the keys: row i of N sees length - N + i + 1 of them."""
    out = _kvcache()(
        q, keys.transpose(1, 2), values.transpose(1, 2),
        cache_seqlens=plan.lengths, cache_batch_idx=plan.slots, softmax_scale=scale, causal=True,
    )  # fmt: skip
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _tree_block(q: Tensor, keys: Tensor, values: Tensor, plan: TreePlan, scale: float) -> Partial:
    """Dense attention over the stored tree rows alone, in float32 or wider."""
    assert plan.sees is not None
    b, n, heads, d = q.shape
    kv_heads = keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    slots = plan.slots[:, None].long()
    tree_keys = keys[slots, :, plan.stored].to(wide).permute(0, 2, 3, 1)  # [B, Hkv, D, T]
    tree_values = values[slots, :, plan.stored].to(wide).transpose(1, 2)  # [B, Hkv, T, D]
    packed = q.reshape(b, n, kv_heads, -1, d).permute(0, 2, 3, 1, 4).to(wide)  # [B, Hkv, G, N, D]
    score = (packed.flatten(2, 3) @ tree_keys).view(*packed.shape[:4], -1) * scale
    score = score.masked_fill(~plan.sees, -torch.inf)
    lse = score.logsumexp(-1)
    weight = (score - lse[..., None]).exp()
    out = (weight.flatten(2, 3) @ tree_values).view_as(packed)
    return Partial(out.permute(0, 3, 1, 2, 4).reshape(q.shape), lse.permute(0, 3, 1, 2).reshape(b, n, heads))


def _refuse(window: int | None, softcap: float | None) -> None:
    for field, value in (("window", window), ("softcap", softcap)):
        if value is not None:
            raise UnsupportedError(
                "flash attention over trees cannot apply it exactly", field=field, value=value,
                allowed="None", remedy="Use the triton or the reference attention for this model.",
            )  # fmt: skip


@functools.cache
def _kvcache() -> Callable[..., Any]:
    """`flash_attn_with_kvcache` of the newest flash-attn that is installed."""
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        kvcache: Callable[..., Any] = module.flash_attn_with_kvcache
        return kvcache
    raise UnsupportedError(
        "flash-attn is not installed", field="attention", value="flash",
        remedy="Install the extra specdec[flash], or use the triton attention.",
    )  # fmt: skip


class FlashAttention:
    """flash-attn behind the `TreeAttention` protocol."""

    name = "flash"

    def plan(self, rows: Rows, cache: KVCache, window: int | None) -> TreePlan:
        """See `plan_of`. Raises UnsupportedError for a window or a dtype flash-attn lacks, or where it is not there."""
        _refuse(window, None)
        _kvcache()
        if cache.kv.dtype not in (torch.float16, torch.bfloat16):
            raise UnsupportedError(
                "flash-attn has no kernels for this dtype", field="dtype", value=str(cache.kv.dtype),
                allowed="float16, bfloat16", remedy="Use the triton or the reference attention.",
            )  # fmt: skip
        return plan_of(rows)

    def attend(self, query: Tensor, cache: KVCache, layer: int, plan: TreePlan, scale: float,
               softcap: float | None = None) -> Tensor:  # fmt: skip
        """query [B, N, H, D] -> [B, N, H, D]."""
        _refuse(None, softcap)
        return attend(query, cache.kv[layer, 0], cache.kv[layer, 1], plan, scale)
