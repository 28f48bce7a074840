"""Captured text on disk: a manifest that says whose text it is, and checksummed shards of whole documents.

A shard is written under a temporary name and renamed, so an interruption costs at most the current one; a broken
shard counts as missing and a foreign manifest is refused. Knows tensors and files, no model.
Dimension legend: R rows of a shard, A taps, d hidden width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import CheckpointError, MismatchError, SpecdecError
from specdec.places import replacing

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a capture is of; two captures with equal manifests are interchangeable.

    Attributes:
        target: fingerprint and number format.
        passages: hash of all prompts with their ids and domains.
        layers: tapped, in the order of the columns.
        domains: a name per domain index.
        temperature, max_tokens, seed: of the answers.
        documents, per_shard: how many, and how many per file.
    """

    target: str
    passages: str
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    temperature: float
    max_tokens: int
    seed: int
    documents: int
    per_shard: int

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.documents // self.per_shard)


@dataclass(frozen=True, slots=True)
class Shard:
    """Whole documents, prompts included; documents are contiguous runs of rows.

    Attributes:
        ids, doc, position, domain: int64 [R], as in `contract.Captured`.
        written: bool [R], rows whose next token the target wrote itself (its own law).
        taps: [R, A, d].
        final: [R, d], input of the final norm.
        floor: float32 [m], total variation between the law at generation and the teacher-forced one, some rows.
    """

    ids: Tensor
    doc: Tensor
    position: Tensor
    domain: Tensor
    written: Tensor
    taps: Tensor
    final: Tensor
    floor: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, contiguous, as they are stored."""
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}


def shard_path(directory: Path, index: int) -> Path:
    """Where shard `index` lies."""
    return directory / f"shard-{index:05d}.safetensors"


def open_directory(directory: Path, manifest: Manifest) -> None:
    """Make the directory, or check that it holds the same capture.

    Raises:
        MismatchError: naming the first field in which an existing capture differs.
        CheckpointError: a manifest that cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        write_text(path, json.dumps(asdict(manifest), indent=1))
        return
    found = read_manifest(directory)
    for field in fields(Manifest):
        ours, theirs = getattr(manifest, field.name), getattr(found, field.name)
        if ours != theirs:
            raise MismatchError(
                f"holds the capture of another run: {field.name} is {theirs}, not {ours}",
                field="work",
                value=str(directory),
                remedy="Choose another working directory, or delete this one.",
            )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a capture. Raises CheckpointError when there is none or it is broken."""
    path = directory / MANIFEST
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**row | {name: tuple(row[name]) for name in ("layers", "domains")})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"is not a capture's manifest: {error}", field="capture", value=str(path), remedy="Capture again."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name to write under; renamed to `path` at the end, taken away where the disk refuses.

    Raises:
        SpecdecError: the disk refuses (full, read-only).
    """
    try:
        with replacing(path) as fresh:
            yield fresh
    except (OSError, SafetensorError) as error:
        raise SpecdecError(f"cannot be written: {error}", field="report", value=str(path),
                           remedy="Free some space and run again: what was captured is kept.") from error  # fmt: skip


def write_shard(path: Path, shard: Shard) -> None:
    """Store under a temporary name, then rename. Raises SpecdecError where the disk refuses."""
    tensors = shard.tensors()
    with writing(path) as fresh:
        save_file(tensors, fresh, metadata={"checksum": checksum(tensors)})


def read_shard(path: Path) -> Shard:
    """Read and verify one shard.

    Raises:
        CheckpointError: missing, torn or altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            told = (file.metadata() or {}).get("checksum")
        shard = Shard(**tensors)
    except (OSError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"cannot be read: {error}", field="shard", value=path.name) from error
    if told != checksum(tensors):
        raise CheckpointError("does not match its checksum", field="shard", value=path.name)
    return shard


def is_sound(path: Path) -> bool:
    """Is this shard there and whole?"""
    if not path.exists():
        return False
    try:
        read_shard(path)
    except CheckpointError:
        return False
    return True


def read_shards(directory: Path, manifest: Manifest) -> Iterator[Shard]:
    """All shards in order, one in memory at a time. Raises CheckpointError for the first that is not sound."""
    for index in range(manifest.shards):
        yield read_shard(shard_path(directory, index))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name and rename it. Raises SpecdecError where the disk refuses."""
    with writing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
