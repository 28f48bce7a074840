"""What a checkpoint of a head says of its target, read from the target's own config."""

from __future__ import annotations

from typing import Any

from specdec.errors import SpecdecError
from specdec.target.files import load_config, resolve, stop_token_ids


def describe(name: str) -> dict[str, Any]:
    """name_or_path, architectures, bos, eos and max_length of a target, without loading its weights.

    Raises:
        SpecdecError: no such target, or its config names no architecture.
    """
    files = resolve(name)
    config = load_config(files.directory)
    stops = tuple(stop_token_ids(files.directory))
    named = config.get("architectures")
    if not named:
        raise SpecdecError("names no architecture", field="config.json", value=name)
    return {
        "name_or_path": name,
        "architectures": tuple(named),
        "bos": config.get("bos_token_id"),
        "eos": stops[0] if len(stops) == 1 else stops or None,
        "max_length": config.get("max_position_embeddings"),
    }
