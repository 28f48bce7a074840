"""A head small enough for tests: random weights, a random embedding, random features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead

VOCAB, HIDDEN = 50, 32


def tiny_head(seed: int = 0, spread: float = 0.2, **changes: Any) -> DraftHead:
    """A head of 4 query and 2 kv heads over three taps and a draft vocabulary of every second token."""
    fields: dict[str, Any] = {
        "hidden": HIDDEN, "target_hidden": HIDDEN, "taps": (1, 2, 3), "intermediate": 48, "heads": 4, "kv_heads": 2,
        "head_dim": 8, "vocab": VOCAB, "draft_vocab": VOCAB // 2,
    }  # fmt: skip
    head = DraftHead(HeadConfig(**fields | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, spread, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(1)
    head.ids.copy_(torch.arange(head.config.draft_vocab) * (VOCAB // head.config.draft_vocab))
    return head


def tiny_embedding(seed: int = 1) -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Embed:
    """tokens -> rows of a random embedding."""

    def __init__(self) -> None:
        self.weight = tiny_embedding()

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)
