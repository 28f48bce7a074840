"""Capture: the target writes text at the serving temperature, then reads it once with its taps on.

Text of the target's own law, through the engine with nothing drafted; streamed into shards, so memory
is bounded by one shard and an interruption costs at most one. Knows token ids and targets: no prompts' text, no probe.
Dimension legend: R rows of a document, A taps, d hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN
from specdec.engine.budget import Budget
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Request
from specdec.errors import MismatchError, RequestError, SpecdecError, UnsupportedError
from specdec.sampling import Sampling
from specdec.stats import Round
from specdec.surplus.contract import Captured, TargetHead
from specdec.surplus.shards import (
    Manifest,
    Shard,
    is_sound,
    open_directory,
    read_shards,
    shard_path,
    write_shard,
)
from specdec.target.protocol import Target

Tell = Callable[[int, int], None]
"""Progress: (done, of)."""

CHUNK = 256
"""Rows of a document read at once; the full softmax of one chunk is the peak of the numerics floor."""
HEAD_TOLERANCE = 0.2
"""Logits of our float32 head against the target's own, in units of their spread (bfloat16 rounds by 2^-8)."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt as token ids; the target's answer to it is one document."""

    id: str
    domain: str
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """How text is written and what is kept.

    Attributes:
        layers: tapped layers, 0 to the target's count.
        temperature: of serving; the law whose information is measured.
        max_tokens: of one answer.
        seed: of all answers; each document has its own from it.
        slots: answers written at once.
        per_shard: documents per file, what an interruption may cost.
    """

    layers: tuple[int, ...]
    temperature: float = 1.0
    max_tokens: int = 128
    seed: int = 0
    slots: int = 4
    per_shard: int = 8

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RequestError(
                "surplus is information under the law that serves; a greedy law has no entropy to share",
                field="temperature",
                value=self.temperature,
                allowed="> 0",
                remedy="Use the serving temperature, or 1.",
            )
        for name in ("max_tokens", "slots", "per_shard"):
            if getattr(self, name) < 1:
                raise RequestError("must be positive", field=name, value=getattr(self, name), allowed=">= 1")


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raises RequestError naming a tap that this target does not have."""
    for layer in layers:
        if not 0 <= layer <= count:
            raise RequestError(
                "no such layer",
                field="taps",
                value=layer,
                allowed=f"0 to {count}",
                remedy="A tap is the state entering a layer; the last one leaves the network.",
            )


def target_head(target: Target, temperature: float) -> TargetHead:
    """The target's output map as reports need it, float32."""
    weight, eps = target.final_norm()
    return TargetHead(target.output_embedding().cpu(), weight.detach().float().cpu(), eps, temperature)


def digest(passages: Sequence[Passage]) -> str:
    """Tells one choice of passages from another."""
    told = json.dumps([(p.id, p.domain, p.prompt) for p in passages]).encode()
    return hashlib.sha256(told).hexdigest()


def manifest_of(target: Target, passages: Sequence[Passage], settings: CaptureSettings) -> Manifest:
    """What this capture will be, before it is made."""
    return Manifest(
        target=f"{target.info.fingerprint} {target.info.dtype}",
        passages=digest(passages),
        layers=settings.layers,
        domains=tuple(dict.fromkeys(p.domain for p in passages)),
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        documents=len(passages),
        per_shard=settings.per_shard,
    )


@torch.inference_mode()
def capture(
    target: Target,
    passages: Sequence[Passage],
    settings: CaptureSettings,
    directory: Path,
    tell: Tell = lambda done, of: None,
) -> Manifest:
    """Write every shard that is not there yet, or broken.

    Raises:
        RequestError: a tap out of range, no passages, or a prompt and answer longer than the context.
        MismatchError: the directory holds another capture, or states are not numbers.
        UnsupportedError: a target whose logits are not its final norm times its output embedding.
    """
    check_layers(settings.layers, target.info.layers)
    if not passages:
        raise RequestError("nothing to capture", field="prompts", value=0, allowed=">= 1 prompt")
    manifest = manifest_of(target, passages, settings)
    open_directory(directory, manifest)
    writer = _Writer(target, settings, manifest, max(len(p.prompt) for p in passages))
    for index in range(manifest.shards):
        group = passages[index * settings.per_shard : (index + 1) * settings.per_shard]
        path = shard_path(directory, index)
        if not is_sound(path):
            write_shard(path, writer.shard(index * settings.per_shard, group))
        tell(min((index + 1) * settings.per_shard, len(passages)), len(passages))
    return manifest


def load_captured(directory: Path, manifest: Manifest, head: TargetHead) -> Captured:
    """The rows whose law the target wrote, of all shards; prompts stay on disk.

    Raises:
        CheckpointError: a shard is missing or broken (capture again: the others are kept).
        MismatchError: NaN or infinity in the states.
    """
    names = ("ids", "doc", "position", "domain", "taps", "final")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for shard in read_shards(directory, manifest):
        for name in names:
            parts[name].append(getattr(shard, name)[shard.written])
    columns = {name: torch.cat(found) for name, found in parts.items()}
    return Captured(**columns, head=head, domains=manifest.domains, layers=manifest.layers)


def load_floor(directory: Path, manifest: Manifest) -> Tensor:
    """Total variation between the law at generation and teacher-forced: the numerics floor, float32 [n]."""
    return torch.cat([shard.floor for shard in read_shards(directory, manifest)])


@dataclass(frozen=True, slots=True)
class Document:
    """One captured document with its prompt.

    Attributes:
        doc, domain: its numbers.
        ids: int64 [R].
        taps: [R, A, d].
        final: [R, d].
        start: first row whose next token the target wrote.
        layers: the tapped layer of each column of `taps`.
    """

    doc: int
    domain: int
    ids: Tensor
    taps: Tensor
    final: Tensor
    start: int
    layers: tuple[int, ...]


def documents(directory: Path, manifest: Manifest) -> Iterator[Document]:
    """All documents in order, prompts included: what a draft head reads."""
    for shard in read_shards(directory, manifest):
        for number in torch.unique(shard.doc).tolist():
            rows = shard.doc == number
            start = int(shard.written[rows].to(torch.int64).argmax())
            domain = int(shard.domain[rows][0])
            yield Document(
                number, domain, shard.ids[rows], shard.taps[rows], shard.final[rows], start, manifest.layers
            )


class _Witness:
    """Keeps the laws of one request as the engine saw them at generation, for the numerics floor."""

    def __init__(self, request: str) -> None:
        self.request, self.laws = request, list[Tensor]()

    def record(self, round: Round) -> None:
        """Copy the root's logits."""
        if self.request in round.requests and len(self.laws) < CHUNK:
            self.laws.append(round.logits[round.requests.index(self.request), 0].float().cpu())


class _Writer:
    """Makes shards with one engine and one cache for all of them."""

    def __init__(self, target: Target, settings: CaptureSettings, manifest: Manifest, longest: int) -> None:
        self.target, self.settings, self.manifest = target, settings, manifest
        length = longest + settings.max_tokens
        if length > target.info.max_length:
            raise RequestError(
                "prompt and answer do not fit the context",
                field="prompts",
                value=f"{longest} tokens and {settings.max_tokens} of answer",
                allowed=f"{target.info.max_length} together",
                remedy="Shorten the prompts, or ask for a smaller budget.",
            )
        slots = min(settings.slots, manifest.documents)
        plain = Budget(None, PLAIN, adaptive=False)
        self.engine = Engine(target, NoDrafter(), plain, Limits(slots, length + 1))
        self.cache = KVCache(target.info.cache, 1, length + 1)
        self.head = target_head(target, settings.temperature)
        self.checked = False

    def shard(self, first: int, group: Sequence[Passage]) -> Shard:
        """Write and read the documents numbered from `first` on."""
        requests = [self._request(first + i, passage) for i, passage in enumerate(group)]
        witness = _Witness(requests[0].id)
        self._generate(requests, witness)
        parts = [
            self._read(first + i, passage, request)
            for i, (passage, request) in enumerate(zip(group, requests, strict=True))
        ]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Shard(**columns, floor=self._floor(witness, parts[0]))

    def _request(self, doc: int, passage: Passage) -> Request:
        s = self.settings
        seed = (
            int.from_bytes(hashlib.sha256(f"{s.seed}/{passage.id}/{doc}".encode()).digest()[:8], "big") >> 1
        )
        sampling = Sampling(temperature=s.temperature, seed=seed, max_tokens=s.max_tokens)
        return Request(f"doc-{doc}", passage.prompt, sampling, frozenset(self.target.info.stop_ids))

    def _generate(self, requests: Sequence[Request], witness: _Witness) -> None:
        self.engine.recorder = witness
        for request in requests:
            self.engine.add(request)
        while self.engine.busy:
            for piece in self.engine.step():
                if piece.finish == "error":
                    raise SpecdecError(f"the target failed: {piece.error}", field=piece.request)

    def _read(self, doc: int, passage: Passage, request: Request) -> dict[str, Tensor]:
        """Teacher-force prompt and answer; the last token predicts what nobody wrote, yet its law is kept."""
        ids = torch.tensor([*passage.prompt, *request.output], dtype=torch.int64)
        states = self._states(ids)
        rows = ids.shape[0]
        domain = self.manifest.domains.index(passage.domain)
        taps = states[:, :-1].to(torch.bfloat16)
        if not bool(torch.isfinite(states).all()):
            raise MismatchError(
                "hidden states hold NaN or infinity",
                field=f"document {passage.id}",
                remedy="Load the target in float32; drop the document if it persists.",
            )
        position = torch.arange(rows)
        return {
            "ids": ids,
            "doc": torch.full((rows,), doc),
            "position": position,
            "domain": torch.full((rows,), domain),
            "written": position >= len(passage.prompt) - 1,
            "taps": taps,
            "final": states[:, -1].contiguous(),
        }

    def _states(self, ids: Tensor) -> Tensor:
        """Taps and, last, the input of the final norm: [R, A + 1, d]."""
        info, device = self.target.info, self.target.info.device
        wanted = (*self.settings.layers, info.layers)
        slot, parts = torch.zeros(1, dtype=torch.int64, device=device), []
        for start in range(0, ids.shape[0], CHUNK):
            tokens = ids[None, start : start + CHUNK].to(device)
            rows = chunk_rows(slot, torch.tensor([start], device=device), tokens.shape[1])
            states = self.target.forward(tokens, rows, self.cache, wanted)
            taps = states.features[0].view(tokens.shape[1], len(wanted), info.hidden).cpu()
            if not self.checked:
                check_head(self.head, taps[:, -1], self.target.logits(states.final[0]).float().cpu())
                self.checked = True
            parts.append(taps)
        return torch.cat(parts)

    def _floor(self, witness: _Witness, document: dict[str, Tensor]) -> Tensor:
        """TV between what the engine saw and what teacher-forcing gives; round i stood at answer token i."""
        if not witness.laws:
            return torch.zeros(0)
        seen = torch.log_softmax(torch.stack(witness.laws) / self.settings.temperature, dim=-1)
        first = int(document["written"].to(torch.int64).argmax()) + 1
        again = self.head.log_probs(document["final"][first : first + seen.shape[0]])
        return (seen.exp() - again.exp()).abs().sum(-1) / 2


def check_head(head: TargetHead, final: Tensor, logits: Tensor) -> None:
    """Refuse a target whose logits are not final norm times output embedding (soft caps, logit scales).

    Args:
        final: [n, d] input of the final norm.
        logits: float32 [n, V] of the target.

    Raises:
        MismatchError: states or logits that are not numbers.
        UnsupportedError: naming by how much they differ.
    """
    if not bool(torch.isfinite(logits).all()) or not bool(torch.isfinite(final).all()):
        raise MismatchError("hidden states or logits hold NaN or infinity", field="target")
    ours = head.normed(final) @ head.unembedding.T
    spread = float(logits.std()) + 1e-12
    worst = float((ours - logits).abs().max()) / spread
    if worst > HEAD_TOLERANCE:
        raise UnsupportedError(
            "its logits are not the final norm times the output embedding (a soft cap or a logit scale?)",
            field="target",
            value=f"largest difference {worst:.2f} standard deviations",
            allowed=f"<= {HEAD_TOLERANCE}",
        )
