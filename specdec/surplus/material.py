"""Material: captured text with its labels, ready for probes of any tap set.

Knows captured tensors and label symbols; no probe. Dimension legend: N rows, V vocabulary, M label symbols, e token
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.surplus.banks import Banks
from specdec.surplus.contract import Captured
from specdec.surplus.draft import draft_lumping
from specdec.surplus.labels import HeadLabels, Labels, Lumping, in_memory
from specdec.surplus.mixture import Brief
from specdec.surplus.plan import Plan, TapSet
from specdec.surplus.probe import ProbeData
from specdec.surplus.shards import checksum

SAMPLE_ROWS = 2048
"""Rows on which geometry, entropies and tap alignment are measured."""


@dataclass(frozen=True, slots=True)
class Material:
    """Captured text with its labels, ready for probes of any tap set.

    Attributes:
        captured: the text.
        labels: log p of any row, lumped where `lumping` says so.
        lumping: None keeps the vocabulary.
        tokens: [V, e] input embedding.
        tail: mean mass of the tail symbol; alpha and children masses of probes are at most this much too high.
        banks: controls, shared by all tap sets.
        briefs: per depth the target run on z alone.
    """

    captured: Captured
    labels: Labels
    lumping: Lumping | None
    tokens: Tensor
    tail: float
    banks: Banks = field(default_factory=Banks)
    briefs: Mapping[int, Brief] = field(default_factory=dict)

    def data(self, taps: TapSet) -> ProbeData:
        """What probes of one tap set read."""
        c = self.captured
        rows = c.head.unembedding
        unembedding = rows if self.lumping is None else self.lumping.unembedding(rows)
        return ProbeData(
            c.ids, c.doc, c.features(taps), self.labels, self.tokens, unembedding, banks=self.banks,
            briefs=self.briefs,
        )  # fmt: skip

    @property
    def symbols_key(self) -> str:
        """Tells one choice of label symbols and controls from another."""
        symbols = "all" if self.lumping is None else checksum({"kept": self.lumping.kept})
        return symbols + (" briefs" if self.briefs else "")

    def sample(self, count: int = SAMPLE_ROWS) -> Tensor:
        """Evenly spaced rows, int64 [<= count]."""
        total = self.captured.ids.shape[0]
        return torch.arange(0, total, max(1, -(-total // count)))


def prepare(captured: Captured, tokens: Tensor, plan: Plan, draft_ids: Tensor | None) -> Material:
    """Choose label symbols and compute the laws once where memory allows.

    Args:
        tokens: [V, e] input embedding.
        draft_ids: the head's draft vocabulary: symbols are then chosen among tokens it can draft.

    Raises:
        RequestError: a draft vocabulary that covers nothing of the text.
    """
    vocab = captured.head.unembedding.shape[0]
    rows = torch.arange(0, captured.ids.shape[0], max(1, captured.ids.shape[0] // 4096))
    weight = torch.zeros(vocab)
    for part in torch.split(rows, 256):
        weight += captured.head.log_probs(captured.final[part]).exp().sum(0)
    lumping = _lumping(weight, plan.symbols, draft_ids)
    labels = in_memory(HeadLabels(captured.head, captured.final, lumping), captured.ids.shape[0])
    kept = weight.sum() if lumping is None else weight[lumping.kept].sum()
    return Material(captured, labels, lumping, tokens, float(1 - kept / weight.sum()))


def _lumping(weight: Tensor, symbols: int, draft_ids: Tensor | None) -> Lumping | None:
    vocab = weight.shape[0]
    if draft_ids is not None:
        return draft_lumping(draft_ids, weight, symbols or vocab)
    if not 0 < symbols < vocab:
        return None
    return Lumping(weight.argsort(descending=True, stable=True)[:symbols].sort().values, vocab)
