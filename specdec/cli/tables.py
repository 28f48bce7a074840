"""What reports say on a terminal: findings and claims of a new one, two side by side, a ranking, the self-check.

Knows values of reports; makes none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specdec.cli.screen import Screen
from specdec.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.surplus.values import Value


def summary(console: Console, values: Value) -> None:
    """Findings and claims on the terminal."""
    from rich.markup import escape
    from rich.table import Table

    from specdec.surplus.page import findings, show

    for line in findings(values):
        console.print(f"- {line}", highlight=False, markup=False)
    table = Table(title="claims (95% document intervals; * passes a stricter mark too)")
    for name in ("claim", "number", "threshold", "verdict", "note"):
        table.add_column(name, overflow="fold")
    colours = {"holds": "green", "fails": "red"}
    for claim in values["claims"]:
        verdict = claim["verdict"] + (" *" if claim["impressive"] else "")
        style = colours.get(claim["verdict"], "dim")
        table.add_row(
            claim["name"], escape(show(claim["number"])), claim["threshold"],
            f"[{style}]{verdict}[/{style}]", escape(claim["note"]),
        )  # fmt: skip
    console.print(table)


def _screen() -> Screen:
    """Standard output; wide enough for a row where nobody says how wide it is."""
    return Screen(width=None if sys.stdout.isatty() else 150)


def compare(left: Path, right: Path) -> int:
    """Two reports side by side, on standard output."""
    from rich.markup import escape
    from rich.table import Table

    from specdec.surplus.page import show
    from specdec.surplus.write import changes, comparable, read_report

    console, a, b = _screen(), read_report(left), read_report(right)
    for line in comparable(a, b):
        console.print(f"differs: {line}", highlight=False, markup=False, style="yellow")
    table = Table(title="A against B (intervals that do not overlap are apart)")
    for name in ("number", "A", "B", ""):
        table.add_column(name, overflow="fold")
    for name, ours, theirs, word in changes(a, b):
        row = (name, show(ours), show(theirs))
        table.add_row(*map(escape, row), word, style="bold" if word == "apart" else "")
    console.print(table)
    return 0


def rank(paths: Sequence[Path]) -> int:
    """F3 from a plan report and the reports of trained heads, for every tree shape they share."""
    from specdec.surplus.page import show
    from specdec.surplus.ranked import check_alike, f3, gaps_of, lengths_of
    from specdec.surplus.write import read_report

    plan, *heads = (read_report(path) for path in paths)
    if not heads:
        raise RequestError("needs reports of heads after the plan", field="rank", value=0, allowed=">= 6")
    for path, head in zip(paths[1:], heads, strict=True):
        if not head["engine"]:
            raise RequestError("is no report of a head", field="rank", value=str(path),
                               remedy="The plan comes first, reports made with --head after it.")  # fmt: skip
    check_alike(plan, heads)
    for shape in sorted(set.intersection(*(set(head["engine"]) for head in heads))):
        claim = f3(gaps_of(plan), lengths_of(heads, shape))
        line = f"F3, {shape}: Kendall {show(claim['number'])} ({claim['threshold']}): {claim['verdict']}"
        _screen().print(line, highlight=False, markup=False)
    return 0


def self_check(console: Console) -> int:
    """The closed-form controls: 0 when all pass, 1 when one fails."""
    from rich.table import Table

    from specdec.surplus import controls

    with console.status("running the closed-form controls"):
        checks = controls.self_check()
    table = Table(title="controls with a known answer")
    for name in ("control", "expected", "measured", "tolerance", ""):
        table.add_column(name)
    for check in checks:
        word = "[green]passed[/green]" if check.passed else "[red]FAILED[/red]"
        numbers = (f"{value:.4f}" for value in (check.expected, check.measured, check.tolerance))
        table.add_row(check.name, *numbers, word)
    _screen().print(table)
    return 0 if all(check.passed for check in checks) else 1
