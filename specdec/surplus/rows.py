"""Per-context rows on disk: estimates kept between runs as checksummed tensors, and exported as parquet.

Knows columns and files, nothing of probes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import UnsupportedError
from specdec.surplus.estimate import TOPS, Estimate, Scores
from specdec.surplus.shards import checksum, writing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Store under a temporary name and rename; `told` is what `load_tensors` must be asked for.

    Raises:
        SpecdecError: the disk refuses.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    meta = {"told": json.dumps(told, sort_keys=True), "checksum": checksum(whole)}
    with writing(path) as fresh:
        save_file(whole, fresh, metadata=meta)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_tensors` stored, or None when it is missing or broken (it is then computed again)."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            meta = file.metadata() or {}
        told = json.loads(meta["told"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (tensors, told) if meta.get("checksum") == checksum(tensors) else None


def save_estimates(path: Path, estimates: Mapping[int, Estimate], key: str, seconds: float = 0.0) -> None:
    """Keep a cross-fit; `key` says of what, `seconds` what it cost."""
    tensors = {
        f"{k}.{name}": getattr(each.scores, name)
        for k, each in estimates.items()
        for name in Scores.__slots__
    }
    told = {str(k): [dict(each.bank), each.seed_spread] for k, each in estimates.items()}
    save_tensors(path, tensors, {"key": key, "estimates": told, "seconds": round(seconds, 3)})


def load_estimates(path: Path, key: str) -> dict[int, Estimate] | None:
    """A kept cross-fit with the same key, or None."""
    found = load_tensors(path)
    if found is None or found[1].get("key") != key:
        return None
    tensors, told = found
    return {
        int(k): Estimate(
            int(k), Scores(**{name: tensors[f"{k}.{name}"] for name in Scores.__slots__}), bank, spread
        )
        for k, (bank, spread) in told["estimates"].items()
    }


def columns_of(scores: Scores) -> dict[str, Tensor]:
    """Flat columns: vectors as they are, masses one column per number of children."""
    flat: dict[str, Tensor] = {}
    for name in Scores.__slots__:
        value = getattr(scores, name)
        if value.ndim == 1:
            flat[name] = value
        else:
            flat |= {f"{name}_{m}": value[:, i] for i, m in enumerate(TOPS[: value.shape[1]])}
    return flat


def write_parquet(path: Path, parts: Sequence[tuple[Mapping[str, str | int], Mapping[str, Tensor]]]) -> None:
    """One table of all parts; the labels of a part become constant columns.

    Raises:
        UnsupportedError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UnsupportedError(
            "needs pyarrow", field="per-context rows", remedy="pip install 'specdec[report]'"
        ) from error
    tables = []
    for labels, columns in parts:
        count = len(next(iter(columns.values())))
        fixed = {name: [value] * count for name, value in labels.items()}
        tables.append(pyarrow.table(fixed | {name: column.numpy() for name, column in columns.items()}))
    if tables:
        pyarrow.parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), path)


def group_numbers(names: Sequence[str]) -> Tensor:
    """Names -> int64 numbers in order of first appearance.

    >>> group_numbers(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names], dtype=torch.int64)
