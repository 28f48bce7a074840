"""Rows of a jsonl, parquet or Hub dataset as mappings, streamed.

Knows containers and compression; what a row means is `training.data`'s business.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from specdec.errors import SpecdecError, UnsupportedError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".ndjson", ".parquet")


def read_rows(source: str | Path, skip: Callable[[str], None]) -> Iterator[Mapping[str, Any]]:
    """Stream the rows of `source`; a line that is not a JSON object goes to `skip` with the reason.

    Raises:
        SpecdecError: no such file, unknown kind of file, a broken archive, or a dataset that does not load.
    """
    path = Path(source)
    if path.is_file():
        return _parquet(path) if path.suffix == ".parquet" else _jsonl(path, skip)
    if isinstance(source, Path) or path.is_absolute() or str(source).endswith(SUFFIXES) or path.exists():
        raise SpecdecError(
            "no such file",
            field="data.prompts",
            value=str(source),
            allowed=f"{', '.join(SUFFIXES)}, or a datasets id",
        )
    return _dataset(str(source))


def _jsonl(path: Path, skip: Callable[[str], None]) -> Iterator[Mapping[str, Any]]:
    if not path.name.endswith(SUFFIXES):
        raise SpecdecError(
            "unknown kind of file", field="data.prompts", value=str(path), allowed=", ".join(SUFFIXES)
        )
    try:
        with _open(path) as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # no UTF-8, numbers and brackets without end among them
                    skip("not JSON")
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    skip("not an object")
    except (OSError, EOFError, zlib.error) as error:
        raise SpecdecError(
            f"cannot be read: {error}",
            field="data.prompts",
            value=str(path),
            remedy="The file is damaged or not readable; fetch it again.",
        ) from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    parquet = _optional("pyarrow.parquet", "pyarrow", "parquet files")
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise SpecdecError(
            f"cannot be read as parquet: {error}", field="data.prompts", value=str(path)
        ) from error


def _dataset(name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a Hub dataset, streamed; `org/name:split` names a split other than train."""
    datasets = _optional("datasets", "datasets", "dataset ids")
    repository, _, split = name.partition(":")
    try:
        yield from datasets.load_dataset(repository, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise SpecdecError(
            f"no such file, and as a dataset it does not load: {error}",
            field="data.prompts",
            value=name,
            allowed=f"a {', '.join(SUFFIXES)} file, org/name or org/name:split",
            remedy="Check the spelling and the connection.",
        ) from error


def _optional(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"{purpose} need the package {package}",
            field="data.prompts",
            remedy=f"pip install {package}, or convert the data to jsonl.",
        ) from error
