"""Figures of a head: where its gap comes from, forecasts against the engine, domains, calibration.

Drawn from report.json's values alone; each caption says what to conclude.
"""

from __future__ import annotations

from specdec.surplus.drawing import GAP, HEAD, MEASURED, SERIES, SURPLUS, Drawn, canvas, saved, whisker
from specdec.surplus.values import Value

TERMS = {"unrecoverable": "#8a8f98", "capacity": GAP, "training": HEAD, "drift": "#d55e00"}
MARKS = {"chain": "o", "tree": "s", "sampled chain": "^"}
NAMES = {
    "unrecoverable": "not recoverable from the taps by a probe",
    "capacity": "capacity",
    "training": "training shortfall",
    "drift": "feature drift",
}


def waterfall(values: Value) -> Drawn | None:
    """The head's gap, split into where it comes from, per depth."""
    rows = values["waterfall"]
    if not rows:
        return None
    figure, axes = canvas()
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
        places, [t["value"] for t in totals], whisker(totals), fmt="_", color=MEASURED, label="head's gap"
    )
    axes.axhline(0, color=MEASURED, linewidth=0.8)
    axes.set(xlabel="depth k", ylabel="gap (nats per token)", xticks=list(places))
    axes.set_xticklabels([str(row["depth"]) for row in rows])
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = (
        f"{why(values)} Terms are signed; at k > 2 the training term may be negative, because the head "
        "then reads states that are newer than the probe's."
    )
    return saved(figure, "waterfall", "Where the head's gap comes from", caption)


def why(values: Value) -> str:
    """Where the head's gap comes from and what to do about it, in sentences; "" without a head."""
    rows = values["waterfall"]
    if not rows:
        return ""
    first, last = rows[0], rows[-1]
    total, training = first["total"]["value"], first["training"]
    told = f"At k = {first['depth']} the head's own gap is {total:.3f} nats"
    if training["high"] is not None and training["high"] < 0:
        share = last["drift"]["value"] / last["total"]["value"]
        return (
            f"{told}, {-training['value']:.3f} below that of a small probe, which learned on this report's text alone: "
            f"a probe's gap is no floor, and more text may still help. At k = {last['depth']} {100 * share:.0f}% of "
            "the head's gap is feature drift, which more unrolled steps in training lower."
        )
    worst = max(TERMS, key=lambda term: first[term]["value"])
    return f"{told}; its largest part, {first[worst]['value']:.3f}, is {NAMES[worst]}. {_ADVICE[worst]}"


_ADVICE = {
    "unrecoverable": "Other taps may help, and more text where the learning curve still falls.",
    "capacity": "A larger head would pay.",
    "training": "More text, epochs or a better loss would pay before anything else.",
    "drift": "More unrolled steps in training would pay.",
}


def prediction(values: Value) -> Drawn | None:
    """One point per cell: predicted against measured acceptance."""
    cells = [cell for cell in values["prediction"] if cell["predicted"] is not None]
    if not cells:
        return None
    figure, axes = canvas(5.2, 4.8)
    names = list(dict.fromkeys(cell["domain"] for cell in cells))
    for cell in cells:
        colour = SERIES[names.index(cell["domain"]) % len(SERIES)]
        found = cell["measured"]
        axes.errorbar(
            cell["predicted"], found["value"], [[w[0]] for w in whisker([found])], fmt=MARKS[cell["shape"]],
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
        f"{len(cells)} cells, each of one domain, depth and tree, measured on documents that no forecast saw. Their "
        f"mean distance from the dashed line, where both agree, is {error:.3f}. Points on the line: acceptance can be "
        "read off the head before it serves. Points below it in one colour: that domain is harder for the engine than "
        "the captured text says."
    )
    return saved(figure, "prediction", "Predicted against measured acceptance", caption)


def measured_domains(values: Value) -> Drawn | None:
    """tau by domain, of those with documents enough for an interval."""
    runs = values["engine"]
    known = {row["domain"] for run in runs.values() for row in run["by_domain"] if row["tau"] is not None}
    names = [name for name in values["domain_names"] if name in known]
    if not names:
        return None
    figure, axes = canvas(6.4, max(3.8, 1.4 + 0.32 * len(names)))
    height = 0.8 / len(runs)
    for i, (shape, run) in enumerate(runs.items()):
        rows = [row for row in run["by_domain"] if row["tau"] is not None]
        places = [names.index(row["domain"]) + (i - (len(runs) - 1) / 2) * height for row in rows]
        found = [row["tau"] for row in rows]
        axes.barh(
            places,
            [v["value"] for v in found],
            height * 0.9,
            xerr=whisker(found),
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
    caption = f"Measured tau: {told}. The {best} accepts most per forward; specdec bench speed tells which is fastest."
    return saved(figure, "domains", "Acceptance length by domain", caption)


def calibration(values: Value) -> Drawn | None:
    """The head's gap with and without the temperature that fixes it, and its excess entropy."""
    rows = values["calibration"]
    if not rows:
        return None
    figure, axes = canvas()
    depths = [row["depth"] for row in rows]
    gap = [row["gap"] for row in rows]
    excess = [row["excess_entropy"] for row in rows]
    axes.errorbar(depths, [v["value"] for v in gap], whisker(gap), fmt="o-", color=HEAD, label="gap")
    axes.plot(
        depths, [row["gap_tempered"] for row in rows], "o--", color=SURPLUS, label="gap after temperature"
    )
    axes.errorbar(
        depths, [v["value"] for v in excess], whisker(excess), fmt="s:", color=GAP, label="H(q) - H(p)"
    )
    axes.set(xlabel="depth k", ylabel="nats per token", xticks=depths)
    axes.legend(frameon=False)
    first = rows[0]
    side = "over" if first["temperature"] > 1 else "under"
    caption = (
        f"At k = {first['depth']} the head is {side}-confident (best temperature {first['temperature']:.2f}, "
        f"calibration error {first['ece']:.3f}). H(q) - H(p) is by how much the head is less sure than the target. "
        "Where it meets the gap, the head is calibrated and its entropy tells its loss."
    )
    return saved(figure, "calibration", "Calibration of the head by depth", caption)
