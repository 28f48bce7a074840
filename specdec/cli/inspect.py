"""`specdec inspect`: what a target or a head is, whether they match, and which engines can load the head."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from specdec.cli.options import add_model

EXAMPLES = """\
examples:
  specdec inspect                              the default target and its shipped head
  specdec inspect --draft ./my-head            a head against the default target
  specdec inspect ./model.gguf --draft none    a target alone"""

SHIPPED = ("auto", "head", "head+ngram")  # words that ask for the head that ships with the package


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from specdec.cli.session import loading, options_of
    from specdec.generate import SpecDecoder

    options = options_of(args)
    with loading(args):
        decoder = SpecDecoder.from_pretrained(args.target, "none", options)
    report: dict[str, Any] = {"target": _target(decoder)}
    head = _head_path(decoder.engine.target.info.name, args.draft)
    matches = True
    if head is not None:
        report["head"], matches = _head(decoder, head, options.taps)
    elif args.draft in SHIPPED:
        sys.stderr.write(f"no head ships for {decoder.engine.target.info.name}\n")
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        _show(report)
    return 0 if matches else 1


def _head_path(target: str, draft: str) -> Path | None:
    from specdec.engine.build import LOOKUPS
    from specdec.head.pretrained import shipped_head

    if draft in ("", "none", "ngram"):
        return None
    return shipped_head(target) if draft in SHIPPED else Path(draft.removesuffix(LOOKUPS))


def _target(decoder: Any) -> dict[str, Any]:
    from specdec.native.library import why_not
    from specdec.native.linear import told

    info, engine = decoder.engine.target.info, decoder.engine
    return {
        "name": info.name,
        "architecture": info.architecture,
        "backend": type(decoder.loaded.target).__name__,
        "attention": choice.told()
        if (choice := getattr(decoder.loaded.target, "choice", None))
        else "reference",
        "C kernels": why_not() or f"yes ({told()})",
        "fused kernels": _fused(info.device),
        "captured in CUDA graphs": "yes" if hasattr(engine.target, "recording") else "no",
        "rounds": _rounds(engine),
        "layers": info.layers,
        "hidden": info.hidden,
        "vocab": info.vocab,
        "max_length": info.max_length,
        "dtype": str(info.dtype).removeprefix("torch."),
        "device": str(info.device),
        "stop_ids": list(info.stop_ids),
        "kv_bytes_per_token": info.cache.row_bytes(),
        "fingerprint": info.fingerprint,
        "directory": str(decoder.loaded.files.directory),
    }


def _fused(device: Any) -> str:
    from specdec.fused.available import overlaps, runs

    if not runs(device):
        return "no"
    return "yes, overlapping" if overlaps() else "yes"


def _rounds(engine: Any) -> str:
    if engine.pipeline is not None:
        return "one device program each, launched one ahead of the host"
    return "step by step" + (f" ({engine.refused})" if engine.refused else "")


def _head(decoder: Any, path: Path, taps: tuple[int, ...] | None) -> tuple[dict[str, Any], bool]:
    """Facts of the head, whether it matches, who can load it."""
    from dataclasses import asdict

    from specdec.errors import MismatchError
    from specdec.head.checkpoint import load_head
    from specdec.head.match import check_match
    from specdec.head.portability import check

    info = decoder.engine.target.info
    head = load_head(path, taps=taps, target_layers=info.layers)
    facts = {
        "path": str(path),
        **asdict(head.config),
        "parameters": sum(p.numel() for p in head.parameters()),
    }
    try:
        check_match(head.config, info)
        facts["match"] = "yes"
    except MismatchError as error:
        facts["match"] = f"no: {error}"
    facts["engines"] = {one.engine: one.told() for one in check(path, taps=taps, target_layers=info.layers)}
    return facts, facts["match"] == "yes"


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from specdec.cli.screen import Screen

    for title, facts in report.items():
        table = Table("", "", title=title, show_header=False)
        for key, value in facts.items():
            lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
            table.add_row(key, "\n".join(lines))
        Screen(markup=False).print(table)  # names and paths may hold brackets
