"""The draft head under the probes' own test: its q at every depth along captured text, teacher-forced and unrolled.

    row t, draft depth 1   reads feature(<= t), token t+1               -> q of x_{t+2}   (k = 2)
    row t, draft depth j   reads its own output of depth j-1, token t+j -> q of x_{t+j+1} (k = j + 1)
    fresh features         the same prediction from row t+j-1 of depth 1: what true features would have given

The attention is the drafter's: every depth sees the true rows up to t and its own path after them. Knows a head and
captured documents; runs no target. Dimension legend: R rows of a document, n rows asked for, K depths, Vd draft
vocabulary, V vocabulary, m children counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from specdec.surplus.capture import Document
from specdec.surplus.contract import Contexts, TargetHead
from specdec.surplus.estimate import TOPS, Scores, join, score
from specdec.surplus.labels import Lumping
from specdec.surplus.predict import truncated

RANKS = max(TOPS)
SAMPLE = 4
"""Every so many rows of a document are kept with full laws, for calibration."""
SPARSE = 24
"""Every so many with the head's and the target's states, for geometry."""


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The head at one depth, one row per context of captured text.

    Attributes:
        depth: k; the draft depth is k - 1.
        scores: as of a probe; gap on the lumped vocabulary, alpha and children masses on the full one.
        fresh_gap: float32 [n], gap had the features been the target's own at every step.
        coverage: float32 [n], the target's mass on the draft vocabulary.
        log_ratio: float32 [n], log q - log p of the token that came; NaN where the text ended.
        rank: int64 [n], rank of the token that came in q, RANKS where it is not among the best.
        masses: float32 [n, RANKS], the target's mass on the r-th best token of q.
        law: log p and log q [s, M] lumped of a sample of rows, with their documents [s].
        states: the head's output y and the target's final state [s, d] of a sample, with their documents [s].
    """

    depth: int
    scores: Scores
    fresh_gap: Tensor
    coverage: Tensor
    log_ratio: Tensor
    rank: Tensor
    masses: Tensor
    law: tuple[Tensor, Tensor, Tensor]
    states: tuple[Tensor, Tensor, Tensor]


def draft_lumping(ids: Tensor, weight: Tensor, keep: int) -> Lumping:
    """The heaviest tokens that the head can draft, at most half of them, so that its tail is never empty.

    Args:
        ids: int64 [Vd], the draft vocabulary.
        weight: [V], how often each token is expected in the text.
        keep: tokens wanted.

    Raises:
        RequestError: no token of the text lies in the draft vocabulary.
    """
    inside = weight[ids]
    if not ids.numel() or not bool((inside > 0).any()):
        raise RequestError(
            "the draft vocabulary covers no token of the text",
            field="draft vocabulary",
            value=f"{len(ids)} tokens, none in the text",
            remedy="Check that the head belongs to this target and that ids are not offsets.",
        )
    best = inside.argsort(descending=True, stable=True)[: max(1, min(keep, len(ids) // 2))]
    return Lumping(ids[best].sort().values, weight.shape[0])


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """What of a head is read.

    Attributes:
        columns: of the captured taps, those the head consumes.
        depths: K, draft depths to unroll.
        lumping: labels shared with the probes; None keeps the vocabulary.
    """

    columns: tuple[int, ...]
    depths: int
    lumping: Lumping | None = None


class HeadReader:
    """Runs a head along documents.

    Args:
        head: frozen weights.
        embed: the target's input embedding.
        output: the target's output map, for p.
        settings: see `ReadSettings`.
    """

    def __init__(
        self,
        head: DraftHead,
        embed: Callable[[Tensor], Tensor],
        output: TargetHead,
        settings: ReadSettings,
    ) -> None:
        self.head, self.embed, self.output, self.settings = head, embed, output, settings
        self.ids = head.ids.cpu()
        self.place = torch.full((head.config.vocab,), -1, dtype=torch.int64)
        self.place[self.ids] = torch.arange(len(self.ids))

    @torch.inference_mode()
    def read(self, document: Document, first_row: int) -> list[DraftRows]:
        """Rows of depths k = 2 .. K + 1 of one document.

        Args:
            first_row: number of the document's first written row among the captured rows.
        """
        outputs = self._unroll(document)
        laws = self._laws(document, outputs)
        made = []
        for j, y in enumerate(outputs, start=1):
            at = torch.arange(document.start, document.ids.shape[0] - j)
            if not at.numel():
                break
            made.append(self._depth(laws, j, y[at], at, first_row))
        return made

    def _laws(self, document: Document, outputs: list[Tensor]) -> _Laws:
        log_p = self.output.log_probs(document.final[document.start :])
        fresh = self._log_q(outputs[0][document.start :]) if outputs else log_p[:0, self.ids]
        return _Laws(document, log_p, self._lump(log_p), self._lumped(fresh))

    def _unroll(self, document: Document) -> list[Tensor]:
        """y of every depth: [R - j, H] of depth j, rows in order."""
        device = self.head.device
        taps = document.taps[:-1, list(self.settings.columns)].flatten(1).to(device, self.head.dtype)
        reading = _Reading(self.head.config.window)
        outputs: list[Tensor] = []
        self.head.reserve(len(document.ids) + self.settings.depths)
        g = self.head.fuse(taps[None])
        for j in range(1, self.settings.depths + 1):
            tokens = document.ids[None, j:].to(device)
            if not tokens.shape[1]:
                break
            g = g[:, : tokens.shape[1]]
            angles = self.head.angles(torch.arange(tokens.shape[1], device=device)[None] + j - 1)
            y = self.head(self.embed(tokens).to(g.dtype), g, angles, reading)
            outputs.append(y[0])
            g = self.head.feedback(y)
        return outputs

    def _depth(self, laws: _Laws, j: int, y: Tensor, at: Tensor, first: int) -> DraftRows:
        """Rows of the contexts `at` [n] at draft depth j, y [n, H] the head's outputs."""
        document, label, log_q = laws.document, at + j - laws.document.start, self._log_q(y)
        log_p, lumped_p, lumped_q = laws.log_p[label], laws.lumped[label], self._lumped(log_q)
        where = Contexts(j + 1, torch.arange(len(at)), at[:, None])
        doc = torch.full((len(at),), document.doc)
        scores = score(where, doc, lumped_p, lumped_q, torch.zeros(len(at)))
        cut = truncated(log_p, log_q, self.ids)
        picks = self.ids[log_q.topk(min(RANKS, log_q.shape[-1]), dim=-1).indices]
        masses = log_p.gather(1, picks).exp()
        masses = torch.nn.functional.pad(masses, (0, RANKS - masses.shape[1]))
        scores = replace(
            scores,
            at=first + at - document.start,
            alpha=cut.alpha,
            top=masses.cumsum(1)[:, [m - 1 for m in TOPS]],
            confidence=log_q.max(-1).values.exp(),
        )
        # The row before the label's, at depth 1, has seen everything: what true features would have given.
        fresh = -(lumped_p.exp() * laws.fresh[label - 1].clamp_min(-1e4)).sum(-1)
        log_ratio, rank = self._came(document, at + j + 1, log_p, log_q, picks)
        some = torch.arange(len(at))[j % SAMPLE :: SAMPLE]
        law = (lumped_p[some], lumped_q[some], doc[some])
        few = torch.arange(len(at))[j % SPARSE :: SPARSE]
        states = (y[few].float().cpu(), document.final[at[few] + j].float(), doc[few])
        return DraftRows(
            j + 1, scores, fresh - scores.entropy, cut.coverage, log_ratio, rank, masses, law, states
        )

    def _log_q(self, y: Tensor) -> Tensor:
        """The head's law at the serving temperature, float32 [n, Vd] on the host."""
        return torch.log_softmax(self.head.logits(y).float().cpu() / self.output.temperature, dim=-1)

    def _lump(self, full: Tensor) -> Tensor:
        return full if self.settings.lumping is None else self.settings.lumping.log_probs(full)

    def _lumped(self, log_q: Tensor) -> Tensor:
        """The head's law [n, Vd] over label symbols [n, M]."""
        if self.settings.lumping is None:
            full = log_q.new_full((log_q.shape[0], self.head.config.vocab), float("-inf"))
            return full.index_copy_(1, self.ids, log_q)
        kept = self.settings.lumping.kept
        place = self.place[kept]
        if bool((place < 0).any()):
            raise RequestError("keeps tokens that the head cannot draft", field="lumping", value=len(kept))
        return Lumping(place, len(self.ids)).log_probs(log_q)

    def _came(
        self, document: Document, row: Tensor, log_p: Tensor, log_q: Tensor, picks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log q - log p and rank in q of the tokens that really followed; NaN and RANKS past the end of the text."""
        known = row < document.ids.shape[0]
        tokens = document.ids[row.clamp_max(document.ids.shape[0] - 1)][:, None]
        place = self.place[tokens]
        ours = log_q.gather(1, place.clamp_min(0)).masked_fill(place < 0, float("-inf"))
        ratio = (ours - log_p.gather(1, tokens))[:, 0].masked_fill(~known, float("nan"))
        hits = picks == tokens
        rank = torch.where(hits.any(-1), hits.to(torch.int64).argmax(-1), RANKS)
        return ratio, rank.masked_fill(~known, RANKS)


@dataclass(frozen=True, slots=True)
class _Laws:
    """What all depths of one document share: each written row's law is the label of one context per depth.

    Attributes:
        document: whose rows.
        log_p: float32 [r, V] of the written rows.
        lumped: [r, M], the same over label symbols.
        fresh: [r - 1, M], the head's first draft at every written row, over label symbols.
    """

    document: Document
    log_p: Tensor
    lumped: Tensor
    fresh: Tensor


class _Reading:
    """Attention of the unroll: true rows up to t, then the own path, one diagonal per later depth."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, new: Heads, scale: float) -> Tensor:
        """Heads of the [1, n] rows of this depth -> [1, n, heads, D]."""
        query, key, value = new.turned()
        n, groups = query.shape[1], query.shape[2] // key.shape[2]
        self.keys.append(key[0].repeat_interleave(groups, dim=1).float())
        self.values.append(value[0].repeat_interleave(groups, dim=1).float())
        q = query[0].float()
        far = torch.einsum("nhd,mhd->hnm", q, self.keys[0][:n]) * scale
        far = far.masked_fill(self._hidden(n, far.device), float("-inf"))
        near = [(q * k[:n]).sum(-1).T[..., None] * scale for k in self.keys[1:]]
        weights = torch.cat([far, *near], dim=-1).softmax(-1)
        out = torch.einsum("hnm,mhd->nhd", weights[..., :n], self.values[0][:n])
        for i, v in enumerate(self.values[1:]):
            out = out + weights[..., n + i].T[..., None] * v[:n]
        return out[None].to(query.dtype)

    def _hidden(self, n: int, device: torch.device) -> Tensor:
        """bool [n, n]: true rows that row t of this depth does not see."""
        hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        if self.window is not None:
            depth = len(self.keys) - 1
            row = torch.arange(n, device=device)
            age = row[:, None] + depth - row
            hidden |= age >= self.window
        return hidden


def gather(documents: Iterable[list[DraftRows]]) -> dict[int, DraftRows]:
    """Rows of many documents by depth k."""
    parts: dict[int, list[DraftRows]] = {}
    for rows in documents:
        for each in rows:
            parts.setdefault(each.depth, []).append(each)
    return {depth: _joined(depth, found) for depth, found in parts.items()}


def _joined(depth: int, parts: list[DraftRows]) -> DraftRows:
    columns = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("fresh_gap", "coverage", "log_ratio", "rank", "masses")
    }
    law, states = (_stacked(found) for found in ([p.law for p in parts], [p.states for p in parts]))
    return DraftRows(depth, join([part.scores for part in parts]), law=law, states=states, **columns)


def _stacked(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (torch.cat(column) for column in zip(*parts, strict=True))
    return a, b, c


def take(rows: DraftRows, keep: Tensor) -> DraftRows:
    """Rows picked by a mask or index; the samples of laws and states stay."""
    columns = {
        name: getattr(rows, name)[keep] for name in ("fresh_gap", "coverage", "log_ratio", "rank", "masses")
    }
    return DraftRows(rows.depth, rows.scores.take(keep), law=rows.law, states=rows.states, **columns)
