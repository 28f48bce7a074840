"""`specdec demo`: the same prompts decoded plainly and with speculation, and a table of what that gave."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from specdec.cli.options import add_model

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "A farmer has 17 sheep, buys 8 more and then sells 5. How many sheep are left? Think step by step.",
)


EPILOG = """\
Weights are float32 unless --dtype says otherwise: there, tokens that differ are a bug, and the exit code is 1."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_model(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each answer (default: 96)")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when tokens differ: in float32 they must not. 130 as soon as an answer was interrupted."""
    from specdec.cli.screen import Screen
    from specdec.cli.session import open_decoder, options_of, stream_answer
    from specdec.sampling import Sampling

    console = Screen(highlight=False)
    coloured = console.color_system is not None and not console.no_color  # else escapes would be text
    fast = open_decoder(args, draft=args.draft)
    plain = fast.with_drafter("none", replace(options_of(args), tree=None))
    sampling = Sampling(max_tokens=args.max_tokens)
    rows = []
    fast.generate(PROMPTS[0], Sampling(max_tokens=8))
    plain.generate(PROMPTS[0], Sampling(max_tokens=8))
    for prompt in PROMPTS:
        console.rule(f"[bold]{prompt}")
        console.print("[dim]plain decoding[/dim]")
        base = stream_answer(plain, prompt, sampling, "text")
        if base.finish_reason == "cancelled":
            return 130
        green = ": accepted draft tokens are [/dim][green]green[/green]" if coloured else "[/dim]"
        console.print(f"[dim]with {fast.engine.drafter.name}{green}")
        sys.stdout.flush()
        answer = stream_answer(fast, prompt, sampling, "tree" if coloured else "text")
        if answer.finish_reason == "cancelled":
            return 130
        rows.append((prompt, base, answer))
    console.print(_table(rows))
    same = all(base.token_ids == answer.token_ids for _, base, answer in rows)
    if args.dtype == "float32" and not same:
        sys.stderr.write("float32 tokens differ: this is a bug, please report it\n")
        return 1
    return 0


def _table(rows: list) -> object:  # type: ignore[type-arg]
    from rich.table import Table

    table = Table(title="greedy decoding, same weights, same loop")
    for column in ("prompt", "plain tokens/s", "speculative tokens/s", "speedup", "tau", "identical tokens"):
        table.add_column(column, overflow="fold")
    for prompt, base, answer in rows:
        table.add_row(
            prompt[:40] + "…",
            f"{base.tokens_per_second:.1f}",
            f"{answer.tokens_per_second:.1f}",
            _ratio(answer.tokens_per_second, base.tokens_per_second),
            f"{answer.counters.tau:.2f}",
            "yes" if base.token_ids == answer.token_ids else "NO",
        )
    return table


def _ratio(fast: float, plain: float) -> str:
    """An answer of one token has no speed."""
    return f"{fast / plain:.2f}x" if plain > 0 else "-"
