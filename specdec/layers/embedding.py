"""Token embeddings by lookup."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from specdec.fused import layer as fused
from specdec.fused.available import applies


def embedded(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of table [V, H] by tokens int64 [...]: [..., H]."""
    if applies(table) and table.is_contiguous():
        return fused.lookup(tokens, table)
    return F.embedding(tokens, table)
