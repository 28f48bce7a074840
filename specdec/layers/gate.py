"""The gated activation of Llama's MLP: silu(gate) * up, both from one packed product (Shazeer 2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from specdec.fused import layer as fused
from specdec.fused.available import applies
from specdec.native import elementwise


def gated(gate_up: Tensor) -> Tensor:
    """[..., 2 * I], gate first -> [..., I]."""
    if elementwise.applies(gate_up, gate_up.shape[-1] // 2):
        return elementwise.gate(gate_up)
    if applies(gate_up):
        return fused.gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
