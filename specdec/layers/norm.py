"""RMSNorm, computed in float32 as Llama's (Zhang and Sennrich 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdec.native import elementwise


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), torch.nan))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width], same shape and dtype out."""
        if x.dtype == self.weight.dtype and elementwise.applies(x, self.width):
            return elementwise.norm(x, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight
