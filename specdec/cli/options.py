"""Options that several verbs share, and what they mean to the library."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from specdec.errors import SpecdecError

if TYPE_CHECKING:
    from specdec.sampling import Sampling

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")


def add_model(parser: argparse.ArgumentParser, *, draft: bool = True) -> None:
    """TARGET, what says how and where it runs, and, with `draft`, --draft, --tree, --taps."""
    parser.add_argument(
        "target",
        nargs="?",
        default="smollm2-135m",
        help="name, directory, .gguf file or Hub id (default: smollm2-135m)",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the weights; auto measures what is fastest"
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--device-map",
        default=None,
        metavar="MAP",
        help="spread a large target over devices: auto, balanced, sequential, or JSON such as "
        '\'{"model.embed_tokens": 0, "model.layers": 1, ...}\' (accelerate\'s)',
    )
    parser.add_argument(
        "--max-length", type=int, default=None, help="context length (default: what fits, at most 4096)"
    )
    parser.add_argument(
        "--memory", type=float, default=None, metavar="GIB", help="for KV caches (default: what is free)"
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "lean", "adapter"),
        help="our own decoder or transformers (default: by self-test)",
    )
    if draft:
        parser.add_argument(
            "--draft",
            default="auto",
            metavar="none|ngram|head|PATH",
            help="who drafts: nobody, lookups in the text, the shipped head or a head's directory; with +ngram "
            "behind it, a head and lookups together (default: head+ngram on a CPU, head on a GPU, ngram without one)",
        )
        parser.add_argument(
            "--tree",
            default="auto",
            metavar="TREE",
            help="a fixed tree, DEPTH/CHILDREN/NODES such as 7/10/60, or sampled/5 for block-verified chains of 5 "
            "drawn from the head (default: as large as pays, by measurement)",
        )
        parser.add_argument(
            "--taps",
            default=None,
            metavar="I,J,K",
            help="layers whose input the head reads, for heads whose checkpoint names none",
        )
    else:
        parser.set_defaults(taps=None)


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None = None) -> None:
    """--temperature and its family; what is not given stays out of the namespace and keeps the library's default."""

    def number(flag: str, kind: type, help_text: str | None = None) -> None:
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help_text)

    number("--temperature", float, "0 is greedy (default)")
    number("--top-p", float, "keep the smallest set of likeliest tokens with this mass")
    number("--top-k", int, "keep so many of the likeliest tokens; 0 keeps all (default)")
    number("--min-p", float, "keep tokens at least this fraction of the likeliest")
    number("--repetition-penalty", float, "1 is none (default)")
    number(
        "--max-tokens",
        int,
        "at most so many new tokens" + (f" (default: {max_tokens})" if max_tokens else ""),
    )
    number("--seed", int, "makes sampling repeat exactly")
    if max_tokens:
        parser.set_defaults(max_tokens=max_tokens)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text (repeatable)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The settings the flags ask for. Raises RequestError naming the one that is out of range."""
    from specdec.sampling import Sampling  # here, because it needs torch and `--help` must not wait for that

    given = {name: getattr(args, name) for name in SETTINGS if name in args}
    return Sampling(**given, stop=tuple(args.stop), ignore_eos=args.ignore_eos)


def device_map_of(text: str | None) -> str | dict[str, int | str] | None:
    """accelerate's word or a JSON object of module -> device.

    >>> device_map_of('{"lm_head": 1}')
    {'lm_head': 1}
    """
    if text is None or text in DEVICE_MAPS:
        return text
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not given or not isinstance(given, dict) or {type(place) for place in given.values()} - {int, str}:
        raise SpecdecError("is no placement", field="device_map", value=text,
                           allowed=", ".join(DEVICE_MAPS) + " or a JSON object of module: device")  # fmt: skip
    return given


def memory_of(gib: float | None) -> int | None:
    """GiB -> bytes."""
    if gib is not None and not 0 < gib * 2**30 < math.inf:
        raise SpecdecError("is no amount of memory", field="memory", value=gib, allowed="GiB above 0")
    return None if gib is None else int(gib * 2**30)


def taps_of(text: str | None) -> tuple[int, ...] | None:
    """ "2,15,27" -> (2, 15, 27)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecdecError(
            "wants whole numbers", field="taps", value=text, allowed="such as 2,15,27"
        ) from None
