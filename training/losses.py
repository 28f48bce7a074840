"""What the head is graded by: its distribution against the target's, over the draft vocabulary.

Knows rows of logits; knows nothing of positions, batches or heads. Every loss comes with its gradient in closed
form, so that logits over thousands of tokens exist only for one small chunk of rows at a time.
Dimension legend: R rows, H hidden, Vd draft vocabulary.

    p   target probabilities restricted to the draft vocabulary, renormalised
    q   head probabilities                      alpha = sum min(p, q), the chance that a draft is accepted

    kl       sum p log(p / q)
    tv       1 - alpha
    lk       lambda kl + (1 - lambda) tv,  lambda = exp(-rate alpha), held constant     (LK losses, arXiv 2602.23881)
    alpha    -log alpha                                                                 (the same)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.errors import SpecdecError
from specdec.native.grading import KINDS, can_grade
from specdec.native.grading import grade as native_grade

SMALLEST = 1e-6  # overlap below which its logarithm is cut
CHUNK = 256  # rows whose logits exist at once: a few MB, which stay in cache


@dataclass(frozen=True, slots=True)
class Graded:
    """Loss of each row and two things worth logging.

    Attributes:
        loss: float32 [R].
        overlap: float32 [R], alpha = sum min(p, q).
        hit: bool [R], the head's likeliest token is the target's.
    """

    loss: Tensor
    overlap: Tensor
    hit: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """Which loss: one of KINDS, and the rate of the LK hybrid. Raises SpecdecError for another kind."""

    kind: str = "kl"
    lk_rate: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecdecError("unknown loss", field="loss.kind", value=self.kind, allowed=", ".join(KINDS))


def target_probs(final: Tensor, rows: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The target's distribution over the draft vocabulary, renormalised.

    Args:
        final: [R, H] final states; rows: [Vd, H], the target's LM-head rows of the draft vocabulary.
        finish: float32 products [R, Vd] to the target's logits, where these are not the products themselves.

    Returns:
        [R, Vd] in the dtype of `final`; made chunk by chunk, in float32 inside.
    """
    out = final.new_empty(final.shape[0], rows.shape[0])
    for start in range(0, final.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        logits = F.linear(final[part], rows).float()
        out[part] = (logits if finish is None else finish(logits)).softmax(-1).to(out.dtype)
    return out


def grade(logits: Tensor, p: Tensor, loss: Loss) -> tuple[Graded, Tensor]:
    """Losses of rows and the gradient of each row's loss by its logits.

    Args:
        logits: float32 [R, Vd] of the head; p: float32 [R, Vd] of the target, rows sum to one.

    Returns:
        (Graded, gradient float32 [R, Vd]).
    """
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    overlap = torch.minimum(p, q).sum(-1)
    hit = logits.argmax(-1) == p.argmax(-1)
    kl = torch.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)
    if loss.kind == "kl":
        return Graded(kl, overlap, hit), q - p
    under = q * (q < p)
    tv_grad = q * under.sum(-1, keepdim=True) - under
    if loss.kind == "tv":
        return Graded(1 - overlap, overlap, hit), tv_grad
    if loss.kind == "alpha":
        safe = overlap.clamp(min=SMALLEST)
        return Graded(-safe.log(), overlap, hit), tv_grad / safe[:, None]
    mix = (-loss.lk_rate * overlap).exp()
    return Graded(mix * kl + (1 - mix) * (1 - overlap), overlap, hit), torch.lerp(
        tv_grad, q - p, mix[:, None]
    )


def _grade_in_place(logits: Tensor, p: Tensor, index: Tensor, row_weight: Tensor, loss: Loss) -> Graded:
    """Logits [R, Vd] become gradients of row_weight * loss, row p[index] being the target's."""
    if can_grade(logits):
        return Graded(*native_grade(logits, p, index, row_weight, loss.kind, loss.lk_rate))
    graded, grad = grade(logits.float(), p[index].float(), loss)
    logits.copy_(grad * row_weight[:, None])
    return graded


class _Fused(torch.autograd.Function):
    """sum_r weight_r loss_r of logits = hidden W^T, gradients made in the forward pass chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, p: Tensor, index: Tensor, row_weight: Tensor,
                loss: Loss) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        d_logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        parts = []
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            torch.mm(hidden[part], weight.T, out=d_logits[part])
            parts.append(_grade_in_place(d_logits[part], p, index[part], row_weight[part], loss))
        rows = torch.cat([graded.loss for graded in parts])
        overlap, hit = torch.cat([g.overlap for g in parts]), torch.cat([g.hit for g in parts])
        ctx.save_for_backward(d_logits @ weight, d_logits.T @ hidden)
        ctx.mark_non_differentiable(rows, overlap, hit)
        return (rows * row_weight).sum(), rows, overlap, hit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], d_weight * grads[0], None, None, None, None


def fused_loss(hidden: Tensor, weight: Tensor, p: Tensor, index: Tensor, row_weight: Tensor, loss: Loss
               ) -> tuple[Tensor, Graded]:  # fmt: skip
    """Weighted sum of row losses without keeping logits.

    Args:
        hidden: [R, H] normed output of the head.
        weight: [Vd, H] of its LM head.
        p: [M, Vd] target probabilities; index: int64 [R], the row of `p` that grades each row.
        row_weight: float32 [R].
        loss: which one.

    Returns:
        (scalar that can be differentiated by hidden and weight, Graded).
    """
    if not hidden.shape[0]:
        none = hidden.new_zeros(0, dtype=torch.float32)
        return hidden.sum() * 0, Graded(none, none, none.bool())
    value, rows, overlap, hit = _Fused.apply(hidden, weight, p, index, row_weight, loss)  # type: ignore[no-untyped-call]  # torch
    return value, Graded(rows, overlap, hit)
