"""A head's directory as it lies on disk: which layout, its config.json, its tensors. Reads and writes, judges
nothing of what they mean (settings.py, layout.py and checkpoint.py do).
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.errors import CheckpointError
from specdec.head.layout import Layout

CONFIG, SAFETENSORS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """One head's directory, read.

    Attributes:
        path: the directory.
        layout: "raw" EAGLE-3 or "speculators".
        config: config.json as it is.
        weights: name of the file the tensors came from.
        tensors: by the names in the file.
    """

    path: Path
    layout: Layout
    config: Mapping[str, Any]
    weights: str
    tensors: Mapping[str, Tensor]


def read_config(directory: Path) -> tuple[dict[str, Any], Layout]:
    """config.json and the layout it declares.

    Raises:
        CheckpointError: no directory, no config.json, or one that is not a JSON object.
    """
    if not directory.is_dir():
        raise CheckpointError("no such head directory", field="head", value=str(directory))
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "the directory holds no config.json",
            field="head",
            value=str(directory),
            remedy="A head is a raw EAGLE-3 or a speculators directory.",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", field=str(path)) from error
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", field=str(path), value=config)
    return config, "speculators" if "speculators_model_type" in config else "raw"


def read_files(directory: Path) -> HeadFiles:
    """Config and tensors: model.safetensors, else pytorch_model.bin (tensors only, no code is run).

    Raises:
        CheckpointError: something is missing, truncated or not a file of tensors.
    """
    config, layout = read_config(directory)
    for name in (SAFETENSORS, PICKLED):
        if (directory / name).is_file():
            tensors = _read_tensors(directory / name)
            return HeadFiles(directory, layout, config, name, tensors)
    raise CheckpointError(
        "the directory holds no weights",
        field="head",
        value=str(directory),
        allowed=f"{SAFETENSORS} or {PICKLED}",
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.name == SAFETENSORS:
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"is truncated or not a file of tensors: {str(error).splitlines()[0]}",
            field=str(path),
            remedy="Fetch it again.",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError("is not a table of tensors", field=str(path))
    return loaded


def write_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write config.json and model.safetensors under a temporary name, then rename.

    A new directory appears whole. In one that exists the two files are replaced, each at once, and other
    files (model card, logs) stay.

    Raises:
        CheckpointError: the disk refuses (full, read-only), or `directory` is a file; nothing is left behind.
    """
    staging: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        staging.chmod(0o755)  # made for its owner alone, as temporary files are
        save_file(dict(tensors), staging / SAFETENSORS, metadata={"format": "pt"})
        (staging / SAFETENSORS).chmod(0o644)
        text = json.dumps(dict(config), indent=2) + "\n"
        (staging / CONFIG).write_text(text, encoding="utf-8")
        _move_in(staging, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be written: {error}",
            field=str(directory),
            remedy="Free some space or choose another directory.",
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def _move_in(staging: Path, directory: Path) -> None:
    if not directory.exists():
        staging.rename(directory)
        return
    for name in (SAFETENSORS, CONFIG):
        (staging / name).replace(directory / name)
