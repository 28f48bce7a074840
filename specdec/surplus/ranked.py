"""F3: does the ranking of tap sets by probe gap order heads that were really trained on them?

Gaps come from a plan report, lengths from trained heads: their own reports, or any table of accepted lengths. Knows
values of reports only; resamples are drawn from the stated intervals, since the documents are elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdec.errors import MismatchError, RequestError
from specdec.surplus.claims import claim_f3
from specdec.surplus.values import Value, claim_row

DRAWS = 1000


def f3(gaps: Mapping[str, Value], lengths: Mapping[str, Value], *, seed: int = 0) -> Value:
    """The claim's row.

    Args:
        gaps: probe gap of each tap set, by name such as "2+15+27", with intervals.
        lengths: accepted length of the head trained on each.

    Raises:
        RequestError: a head on a tap set that was not ranked, or fewer than six.
    """
    for name in lengths:
        if name not in gaps:
            raise RequestError(
                "was not ranked by the plan report",
                field="taps",
                value=name,
                allowed=", ".join(gaps),
                remedy="Make the plan again with --taps for every head's layers.",
            )
    generator = torch.Generator().manual_seed(seed)
    names = list(lengths)
    columns = [_draws([table[name] for name in names], generator) for table in (gaps, lengths)]
    row = claim_row(claim_f3(columns[0], columns[1]))
    return row | {"note": f"{len(names)} tap sets; intervals drawn from each number's own"}


def check_alike(plan: Value, heads: Sequence[Value]) -> None:
    """Raises MismatchError where a head's report is of another target or temperature than the plan."""
    for head in heads:
        alike = head["target"]["fingerprint"] == plan["target"]["fingerprint"]
        if not alike or head["temperature"] != plan["temperature"]:
            ours, theirs = (
                f"{each['target']['name']} at temperature {each['temperature']:g}" for each in (plan, head)
            )
            raise MismatchError(
                f"the head on layers {head['taps_used']} is not of the plan's target and temperature",
                field="rank",
                value=theirs,
                allowed=ours,
            )


def lengths_of(reports: Sequence[Value], shape: str) -> dict[str, Value]:
    """tau of each report's head by its taps.

    Raises:
        RequestError: a plan report, a shape that was not run, or two heads on the same taps.
    """
    found: dict[str, Value] = {}
    for report in reports:
        if shape not in report["engine"]:
            raise RequestError(
                "this report has no such run",
                field="shape",
                value=shape,
                allowed=", ".join(report["engine"]) or "none: it is a plan report",
            )
        if report["taps_used"] in found:
            raise RequestError("two heads on the same taps", field="taps", value=report["taps_used"])
        found[report["taps_used"]] = report["engine"][shape]["tau"]
    return found


def gaps_of(plan: Value) -> dict[str, Value]:
    """Probe gap of each tap set of a report, as its distance to the best where the report has that: all that an order
    asks for, and with an interval that is not of the text they share."""
    return {row["taps"]: row.get("behind", row["gap"]) for row in plan["taps"]}


def _draws(numbers: Sequence[Value], generator: torch.Generator) -> Tensor:
    """[DRAWS + 1, c]: the values, then normal draws with the width of each interval."""
    value = torch.tensor([n["value"] for n in numbers], dtype=torch.float64)
    known = [(n["high"] - n["low"]) / 3.92 if n["low"] is not None else 0.0 for n in numbers]
    noise = torch.randn(DRAWS, len(numbers), generator=generator, dtype=torch.float64)
    return torch.cat([value[None], value + noise * torch.tensor(known, dtype=torch.float64)])
