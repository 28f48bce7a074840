"""The page: report.html from report.json's values and figures, one file, nothing fetched from anywhere.

What to conclude comes first, in sentences and seven numbers; the tables follow. Knows values, no tensors.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from specdec.surplus.drawing import Drawn
from specdec.surplus.figures import overall_cells
from specdec.surplus.head_figures import why
from specdec.surplus.values import Value

TEMPLATE = Path(__file__).with_name("page.html")
VERDICT_MARKS = {"holds": "good", "fails": "bad", "undecided": "dim", "baseline": "dim"}


def make_page(values: Value, figures: Sequence[Drawn]) -> str:
    """The whole page."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    kind = "Plan report (no head)" if values["kind"] == "plan" else "Surplus against acceptance"
    return template.substitute(
        title=escape(f"{kind}: {values['target']['name']}"),
        facts=_facts(values),
        findings="".join(f"<li>{escape(line)}</li>" for line in findings(values)),
        tiles="".join(_tile(*tile) for tile in tiles(values)),
        figures="".join(_figure(each) for each in figures),
        claims=_claims(values),
        engine=_engine(values),
        head=_head(values),
        taps=_taps(values),
        cells=_cells(values),
        checks=_checks(values),
        making=_making(values),
    )


def show(found: Value | None, digits: int = 3) -> str:
    """ "0.412 [0.398, 0.431]"; a dash where there is no number."""
    if found is None or found["value"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def findings(values: Value) -> list[str]:
    """What a reader should take away, a sentence each."""
    lines = []
    cells = overall_cells(values)
    if cells:
        first = cells[0]
        lines.append(
            f"Beyond the next token, the past holds {show(first['ceiling'])} nats about the first draft token (k = 2); "
            f"a probe on layers {values['taps_used']} reads {show(first['surplus'])} of them and misses "
            f"{show(first['gap'])}."
        )
    if len(values["taps"]) > 1:
        best = values["taps"][0]
        own = next((row for row in values["taps"] if row["taps"] == values["taps_used"]), best)
        lines.append(
            f"Of {len(values['taps'])} tap sets, layers {best['taps']} leave the smallest gap "
            f"({show(best['gap'])} nats); layers {own['taps']}, used here, leave {show(own['behind'])} more on the "
            "same contexts."
        )
    for shape, run in values["engine"].items():
        error = abs(run["tau_predicted"] / run["tau"]["value"] - 1)
        lines.append(
            f"The engine emits {show(run['tau'], 2)} tokens per forward with a {shape}; predicted from other "
            f"documents: {show(run['tau_predicted_interval'], 2)} ({100 * error:.1f}% off)."
        )
    if values["kind"] == "plan" and values["taps"]:
        best = values["taps"][0]
        lines.append(
            f"A head as good as the probe on layers {best['taps']} would emit about {best['tau']:.2f} tokens per "
            "forward with a chain."
        )
    lines += [why(values)] if values["waterfall"] else []
    counted = {
        v: [c["name"] for c in values["claims"] if c["verdict"] == v] for v in ("holds", "fails", "undecided")
    }
    told = "; ".join(f"{verdict}: {', '.join(names) or 'none'}" for verdict, names in counted.items())
    return [*lines, f"Claims. {told}."]


def tiles(values: Value) -> list[tuple[str, str, str]]:
    """(name, number, unit) of the numbers worth a glance."""
    made = []
    cells = overall_cells(values)
    if cells:
        for name in ("surplus", "ceiling", "gap"):
            made.append((f"{name} at k = 2", show(cells[0][name]), "nats per token"))
        made.append(("alpha of the probe (1 - TV)", show(cells[0]["alpha"]), "first draft token"))
    for shape, run in values["engine"].items():
        made.append((f"tau, {shape}", show(run["tau"], 2), f"predicted {run['tau_predicted']:.2f}"))
    floor = values["floor"]
    if floor is not None:
        made.append(
            (
                "numerics floor",
                f"{floor['tv_mean']:.1e}",
                "total variation: trees checked against text read in one piece",
            )
        )
    return made


def _facts(values: Value) -> str:
    told = [
        f"{values['documents']['predictors']} captured documents, {values['rows']:,} positions",
        f"{values['documents']['outcomes']} outcome documents",
        f"temperature {values['temperature']:g}",
        f"budget {values['budget']}",
        f"taps {values['taps_used']}",
    ]
    return escape(" · ".join(told))


def _tile(name: str, value: str, unit: str) -> str:
    head, _, interval = value.partition(" ")
    return (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(head)}</b>'
        f"<small>{escape(interval)} {escape(unit)}</small></div>"
    )


def _figure(drawn: Drawn) -> str:
    data = base64.b64encode(drawn.svg).decode()
    return (
        f'<figure id="{escape(drawn.name)}"><h3>{escape(drawn.title)}</h3>'
        f'<img alt="{escape(drawn.title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(drawn.caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or a sentence where there is nothing to show. Cells are escaped."""
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    if not body:
        return "<p>Not measured in this run.</p>"
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _claims(values: Value) -> str:
    rows = []
    for claim in values["claims"]:
        mark = VERDICT_MARKS[claim["verdict"]]
        verdict = claim["verdict"] + (" (impressive)" if claim["impressive"] else "")
        cells = (claim["name"], show(claim["number"]), claim["threshold"], verdict, claim["note"])
        rows.append(f'<tr class="{mark}">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    top = "".join(f"<th>{name}</th>" for name in ("claim", "number", "threshold", "verdict", "note"))
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _engine(values: Value) -> str:
    rows = []
    for shape, run in values["engine"].items():
        alpha = ", ".join(
            f"{each['value']:.3f}" for each in run["alpha"].values() if each["value"] is not None
        )
        rows.append(
            (shape, show(run["tau"]), show(run["tau_predicted_interval"]), _plain(run["tau_expected"]), alpha)
        )
    return table(("tree", "tau measured", "predicted", "expected under p", "alpha by depth"), rows)


def _head(values: Value) -> str:
    """By depth: the gap and its parts where the probes have that depth, calibration, and three kinds of acceptance."""
    parts = {row["depth"]: row for row in values["waterfall"]}
    met = {row["depth"] + 1: row for row in values.get("selection", [])}
    rows = []
    for row in values["calibration"]:
        split, alpha = parts.get(row["depth"], {}), met.get(row["depth"], {})
        terms = [show(split.get(name)) for name in ("unrecoverable", "capacity", "training", "drift")]
        honest = [show(row["excess_entropy"]), _plain(row["temperature"]), show(row["coverage"])]
        chances = [_plain(alpha.get(name)) for name in ("forced", "survivors", "rounds")]
        rows.append((str(row["depth"]), show(row["gap"]), *terms, *honest, ", ".join(chances)))
    names = ("k", "gap", "not recoverable", "capacity", "training", "drift", "H(q) - H(p)", "temperature")
    return table((*names, "p of its vocabulary", "alpha on all text, survivors, rounds"), rows)


def _taps(values: Value) -> str:
    rows = []
    for row in values["taps"]:
        alpha = ", ".join(f"{each['value']:.3f}" for each in row["alpha"].values())
        align, energy = (
            f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("alignment", "energy")
        )
        gaps = (show(row["gap"]), show(row["behind"]))
        rows.append((row["taps"], *gaps, alpha, f"{row['tau']:.2f}", align, energy))
    names = ("layers", "gap (nats)", "behind the best, same contexts", "p of one child by k", "chain tau")
    return table((*names, "alignment", "Dirichlet"), rows)


def _cells(values: Value) -> str:
    rows = []
    for cell in values["cells"]:
        key = " · ".join(f"{name} {level}" for name, level in cell["key"].items() if name != "taps")
        numbers = [show(cell[name]) for name in ("surplus", "ceiling", "gap", "captured", "alpha", "entropy")]
        rows.append((key, *numbers, str(cell["gap"]["n"]), str(cell["gap"]["documents"])))
    return table(("cell", "S", "C", "Δ", "S/C", "1 - TV", "H(p)", "rows", "documents"), rows)


def _checks(values: Value) -> str:
    entropy, both = values["entropy"], values["cross_check"]
    rows = [
        ("mean target entropy (nats)", show(entropy["shannon"])),
        ("chance that two draws from the target differ (Gini-Simpson)", show(entropy["gini_simpson"])),
        ("tail symbol's mass (probe alpha is at most this much too high)", f"{entropy['tail_mass']:.4f}"),
        ("information about the next token, full vocabulary (nats)", show(entropy["information_full"])),
        ("the same, lumped: an exact coarse-graining can only lower it", show(entropy["information_lumped"])),
        (
            "KL by the local metric over exact KL, small errors (1: they agree)",
            f"{values['geometry']['kl_forecast_ratio']:.3f}",
        ),
    ]
    if both is not None:
        told = "agree" if both["holds"] else "DISAGREE"
        rows.append(
            (
                f"surplus at k = 2 by two estimators, E1 and E2, in nats (allowed {both['allowed']:.3f} apart)",
                f"{show(both['e1'])}, {show(both['e2'])}: {told}",
            )
        )
    rows += _controls(values)
    for depth, bank in values["bank"].items():
        told = ", ".join(f"{name} {value:.3f}" for name, value in bank.items())
        rows.append((f"controls at k = {depth}, validation cross-entropy", told))
    return table(("check", "value"), rows)


def _controls(values: Value) -> list[tuple[str, str]]:
    """What must hold whatever the target: bounds in every cell, the negative control, where the head's error lies."""
    rows = []
    broken = values["bounds"]["broken"]
    told = "holds in every one" if not broken else f"BROKEN in {len(broken)}: {'; '.join(broken)}"
    rows.append((f"0 <= S <= C in {values['bounds']['cells']} cells, within intervals", told))
    blind = values["permuted"]
    if blind is not None:
        told = "0 within 2 standard errors" if blind["holds"] else "NOT 0"
        rows.append(
            (
                "surplus of h permuted within equal z, against its own architecture",
                f"{show(blind['surplus'])}: {told}",
            )
        )
        rows.append(
            ("the same against the best control: S and C are too high by this", show(blind["excess"]))
        )
    for row in values.get("feature_error", []):
        told = f"log share {show(row['share'])}, {show(row['size'], 2)} of the state's square"
        rows.append(
            (f"head's feature error at k = {row['depth']} in predictive directions (0: isotropic)", told)
        )
    return rows


def _making(values: Value) -> str:
    rows = [(name, str(value)) for name, value in values["told"].items()]
    rows += [("seed", str(values["seed"])), ("label symbols", str(values["symbols"]))]
    rows += [("this budget cuts", cut) for cut in values["cuts"]]
    rows += [
        ("cell left out, too few documents", " · ".join(map(str, key.values()))) for key in values["thin"]
    ]
    return table(("", ""), rows)
