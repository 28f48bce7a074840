"""Where a head starts: solved in closed form from a little text, before the first gradient step.

Knows second moments and weights; nothing of files, batches or optimizers. Dimension legend: A taps, H hidden size,
F = A * H, Vd draft vocabulary.

The head's output is y = fc(taps(t)) + out(attention) + mlp. With attention on the row itself, the attention term is
a linear map of the token embedding e(t + 1), of rank kv_heads * head_dim. What y should be is the final state at
t + 1, before the norm, at unit RMS (the norm that follows forgets the scale). So the start is a reduced-rank
regression:

    state(t + 1)  ~  fc taps(t)  +  out value(e(t + 1))       norm, lm_head: the target's own

Queries and keys share one random projection of the embedding: a row's score with itself is the square of its own
length, above its score with any other, until training has something better to do with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.head.model import DraftHead

RIDGE = 3e-4  # of the mean diagonal, once every input has unit RMS
SELF_SCORE = 6.0  # scaled score of a row with itself at the start
SPREAD = 0.02  # of weights that start random: Llama's initializer_range


class Moments:
    """Running second moments of inputs [taps(t), normed e(t + 1)] and of the states to predict.

    Args:
        inputs: F + H.
        outputs: H.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.inner = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs, dtype=torch.float64)
        self.rows = 0

    def add(self, taps: Tensor, embedded: Tensor, final: Tensor) -> None:
        """Rows of taps [R, F], of e(t + 1) [R, H] and of the pre-norm final state at t + 1 [R, H]."""
        x = torch.cat([taps.float(), unit(embedded.float())], dim=-1)
        self.inner += (x.T @ x).double()
        self.cross += (unit(final.float()).T @ x).double()
        self.rows += x.shape[0]

    def scale(self, fused: int) -> Tensor:
        """RMS of each of the first `fused` inputs, float32 [fused]."""
        mean = self.inner.diagonal()[:fused] / max(1, self.rows)
        return mean.clamp(min=1e-12).sqrt().float()


@dataclass(frozen=True, slots=True)
class Sources:
    """What the target lends.

    Attributes:
        final_norm: [H] weight of its last norm.
        rows: [Vd, H] LM-head rows of the draft vocabulary.
        mlp_norm, gate_up: of its last layer, or None where shapes differ; `down` starts at zero, so these only say
            what the MLP looks at first.
    """

    final_norm: Tensor
    rows: Tensor
    mlp_norm: Tensor | None = None
    gate_up: Tensor | None = None


def unit(x: Tensor) -> Tensor:
    """x at unit RMS over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def solve(moments: Moments, fused: int, metric: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge regression.

    Args:
        moments: of the text.
        fused: F, the width of the taps; what follows is the embedding.
        metric: [Vd, H], the map through which errors of the state are felt.
        rank: of the embedding's share, at most H.

    Returns:
        (fc [H, F], out [H, rank], value [rank, H]).
    """
    scale = (moments.inner.diagonal() / max(moments.rows, 1)).clamp(min=1e-12).sqrt()
    inner = moments.inner / moments.rows / scale[:, None] / scale
    inner += RIDGE * torch.eye(len(scale), dtype=inner.dtype)
    cross = moments.cross / moments.rows / scale
    full = torch.linalg.solve(inner, cross.T).T
    taps, token = slice(None, fused), slice(fused, None)
    # what the embedding adds beyond the taps, measured in the output metric
    beyond = inner[token, token] - inner[token, taps] @ torch.linalg.solve(
        inner[taps, taps], inner[taps, token]
    )
    left = torch.linalg.cholesky(
        metric.double().T @ metric.double() + 1e-6 * torch.eye(metric.shape[1]).double()
    )
    right = torch.linalg.cholesky(beyond)
    u, s, v = torch.linalg.svd(left.T @ full[:, token] @ right, full_matrices=False)
    root = s[:rank].sqrt()
    out = torch.linalg.solve(left.T, u[:, :rank] * root)
    value = torch.linalg.solve(right.T, (root[:, None] * v[:rank]).T).T
    fc = torch.linalg.solve(inner[taps, taps], (cross[:, taps] - out @ value @ inner[token, taps]).T).T
    return (fc / scale[:fused]).float(), out.float(), (value / scale[fused:]).float()


@torch.no_grad()
def warm_start(
    head: DraftHead, ids: Tensor, moments: Moments, lent: Sources, generator: torch.Generator
) -> None:
    """Fill every parameter of `head` in place. Norms not named above start at one."""
    c = head.config
    cold_start(head, ids, generator)
    head.norm.weight.copy_(lent.final_norm)
    head.lm_head.weight.copy_(lent.rows)
    width = c.kv_heads * c.head_dim
    fused = len(c.taps) * c.target_hidden
    fc, out, value = solve(moments, fused, lent.rows * lent.final_norm, min(width, c.hidden))
    spare = width - out.shape[1]  # Gemma's attention is wider than its state: values that nothing reads yet
    out = torch.cat([out, out.new_zeros(c.hidden, spare)], dim=1)
    value = torch.cat([value, SPREAD * torch.randn(spare, c.hidden, generator=generator)])
    head.fc.weight.copy_(fc)
    _attend_to_self(head, value, generator)
    share = out.view(c.hidden, c.kv_heads, 1, c.head_dim) * c.kv_heads / c.heads
    head.out.weight.copy_(share.expand(-1, -1, c.heads // c.kv_heads, -1).reshape(c.hidden, -1))
    if lent.mlp_norm is not None and lent.gate_up is not None:
        head.mlp_norm.weight.copy_(lent.mlp_norm)
        head.gate_up.weight.copy_(lent.gate_up)
    head.down.weight.zero_()


def _attend_to_self(head: DraftHead, value: Tensor, generator: torch.Generator) -> None:
    """Queries and keys as one random projection of the embedding; values as solved. Inputs have unit RMS."""
    c = head.config
    h, d = c.hidden, c.head_dim
    q, k = c.heads * d, c.kv_heads * d
    shared = torch.randn(c.kv_heads, d, h, generator=generator) / h**0.5  # keeps unit RMS
    shared *= (SELF_SCORE / d**0.5) ** 0.5
    weight = head.qkv.weight
    weight[:, h:].normal_(0, SPREAD / 4, generator=generator)
    weight[:q, :h] = shared.repeat_interleave(c.heads // c.kv_heads, 0).flatten(0, 1)
    weight[q : q + k, :h] = shared.flatten(0, 1)
    weight[q + k :, :h] = value
    weight[q + k :, h:] = 0


@torch.no_grad()
def cold_start(head: DraftHead, ids: Tensor, generator: torch.Generator) -> None:
    """Random matrices and norms of one: EAGLE-3's own start, for comparison."""
    for parameter in head.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, SPREAD, generator=generator)
    head.ids.copy_(ids)
