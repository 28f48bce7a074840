"""`specdec chat`: a conversation in the terminal, with live tokens per second and tau after each answer."""

from __future__ import annotations

import argparse
import sys

from specdec.cli.options import add_model, add_sampling, sampling_of, taps_of

HELP = """\
commands: /reset forgets the conversation, /plain and /fast switch drafting, /tree colours accepted tokens,
/quit or Ctrl-D leaves; Ctrl-C stops the answer."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = HELP
    add_model(parser)
    add_sampling(parser, max_tokens=512)
    parser.add_argument("--system", default=None, help="a system message to start with")
    parser.add_argument("--show-tree", action="store_true", help="colour accepted draft tokens")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from specdec.cli.session import open_decoder, stream_answer

    sampling = sampling_of(args)
    decoder = open_decoder(args, draft=args.draft, taps=taps_of(args.taps))
    console = Console(stderr=True, highlight=False)
    console.print(f"[dim]{HELP}[/dim]")
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, switches = list(start), {"tree": args.show_tree, "fast": True}
    while (text := _ask()) is not None:
        if text.startswith("/"):
            if text == "/quit":
                break
            messages = list(start) if text == "/reset" else messages
            console.print(f"[dim]{_switch(text, switches)}[/dim]")
            continue
        messages.append({"role": "user", "content": text})
        answer = stream_answer(
            decoder, messages, sampling, "tree" if switches["tree"] else "text", speculate=switches["fast"]
        )
        messages.append({"role": "assistant", "content": answer.text})
        tau = f", tau {answer.counters.tau:.2f}" if answer.counters.rounds else ""
        console.print(
            f"[dim]{len(answer.token_ids)} tokens, {answer.tokens_per_second:.0f} tokens/s{tau}[/dim]"
        )
    return 0


def _ask() -> str | None:
    """The next non-empty line, None at the end of input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if text:
            return text


def _switch(command: str, switches: dict[str, bool]) -> str:
    if command in ("/plain", "/fast"):
        switches["fast"] = command == "/fast"
        return "drafting on" if switches["fast"] else "plain decoding"
    if command == "/tree":
        switches["tree"] = not switches["tree"]
        return "accepted tokens are green" if switches["tree"] else "no colours"
    return "forgotten" if command == "/reset" else HELP
