"""What generate, chat and demo share: opening a decoder from flags and streaming one answer to the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import torch

from specdec.cli.options import device_map_of, memory_of, taps_of
from specdec.engine.build import Options, parse_tree
from specdec.engine.request import Piece
from specdec.generate import Answer, SpecDecoder, answer_of
from specdec.sampling import Sampling

if TYPE_CHECKING:
    from rich.status import Status

GREEN, PLAIN = "\033[32m", "\033[0m"


def options_of(args: argparse.Namespace, *, slots: int | None = 1, most_slots: int = 1) -> Options:
    """Library options from the shared flags; without slots, as many as fit up to `most_slots`."""
    return Options(
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        device=args.device,
        slots=slots,
        max_length=args.max_length,
        tree=parse_tree(args.tree),
        backend=args.backend,
        taps=taps_of(args.taps),
        most_slots=most_slots,
        memory=memory_of(args.memory),
        device_map=device_map_of(args.device_map),
    )


def loading(args: argparse.Namespace) -> Status:
    """A status line on stderr for as long as it is the context."""
    from rich.console import Console
    from rich.markup import escape

    told = f"loading {escape(args.target)}"
    if str(args.device or "cuda").startswith("cuda") and torch.cuda.is_available():
        told += " (a first start on a GPU compiles kernels for some minutes)"
    return Console(stderr=True).status(told)


def open_decoder(args: argparse.Namespace, *, draft: str, slots: int = 1) -> SpecDecoder:
    """Load what the flags name, with a status line on stderr."""
    from rich.console import Console

    with loading(args):
        decoder = SpecDecoder.from_pretrained(args.target, draft, options_of(args, slots=slots))
    info = decoder.engine.target.info
    Console(stderr=True).print(
        f"{info.name}: {info.layers} layers, {str(info.dtype).removeprefix('torch.')} on {info.device}, "
        f"drafter {decoder.engine.drafter.name}",
        style="dim",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return decoder


def stream_answer(
    decoder: SpecDecoder,
    prompt: Any,
    sampling: Sampling,
    show: str | None,
    *,
    chat: bool = True,
    speculate: bool = True,
) -> Answer:
    """One answer; `show` streams "text" or "tree" (accepted drafts green) to stdout.

    Ctrl-C ends the answer: what came so far is kept and the finish reason is "cancelled".
    """
    request = decoder.request(prompt, sampling, chat=chat, speculate=speculate)
    error = None
    pieces = decoder.run(request)
    try:
        for piece in pieces:
            error = piece.error or error
            if show:
                sys.stdout.write(_painted(piece) if show == "tree" else piece.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        request.finish = request.finish or "cancelled"  # also where Ctrl-C came before the first step
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return answer_of(request, error)


def _painted(piece: Piece) -> str:
    """Accepted draft tokens green, the target's own tokens plain."""
    return "".join(f"{GREEN}{text}{PLAIN}" if drafted else text for text, drafted in piece.runs())
