"""Values of report.json: every number with its interval, rows and documents; NaN becomes null.

The page, the figures, the terminal and `--compare` read these and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from specdec.surplus.cells import Cell
from specdec.surplus.claims import Claim
from specdec.surplus.estimate import TOPS
from specdec.surplus.interval import Interval

VERSION = 1
"""Of the layout of report.json."""

Value = dict[str, Any]


def clean(value: float) -> float | None:
    """A number JSON knows: NaN and infinities become null."""
    return round(value, 6) if math.isfinite(value) else None


def number(found: Interval) -> Value:
    """value, low, high, n, documents."""
    return {name: clean(each) if isinstance(each, float) else each for name, each in asdict(found).items()}


def cell_row(cell: Cell) -> Value:
    """One cell: its key and all its intervals."""
    row: Value = {"key": dict(cell.key)}
    for name in ("surplus", "gap", "ceiling", "captured", "alpha", "entropy"):
        row[name] = number(getattr(cell, name))
    row["top"] = {str(m): number(each) for m, each in zip(TOPS, cell.top, strict=False)}
    row["control_spread"] = clean(cell.control_spread)
    return row


def claim_row(claim: Claim) -> Value:
    """One claim with its verdict, and room for a note."""
    return {
        "name": claim.name,
        "number": number(claim.interval) | {"value": clean(claim.value)},
        "threshold": claim.threshold,
        "verdict": claim.verdict.value,
        "impressive": claim.impressive,
        "note": "",
    }


def undecided(name: str, threshold: str, note: str) -> Value:
    """A claim that this run cannot judge, and why."""
    return {
        "name": name,
        "number": None,
        "threshold": threshold,
        "verdict": "undecided",
        "impressive": False,
        "note": note,
    }
