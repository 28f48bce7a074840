"""`specdec generate`: answer prompts; text to stdout as it comes, or one JSON object per answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from specdec.cli.options import add_model, add_sampling, sampling_of
from specdec.cli.prompts import Dialogue, read_dialogues, read_stdin
from specdec.cli.talk import Row, Talk
from specdec.errors import RequestError

if TYPE_CHECKING:
    from specdec.generate import SpecDecoder
    from specdec.sampling import Sampling

EXAMPLES = """\
examples:
  specdec generate -p "Why is the sky blue?"
  specdec generate -p "Write a haiku." --temperature 0.8 --seed 1 --show-tree
  specdec generate --prompts questions.jsonl --json > answers.jsonl
  specdec generate --prompts questions.jsonl --json --slots 32 > answers.jsonl
  echo "Summarize: ..." | specdec generate --draft ngram
  specdec generate ./my-model --draft ./my-head --tree 7/10/60 -p "Hello"

FILE is jsonl; each row has `turns` (user turns, answered one after another), `messages` or `prompt`.
With --slots, as many rows are answered at once: more tokens per second in all, the same answers, written in the order
of FILE. Speculation pays less the more there are, and turns itself off where it does not.
With --show-tree, drafted tokens that the target accepted are green, its own are plain. A row of FILE that cannot be
answered is told on standard error, the others go on; the exit code is then 2."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add_model(parser)
    add_sampling(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", default=None, help="the prompt (default: standard input)")
    source.add_argument("--prompts", type=Path, default=None, metavar="FILE", help="jsonl of prompts")
    parser.add_argument("--plain", action="store_true", help="the baseline: the same loop without drafting")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue each text by itself")
    parser.add_argument(
        "--show-tree", action="store_true", help="colour accepted draft tokens as they appear"
    )
    parser.add_argument(
        "--slots", type=int, default=1, metavar="N", help="rows of FILE answered at once (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per answer on stdout")


def run(args: argparse.Namespace) -> int:
    sampling = sampling_of(args)
    if args.slots < 1 or (args.slots > 1 and (args.prompts is None or args.show_tree)):
        raise RequestError("is out of range", field="slots", value=args.slots,
                           allowed="1 or more for a FILE without --show-tree, else 1")  # fmt: skip
    dialogues = list(_dialogues(args))
    from specdec.cli.session import open_decoder

    decoder = open_decoder(args, draft="none" if args.plain else args.draft, slots=args.slots)
    code = 0
    for row in _rows(decoder, dialogues, sampling, args):
        if row["finish_reason"] == "error":
            code = max(code, 2 if row["stats"] is None else 1)
        if row["finish_reason"] == "cancelled":
            code = 130
        if args.json or args.slots > 1:
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n" if args.json else row["text"] + "\n")
            sys.stdout.flush()
    return code


def _rows(
    decoder: SpecDecoder, dialogues: list[Dialogue], sampling: Sampling, args: argparse.Namespace
) -> Iterator[Row]:
    if args.slots > 1:
        from specdec.cli.many import Many

        yield from Many(decoder, dialogues, sampling, args.raw).rows()
        return
    for dialogue in dialogues:
        for row in _one_by_one(decoder, Talk(dialogue, args.raw), sampling, args):
            yield row
            if row["finish_reason"] == "cancelled":
                return


def _dialogues(args: argparse.Namespace) -> Iterator[Dialogue]:
    if args.prompts is not None:
        yield from read_dialogues(args.prompts)
        return
    text = args.prompt if args.prompt is not None else read_stdin()
    if not text:
        raise RequestError(
            "is empty", field="prompt", remedy="Give -p TEXT, --prompts FILE or text on stdin."
        )
    yield Dialogue("0", (), (text,))


def _one_by_one(
    decoder: SpecDecoder, talk: Talk, sampling: Sampling, args: argparse.Namespace
) -> Iterator[Row]:
    """Each turn's answer, shown while it comes unless JSON is wanted."""
    from specdec.cli.session import stream_answer

    show = None if args.json else ("tree" if args.show_tree else "text")
    while not talk.over:
        try:
            yield talk.answered(stream_answer(decoder, talk.ask(), sampling, show, chat=not args.raw))
        except RequestError as error:
            if args.prompts is None:
                raise
            yield talk.refused(error)
