"""Attention over disjoint sets of keys, put together by the log-sum-exp of their scores.

Knows nothing of masks, caches or kernels. Dimension legend: B requests, N rows, H heads, D head size.

    keys      [ prefix ......... )[ tree )        softmax over all keys
    part 1     out_1, lse_1                         = sum_i out_i e^lse_i / sum_i e^lse_i
    part 2                         out_2, lse_2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some of the keys.

    Attributes:
        out: [B, N, H, D], softmax-weighted values over those keys alone.
        lse: [B, N, H], natural logarithm of the sum of exponentials of the scaled scores.
    """

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of the keys of all parts, in float32 or wider.

    A row for which a part has no keys is marked by an lse of -inf or of +inf: flash-attn 2 reports +inf for
    an empty prefix (`softmax.h`), flash-attn 3 reports -inf. Finite scores never sum to infinity, so both
    mean empty; the part's output is not looked at there. A row without any keys gets zeros and -inf.

    >>> one = Partial(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1))
    >>> empty = Partial(torch.full((1, 1, 1, 1), torch.nan), torch.full((1, 1, 1), torch.inf))
    >>> merge([one, empty]).out.item()
    1.0
    """
    wide = torch.promote_types(parts[0].out.dtype, torch.float32)
    lse = torch.stack([part.lse.to(wide) for part in parts])
    empty = torch.isinf(lse)
    lse = lse.masked_fill(empty, -torch.inf)
    peak = lse.amax(0).masked_fill(empty.all(0), 0)
    weight = (lse - peak).exp()
    total = weight.sum(0)
    out = torch.zeros_like(parts[0].out, dtype=wide)
    for part, share, nothing in zip(parts, weight, empty, strict=True):
        out += share[..., None] * part.out.to(wide).masked_fill(nothing[..., None], 0)
    return Partial(out / total.clamp(min=torch.finfo(wide).tiny)[..., None], peak + total.log())
