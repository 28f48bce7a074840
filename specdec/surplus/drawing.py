"""Drawing: the palette, an empty canvas, and a finished figure in both formats.

matplotlib is imported here only, and without pyplot: nothing global changes. Knows no report.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.errors import UnsupportedError
from specdec.surplus.values import Value

# Okabe and Ito's palette: told apart by colour-blind readers.
CEILING, SURPLUS, GAP, HEAD, MEASURED = "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#222222"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#222222")


@dataclass(frozen=True, slots=True)
class Drawn:
    """One figure: its name, caption, and both formats."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def canvas(width: float = 6.4, height: float = 3.8) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "needs matplotlib", field="figures", remedy="pip install 'specdec[report]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def saved(figure: Any, name: str, title: str, caption: str) -> Drawn:
    made = {}
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        made[kind] = stream.getvalue()
    return Drawn(name, title, caption, made["svg"], made["png"])


def whisker(found: Sequence[Value]) -> list[list[float]]:
    """Distances to both interval ends; 0 where an end is not known."""
    low = [max(0.0, v["value"] - v["low"]) if v["low"] is not None else 0.0 for v in found]
    high = [max(0.0, v["high"] - v["value"]) if v["high"] is not None else 0.0 for v in found]
    return [low, high]
