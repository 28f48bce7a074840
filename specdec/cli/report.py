"""`specdec report`: how much the target's states know, how much a head captures, and what the engine accepts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli.options import DTYPES, taps_of
from specdec.errors import RequestError, SpecdecError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.head.model import DraftHead
    from specdec.target.protocol import Target

EXAMPLES = """\
examples:
  specdec report --prompts prompts.jsonl --out plan                       which taps, which domains, what tau
  specdec report --prompts a.jsonl b.jsonl --head my-head --out report    and what this head makes of it
  specdec report --compare plan/report.json report/report.json
  specdec report --self-check                                             closed-form controls; exit 1 if one fails

First a report without --head, which plans: what the target's states know of later tokens, and which layers to read.
Then one with a head: what it makes of that, and where it loses. Open OUT/report.html; specdec/surplus/README.md tells
how to read it. The minutes are estimated before anything runs. An interrupted report goes on when the same command is
given again (its captured text lies in OUT.work)."""
BUDGETS = ("quick", "standard", "full")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--target", default="smollm2-135m", help="name, directory, .gguf file or Hub id")
    parser.add_argument(
        "--head", default=None, metavar="auto|PATH", help="a draft head (default: none, a plan report)"
    )
    parser.add_argument(
        "--prompts", nargs="+", type=Path, metavar="FILE", help="jsonl files of prompts, one domain each"
    )
    parser.add_argument("--out", type=Path, help="directory of the report; must not exist (but --force)")
    parser.add_argument(
        "--budget",
        default="quick",
        choices=BUDGETS,
        help="prompts used at most: quick 150, standard 288, full 1,000 (default: quick)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of serving (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument(
        "--taps",
        action="append",
        default=[],
        metavar="I,J,K",
        help="layers whose input is read, a set to rank (repeatable)",
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="weights (default: float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace a finished report")
    parser.add_argument("--work", type=Path, default=None, help="keep captured text here (default: OUT.work)")
    parser.add_argument("--json", action="store_true", help="print report.json on standard output too")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two reports")
    parser.add_argument(
        "--rank",
        nargs="+",
        type=Path,
        metavar="REPORT",
        help="a plan report, then reports of heads trained on its tap sets: does the plan order them (F3)?",
    )
    parser.add_argument(
        "--self-check", action="store_true", help="run the controls whose answer is known in closed form"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from specdec.cli.tables import compare, rank, self_check

    console = Console(stderr=True)
    if args.self_check:
        return self_check(console)
    if args.compare:
        return compare(*args.compare)
    if args.rank:
        return rank(args.rank)
    if not args.prompts or args.out is None:
        raise RequestError(
            "needs --prompts and --out", field="report", remedy="Or --compare, --rank or --self-check."
        )
    return make(console, args)


def make(console: Console, args: argparse.Namespace) -> int:
    """The report itself."""
    from specdec.cli.passages import passages_of
    from specdec.cli.tables import summary
    from specdec.places import check_writable
    from specdec.surplus import run as runs
    from specdec.surplus.plan import check_documents, plan_of
    from specdec.surplus.write import check_out, check_writers, write_report
    from specdec.target.load import load_target

    check_writers()
    out = (
        args.out.resolve()
    )  # "." has no name to put ".work" after, and a link cannot be replaced by a report
    check_out(out, force=args.force)
    work = args.work or out.with_name(out.name + ".work")
    check_writable(work, "work")
    dialogues = _dialogues(args.prompts)
    plan = plan_of(args.budget)
    check_documents(plan, len(dialogues), head=args.head is not None)
    tap_sets = tuple(taps for taps in (taps_of(text) for text in args.taps) if taps is not None)
    loaded = load_target(args.target, dtype=_dtype(args.dtype), device=args.device)
    head = _head(loaded.target, args.head)
    passages = passages_of(console, loaded, dialogues, plan.max_tokens)
    check_documents(plan, len(passages), head=head is not None)
    order = runs.Order(
        target=loaded.target, passages=passages, plan=plan, work=work, head=head, tap_sets=tap_sets,
        temperature=args.temperature, seed=args.seed, told=_told(args, len(dialogues)),
    )  # fmt: skip
    _announce(console, order)
    started = time.monotonic()
    with _Bars(console) as bars:
        report = runs.run(order, bars.say)
    report.values["told"] |= _cost(time.monotonic() - started)
    page = write_report(report, out, force=args.force)
    if args.work is None:
        _remove(work)
    summary(console, report.values)
    told = report.values["told"]
    console.print(f"peak memory {told['peak memory (GiB)']} GiB, {told['minutes']} minutes", highlight=False)
    console.print(f"report: {page}", highlight=False, markup=False)
    if args.json:
        sys.stdout.write((out / "report.json").read_text(encoding="utf-8") + "\n")
    return 0


def _cost(seconds: float) -> dict[str, float]:
    """Minutes and peak memory of this process; what an earlier, interrupted run kept is not counted in the minutes."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    minutes, busy = seconds / 60, (used.ru_utime + used.ru_stime) / 60
    return {
        "minutes": round(minutes, 1), "processor minutes": round(busy, 1), "peak memory (GiB)": round(peak, 2)
    }  # fmt: skip


def _dtype(name: str) -> Any:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _dialogues(files: Sequence[Path]) -> list[tuple[str, Any]]:
    """(domain, dialogue) of every row; the domain is the row's category, else the file's name."""
    from specdec.cli.prompts import read_dialogues

    return [(row.category or file.stem, row) for file in files for row in read_dialogues(file)]


def _head(target: Target, name: str | None) -> DraftHead | None:
    """Load and check a head. Raises SpecdecError for "auto" where none ships, MismatchError for a stranger."""
    if name is None:
        return None
    from specdec.head.checkpoint import load_head
    from specdec.head.match import check_match
    from specdec.head.pretrained import shipped_head

    info = target.info
    path = shipped_head(info.name) if name == "auto" else Path(name)
    if path is None:
        raise SpecdecError(
            "no head ships for this target", field="head", value=info.name, remedy="Name a directory."
        )
    head = load_head(path, target_layers=info.layers, dtype=info.dtype, device=info.device)
    check_match(head.config, info)
    head.freeze()
    return head


def _told(args: argparse.Namespace, prompts: int) -> dict[str, Any]:
    """How the report was made; file names without their directories."""
    from importlib import metadata

    from specdec import __version__

    command = ["specdec report", f"--target {args.target}", f"--budget {args.budget}"]
    command += [f"--head {args.head}"] if args.head else []
    command += [f"--taps {taps}" for taps in args.taps]
    command += [
        f"--temperature {args.temperature:g} --seed {args.seed} --dtype {args.dtype} --device {args.device}"
    ]
    command += [f"--prompts {' '.join(path.name for path in args.prompts)}"]
    return {
        "command": " ".join(command),
        "prompts": prompts,
        "versions": f"specdec {__version__}, torch {metadata.version('torch')}",
    }


def _announce(console: Console, order: Any) -> None:
    """What will be done, and about how long it takes."""
    from specdec.surplus.plan import Sizes, arithmetic_rate, estimated_minutes
    from specdec.surplus.run import tap_sets_of

    info, plan = order.target.info, order.plan
    documents = min(plan.documents, len(order.passages))
    outcomes = round(documents * plan.outcome_share) if order.head is not None else 0
    predictors, outcomes = min(documents - outcomes, plan.predictors), min(outcomes, plan.outcomes)
    widths = tuple(len(taps) for taps in tap_sets_of(order))
    sizes = Sizes(info.hidden, info.layers, info.vocab, predictors, outcomes, widths)
    minutes = estimated_minutes(plan, sizes, arithmetic_rate())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in minutes.items() if value >= 0.5)
    console.print(
        f"{plan.budget} report on {info.name}: {predictors} documents predict, {outcomes} are measured, "
        f"{len(widths)} tap sets; about {sum(minutes.values()):.0f} minutes ({parts or 'seconds each'})",
        highlight=False,
        markup=False,
    )
    for cut in plan.cuts:
        console.print(f"  this budget cuts: {cut}", highlight=False, style="dim")


class _Bars:
    """Progress by stage on the terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, stage: str, done: int, of: int) -> None:
        """Move one bar."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=of)
        self.progress.update(self.tasks[stage], completed=done, total=of)


def _remove(work: Path) -> None:
    """Delete what a run left in its working directory, and nothing else that may lie there."""
    import contextlib
    import shutil

    for part in ("capture", "stages"):
        shutil.rmtree(work / part, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: somebody else's files
        work.rmdir()
