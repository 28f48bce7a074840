"""Flash attention over trees with a fake flash-attn: the reference's results, empty prefixes too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import tree as trees
from specdec.attention import flash
from specdec.attention.protocol import Rows, chunk_rows, level_rows, tree_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import CacheShape, KVCache
from specdec.errors import UnsupportedError

SCALE = 0.3


def fake_kvcache(mark: float, extra: int) -> Callable[..., Any]:
    """`flash_attn_with_kvcache` as documented, in any dtype; `mark` is its log-sum-exp of no keys at all."""

    def kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor,
                cache_batch_idx: Tensor, softmax_scale: float, causal: bool, num_splits: int = 0,
                return_softmax_lse: bool = False) -> Any:  # fmt: skip
        assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
        _, n, heads, _ = q.shape
        rows, group = k_cache.shape[1], heads // k_cache.shape[2]
        keys, values = (x[cache_batch_idx.long()].repeat_interleave(group, 2) for x in (k_cache, v_cache))
        last = cache_seqlens[:, None] - 1 + torch.arange(1 - n, 1) * causal  # bottom-right alignment
        sees = torch.arange(rows) <= last[:, :, None]
        score = torch.einsum("bnhd,blhd->bhnl", q, keys) * softmax_scale
        score = score.masked_fill(~sees[:, None], -torch.inf)
        lse = score.logsumexp(-1)
        weight = (score - lse.nan_to_num(neginf=0.0)[..., None]).exp()
        out = torch.einsum("bhnl,blhd->bnhd", weight, values)
        lse = lse.masked_fill(lse == -torch.inf, mark)
        return (out, lse, *[None] * extra) if return_softmax_lse else out

    return kvcache


@pytest.fixture(params=["flash_attn", "flash_attn_interface"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """flash-attn 2 marks an empty prefix by +inf; flash-attn 3 by -inf, and returns two tensors more."""
    for name in flash.MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    module = ModuleType(request.param)
    second = request.param == "flash_attn"
    kvcache = fake_kvcache(torch.inf if second else -torch.inf, 0 if second else 2)
    monkeypatch.setattr(module, "flash_attn_with_kvcache", kvcache, raising=False)
    monkeypatch.setitem(sys.modules, request.param, module)
    flash._kvcache.cache_clear()
    yield request.param
    flash._kvcache.cache_clear()


def filled_cache(dtype: torch.dtype = torch.float64) -> KVCache:
    cache = KVCache(CacheShape(2, 2, 8, dtype, torch.device("cpu")), 4, 64)
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=torch.Generator().manual_seed(0)))
    return cache


def queries(n: int, heads: int = 6) -> Tensor:
    return torch.randn(3, n, heads, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def both(rows: Rows, heads: int = 6) -> tuple[Tensor, Tensor]:
    """(flash, reference) for layer 1."""
    cache, reference = filled_cache(), ReferenceAttention()
    q = queries(rows.positions.shape[1], heads)
    expected = reference.attend(q, cache, 1, reference.plan(rows, cache, None), SCALE)
    return flash.attend(q, cache.kv[1, 0], cache.kv[1, 1], flash.plan_of(rows), SCALE), expected


SLOTS, LENGTHS = torch.tensor([2, 0, 3]), torch.tensor([17, 0, 40])
TREE = trees.build(torch.zeros(3, 6, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 3]] * 3))


@pytest.mark.parametrize("heads", [2, 6, 8])
def test_a_tree_equals_the_reference(installed: str, heads: int) -> None:
    """Request 1 has an empty prefix: its rows are the tree's alone, whatever flash-attn says of no keys."""
    seen, expected = both(tree_rows(SLOTS, LENGTHS, TREE), heads)
    torch.testing.assert_close(seen, expected)


def test_a_drafting_level_equals_the_reference(installed: str) -> None:
    rows = level_rows(SLOTS, LENGTHS, (LENGTHS[:, None] + 2).expand(3, 2), TREE.ancestors[:, 4:], 4)
    torch.testing.assert_close(*both(rows))


def test_a_chunk_equals_the_reference(installed: str) -> None:
    torch.testing.assert_close(*both(chunk_rows(SLOTS, LENGTHS, 9)))


def test_more_tree_rows_than_a_word_has_bits_are_refused(installed: str) -> None:
    rows = level_rows(SLOTS, LENGTHS, (LENGTHS[:, None] + 2).expand(3, 2), TREE.ancestors[:, 4:], 63)
    with pytest.raises(UnsupportedError, match="65; allowed: at most 64"):
        flash.plan_of(rows)


def test_the_protocol_equals_the_reference_in_half_precision(installed: str) -> None:
    cache, rows = filled_cache(torch.bfloat16), tree_rows(SLOTS, LENGTHS, TREE)
    attention, reference, wide = flash.FlashAttention(), ReferenceAttention(), filled_cache()
    wide.kv.copy_(cache.kv)
    q = queries(6).bfloat16()
    seen = attention.attend(q, cache, 1, attention.plan(rows, cache, None), SCALE)
    expected = reference.attend(q.double(), wide, 1, reference.plan(rows, wide, None), SCALE)
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen.double(), expected, atol=0.03, rtol=0)
    chunk = attention.plan(chunk_rows(SLOTS, LENGTHS, 6), cache, None)
    assert attention.attend(q, cache, 1, chunk, SCALE).shape == q.shape


def test_the_protocol_refuses_at_the_door(installed: str) -> None:
    """Trimmed builds of flash-attn ignore windows and soft caps without a word."""
    attention, rows = flash.FlashAttention(), tree_rows(SLOTS, LENGTHS, TREE)
    half = filled_cache(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="window"):
        attention.plan(rows, half, 16)
    with pytest.raises(UnsupportedError, match="float64"):
        attention.plan(rows, filled_cache(), None)
    with pytest.raises(UnsupportedError, match="softcap"):
        attention.attend(queries(6).bfloat16(), half, 0, attention.plan(rows, half, None), SCALE, 30.0)


def test_without_flash_attn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in flash.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    flash._kvcache.cache_clear()
    with pytest.raises(UnsupportedError, match=r"specdec\[flash\]"):
        both(tree_rows(SLOTS, LENGTHS, TREE))
