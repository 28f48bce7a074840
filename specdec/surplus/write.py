"""Writing a report: every file into a temporary directory, then one rename; and what changed between two reports."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specdec.errors import CheckpointError, MismatchError, RequestError, SpecdecError, UnsupportedError
from specdec.places import check_writable
from specdec.surplus.figures import draw_all
from specdec.surplus.page import make_page
from specdec.surplus.rows import write_parquet
from specdec.surplus.run import Report
from specdec.surplus.values import VERSION, Value


def check_writers() -> None:
    """Raises UnsupportedError where what draws figures or writes rows is not installed."""
    for package in ("matplotlib", "pyarrow"):
        try:
            import_module(package)
        except ImportError as error:
            raise UnsupportedError(
                f"needs {package}", field="report", remedy="pip install 'specdec[report]'"
            ) from error


def check_out(out: Path, *, force: bool) -> None:
    """Refuse a report directory that exists, unless it may be replaced.

    Raises:
        RequestError: it exists and `force` is not set, or it is not a report and must not be deleted, or it cannot
            be made.
    """
    if not out.exists():
        check_writable(out)
        return
    if not force:
        raise RequestError(
            "exists already", field="out", value=str(out), remedy="Choose another directory, or give --force."
        )
    if not (out / "report.json").is_file():
        raise RequestError("exists and is no report; it will not be replaced", field="out", value=str(out))


def write_report(report: Report, out: Path, *, force: bool = False) -> Path:
    """report.html, report.json, figures and contexts.parquet under `out`; returns the page's path.

    Raises:
        RequestError: `out` exists and `force` is not set.
        UnsupportedError: matplotlib or pyarrow is missing.
        SpecdecError: the disk refuses; what was there stays.
    """
    check_out(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as work:
            fresh, old = Path(work) / "new", Path(work) / "old"
            _write_files(report, fresh)
            if out.exists():
                out.rename(old)
            fresh.rename(out)
    except OSError as error:
        raise SpecdecError(f"cannot be written: {error}", field="out", value=str(out),
                           remedy="Free some space and run again: what was measured is kept.") from error  # fmt: skip
    return out / "report.html"


def _write_files(report: Report, fresh: Path) -> None:
    (fresh / "figures").mkdir(parents=True)
    figures = draw_all(report.values)
    for drawn in figures:
        (fresh / "figures" / f"{drawn.name}.svg").write_bytes(drawn.svg)
        (fresh / "figures" / f"{drawn.name}.png").write_bytes(drawn.png)
    (fresh / "report.html").write_text(make_page(report.values, figures), encoding="utf-8")
    (fresh / "report.json").write_text(json.dumps(report.values, indent=1, allow_nan=False), encoding="utf-8")
    write_parquet(fresh / "contexts.parquet", report.rows)


def read_report(path: Path) -> Value:
    """The values of a report.json, or of the directory that holds one.

    Raises:
        CheckpointError: not there, or not a report.
        MismatchError: of another layout.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", field="report", value=str(file)) from error
    if not isinstance(values, dict) or "version" not in values or "cells" not in values:
        raise CheckpointError("is not a report", field="report", value=str(file))
    if values["version"] != VERSION:
        raise MismatchError(
            "has another layout", field="report version", value=values["version"], allowed=str(VERSION)
        )
    return values


def comparable(a: Value, b: Value) -> list[str]:
    """What makes two reports hard to compare: empty when nothing does."""
    names = ("temperature", "budget", "symbols", "taps_used", "domain_names")
    told = [f"{name}: {a[name]} against {b[name]}" for name in names if a[name] != b[name]]
    if a["target"]["fingerprint"] != b["target"]["fingerprint"]:
        told.insert(0, f"target: {a['target']['name']} against {b['target']['name']}")
    return told


def changes(a: Value, b: Value) -> list[tuple[str, Value, Value, str]]:
    """(name, a, b, word) of every number that both reports have: gaps and surpluses, of the head too, taps, tau.

    The word is "apart" where the intervals do not overlap, else "within noise"; runs are not paired.
    """
    left, right = _numbers(a), _numbers(b)
    return [(name, left[name], right[name], _word(left[name], right[name])) for name in left if name in right]


def _numbers(values: Value) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for cell in values["cells"]:
        key = " ".join(f"{name} {level}" for name, level in cell["key"].items() if name != "taps")
        found |= {f"{what}, {key}": cell[what] for what in ("surplus", "gap")}
    found |= {f"gap of layers {row['taps']}": row["gap"] for row in values["taps"]}
    for row in values["waterfall"]:
        names = {"total": "gap", "training": "training", "drift": "drift"}
        found |= {f"head's {name}, depth {row['depth']}": row[term] for term, name in names.items()}
    for shape, run in values["engine"].items():
        found[f"tau, {shape}"] = run["tau"]
        found |= {f"alpha({depth}), {shape}": each for depth, each in run["alpha"].items()}
    return found


def _word(a: Value, b: Value) -> str:
    ends = (a["low"], a["high"], b["low"], b["high"])
    if any(end is None for end in ends):
        return "no interval"
    return "apart" if a["high"] < b["low"] or b["high"] < a["low"] else "within noise"
