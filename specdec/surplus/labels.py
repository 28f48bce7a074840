"""Soft labels: the target's own law at any captured row, in full or with the vocabulary tail as one symbol.

Lumping is an exact coarse-graining: it can only lower an information, never invent one (data processing). Knows no
probe. Dimension legend: V vocabulary, m kept tokens, M label symbols (V, or m + 1 when lumped), T rows, n rows asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.contract import TargetHead


@dataclass(frozen=True, slots=True)
class Lumping:
    """Keep the tokens `kept`, make one symbol (the last) of all others.

    Attributes:
        kept: int64 [m], distinct token ids.
        vocab: V.

    >>> lumping = Lumping(torch.tensor([2, 0]), vocab=4)
    >>> lumping.symbols(torch.tensor([0, 1, 2, 3])).tolist()
    [1, 2, 0, 2]

    Raises:
        RequestError: no token kept, all kept, one kept twice or outside the vocabulary.
    """

    kept: Tensor
    vocab: int

    def __post_init__(self) -> None:
        count = self.kept.shape[0]
        sound = 0 < count < self.vocab and torch.unique(self.kept).shape[0] == count
        if not sound or int(self.kept.min()) < 0 or int(self.kept.max()) >= self.vocab:
            raise RequestError(
                "not a proper subset of the vocabulary",
                field="kept",
                value=f"{count} ids",
                allowed=f"1 to {self.vocab - 1} distinct ids below {self.vocab}",
                remedy="Keep the most frequent tokens, or pass no lumping for the full vocabulary",
            )

    @property
    def width(self) -> int:
        """M = m + 1."""
        return self.kept.shape[0] + 1

    def log_probs(self, full: Tensor) -> Tensor:
        """log p [n, V] -> [n, M]; the last column is the log of the tail's mass."""
        tail = full.index_fill(1, self.kept.to(full.device), float("-inf")).logsumexp(dim=1, keepdim=True)
        return torch.cat([full[:, self.kept.to(full.device)], tail.clamp_min(-80.0)], dim=1)

    def symbols(self, ids: Tensor) -> Tensor:
        """Token ids -> label symbols, same shape."""
        table = torch.full((self.vocab,), self.width - 1, dtype=torch.int64, device=ids.device)
        table[self.kept.to(ids.device)] = torch.arange(self.width - 1, device=ids.device)
        return table[ids]

    def unembedding(self, rows: Tensor) -> Tensor:
        """[V, d] -> [M, d]; the tail gets the mean of its tokens' rows (any fixed row is a valid probe)."""
        tail = torch.ones(self.vocab, dtype=torch.bool, device=rows.device)
        tail[self.kept.to(rows.device)] = False
        return torch.cat([rows[self.kept.to(rows.device)], rows[tail].mean(dim=0, keepdim=True)])


class Labels(Protocol):
    """Where probes get log p from."""

    @property
    def width(self) -> int:
        """M."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """float32 log p [n, M] of rows `index` [n]."""
        ...


@dataclass(frozen=True, slots=True)
class TableLabels:
    """Log-laws held in memory, [T, M]; half precision is enough for storage, arithmetic is float32."""

    table: Tensor

    @property
    def width(self) -> int:
        """M."""
        return self.table.shape[1]

    def rows(self, index: Tensor) -> Tensor:
        """float32 log p [n, M]."""
        return self.table[index].float()


@dataclass(frozen=True, slots=True)
class HeadLabels:
    """Log-laws recomputed from the final states at every call: bounded memory, one softmax per row."""

    head: TargetHead
    final: Tensor
    lumping: Lumping | None = None

    @property
    def width(self) -> int:
        """M."""
        return self.head.unembedding.shape[0] if self.lumping is None else self.lumping.width

    def rows(self, index: Tensor) -> Tensor:
        """float32 log p [n, M]."""
        full = self.head.log_probs(self.final[index])
        return full if self.lumping is None else self.lumping.log_probs(full)


TABLE_BYTES = 1_500_000_000
"""Label laws held in memory; beyond, they are recomputed at every visit."""


def in_memory(labels: Labels, rows: int) -> Labels:
    """The same laws computed once, in float32 or float16, where memory allows."""
    size = rows * labels.width
    if size * 4 <= TABLE_BYTES:
        return tabulate(labels, rows, chunk=256)
    return tabulate(labels, rows, chunk=256, dtype=torch.float16) if size * 2 <= TABLE_BYTES else labels


def tabulate(
    labels: Labels, rows: int, *, chunk: int = 1024, dtype: torch.dtype = torch.float32
) -> TableLabels:
    """Compute every row once, in chunks: pays when M is small and probes visit the text many times.

    float16 keeps log p to about 0.01 near -16 and is then renormalised by nobody: use it only for large M.
    """
    table = torch.empty(rows, labels.width, dtype=dtype)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        table[start:stop] = labels.rows(torch.arange(start, stop)).to(dtype)
    return TableLabels(table)
