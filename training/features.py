"""What the head reads and is graded by: the target's taps and final states over samples, captured online.

The target runs in this process, in inference mode. What it said of a sample can be kept on disk between epochs, in
shards of consecutive samples up to a budget; a shard that fails its checksum is recomputed. Knows nothing of heads.
Dimension legend: B samples, T positions, A taps, H hidden size.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.errors import SpecdecError
from specdec.places import replacing
from specdec.target.protocol import Target
from training.data import Sample

SHARD_TOKENS = 16384  # of one shard: some hundred MB for a large target, seconds for a small one
KEPT = torch.bfloat16  # on disk


@dataclass(frozen=True, slots=True)
class Captured:
    """The target's view of one sample.

    Attributes:
        features: [T, A * H] taps, concatenated.
        final: [T, H] input of the LM head, after the final norm.
    """

    features: Tensor
    final: Tensor


class Capture:
    """Runs the target over samples.

    Args:
        target: whose states are wanted.
        taps: layer-input ids.
        batch_tokens: padded tokens of one forward.
    """

    def __init__(self, target: Target, taps: tuple[int, ...], batch_tokens: int = 4096) -> None:
        self.target, self.taps, self.batch_tokens = target, taps, batch_tokens
        self._cache: KVCache | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[Captured]:
        """Each sample's states, on the target's device."""
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        out: dict[int, Captured] = {}
        while order:
            longest = len(samples[order[-1]])
            count = max(1, self.batch_tokens // longest)
            part, order = order[-count:], order[:-count]
            out.update(zip(part, self._forward([samples[i] for i in part], longest), strict=True))
        return [out[i] for i in range(len(samples))]

    @torch.inference_mode()
    def _forward(self, samples: Sequence[Sample], longest: int) -> list[Captured]:
        device = self.target.info.device
        tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample)] = torch.from_numpy(sample.ids)
        slots = torch.arange(len(samples), device=device)
        rows = chunk_rows(slots, torch.zeros_like(slots), longest)
        states = self.target.forward(tokens.to(device), rows, self._room(len(samples), longest), self.taps)
        lengths = [len(sample) for sample in samples]
        return [
            Captured(states.features[row, :n].clone(), states.final[row, :n].clone())
            for row, n in enumerate(lengths)
        ]

    def _room(self, slots: int, length: int) -> KVCache:
        """A cache with room for the batch, kept for the next."""
        cache = self._cache
        if cache is None or cache.slots < slots or cache.length < length:
            big = (slots, length) if cache is None else (max(slots, cache.slots), max(length, cache.length))
            cache = self._cache = KVCache(self.target.info.cache, *big)
        return cache


@dataclass(frozen=True, slots=True)
class _Shard:
    """Samples first .. last - 1 and where each one's rows begin; `key` names their content."""

    first: int
    last: int
    starts: tuple[int, ...]
    key: str


class Features:
    """Captured samples by index, from disk where they are kept.

    Args:
        samples: all that will be asked for.
        capture: the target behind them.
        directory: of the shards; None keeps nothing.
        gigabytes: how much may be kept; samples beyond are captured each time.
        identity: what else the content depends on, such as the target's fingerprint.

    Raises:
        SpecdecError: the disk refuses a shard.
    """

    def __init__(self, samples: Sequence[Sample], capture: Capture, directory: Path | None = None,
                 gigabytes: float = 0.0, identity: str = "") -> None:  # fmt: skip
        self.samples, self.capture, self.directory = samples, capture, directory
        self.rebuilt = 0
        info = capture.target.info
        row_bytes = (len(capture.taps) + 1) * info.hidden * KEPT.itemsize
        room = int(gigabytes * 1e9 / row_bytes) if directory is not None else 0
        self._shards = _plan(samples, room, f"{info.fingerprint}/{info.dtype}/{capture.taps}/{identity}")
        self._shard_of = {i: shard for shard in self._shards for i in range(shard.first, shard.last)}
        self._whole: set[str] = set()

    @property
    def kept(self) -> int:
        """Samples that have a place on disk."""
        return len(self._shard_of)

    def take(self, indices: Sequence[int]) -> list[Captured]:
        """The samples at `indices`."""
        loose = [i for i in indices if i not in self._shard_of]
        found = dict(zip(loose, self.capture([self.samples[i] for i in loose]), strict=True))
        for i in indices:
            if i not in found:
                found[i] = self._read(self._shard_of[i], i)
        return [found[i] for i in indices]

    def fill(self, advance: Callable[[int], None] = lambda tokens: None) -> None:
        """Capture every shard that is missing or broken, and make room of those that other texts or taps have left.
        For one process. `advance` hears of tokens done."""
        self._clear()
        for shard in self._shards:
            self._ready(shard)
            advance(sum(len(self.samples[i]) for i in range(shard.first, shard.last)))

    def _clear(self) -> None:
        """Files of no shard of ours, halves of a killed process among them: they would count beyond the budget."""
        ours = {path for shard in self._shards for path in (self._path(shard), _sum_path(self._path(shard)))}
        for path in self.directory.glob("*") if self.directory is not None else ():
            if path not in ours:
                with suppress(OSError):
                    path.unlink()

    def _path(self, shard: _Shard) -> Path:
        assert self.directory is not None
        return self.directory / f"{shard.key}.safetensors"

    def _read(self, shard: _Shard, index: int) -> Captured:
        path = self._ready(shard)
        start = shard.starts[index - shard.first]
        rows = slice(start, start + len(self.samples[index]))
        device = str(self.capture.target.info.device)
        with safe_open(path, "pt", device=device) as file:
            return Captured(file.get_slice("features")[rows], file.get_slice("final")[rows])

    def _ready(self, shard: _Shard) -> Path:
        """The shard's file, captured or captured again if need be; checked once by this process."""
        path = self._path(shard)
        if shard.key in self._whole:
            return path
        if path.exists() and not _is_whole(path):
            self.rebuilt += 1
            warnings.warn(f"feature shard {path.name} is broken; it is computed again", stacklevel=2)
            path.unlink()
        if not path.exists():
            self._write(shard, path)
        self._whole.add(shard.key)
        return path

    def _write(self, shard: _Shard, path: Path) -> None:
        captured = self.capture(self.samples[shard.first : shard.last])
        tensors = {
            "features": torch.cat([one.features for one in captured]).to("cpu", KEPT),
            "final": torch.cat([one.final for one in captured]).to("cpu", KEPT),
        }
        try:
            with replacing(path) as fresh:
                save_file(tensors, fresh)
                _sum_path(path).write_text(_digest(fresh))
        except (OSError, SafetensorError) as error:
            raise SpecdecError(f"cannot be written: {error}", field="cache.gigabytes", value=str(path.parent),
                               remedy="Free some space, or lower cache.gigabytes.") from error  # fmt: skip


def _plan(samples: Sequence[Sample], room: int, identity: str) -> list[_Shard]:
    """Consecutive samples up to SHARD_TOKENS a shard, as many shards as fit into `room` tokens."""
    shards: list[_Shard] = []
    first, starts, held = 0, [0], 0
    for index, sample in enumerate(samples):
        starts.append(starts[-1] + len(sample))
        if starts[-1] < SHARD_TOKENS and index + 1 < len(samples):
            continue
        held += starts[-1]
        if held > room:
            break
        key = hashlib.sha256(identity.encode())
        for one in samples[first : index + 1]:
            key.update(len(one).to_bytes(4, "little") + one.ids.tobytes())
        shards.append(_Shard(first, index + 1, tuple(starts[:-1]), key.hexdigest()[:24]))
        first, starts = index + 1, [0]
    return shards


def _sum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return _sum_path(path).read_text() == _digest(path)
    except OSError:
        return False
