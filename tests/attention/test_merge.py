"""Merging attention over parts of the keys equals attention over all of them, also where parts are empty."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from specdec.attention.merge import Partial, merge


def attention(q: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """Dense attention. q [B, N, H, D], keys and values [B, L, H, D]; no keys give NaN and -inf."""
    score = torch.einsum("bnhd,blhd->bnhl", q, keys)
    return Partial(torch.einsum("bnhl,blhd->bnhd", score.softmax(-1), values), score.logsumexp(-1))


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (4, 37, 37))
    return 3 * q, keys, values  # sharp enough that parts differ in their peaks


@pytest.mark.parametrize("cuts", [[], [1], [36], [5, 6, 30], [0], [37], [0, 0, 9, 37, 37]])
def test_parts_equal_the_whole(qkv: tuple[Tensor, Tensor, Tensor], cuts: list[int]) -> None:
    q, keys, values = qkv
    bounds = [0, *cuts, keys.shape[1]]
    parts = [attention(q, keys[:, a:b], values[:, a:b]) for a, b in pairwise(bounds)]
    whole, merged = attention(q, keys, values), merge(parts)
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)


@pytest.mark.parametrize("mark", [torch.inf, -torch.inf])
@pytest.mark.parametrize("garbage", [0.0, 1e4, torch.nan])
def test_an_empty_prefix_is_ignored_row_by_row(mark: float, garbage: float) -> None:
    """flash-attn 2 marks it by +inf: taken at its word, exp(+inf) would drown the tree."""
    generator = torch.Generator().manual_seed(0)
    tree = Partial(torch.randn(2, 3, 1, 4, generator=generator), torch.randn(2, 3, 1, generator=generator))
    prefix = Partial(tree.out.flip(0), tree.lse.flip(0))
    expected = merge([prefix, tree])
    hollow = Partial(prefix.out.clone(), prefix.lse.clone())
    hollow.out[0], hollow.lse[0] = garbage, mark
    for parts in ([hollow, tree], [tree, hollow]):
        merged = merge(parts)
        torch.testing.assert_close(merged.out[0], tree.out[0])
        torch.testing.assert_close(merged.lse[0], tree.lse[0])
        torch.testing.assert_close(merged.out[1], expected.out[1])


def test_rows_that_see_nothing_are_zero() -> None:
    nothing = Partial(torch.full((1, 1, 1, 2), torch.nan), torch.full((1, 1, 1), -torch.inf))
    merged = merge([nothing, nothing])
    assert merged.out.eq(0).all() and merged.lse.eq(-torch.inf).all()


def test_large_scores_neither_overflow_nor_vanish() -> None:
    one, two = (Partial(torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1), 3e4)) for x in (1.0, 3.0))
    merged = merge([one, two])
    torch.testing.assert_close(merged.out.item(), 2.0)
    far = Partial(one.out, torch.full((1, 1, 1), -3e4))
    torch.testing.assert_close(merge([far, two]).out.item(), 3.0)


def test_half_precision_is_merged_in_float32() -> None:
    parts = [
        Partial(torch.full((1, 1, 1, 1), x, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
        for x in (1, 1.0078125)
    ]
    merged = merge(parts)
    assert merged.out.dtype == torch.float32
    assert merged.out.item() == pytest.approx(1.00390625)
