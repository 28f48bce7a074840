"""`specdec export`: write a head in another layout, or say which engines can load it and why not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specdec.cli.options import taps_of
from specdec.errors import SpecdecError

EXAMPLES = """\
examples:
  specdec export ./my-head --format speculators --target smollm2-135m --out ./my-head-speculators
  specdec export --check ./my-head"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("head", type=Path, help="directory of a head")
    parser.add_argument("--check", action="store_true", help="only print which engines can load it")
    parser.add_argument("--format", choices=("raw", "speculators"), default="speculators")
    parser.add_argument("--target", default="smollm2-135m", help="the target the export names")
    parser.add_argument("--taps", default=None, metavar="I,J,K", help="for checkpoints that name none")
    parser.add_argument("--out", type=Path, default=None, help="directory to write")


def run(args: argparse.Namespace) -> int:
    from specdec.head.portability import check

    if args.check:
        verdicts = check(args.head)
        for one in verdicts:
            sys.stdout.write(f"{one.engine}: {'yes' if one.ok else 'no: ' + '; '.join(one.reasons)}\n")
        return 0 if all(one.ok for one in verdicts) else 1
    if args.out is None:
        raise SpecdecError("is missing", field="out", remedy="Name the directory to write.")
    _write(args)
    sys.stderr.write(f"written: {args.out}\n")
    return 0


def _write(args: argparse.Namespace) -> None:
    from specdec.head.checkpoint import load_head
    from specdec.head.export import TargetNames, save_raw, save_speculators
    from specdec.target.names import describe

    head = load_head(args.head, taps=taps_of(args.taps))
    save = save_raw if args.format == "raw" else save_speculators
    save(head, args.out, target=TargetNames(**describe(args.target)))
