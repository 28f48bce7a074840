"""The figures of a report, drawn from report.json's values alone: one colour per meaning, units on every axis.

Each comes with a caption that says what to conclude, built from the same numbers. matplotlib is imported here only, and
without pyplot: nothing global changes. A figure whose numbers a run does not have is left out.
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
TERMS = {"unrecoverable": "#8a8f98", "capacity": GAP, "training": HEAD, "drift": "#d55e00"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#222222")
MARKS = {"chain": "o", "tree": "s", "sampled chain": "^"}
NAMES = {
    "unrecoverable": "not recoverable from the taps",
    "capacity": "capacity",
    "training": "training shortfall",
    "drift": "feature drift",
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One figure: its name, caption, and both formats."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def draw_all(values: Value) -> list[Drawn]:
    """Every figure these values allow, in reading order.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    makers = (
        surplus_by_depth,
        waterfall,
        prediction,
        by_domain,
        tap_ranking,
        fisher_spectrum,
        calibration,
        doses,
        learning,
    )
    return [drawn for drawn in (make(values) for make in makers) if drawn is not None]


def _canvas(width: float = 6.4, height: float = 3.8) -> tuple[Any, Any]:
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


def _saved(figure: Any, name: str, title: str, caption: str) -> Drawn:
    made = {}
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        made[kind] = stream.getvalue()
    return Drawn(name, title, caption, made["svg"], made["png"])


def _whisker(found: Sequence[Value]) -> list[list[float]]:
    """Distances to both interval ends; 0 where an end is not known."""
    low = [max(0.0, v["value"] - v["low"]) if v["low"] is not None else 0.0 for v in found]
    high = [max(0.0, v["high"] - v["value"]) if v["high"] is not None else 0.0 for v in found]
    return [low, high]


def overall_cells(values: Value) -> list[Value]:
    """The cells that are of one depth and nothing else, by depth."""
    plain = [cell for cell in values["cells"] if set(cell["key"]) == {"taps", "depth"}]
    return sorted(plain, key=lambda cell: int(cell["key"]["depth"]))


def surplus_by_depth(values: Value) -> Drawn | None:
    """Ceiling and surplus against k, with bands; what lies between is the gap."""
    cells = overall_cells(values)
    if not cells:
        return None
    depths = [int(cell["key"]["depth"]) for cell in cells]
    figure, axes = _canvas()
    for name, colour, label in (("ceiling", CEILING, "ceiling C"), ("surplus", SURPLUS, "surplus S")):
        found = [cell[name] for cell in cells]
        axes.plot(depths, [v["value"] for v in found], "o-", color=colour, label=label)
        axes.fill_between(
            depths, [v["low"] for v in found], [v["high"] for v in found], color=colour, alpha=0.25
        )
    axes.fill_between(
        depths,
        [c["surplus"]["value"] for c in cells],
        [c["ceiling"]["value"] for c in cells],
        color=GAP,
        alpha=0.15,
        label="gap Δ",
    )
    axes.set(
        xlabel="depth k (the draft token is the k-th after t)",
        ylabel="information (nats per token)",
        xticks=depths,
    )
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(frameon=False)
    first, last = cells[0], cells[-1]
    caption = (
        f"At k = {depths[0]} a probe recovers {_share(first)} of what the past knows beyond the next token, at "
        f"k = {depths[-1]} {_share(last)}. The orange band is what a draft head cannot read off these taps: "
        "where it widens, drafting deeper pays less."
    )
    return _saved(figure, "surplus", "Surplus and ceiling by depth", caption)


def _share(cell: Value) -> str:
    value = cell["captured"]["value"]
    return "an unknown share" if value is None else f"{100 * value:.0f}%"


def waterfall(values: Value) -> Drawn | None:
    """The head's gap, split into where it comes from, per depth."""
    rows = values["waterfall"]
    if not rows:
        return None
    figure, axes = _canvas()
    places = range(len(rows))
    up, down = [0.0] * len(rows), [0.0] * len(rows)
    for term, colour in TERMS.items():
        heights = [row[term]["value"] for row in rows]
        base = [u if h >= 0 else d for u, d, h in zip(up, down, heights, strict=True)]
        axes.bar(places, heights, 0.6, bottom=base, color=colour, label=NAMES[term])
        up = [u + max(0.0, h) for u, h in zip(up, heights, strict=True)]
        down = [d + min(0.0, h) for d, h in zip(down, heights, strict=True)]
    totals = [row["total"] for row in rows]
    axes.errorbar(
        places, [t["value"] for t in totals], _whisker(totals), fmt="_", color=MEASURED, label="head's gap"
    )
    axes.axhline(0, color=MEASURED, linewidth=0.8)
    axes.set(xlabel="depth k", ylabel="gap (nats per token)", xticks=list(places))
    axes.set_xticklabels([str(row["depth"]) for row in rows])
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    worst = max(TERMS, key=lambda term: rows[0][term]["value"])
    caption = (
        f"At k = {rows[0]['depth']} the largest part of the head's gap is {NAMES[worst]} "
        f"({rows[0][worst]['value']:.3f} of {rows[0]['total']['value']:.3f} nats). {_ADVICE[worst]} "
        "Terms are signed; at k > 2 the training term may be negative, because true features are fresher than h_t."
    )
    return _saved(figure, "waterfall", "Where the head's gap comes from", caption)


_ADVICE = {
    "unrecoverable": "Other taps may help; a longer training will not.",
    "capacity": "A larger head would pay.",
    "training": "More text, epochs or a better loss would pay before anything else.",
    "drift": "More unrolled steps in training would pay.",
}


def prediction(values: Value) -> Drawn | None:
    """One point per cell: predicted against measured acceptance."""
    cells = [cell for cell in values["prediction"] if cell["predicted"] is not None]
    if not cells:
        return None
    figure, axes = _canvas(5.2, 4.8)
    names = list(dict.fromkeys(cell["domain"] for cell in cells))
    for cell in cells:
        colour = SERIES[names.index(cell["domain"]) % len(SERIES)]
        found = cell["measured"]
        axes.errorbar(
            cell["predicted"], found["value"], [[w[0]] for w in _whisker([found])], fmt=MARKS[cell["shape"]],
            color=colour, markersize=5, elinewidth=0.8, alpha=0.85,
        )  # fmt: skip
    for i, name in enumerate(names):
        axes.plot([], [], "o", color=SERIES[i % len(SERIES)], label=name)
    for shape in dict.fromkeys(cell["shape"] for cell in cells):
        axes.plot([], [], MARKS[shape], color="#888888", label=shape)
    axes.plot([0, 1], [0, 1], color=MEASURED, linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="predicted alpha (no fitted parameter)",
        ylabel="measured alpha (engine)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.legend(frameon=False, fontsize="small", ncols=2)
    error = sum(abs(c["predicted"] - c["measured"]["value"]) for c in cells) / len(cells)
    caption = (
        f"{len(cells)} cells from documents that no predictor saw; the mean distance from the identity is "
        f"{error:.3f}. Points on the line: acceptance can be read off the head before it serves. Points below it in "
        "one colour: that domain is harder for the engine than the captured text says."
    )
    return _saved(figure, "prediction", "Predicted against measured acceptance", caption)


def by_domain(values: Value) -> Drawn | None:
    """tau by domain: the engine's where a head was given, else the probe's forecast."""
    if values["engine"]:
        return _measured_domains(values)
    rows = values["domains"]
    if not rows:
        return None
    figure, axes = _canvas()
    found = [row["alpha"] for row in rows]
    axes.barh(range(len(rows)), [v["value"] for v in found], xerr=_whisker(found), color=SURPLUS)
    axes.set_yticks(range(len(rows)), [f"{row['domain']} (tau {row['tau']:.2f})" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="predicted alpha of the first draft token (one child)", xlim=(0, 1))
    caption = (
        f"Drafting should pay most on {rows[0]['domain']} and least on {rows[-1]['domain']}. The tau in brackets is "
        "that of a chain if deeper tokens were accepted like the last measured depth."
    )
    return _saved(figure, "domains", "Which domains will pay", caption)


def _measured_domains(values: Value) -> Drawn | None:
    figure, axes = _canvas()
    runs = values["engine"]
    names = values["domain_names"]
    height = 0.8 / len(runs)
    for i, (shape, run) in enumerate(runs.items()):
        rows = [row for row in run["by_domain"] if row["tau"] is not None]
        places = [names.index(row["domain"]) + (i - (len(runs) - 1) / 2) * height for row in rows]
        found = [row["tau"] for row in rows]
        axes.barh(
            places,
            [v["value"] for v in found],
            height * 0.9,
            xerr=_whisker(found),
            color=SERIES[i],
            label=shape,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color=MEASURED, linewidth=0.8)
    axes.set(xlabel="tau (tokens per target forward, bonus included)")
    axes.legend(frameon=False)
    best = max(runs, key=lambda shape: runs[shape]["tau"]["value"])
    told = ", ".join(f"{shape} {run['tau']['value']:.2f}" for shape, run in runs.items())
    caption = f"Measured tau: {told}. The {best} accepts most per forward; whether it is fastest is the bench's word."
    return _saved(figure, "domains", "Acceptance length by domain", caption)


def tap_ranking(values: Value) -> Drawn | None:
    """Tap sets by probe gap."""
    rows = values["taps"]
    if not rows:
        return None
    figure, axes = _canvas(6.4, 1.4 + 0.32 * len(rows))
    found = [row["gap"] for row in rows]
    colours = [HEAD if row["taps"] == values["taps_used"] else GAP for row in rows]
    axes.errorbar(
        [v["value"] for v in found], range(len(rows)), xerr=_whisker(found), fmt="none", ecolor="#888888"
    )
    axes.scatter([v["value"] for v in found], range(len(rows)), color=colours, zorder=3)
    axes.set_yticks(range(len(rows)), [row["taps"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="probe gap Δ (nats per token; smaller is better)", ylabel="tapped layers")
    best = rows[0]
    close = [row["taps"] for row in rows[1:] if (row["gap"]["low"] or 0.0) <= (best["gap"]["high"] or 0.0)]
    caption = (
        f"Layers {best['taps']} leave the least unrecovered. "
        + (f"{len(close)} other sets overlap its interval: prefer the cheapest of them. " if close else "")
        + "The pink point is the set used in the rest of this report."
    )
    return _saved(figure, "taps", "Tap sets ranked by probe gap", caption)


def fisher_spectrum(values: Value) -> Drawn | None:
    """Eigenvalues of the pullback metric by target entropy."""
    bins = values["geometry"]["bins"]
    if not bins:
        return None
    figure, axes = _canvas()
    for i, row in enumerate(bins):
        kept = [v for v in row["spectrum"] if v]
        label = f"H(p) {row['entropy']}: rank {row['effective_rank']['value']:.1f}"
        axes.loglog(range(1, len(kept) + 1), kept, "-", color=SERIES[i], label=label)
    axes.set(xlabel="direction (by rank)", ylabel="share of tr G")
    axes.legend(frameon=False)
    widest = max(bins, key=lambda row: row["effective_rank"]["value"])
    caption = (
        "Few directions of the state change the next-token law: at most "
        f"{widest['effective_rank']['value']:.0f} effective ones (H(p) {widest['entropy']}). A head has to be right in "
        "those; an isotropic feature loss spends most of its effort elsewhere."
    )
    return _saved(figure, "fisher", "Fisher-Rao spectrum of the target's head", caption)


def calibration(values: Value) -> Drawn | None:
    """The head's gap with and without the temperature that fixes it, and its excess entropy."""
    rows = values["calibration"]
    if not rows:
        return None
    figure, axes = _canvas()
    depths = [row["depth"] for row in rows]
    gap = [row["gap"] for row in rows]
    excess = [row["excess_entropy"] for row in rows]
    axes.errorbar(depths, [v["value"] for v in gap], _whisker(gap), fmt="o-", color=HEAD, label="gap")
    axes.plot(
        depths, [row["gap_tempered"] for row in rows], "o--", color=SURPLUS, label="gap after temperature"
    )
    axes.errorbar(
        depths, [v["value"] for v in excess], _whisker(excess), fmt="s:", color=GAP, label="H(q) - H(p)"
    )
    axes.set(xlabel="depth k", ylabel="nats per token", xticks=depths)
    axes.legend(frameon=False)
    first = rows[0]
    side = "over" if first["temperature"] > 1 else "under"
    caption = (
        f"At k = {first['depth']} the head is {side}-confident (best temperature {first['temperature']:.2f}, "
        f"calibration error {first['ece']:.3f}). Where H(q) - H(p) meets the gap, the head is calibrated and its "
        "entropy tells its loss."
    )
    return _saved(figure, "calibration", "Calibration of the head by depth", caption)


def doses(values: Value) -> Drawn | None:
    """Surplus against noise and window: curves that no learned map can fake."""
    curves = [values[name] for name in ("noise", "window") if values.get(name)]
    if not curves:
        return None
    figure, axes = _canvas()
    for i, curve in enumerate(curves):
        found = curve["surplus"]
        label = "noise (feature standard deviations)" if curve["name"] == "noise" else "window (tokens)"
        axes.errorbar(
            curve["doses"],
            [v["value"] for v in found],
            _whisker(found),
            fmt="o-",
            color=SERIES[i],
            label=label,
        )
    axes.set(xlabel="dose", ylabel="surplus at k = 2 (nats per token)")
    axes.legend(frameon=False)
    told = [
        f"{curve['name']}: {'as theory demands' if curve['holds'] else 'AGAINST theory'}" for curve in curves
    ]
    caption = f"Surplus must fall with noise and rise with the window. {'; '.join(told)}."
    return _saved(figure, "doses", "Dose and response", caption)


def learning(values: Value) -> Drawn | None:
    """Gap against training text, with its limit."""
    curves = values.get("curve")
    if not curves:
        return None
    figure, axes = _canvas()
    for i, (depth, curve) in enumerate(curves.items()):
        sizes = [point["contexts"] for point in curve["points"]]
        found = [point["gap"] for point in curve["points"]]
        axes.errorbar(
            sizes,
            [v["value"] for v in found],
            _whisker(found),
            fmt="o-",
            color=SERIES[i],
            label=f"k = {depth}",
        )
        axes.axhline(curve["limit"], color=SERIES[i], linestyle="--", linewidth=0.8)
    axes.set(xscale="log", xlabel="training contexts of the probe", ylabel="gap Δ (nats per token)")
    axes.legend(frameon=False)
    ends = {k: (c["points"][-1]["gap"]["value"], c["limit"]) for k, c in curves.items()}
    told = ", ".join(f"k = {k}: {now:.3f} now, {limit:.3f} in the limit" for k, (now, limit) in ends.items())
    return _saved(
        figure, "curve", "Learning curve of the probe", f"{told}. Dashed: the fitted limit of endless text."
    )
