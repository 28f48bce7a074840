"""A layer's product for few rows in one launch, with what comes before and after; of many rows, a norm is one before.

Dimension legend: R rows, W inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.fused.available import launching
from specdec.fused.cuts import SMALL, Cut, enough, parts_of
from specdec.fused.layer import norm
from specdec.fused.turns import COUNTERS, turns

BESIDE = 32  # squares that fit a thread's registers beside its products; of more, the norm comes first
FEW = 32  # rows whose squares fit however few warps share them


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
    assert cut.splits == 1 or (blocks <= COUNTERS and outputs % cut.out == 0), "not a cut for this product"
    sizes = {
        "PAIRED": paired, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.into, "num_warps": cut.warps, **launching(),
    }  # fmt: skip
    if rows > 1 and factor is not None and norm_first(x.dtype, rows, weight.nbytes, cut):
        x, factor = norm(x, factor, eps), None
    given = (x.contiguous(), weight, bias, None if plus is None else plus.contiguous(), factor, y)
    if rows == 1:
        kernels.row_kernel[(blocks,)](*given, inputs, outputs, eps, WHOLE=cut.into >= inputs, **sizes)
        return y
    sizes["BLOCK_ROWS"] = max(16, enough(rows))
    if cut.stages:
        left = _left(weight, sizes["BLOCK_ROWS"], cut)
        tiles = _tiles(given[0].view(rows, inputs), weight, sizes["BLOCK_ROWS"], cut)
        kernels.rows_kernel[blocks, cut.splits](
            *given, *left, *tiles, rows, inputs, outputs, cut.ahead, cut.splits, eps, STAGES=cut.stages, **sizes,
        )  # fmt: skip
    else:
        kernels.whole_rows_kernel[(blocks,)](
            *given, rows, inputs, outputs, eps, PARTS=parts_of(inputs, cut.into), **sizes
        )
    return y


def norm_first(dtype: torch.dtype, rows: int, nbytes: int, cut: Cut) -> bool:
    """Must a norm be a launch of its own? Float16 cannot hold what it has yet to scale down, many rows' squares do not
    fit the registers, and large matrices are read at full speed only where x goes to the tensor cores as it is."""
    squares = enough(rows) * cut.into // (32 * cut.warps)
    alone = (rows > FEW and squares > BESIDE) or cut.splits > 1 or cut.tma or nbytes > SMALL
    return dtype == torch.float16 or bool(cut.stages and alone)


def _left(weight: Tensor, rows: int, cut: Cut) -> tuple[Tensor | None, Tensor | None]:
    """Where programs that share their inputs leave their sums, and count; nothing where none do."""
    if cut.splits == 1:
        return None, None
    room = (cut.splits, rows, weight.shape[0])
    return torch.empty(room, dtype=torch.float32, device=weight.device), turns(weight.device)


def _tiles(x: Tensor, weight: Tensor, rows: int, cut: Cut) -> tuple[Any, Any]:
    """What the copy engine has to know of x [R, W] and the matrix; nothing where threads fetch."""
    if not cut.tma or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None, None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (TensorDescriptor.from_tensor(x, [rows, cut.into]),
            TensorDescriptor.from_tensor(weight, [cut.out, cut.into]))  # fmt: skip
