"""`specdec VERB ...`: finds the verb, runs it, turns errors into one line and an exit code.

Exit codes: 0 done, 1 a check the verb makes failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

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
    args = parser(verb).parse_args(words)
    try:
        return int(importlib.import_module(f"specdec.cli.{args.verb}").run(args))
    except SpecdecError as error:
        print(f"specdec {args.verb}: {error}", file=sys.stderr)  # noqa: T201 - the face speaks here
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone: nothing more to say, and no traceback at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a file that is a directory: the user's world, not our bug
        print(f"specdec {args.verb}: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201 - as above
        return 2


if __name__ == "__main__":
    sys.exit(main())
