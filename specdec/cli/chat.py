"""`specdec chat`: a conversation in the terminal, with live tokens per second and tau after each answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from specdec.cli.options import add_model, add_sampling, sampling_of
from specdec.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.generate import SpecDecoder
    from specdec.sampling import Sampling

HELP = """\
commands: /reset forgets the conversation, /plain and /fast switch drafting, /tree colours accepted tokens,
/quit or Ctrl-D leaves; Ctrl-C stops the answer or gives up the line."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = HELP
    add_model(parser)
    add_sampling(parser, max_tokens=512)
    parser.add_argument("--system", default=None, help="a system message to start with")
    parser.add_argument("--show-tree", action="store_true", help="colour accepted draft tokens")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from specdec.cli.session import open_decoder

    sampling = sampling_of(args)
    decoder = open_decoder(args, draft=args.draft)
    console = Console(stderr=True, highlight=False)
    console.print(f"[dim]{HELP}[/dim]")
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, switches = list(start), {"tree": args.show_tree, "fast": True}
    while (text := _ask(console)) is not None:
        if text.startswith("/"):
            if text == "/quit":
                break
            messages = list(start) if text == "/reset" else messages
            console.print(f"[dim]{_switch(text, switches)}[/dim]")
            continue
        messages.append({"role": "user", "content": text})
        _answer(decoder, messages, sampling, switches, console)
    return 0


def _answer(
    decoder: SpecDecoder,
    messages: list[dict[str, str]],
    sampling: Sampling,
    switches: dict[str, bool],
    console: Console,
) -> None:
    """Answer the last message and append that; a turn that cannot be answered is dropped, the others stay."""
    from specdec.cli.session import stream_answer

    try:
        prompt = decoder.encode(messages)
        room = max(decoder.engine.limits.length - len(prompt), 1)  # with none, the prompt itself is refused
        capped = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        show = "tree" if switches["tree"] else "text"
        answer = stream_answer(decoder, prompt, capped, show, speculate=switches["fast"])
        wrong = answer.error
    except RequestError as error:
        wrong = str(error)
    if wrong is not None:
        messages.pop()
        console.print(
            f"{wrong}\nThis turn is forgotten; /reset forgets the whole conversation.", markup=False
        )
        return
    messages.append({"role": "assistant", "content": answer.text})
    tau = f", tau {answer.counters.tau:.2f}" if answer.counters.rounds else ""
    console.print(f"[dim]{len(answer.token_ids)} tokens, {answer.tokens_per_second:.0f} tokens/s{tau}[/dim]")


def _ask(console: Console) -> str | None:
    """The next non-empty line, None at the end of input."""
    while True:
        try:
            text = _line().strip()
        except EOFError:
            return None
        except UnicodeDecodeError:
            console.print("this line is not UTF-8 and was left out", markup=False)
            continue
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            # no answer to stop: the line alone is given up
            console.print("\n[dim]/quit or Ctrl-D leaves[/dim]")
            continue
        if text:
            return text


def _line() -> str:
    """From a file line by line as bytes: one that is not UTF-8 must not take the others with it."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - with it, input() has arrow keys and a history
        return input("> ")
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8")


def _switch(command: str, switches: dict[str, bool]) -> str:
    if command in ("/plain", "/fast"):
        switches["fast"] = command == "/fast"
        return "drafting on" if switches["fast"] else "plain decoding"
    if command == "/tree":
        switches["tree"] = not switches["tree"]
        return "accepted tokens are green" if switches["tree"] else "no colours"
    return "forgotten" if command == "/reset" else HELP
