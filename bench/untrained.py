"""The negative control on real text: what states of a network with random weights know, against the target's own.

Run as `python -m bench.untrained --work WORK` on the working directory of `specdec report --work WORK`. A network of
the target's architecture with untrained weights reads the very text that the target wrote; the same probe, folds and
labels then measure the surplus at k = 2 from both (theory.md 2.4: well below the trained one). One row goes to
`results/untrained.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.record import append
from specdec.surplus.capture import Document, documents, target_head
from specdec.surplus.contract import Captured
from specdec.surplus.estimate import cross_fit
from specdec.surplus.interval import resamples
from specdec.surplus.material import prepare
from specdec.surplus.plan import STANDARD, TapSet, name_of
from specdec.surplus.shards import Manifest, read_manifest
from specdec.surplus.values import number
from specdec.target.load import load_target


def captured_of(texts: Sequence[Document], manifest: Manifest, head: Any) -> Captured:
    """Written rows of the texts, as an estimator takes them."""
    sizes = torch.tensor([text.ids.shape[0] - text.start for text in texts])
    return Captured(
        ids=torch.cat([text.ids[text.start :] for text in texts]),
        doc=torch.arange(len(texts)).repeat_interleave(sizes),
        position=torch.cat([torch.arange(text.start, text.ids.shape[0]) for text in texts]),
        domain=torch.tensor([text.domain for text in texts]).repeat_interleave(sizes),
        taps=torch.cat([text.taps[text.start :] for text in texts]),
        final=torch.cat([text.final[text.start :] for text in texts]),
        head=head, domains=manifest.domains, layers=manifest.layers,
    )  # fmt: skip


@torch.inference_mode()
def untrained_states(directory: Path, texts: Sequence[Document], taps: TapSet) -> Tensor:
    """Taps [N, A * d] of the written rows from a network with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=torch.float32
    ).eval()
    parts = []
    for text in texts:
        states = model.model(text.ids[None], output_hidden_states=True).hidden_states
        parts.append(torch.cat([states[layer][0, text.start :] for layer in taps], dim=-1).to(torch.bfloat16))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--work", type=Path, required=True, help="working directory of a report")
    parser.add_argument("--taps", default="2,15,29", metavar="I,J,K")
    parser.add_argument("--longest", type=int, default=320, help="tokens of a document read (default: 320)")
    args = parser.parse_args()
    taps = tuple(map(int, args.taps.split(",")))
    loaded = load_target(args.target, dtype=torch.float32)
    target, manifest = loaded.target, read_manifest(args.work / "capture")
    texts = [t for t in documents(args.work / "capture", manifest) if t.ids.shape[0] <= args.longest]
    captured = captured_of(texts, manifest, target_head(target, manifest.temperature))
    embedding = target.embed(torch.arange(target.info.vocab)).detach().float().clone()
    data = prepare(captured, embedding, STANDARD, None).data(taps)
    settings = STANDARD.estimate(ranking=True)
    found = {}
    for name, features in (
        ("trained", data.features),
        ("untrained", untrained_states(loaded.files.directory, texts, taps)),
    ):
        rows = cross_fit(
            replace(data, features=features), captured.position, settings, domain=captured.domain
        )[2].scores
        found[name] = number(resamples(rows.doc, draws=STANDARD.draws, minimum=2).mean(rows.surplus))
        Console().print(f"{name}: S_2 {found[name]}")
    append("untrained", [{"target": args.target, "taps": name_of(taps), "documents": len(texts), **found}])


if __name__ == "__main__":
    main()
