"""Writes the README's table from the newest rows of `results/speed.jsonl`, so that no figure is typed by hand.

Run as `python -m bench.readme`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.record import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
SETS = ("chat", "code", "math", "instruct", "summarize", "qa")


def newest(path: Path) -> list[dict[str, Any]]:
    """Rows of the last complete run: those that share the last row's time and command."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = rows[-1]
    return [row for row in rows if (row["time"], row["argv"]) == (last["time"], last["argv"])]


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table: one line per prompt set, one column pair per system."""
    first = rows[0]
    systems = [s for s in dict.fromkeys(row["system"] for row in rows) if s != "transformers"]
    cells = {(row["set"], row["system"]): row for row in rows}
    head = [
        "prompts",
        "transformers, tokens/s",
        *(f"{_name(s)}, x transformers" for s in systems),
        "tau of the head",
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in [s for s in SETS if (s, "plain") in cells]:
        base = cells.get((name, "transformers"), {})
        speeds = [f"{cells[name, s].get('over_transformers', float('nan')):.2f}" for s in systems]
        tau = cells.get((name, "auto"), {}).get("tau", "")
        lines.append(_line([name, f"{base.get('tokens_per_second', float('nan')):.1f}", *speeds, str(tau)]))
    command = "specdec " + " ".join(first["argv"][1:])
    note = (
        f"{first['target']}, {first['dtype'].removeprefix('torch.')}, temperature {first['temperature']:g}, "
        f"{first['max_tokens']} new tokens, {first['prompts']} prompts a set, {first['machine']}, "
        f"{first['threads']} threads, one process, systems in turn; ratios of tokens/s with prefill. `{command}`"
    )
    return "\n".join([*lines, "", note])


def _name(system: str) -> str:
    return {"auto": "shipped head", "plain": "plain loop", "ngram": "n-grams"}.get(system, system)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1] if END in rest else rest
    staging = README.with_suffix(".tmp")
    staging.write_text(
        before + BEGIN + "\n" + table(newest(RESULTS / "speed.jsonl")) + "\n" + END + after, encoding="utf-8"
    )
    staging.replace(README)


if __name__ == "__main__":
    main()
