"""The state of a run on disk: written under a temporary name, renamed, read back whole or not at all.

Knows a dictionary of tensors and numbers; what is in it is the trainer's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specdec.errors import CheckpointError, MismatchError
from specdec.places import replacing

VERSION = 2  # 1 knew neither the texts nor the scale of a run, and counted its place in groups
LAST, BEST = "last.pt", "best.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that a crash at any moment leaves the old file or the new one. For one process.

    Raises:
        CheckpointError: the disk refuses; the old file stays.
    """
    try:
        for left in path.parent.glob(f".*.{path.name}"):  # by a process that was killed while it wrote
            left.unlink()
        with replacing(path) as fresh:
            torch.save({"version": VERSION} | state, fresh)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(
            f"cannot be written: {error}",
            field=str(path),
            remedy="Free some space and run again: training resumes from the checkpoint before.",
        ) from error


def load_state(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """The state, or None when there is no file.

    Args:
        identity: what must be the same as when it was saved, such as the target's fingerprint.

    Raises:
        CheckpointError: the file is broken. MismatchError: it belongs to another run, naming the field.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved: dict[str, str] = state["identity"]
        version = int(state["version"])
    except Exception as error:  # whatever a torn or foreign file makes the unpickler raise
        raise CheckpointError(
            f"cannot be read: {error}", field=str(path), remedy="Delete it to start the run again."
        ) from error
    if version != VERSION:
        raise CheckpointError("is of another version of specdec", field=str(path), value=version,
                              allowed=str(VERSION), remedy="Delete it to train again on the same answers.")  # fmt: skip
    for name, value in identity.items():
        if saved.get(name) != value:
            raise MismatchError("the run was begun with another one", field=name, value=value,
                                allowed=str(saved.get(name)),
                                remedy="Choose another --out, or give the run what it was begun with.")  # fmt: skip
    return state
