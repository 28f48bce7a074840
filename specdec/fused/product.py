"""A layer's product for few rows in one launch, with what comes before and after; of many rows, a norm is one before.

Dimension legend: R rows, W inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from specdec.fused.available import launching
from specdec.fused.cuts import Cut, enough, parts_of
from specdec.fused.layer import norm

BESIDE = 32  # rows whose squares fit the registers beside their products; of more, the norm comes first
BLOCKS = 1024  # of outputs, at most, where inputs are split


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut, *, plus: Tensor | None = None,
    factor: Tensor | None = None, eps: float = 0.0, paired: bool = False,
) -> Tensor:  # fmt: skip
    """after(norm(x) W^T + bias) + plus for a few rows.

    Where the cut splits the inputs, all such products of a device must be in one order: they count in one place.

    Args:
        x: [..., W], R rows in all, at most 64.
        weight: [O, W]; bias: [O] or None. Twice as many where `paired`: then `after` is the gated activation, of
            lines o and O + o.
        plus: [..., O], added at the end.
        factor: weight [W] of a norm of `eps` that comes first.

    Returns: [..., O] of x's dtype. Sums are float32.
    """
    from specdec.fused import product_kernels as kernels

    lines, inputs = weight.shape
    outputs, rows = lines // (2 if paired else 1), x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], outputs)
    blocks = -(-outputs // cut.out)
    assert cut.splits == 1 or (blocks <= BLOCKS and outputs % cut.out == 0), "not a cut for this product"
    given = (x.contiguous(), weight, bias, None if plus is None else plus.contiguous(), factor, y)
    sizes = {
        "PAIRED": paired,
        "BLOCK_OUT": cut.out,
        "BLOCK_IN": cut.into,
        "num_warps": cut.warps,
    } | launching()
    if rows == 1:
        kernels.row_kernel[(blocks,)](*given, inputs, outputs, eps, WHOLE=cut.into >= inputs, **sizes)
        return y
    sizes["BLOCK_ROWS"] = max(16, enough(rows))
    first = x.dtype == torch.float16 or (cut.stages and (rows > BESIDE or cut.splits > 1))
    if factor is not None and first:  # float16 cannot hold what a norm has yet to scale down
        given = (norm(x, factor, eps).contiguous(), *given[1:4], None, y)
    if cut.stages:
        left: tuple[Tensor | None, ...] = (None, None)
        if cut.splits > 1:
            room = (cut.splits, sizes["BLOCK_ROWS"], lines)
            left = (torch.empty(room, dtype=torch.float32, device=x.device), _turns(x.device))
        kernels.rows_kernel[blocks, cut.splits](
            *given, *left, rows, inputs, outputs, eps, STAGES=cut.stages, SPLITS=cut.splits, **sizes
        )
    else:
        kernels.whole_rows_kernel[(blocks,)](
            *given, rows, inputs, outputs, eps, PARTS=parts_of(inputs, cut.into), **sizes
        )
    return y


@functools.cache
def _turns(device: torch.device) -> Tensor:
    """Of blocks whose inputs are split: how many programs are done. Kernels leave zeros, and no two run at once."""
    return torch.zeros(BLOCKS, dtype=torch.int32, device=device)
