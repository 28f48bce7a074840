"""The weight files of a directory: which they are, and the tensors in each.

Safetensors (one file or several with an index) or PyTorch's pickles, of which only tensors are unpickled.
Knows nothing of models; a broken file is named, and where possible the first tensor that is cut off.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.errors import CheckpointError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
AGAIN = "Fetch the weights again."


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file, by name, and the tensors the index places in it (none without an index)."""

    name: str
    expected: frozenset[str]


def shards(directory: Path) -> tuple[Shard, ...]:
    """The weight files, safetensors preferred.

    Raises:
        CheckpointError: there are none, the index is broken, or a file it names is absent.
    """
    for whole in (SAFETENSORS, PICKLED):
        if (directory / whole).is_file():
            return (Shard(whole, frozenset()),)
        if (directory / f"{whole}.index.json").is_file():
            return _indexed(directory, f"{whole}.index.json")
    loose = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(loose) == 1:
        return (Shard(loose[0], frozenset()),)
    raise CheckpointError("several weight files and no index" if loose else "the directory holds no weights",
                          field="target", value=str(directory),
                          allowed=f"{SAFETENSORS} or {PICKLED}, whole or with an index")  # fmt: skip


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for ours."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _indexed(directory: Path, index: str) -> tuple[Shard, ...]:
    placed: dict[str, set[str]] = {}
    try:
        for tensor, name in json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].items():
            placed.setdefault(str(name), set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"is no index of weights: {error!r}", field=str(directory / index)) from error
    for name, tensors in placed.items():
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError("the file that the index says holds it is absent", field=min(tensors),
                                  value=str(directory / name), remedy=AGAIN)  # fmt: skip
    return tuple(Shard(name, frozenset(placed[name])) for name in sorted(placed))


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped and not read where the format allows.

    Raises:
        CheckpointError: truncated, or not a file of tensors.
    """
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return _pickled(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a handle, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        if cut := _cut_off(path):
            raise CheckpointError("is cut off: the file is truncated", field=cut, value=str(path),
                                  remedy=AGAIN) from error  # fmt: skip
        raise CheckpointError(f"is no safetensors file: {error}", field=str(path), remedy=AGAIN) from error


def _cut_off(path: Path) -> str | None:
    """The first tensor whose bytes reach past the end of the file; None if the header is unreadable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            return None
        try:
            header = json.loads(file.read(length))
            ends = {name: 8 + length + entry["data_offsets"][1]
                    for name, entry in header.items() if name != "__metadata__"}  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    past = [name for name, end in ends.items() if end > size]
    return min(past, key=ends.__getitem__, default=None)


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        # only PyTorch's zip format can be mapped; files from before 1.6 are read whole
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"is truncated or not a file of tensors: {first_line(error)}",
                              field=str(path), remedy=AGAIN) from error  # fmt: skip
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError("is not a table of tensors", field=str(path))
    return loaded
