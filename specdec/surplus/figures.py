"""The figures of a report, drawn from report.json's values alone: one colour per meaning, units on every axis.

Each comes with a caption that says what to conclude, built from the same numbers. A figure whose numbers a run does not
have is left out. Those of a head are in `head_figures`.
"""

from __future__ import annotations

from specdec.surplus.drawing import CEILING, GAP, HEAD, SERIES, SURPLUS, Drawn, canvas, saved, whisker
from specdec.surplus.head_figures import calibration, measured_domains, prediction, waterfall
from specdec.surplus.values import Value


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
    figure, axes = canvas()
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
        f"k = {depths[-1]} {_share(last)}. The orange band is what the probe, with its size and its text, "
        "does not read off these taps."
    )
    return saved(figure, "surplus", "Surplus and ceiling by depth", caption)


def _share(cell: Value) -> str:
    value = cell["captured"]["value"]
    return "an unknown share" if value is None else f"{100 * value:.0f}%"


def by_domain(values: Value) -> Drawn | None:
    """tau by domain: the engine's where a head was given, else the probe's forecast."""
    if values["engine"]:
        return measured_domains(values)
    rows = values["domains"]
    if not rows:
        return None
    figure, axes = canvas(6.4, max(3.8, 1.4 + 0.32 * len(rows)))
    found = [row["alpha"] for row in rows]
    axes.barh(range(len(rows)), [v["value"] for v in found], xerr=whisker(found), color=SURPLUS)
    axes.set_yticks(range(len(rows)), [f"{row['domain']} (tau {row['tau']:.2f})" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="predicted alpha of the first draft token (one child)", xlim=(0, 1))
    caption = (
        f"Drafting should pay most on {rows[0]['domain']} and least on {rows[-1]['domain']}. The tau in brackets is "
        "that of a chain if deeper tokens were accepted like the last measured depth."
    )
    return saved(figure, "domains", "Which domains will pay", caption)


def tap_ranking(values: Value) -> Drawn | None:
    """Tap sets by probe gap."""
    rows = values["taps"]
    if not rows:
        return None
    figure, axes = canvas(6.4, 1.4 + 0.32 * len(rows))
    found = [row["gap"] for row in rows]
    colours = [HEAD if row["taps"] == values["taps_used"] else GAP for row in rows]
    axes.errorbar(
        [v["value"] for v in found], range(len(rows)), xerr=whisker(found), fmt="none", ecolor="#888888"
    )
    axes.scatter([v["value"] for v in found], range(len(rows)), color=colours, zorder=3)
    axes.set_yticks(range(len(rows)), [row["taps"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="probe gap Δ (nats per token; smaller is better)", ylabel="tapped layers")
    best = rows[0]
    close = [row["taps"] for row in rows[1:] if (row["behind"]["low"] or 0.0) <= 0]
    caption = (
        f"Layers {best['taps']} leave the least unrecovered. "
        + (
            f"Compared context by context, {len(close)} others are within noise of it: prefer the cheapest. "
            if close
            else ""
        )
        + "The pink point is the set used in the rest of this report."
    )
    return saved(figure, "taps", "Tap sets ranked by probe gap", caption)


def fisher_spectrum(values: Value) -> Drawn | None:
    """Eigenvalues of the pullback metric by target entropy."""
    bins = values["geometry"]["bins"]
    if not bins:
        return None
    figure, axes = canvas()
    for i, row in enumerate(bins):
        kept = [v for v in row["spectrum"] if v]
        label = f"H(p) {row['entropy']}: rank {row['effective_rank']['value']:.1f}"
        axes.loglog(range(1, len(kept) + 1), kept, "-", color=SERIES[i], label=label)
    axes.set(xlabel="direction (by rank)", ylabel="share of tr G")
    axes.legend(frameon=False)
    widest = max(bins, key=lambda row: row["effective_rank"]["value"])
    caption = (
        "Few directions of the state change the next-token law: at most "
        f"{widest['effective_rank']['value']:.0f} effective ones (where the target's entropy H(p) is "
        f"{widest['entropy']}). A head has to be right in those; a loss that treats all directions of the state alike "
        "spends most of its effort elsewhere."
    )
    return saved(figure, "fisher", "Fisher-Rao spectrum of the target's head", caption)


def doses(values: Value) -> Drawn | None:
    """Surplus against noise and window: curves that no learned map can fake."""
    curves = [values[name] for name in ("noise", "window") if values.get(name)]
    if not curves:
        return None
    figure, axes = canvas()
    for i, curve in enumerate(curves):
        found = curve["surplus"]
        label = "noise (feature standard deviations)" if curve["name"] == "noise" else "window (tokens)"
        axes.errorbar(
            curve["doses"],
            [v["value"] for v in found],
            whisker(found),
            fmt="o-",
            color=SERIES[i],
            label=label,
        )
    axes.set(xlabel="dose", ylabel="surplus at k = 2 (nats per token)")
    axes.legend(frameon=False)
    told = [
        f"{curve['name']}: {'as theory demands' if curve['holds'] else 'AGAINST theory'}" for curve in curves
    ]
    caption = (
        "A true surplus falls when noise is added to the state and rises with the tokens that the target may see. "
        f"{'; '.join(told)}."
    )
    return saved(figure, "doses", "Dose and response", caption)


def learning(values: Value) -> Drawn | None:
    """Gap against training text, with its limit."""
    curves = values.get("curve")
    if not curves:
        return None
    figure, axes = canvas()
    for i, (depth, curve) in enumerate(curves.items()):
        sizes = [point["contexts"] for point in curve["points"]]
        found = [point["gap"] for point in curve["points"]]
        axes.errorbar(
            sizes,
            [v["value"] for v in found],
            whisker(found),
            fmt="o-",
            color=SERIES[i],
            label=f"k = {depth}",
        )
        axes.axhline(curve["limit"], color=SERIES[i], linestyle="--", linewidth=0.8)
    axes.set(xscale="log", xlabel="training contexts of the probe", ylabel="gap Δ (nats per token)")
    axes.legend(frameon=False)
    ends = {k: (c["points"][-1]["gap"]["value"], c["limit"]) for k, c in curves.items()}
    told = ", ".join(f"k = {k}: {now:.3f} now, {limit:.3f} in the limit" for k, (now, limit) in ends.items())
    caption = (
        f"The probe's gap: {told}. Dashed: the fitted limit of endless text. Where a curve still falls, a head trained "
        "on more text may do better than this probe."
    )
    return saved(figure, "curve", "Learning curve of the probe", caption)
