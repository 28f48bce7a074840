"""`specdec generate`: answer prompts; text to stdout as it comes, or one JSON object per answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli.options import add_model, add_sampling, sampling_of
from specdec.cli.prompts import Dialogue, read_dialogues, read_stdin
from specdec.errors import RequestError

if TYPE_CHECKING:
    from specdec.sampling import Sampling

EXAMPLES = """\
examples:
  specdec generate -p "Why is the sky blue?"
  specdec generate -p "Write a haiku." --temperature 0.8 --seed 1 --show-tree
  specdec generate --prompts questions.jsonl --json > answers.jsonl
  echo "Summarize: ..." | specdec generate --draft ngram
  specdec generate ./my-model --draft ./my-head --tree 7/10/60 -p "Hello"

FILE is jsonl; each row has `turns` (user turns, answered one after another), `messages` or `prompt`.
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
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument(
        "--show-tree", action="store_true", help="colour accepted draft tokens as they appear"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per answer on stdout")


def run(args: argparse.Namespace) -> int:
    sampling = sampling_of(args)
    dialogues = list(_dialogues(args))
    from specdec.cli.session import open_decoder

    decoder = open_decoder(args, draft="none" if args.plain else args.draft)
    code = 0
    for dialogue in dialogues:
        for row in _answers(decoder, dialogue, sampling, args):
            if row["finish_reason"] == "error":
                code = max(code, 2 if row["stats"] is None else 1)
            if args.json:
                sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
                sys.stdout.flush()
            if row["finish_reason"] == "cancelled":
                return 130
    return code


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


def _answers(
    decoder: Any, dialogue: Dialogue, sampling: Sampling, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Answer the turns one after another, each with the history before it."""
    from specdec.cli.session import stream_answer

    messages = [dict(m) for m in dialogue.messages]
    for turn, text in enumerate(dialogue.turns):
        messages.append({"role": "user", "content": text})
        prompt = text if args.raw or len(messages) == 1 else messages
        show = None if args.json else ("tree" if args.show_tree else "text")
        try:
            answer = stream_answer(decoder, prompt, sampling, show, chat=not args.raw)
        except RequestError as error:
            if args.prompts is None:
                raise
            sys.stderr.write(f"specdec generate: {dialogue.id}: {error}\n")
            yield _refused(dialogue.id, turn)  # the other rows of the file are still answered
            return
        if answer.error:
            sys.stderr.write(f"specdec generate: {dialogue.id}: {answer.error}\n")
        messages.append({"role": "assistant", "content": answer.text})
        yield {
            "id": dialogue.id,
            "turn": turn,
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "stats": answer.stats(),
        }
        if answer.finish_reason == "cancelled":
            return


def _refused(name: str, turn: int) -> dict[str, Any]:
    """The row of a turn that could not be asked; later turns of its dialogue are left out."""
    return {"id": name, "turn": turn, "text": "", "token_ids": [], "finish_reason": "error", "prompt_tokens": None,
            "stats": None}  # fmt: skip
