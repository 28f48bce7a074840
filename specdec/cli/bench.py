"""`specdec bench speed`: the table of speeds, and one JSON line per row in bench/results/."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec.cli.options import add_model, add_sampling, sampling_of
from specdec.errors import SpecdecError

EXAMPLES = """\
examples:
  specdec bench speed --prompts bench/prompts/*.jsonl --drafts ngram,head,auto --limit 10
  specdec bench speed --prompts questions.jsonl --drafts ./my-head --no-transformers --tree 7/10/60"""

DEPTHS = 4  # of which the table shows alpha


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    speed = kinds.add_parser(
        "speed",
        help="tokens per second of every system on every prompt set",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(speed, draft=False)
    add_sampling(speed, max_tokens=128)
    speed.add_argument(
        "--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="prompt sets (jsonl)"
    )
    speed.add_argument("--drafts", default="ngram,head,auto", help="drafters to compare, comma-separated")
    speed.add_argument(
        "--tree", default="auto", metavar="DEPTH/TOPK/NODES", help="fixed tree (default: budget)"
    )
    speed.add_argument("--limit", type=int, default=None, help="first prompts of each set")
    speed.add_argument("--repeats", type=int, default=1, help="runs per prompt; the median counts")
    speed.add_argument("--no-transformers", action="store_true", help="leave transformers' generate out")
    speed.add_argument("--json", action="store_true", help="rows as JSON lines on stdout instead of a table")


def run(args: argparse.Namespace) -> int:
    try:
        from bench import speed
    except ImportError as error:
        raise SpecdecError(
            "is not installed here", field="bench", remedy="Run from a source checkout."
        ) from error
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from specdec.cli.screen import Screen
    from specdec.cli.session import options_of

    sampling = sampling_of(args)
    for name, value in (("limit", args.limit), ("repeats", args.repeats)):
        if value is not None and value < 1:
            raise SpecdecError("is out of range", field=name, value=value, allowed="1 or more")
    with Progress(console=Console(stderr=True)) as progress:

        def tick(name: str, steps: int) -> Callable[[], None]:
            task = progress.add_task(escape(name), total=steps)
            return lambda: progress.advance(task)

        rows = speed.run(
            args.prompts,
            args.target,
            _names(args.drafts),
            options_of(args),
            sampling,
            limit=args.limit,
            repeats=args.repeats,
            with_transformers=not args.no_transformers,
            tick=tick,
        )
    if args.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        # a file has no width of its own, and eighty columns would cut the intervals
        Screen(width=None if sys.stdout.isatty() else 150, markup=False).print(table(rows))
        sys.stderr.write(f"peak resident memory of generate: {rows[0]['generate_peak_mb']} MB\n")
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return list(dict.fromkeys(names))


def table(rows: list[dict[str, Any]]) -> Any:
    """Rows as a rich table; alpha of the first `DEPTHS` depths only, since lookups draft a dozen and more."""
    from rich.table import Table

    out = Table(title="tokens/s include prefill; intervals are 95% over prompts")
    for column in (
        "set",
        "system",
        "tokens/s",
        "over plain",
        "decode only",
        "over transformers",
        "tau",
        f"alpha to {DEPTHS}",
        "same tokens",
    ):
        out.add_column(column, overflow="fold")
    for row in rows:
        out.add_row(
            row["set"],
            row["system"],
            _with_ci(row, "tokens_per_second", digits=1),
            _with_ci(row, "over_plain"),
            _with_ci(row, "decode_over_plain"),
            _with_ci(row, "over_transformers"),
            f"{row['tau']:.2f}" if "tau" in row else "",
            " ".join(f"{a:.2f}" for a in row.get("alpha", [])[:DEPTHS]),
            str(row.get("same_tokens_as_plain", "")),
        )
    return out


def _with_ci(row: dict[str, Any], key: str, digits: int = 2) -> str:
    if key not in row:
        return ""
    low, high = row[f"{key}_ci"]
    return f"{row[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
