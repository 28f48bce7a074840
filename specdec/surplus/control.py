"""The control bank: predictors r(y | z) that see only the tokens the drafter already has, never h.

A surplus is a difference of cross-entropies, and any excess risk of the control inflates it, so several controls
compete and the best on validation documents wins; the spread is reported as systematic error. Here: an interpolated
back-off n-gram over sorted keys, and a neural table U psi(e(z)). `mixture` adds the target run on z alone and its
mixture with the n-gram, `estimate` a probe fed h permuted within equal z.
Dimension legend: n contexts, k depth, M label symbols, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from specdec.surplus.contract import Contexts
from specdec.surplus.labels import Labels

CHUNK = 2048
"""Rows of dense [n, M] labels handled at a time."""


class Control(Protocol):
    """Something that predicts x_{t+k} from z alone."""

    @property
    def name(self) -> str:
        """For the table of the bank."""
        ...

    def log_probs(self, z: Tensor) -> Tensor:
        """float32 log r [n, M] for z int64 [n, k - 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """Counts of one context length: sorted context keys, and per key a run of (symbol, weight).

    Attributes:
        keys: int64 [g] sorted hashes.
        start: int64 [g + 1] offsets of the runs.
        symbol: int64 [e].
        weight: float32 [e].
        total: float32 [g], all mass seen with this context, also what top-m storage left out.
    """

    keys: Tensor
    start: Tensor
    symbol: Tensor
    weight: Tensor
    total: Tensor


def context_keys(z: Tensor) -> Tensor:
    """A 64-bit key per row of z [n, j], by wrapping multiplication; collisions about n^2 / 2^65."""
    key = torch.full((z.shape[0],), 0x51ED270B, dtype=torch.int64, device=z.device)
    for column in range(z.shape[1]):
        key = (key ^ (z[:, column] + 1)) * 0x2545F4914F6CDD1D
        key = key ^ (key >> 29)
    return key


@dataclass(frozen=True, slots=True)
class Ngram:
    """Back-off n-gram, interpolated by Dirichlet priors: r_j = (counts_j + kappa_j r_{j-1}) / (total_j +
    kappa_j).

    Attributes:
        base: float32 [M], the law without context.
        orders: one per context length 1 .. k - 1, last tokens first.
        kappa: pseudo-count of each order, chosen on validation text.

    >>> ngram = fit_ngram(torch.tensor([[0], [0], [1]]), hard_labels(torch.tensor([1, 1, 0])), width=2)
    >>> bool(ngram.log_probs(torch.tensor([[0]]))[0, 1] > ngram.log_probs(torch.tensor([[1]]))[0, 1])
    True
    """

    base: Tensor
    orders: tuple[Order, ...]
    kappa: tuple[float, ...]
    name: str = "n-gram"

    def log_probs(self, z: Tensor) -> Tensor:
        """float32 log r [n, M]."""
        law = self.base.expand(z.shape[0], -1)
        for length, (order, kappa) in enumerate(zip(self.orders, self.kappa, strict=True), start=1):
            law = _mix(law, order, kappa, z[:, -length:])
        return law.clamp_min(1e-30).log()


@dataclass(frozen=True, slots=True)
class SparseLabels:
    """Up to m weighted symbols per row, [n, m] each; rows may hold less than one unit of mass."""

    symbol: Tensor
    weight: Tensor


def hard_labels(symbols: Tensor) -> SparseLabels:
    """Tokens [n] as one unit of mass each."""
    return SparseLabels(symbols[:, None], torch.ones(symbols.shape[0], 1))


def soft_labels(labels: Labels, rows: Tensor, *, top: int = 64) -> SparseLabels:
    """The target's law at `rows` [n], its `top` symbols; the rest of the mass goes to the lower order."""
    width = min(top, labels.width)
    symbol = torch.empty(rows.shape[0], width, dtype=torch.int64)
    weight = torch.empty(rows.shape[0], width)
    for start in range(0, rows.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        logs, index = labels.rows(rows[part]).topk(width, dim=-1)
        weight[part], symbol[part] = logs.exp(), index
    return SparseLabels(symbol, weight)


def fit_ngram(z: Tensor, labels: SparseLabels, width: int) -> Ngram:
    """Count; `tune` then sets the pseudo-counts.

    Args:
        z: int64 [n, k - 1].
        labels: what followed, hard or soft.
        width: M.
    """
    base = torch.zeros(width).scatter_add_(0, labels.symbol.flatten(), labels.weight.flatten())
    base = (base + 0.5) / (base.sum() + 0.5 * width)
    orders = tuple(_count(context_keys(z[:, -length:]), labels, width) for length in range(1, z.shape[1] + 1))
    return Ngram(base, orders, (4.0,) * len(orders))


def tune(ngram: Ngram, held: Contexts, labels: Labels, *, rows: int = 4096, seed: int = 0) -> Ngram:
    """Choose each order's pseudo-count by soft cross-entropy on held-out contexts, lowest order first."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(held.at.shape[0], generator=generator)[:rows]
    sample = held.take(pick)
    probs = labels.rows(sample.label_row).exp()
    law = ngram.base.expand(pick.shape[0], -1)
    kappa: list[float] = []
    for length, order in enumerate(ngram.orders, start=1):
        tried = []
        for value in (0.01, 0.1, 0.5, 2.0, 8.0, 32.0, 128.0, 1024.0, 1e5, 1e8):
            mixed = _mix(law, order, value, sample.z[:, -length:])
            tried.append((float(-(probs * mixed.clamp_min(1e-30).log()).sum(-1).mean()), value, mixed))
        _, best, law = min(tried, key=lambda row: row[0])
        kappa.append(best)
    return Ngram(ngram.base, ngram.orders, tuple(kappa), ngram.name)


def _count(key: Tensor, labels: SparseLabels, width: int) -> Order:
    keys, group = torch.unique(key, return_inverse=True)
    # One sortable number per (context, symbol) pair; groups * M stays far below 2^63.
    pair = (group[:, None] * width + labels.symbol).flatten()
    pairs, slot = torch.unique(pair, return_inverse=True)
    weight = torch.zeros(pairs.shape[0]).index_add_(0, slot, labels.weight.flatten())
    owner = pairs // width
    start = torch.searchsorted(owner, torch.arange(keys.shape[0] + 1))
    total = torch.bincount(group, minlength=keys.shape[0]).float()  # a row's whole law is 1
    return Order(keys, start, pairs % width, weight, total)


def _mix(law: Tensor, order: Order, kappa: float, z: Tensor) -> Tensor:
    """One step up the ladder: law [n, M] of the shorter context -> law of this one."""
    key = context_keys(z)
    found = torch.searchsorted(order.keys, key).clamp_max(order.keys.shape[0] - 1)
    known = order.keys[found] == key
    first, size = order.start[found], order.start[found + 1] - order.start[found]
    size = torch.where(known, size, 0)
    total = torch.where(known, order.total[found], 0.0)
    row = torch.repeat_interleave(torch.arange(z.shape[0]), size)
    offset = torch.arange(row.shape[0]) - (size.cumsum(0) - size)[row]
    entry = first[row] + offset
    seen = torch.zeros(z.shape[0]).index_add_(0, row, order.weight[entry])
    # Mass that top-m storage left out is spread like the shorter context's law.
    mixed = law * (kappa + (total - seen).clamp_min(0.0))[:, None]
    mixed.index_put_((row, order.symbol[entry]), order.weight[entry], accumulate=True)
    return mixed / (total.maximum(seen) + kappa)[:, None]


@dataclass(frozen=True, slots=True)
class TableSettings:
    """How the neural table is trained.

    Attributes:
        width: inner width of psi.
        rank: output rank before the frozen unembedding.
        epochs, batch, rate: of AdamW; the best epoch on validation is kept.
        seed: of weights and order.
    """

    width: int = 256
    rank: int = 64
    epochs: int = 6
    batch: int = 512
    rate: float = 3e-3
    seed: int = 0


class NeuralTable(nn.Module):
    """log r = log softmax(base + U B psi(e(z))): embeddings frozen, psi two layers, B zero at the start."""

    name = "neural table"

    def __init__(
        self, tokens: Tensor, unembedding: Tensor, base: Tensor, slots: int, settings: TableSettings
    ) -> None:
        super().__init__()
        self.tokens, self.unembedding, self.base = tokens, unembedding, base
        self.inner = nn.Sequential(
            nn.Linear(slots * tokens.shape[1], settings.width),
            nn.GELU(),
            nn.Linear(settings.width, settings.rank),
        )
        self.last = nn.Linear(settings.rank, unembedding.shape[1], bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, z: Tensor) -> Tensor:
        """z [n, k - 1] -> log r [n, M], with gradient."""
        hidden = self.inner(self.tokens[z].flatten(1))
        # U times the last map first: the low rank then carries the batch.
        out = hidden @ (self.unembedding @ self.last.weight).T
        return torch.log_softmax(self.base.log() + out, dim=-1)

    @torch.no_grad()
    def log_probs(self, z: Tensor) -> Tensor:
        """float32 log r [n, M]."""
        result: Tensor = self(z)
        return result


def fit_table(
    model: NeuralTable, train: Contexts, val: Contexts, labels: Labels, settings: TableSettings
) -> NeuralTable:
    """AdamW on soft cross-entropy; the epoch best on `val` is kept (the untouched start is epoch 0)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(settings.seed)
    best, state = cross_entropy(model, val, labels), _snapshot(model)
    for _ in range(settings.epochs):
        for rows in batches(train.at.shape[0], settings.batch, generator):
            part = train.take(rows)
            loss = -(labels.rows(part.label_row).exp() * model(part.z)).sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        score = cross_entropy(model, val, labels)
        if score < best:
            best, state = score, _snapshot(model)
    model.load_state_dict(state)
    return model


def batches(count: int, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Row indices 0 .. count - 1 in runs of `size`, shuffled where a generator is given."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    return [order[start : start + size] for start in range(0, count, size)]


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def cross_entropies(control: Control, where: Contexts, labels: Labels) -> Tensor:
    """Soft cross-entropy of each context, float32 [n], nats."""
    parts = []
    for rows in batches(where.at.shape[0], CHUNK):
        part = where.take(rows)
        parts.append(-(labels.rows(part.label_row).exp() * control.log_probs(part.z)).sum(-1))
    return torch.cat(parts) if parts else torch.zeros(0)


def cross_entropy(control: Control, where: Contexts, labels: Labels) -> float:
    """Mean soft cross-entropy, nats."""
    return float(cross_entropies(control, where, labels).mean())


@dataclass(frozen=True, slots=True)
class Bank:
    """Controls with their validation cross-entropies, nats."""

    controls: tuple[Control, ...]
    validation: tuple[float, ...]

    @property
    def best(self) -> Control:
        """r*, the lowest validation cross-entropy."""
        return self.controls[self.validation.index(min(self.validation))]


def make_bank(controls: Sequence[Control], val: Contexts, labels: Labels) -> Bank:
    """Score every control on the same validation contexts."""
    return Bank(tuple(controls), tuple(cross_entropy(control, val, labels) for control in controls))
