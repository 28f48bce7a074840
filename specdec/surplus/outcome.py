"""The measured side: the real engine decodes outcome documents with the head, and its counters are kept.

Outcome documents are never captured, so no predictor has seen them. Knows engines and requests; what
was predicted is somebody else's business. Dimension legend: n documents, K draft depths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.attention.reference import ReferenceAttention
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Shape
from specdec.engine.budget import Budget
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Request
from specdec.errors import RequestError, SpecdecError
from specdec.head.model import DraftHead
from specdec.sampling import Sampling
from specdec.surplus.capture import CaptureSettings, Passage, Tell
from specdec.surplus.claims import CellOutcomes
from specdec.surplus.interval import Interval, resamples
from specdec.surplus.recorder import EngineRecorder
from specdec.target.protocol import Target


@dataclass(frozen=True, slots=True)
class Measured:
    """What the engine counted, one row per document.

    Attributes:
        doc, domain: int64 [n].
        rounds, emitted: float64 [n], rounds cut by a stop left out.
        reached, accepted: float64 [n, K], rounds that reached depth j - 1 and offered j; that accepted at j.
        expected: float64 [n], mean over rounds of the tree's length expected under the target's law.
        confidence: float64 [n, K], sum over rounds that reached depth j of the draft's own confidence there.
        heard: float64 [n, K], how many rounds that sum counts.
    """

    doc: Tensor
    domain: Tensor
    rounds: Tensor
    emitted: Tensor
    reached: Tensor
    accepted: Tensor
    expected: Tensor
    confidence: Tensor
    heard: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def tau(self, keep: Tensor | None = None, draws: int = 1000) -> Interval:
        """Tokens per round of the engine, with its document interval."""
        rows = slice(None) if keep is None else keep
        return resamples(self.doc[rows], draws=draws).ratio(self.emitted[rows], self.rounds[rows])

    def alpha(self, depth: int, keep: Tensor | None = None, draws: int = 1000) -> Interval:
        """alpha(depth) of the engine, with its document interval."""
        rows = slice(None) if keep is None else keep
        drawn = resamples(self.doc[rows], draws=draws)
        return drawn.ratio(self.accepted[rows, depth - 1], self.reached[rows, depth - 1])


def decode(
    target: Target,
    head: DraftHead,
    passages: Sequence[tuple[int, int, Passage]],
    shape: Shape,
    settings: CaptureSettings,
    tell: Tell = lambda done, of: None,
) -> tuple[Measured, EngineRecorder]:
    """Decode passages with the head.

    Args:
        passages: (document number, domain number, passage).
        shape: of the trees, fixed for the whole run.
        settings: temperature, answer length, seed and slots.

    Raises:
        RequestError: no passages.
        SpecdecError: a request failed.
    """
    if not passages:
        raise RequestError("nothing to decode", field="documents", value=0, allowed=">= 1")
    longest = max(len(p.prompt) for _, _, p in passages) + settings.max_tokens + 1
    limits = Limits(min(settings.slots, len(passages)), min(longest, target.info.max_length))
    drafter = EagleDrafter(head, target.embed, ReferenceAttention(), limits.slots, limits.length)
    engine = Engine(target, drafter, Budget(None, shape, adaptive=False), limits)
    requests = [_request(target, doc, passage, settings) for doc, _, passage in passages]
    recorder = EngineRecorder(
        {r.id: doc for r, (doc, _, _) in zip(requests, passages, strict=True)}, settings.temperature
    )
    engine.recorder = recorder
    _drive(engine, requests, tell)
    domain = [each for _, each, _ in passages]
    return _counted(requests, [doc for doc, _, _ in passages], domain, recorder, shape.depth), recorder


def _request(target: Target, doc: int, passage: Passage, settings: CaptureSettings) -> Request:
    told = hashlib.sha256(f"outcome/{settings.seed}/{passage.id}".encode()).digest()
    sampling = Sampling(
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=int.from_bytes(told[:8], "big") >> 1,
    )
    return Request(f"outcome-{doc}", passage.prompt, sampling, frozenset(target.info.stop_ids))


def _drive(engine: Engine, requests: Sequence[Request], tell: Tell) -> None:
    for request in requests:
        engine.add(request)
    done = 0
    while engine.busy:
        for piece in engine.step():
            if piece.finish == "error":
                raise SpecdecError(f"the engine failed: {piece.error}", field=piece.request)
            if piece.finish is not None:
                done += 1
                tell(done, len(requests))


def _counted(
    requests: Sequence[Request], docs: list[int], domain: list[int], recorder: EngineRecorder, depth: int
) -> Measured:
    count = [r.counters for r in requests]
    place = {doc: row for row, doc in enumerate(docs)}
    confidence, heard = (torch.zeros(len(docs), depth, dtype=torch.float64) for _ in range(2))
    events = recorder.events()
    known = events.confidence.isfinite() & (events.depth <= depth)
    rows = torch.tensor([place[d] for d in events.doc[known].tolist()], dtype=torch.int64)
    where = (rows, events.depth[known] - 1)
    confidence.index_put_(where, events.confidence[known].double(), accumulate=True)
    heard.index_put_(where, torch.ones(len(rows), dtype=torch.float64), accumulate=True)
    expected = [recorder.expected.get(d, 0.0) / max(1, recorder.rounds.get(d, 0)) for d in docs]

    def column(values: list[int] | list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Measured(
        doc=torch.tensor(docs),
        domain=torch.tensor(domain),
        rounds=column([c.rounds for c in count]),
        emitted=column([c.emitted for c in count]),
        reached=torch.tensor([c.reached[1 : depth + 1] for c in count], dtype=torch.float64),
        accepted=torch.tensor([c.accepted[1 : depth + 1] for c in count], dtype=torch.float64),
        expected=column(expected),
        confidence=confidence,
        heard=heard,
    )


@dataclass(frozen=True, slots=True)
class CellKey:
    """Which engine run, domain and draft depth a cell is of."""

    shape: str
    domain: int
    depth: int


def cell_outcomes(measured: dict[str, Measured], least: int) -> tuple[list[CellKey], CellOutcomes]:
    """Cells of runs, domains and depths with at least `least` measured draft tokens, as rows of 0 and 1."""
    keys: list[CellKey] = []
    cell, doc, hit = list[Tensor](), list[Tensor](), list[Tensor]()
    for shape, run in measured.items():
        for domain in torch.unique(run.domain).tolist():
            rows = (run.domain == domain).nonzero()[:, 0]
            for j in range(run.reached.shape[1]):
                tried, won = run.reached[rows, j].long(), run.accepted[rows, j].long()
                if int(tried.sum()) < least:
                    continue
                keys.append(CellKey(shape, int(domain), j + 1))
                doc.append(torch.repeat_interleave(run.doc[rows], tried))
                place = torch.arange(int(tried.sum())) - torch.repeat_interleave(
                    tried.cumsum(0) - tried, tried
                )
                hit.append((place < torch.repeat_interleave(won, tried)).double())
                cell.append(torch.full((int(tried.sum()),), len(keys) - 1))
    if not keys:
        empty = torch.zeros(0)
        return [], CellOutcomes(empty.long(), empty.long(), empty, 0)
    return keys, CellOutcomes(torch.cat(cell), torch.cat(doc), torch.cat(hit), len(keys))
