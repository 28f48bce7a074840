"""`specdec export`: write a head in another layout, or say which engines can load it and why not."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from specdec.cli.options import taps_of
from specdec.errors import SpecdecError

EXAMPLES = """\
examples:
  specdec export ./my-head --format speculators --out ./my-head-speculators
  specdec export --check ./my-head"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("head", type=Path, help="directory of a head")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only print which engines can load it; exit 1 if one that reads its layout cannot",
    )
    parser.add_argument(
        "--format",
        choices=("raw", "speculators"),
        default="speculators",
        help="layout to write (default: speculators)",
    )
    parser.add_argument("--target", default=None, help="the target it was trained on (default: as it says)")
    parser.add_argument(
        "--taps",
        default=None,
        metavar="I,J,K",
        help="layers whose input the head reads, for checkpoints that name none",
    )
    parser.add_argument("--out", type=Path, default=None, help="directory to write")


def run(args: argparse.Namespace) -> int:
    if args.check:
        return _check(args)
    if args.out is None:
        raise SpecdecError("is missing", field="out", remedy="Name the directory to write.")
    _write(args)
    sys.stderr.write(f"written: {args.out}\n")
    return 0


def _check(args: argparse.Namespace) -> int:
    """Exit code 1 when an engine cannot load a head whose layout it reads; another layout is an export away."""
    from specdec.head.checkpoint import open_head
    from specdec.head.portability import check

    taps = taps_of(args.taps)
    open_head(args.head, taps=taps)  # no engine loads a head whose tensors are broken
    verdicts = check(args.head, taps=taps)
    for one in verdicts:
        sys.stdout.write(f"{one.engine}: {one.told()}\n")
    return 0 if all(one.ok for one in verdicts if one.reads_layout) else 1


def _write(args: argparse.Namespace) -> None:
    """In the head's own precision, with the target that its files name."""
    from specdec.head.checkpoint import open_head
    from specdec.head.export import TargetNames, save_raw, save_speculators
    from specdec.head.match import check_sizes
    from specdec.target.names import describe

    opened = open_head(args.head, taps=taps_of(args.taps))
    target = args.target or opened.target
    if target is None:
        raise SpecdecError("the head's files name no target", field="target",
                           remedy="Pass --target with the one it was trained on.")  # fmt: skip
    names = TargetNames(**describe(target))
    check_sizes(opened.head.config, _sizes(target))
    save = save_raw if args.format == "raw" else save_speculators
    save(opened.head, args.out, target=names, dtype=opened.head.dtype)


@dataclass(frozen=True, slots=True)
class _Declared:
    """What a target's config.json says of its sizes."""

    name: str
    vocab: int
    hidden: int
    layers: int


def _sizes(name: str) -> _Declared:
    from specdec.target.files import load_config, resolve
    from specdec.target.stated import stated_config

    config = stated_config(load_config(resolve(name).directory)).get_text_config()
    return _Declared(name, config.vocab_size, config.hidden_size, config.num_hidden_layers)
