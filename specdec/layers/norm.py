"""RMSNorm, computed in float32 as Llama's (Zhang and Sennrich 1910.07467)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specdec.fused import layer as fused
from specdec.native import elementwise


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), torch.nan))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width], same shape and dtype out."""
        if x.dtype == self.weight.dtype:
            if elementwise.applies(x, self.width):
                return elementwise.norm(x, self.weight, self.eps)
            if fused.can_norm(x, self.width):
                return fused.norm(x, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def normed(norms: Sequence[RMSNorm], parts: Sequence[Tensor]) -> Tensor:
    """Each part [..., its width] through its norm, side by side [..., sum of widths]."""
    if not all(
        n.weight.dtype == x.dtype and fused.can_norm(x, n.width) for n, x in zip(norms, parts, strict=True)
    ):
        return torch.cat([norm(part) for norm, part in zip(norms, parts, strict=True)], dim=-1)
    if len(norms) == 2 and norms[0].width == norms[1].width and norms[0].eps == norms[1].eps:
        return fused.two_norms(parts[0], norms[0].weight, parts[1], norms[1].weight, norms[0].eps)
    widths = [norm.width for norm in norms]
    out = parts[0].new_empty(*parts[0].shape[:-1], sum(widths))
    for norm, part, place in zip(norms, parts, torch.split(out, widths, dim=-1), strict=True):
        fused.norm(part, norm.weight, norm.eps, place)
    return out
