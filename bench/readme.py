"""Writes the README's table from the newest rows of `results/speed.jsonl`, so that no figure is typed by hand.

Run as `python -m bench.readme`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.record import RESULTS
from bench.sets import SETS
from specdec.errors import SpecdecError
from specdec.places import replacing

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
NAMES = {"ngram": "n-grams", "head": "shipped head", "auto": "head and n-grams"}


def newest(path: Path) -> list[dict[str, Any]]:
    """The last rows, one per set and system, of the command, machine and commit that last measured transformers, too.

    Raises:
        SpecdecError: a set that the command names was not measured.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = _run([row for row in rows if row["system"] == "transformers"][-1])
    run = [row for row in rows if _run(row) == last]
    asked = [Path(word).stem for word in run[0]["argv"] if word.endswith(".jsonl")]
    if missing := sorted(set(asked or SETS) - {row["set"] for row in run}):
        raise SpecdecError(f"lacks {', '.join(missing)} of its newest run", field=path.name, value=last[2],
                           remedy="Let the bench finish, or run it again.")  # fmt: skip
    return list({(row["set"], row["system"]): row for row in run}.values())


def _run(row: dict[str, Any]) -> tuple[Any, ...]:
    """What the rows of one run share; the first rows written make the tree of the later ones dirty."""
    return row["machine"], row["argv"], row["commit"].removesuffix("-dirty")


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table, one line per prompt set: transformers, the last drafter, and what its factor is made of."""
    first = rows[0]
    cells = {(row["set"], row["system"]): row for row in rows}
    drafters = [s for s in dict.fromkeys(row["system"] for row in rows) if s in NAMES]
    head = ["prompts", "transformers, tokens/s", "specdec, tokens/s", "x transformers",
            "our plain loop, x transformers", *(f"{NAMES[s]}, x plain" for s in drafters), "tau"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for name in [s for s in SETS if (s, "plain") in cells]:
        best = cells[name, drafters[-1]]
        lines.append(_line([
            name,
            _figure(cells.get((name, "transformers"), {}), "tokens_per_second", 1),
            _figure(best, "tokens_per_second", 1),
            _figure(best, "over_transformers"),
            _figure(cells[name, "plain"], "over_transformers"),
            *(_figure(cells[name, s], "over_plain") for s in drafters),
            _figure(best, "tau"),
        ]))  # fmt: skip
    note = (
        f"{first['target']}, {first['dtype'].removeprefix('torch.')}, temperature {first['temperature']:g}, "
        f"{first['max_tokens']} new tokens, {first['prompts']} prompts a set, {first['machine']}, "
        f"{first['threads']} threads, one process, systems in turn; tokens/s include the prefill. Intervals are in "
        "`bench/results/speed.jsonl`, which this command wrote:"
    )
    return "\n".join([*lines, "", note, "", "```", "specdec " + " ".join(first["argv"][1:]), "```"])


def _figure(row: dict[str, Any], key: str, digits: int = 2) -> str:
    return f"{row[key]:.{digits}f}" if row.get(key) is not None else "-"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1] if END in rest else rest
    rows = table(newest(RESULTS / "speed.jsonl"))
    with replacing(README) as fresh:
        fresh.write_text(before + BEGIN + "\n" + rows + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
