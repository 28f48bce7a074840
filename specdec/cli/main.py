"""`specdec VERB ...`: finds the verb, runs it, turns errors into one line and an exit code.

Exit codes: 0 done, 1 a check the verb makes failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from specdec import __version__
from specdec.errors import SpecdecError

VERBS = {
    "generate": "answer prompts from the command line, a file or standard input",
    "chat": "talk to a model in the terminal",
    "serve": "start an OpenAI-compatible server",
    "train": "train a draft head for a target",
    "report": "measure information surplus against acceptance",
    "bench": "measure speed against plain decoding and transformers",
    "inspect": "tell what a target or a head is, and whether they match",
    "export": "write a head in another layout, or check who can load it",
    "demo": "plain and speculative decoding side by side",
}


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the named verb's own options are loaded."""
    top = argparse.ArgumentParser(
        prog="specdec",
        description="Lossless speculative decoding with a draft head: serve, train, and see why it is accepted.",
        epilog="`specdec VERB --help` explains a verb with examples.",
    )
    top.add_argument("--version", action="version", version=f"specdec {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == verb:
            importlib.import_module(f"specdec.cli.{name}").add_options(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in words if word in VERBS), None)
    _open_what_is_closed()
    try:
        try:
            args = parser(verb).parse_args(words)
            return int(importlib.import_module(f"specdec.cli.{args.verb}").run(args))
        finally:
            sys.stdout.flush()  # a pipe or a file is written to only now, and Python's own flush is too late for us
    except SpecdecError as error:
        return _refused(verb, str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone: nothing more to say, and no traceback at exit
        _forget_output()
        return 0
    except OSError as error:  # a full disk, a file that is a directory: the user's world, not our bug
        _forget_output()
        return _refused(verb, " ".join(str(error).split()))


def _refused(verb: str | None, told: str) -> int:
    print(f"specdec {verb}: {told}" if verb else f"specdec: {told}", file=sys.stderr)  # noqa: T201 - the face speaks
    return 2


def _open_what_is_closed() -> None:
    """Python has None for a standard stream that the caller closed (`>&-`); here it is the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open until the end


def _forget_output() -> None:
    """What cannot be written any more must not be tried again at exit, which would complain with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
