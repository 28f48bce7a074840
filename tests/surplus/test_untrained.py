"""The negative control on real text: what a network of random weights knows of the tokens to come.

Both networks read the same text; labels, folds, controls and probe are the same, so only the states differ.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.steps import SMOL, random_target
from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.surplus.brief import beginning, finals
from specdec.surplus.capture import target_head
from specdec.surplus.contract import Captured
from specdec.surplus.estimate import cross_fit
from specdec.surplus.interval import Interval, resamples
from specdec.surplus.material import prepare
from specdec.surplus.plan import QUICK
from specdec.target.load import load_target
from specdec.target.protocol import Target

PROMPTS = Path(__file__).parents[2] / "bench" / "prompts"
SETS, TAPS, LENGTH, LEAST = ("chat", "code", "math", "instruct", "qa"), (2, 15, 29), 64, 24
PLAN = replace(QUICK, symbols=512, draws=200, table=replace(QUICK.table, epochs=1))


@torch.inference_mode()
def read(target: Target, texts: list[list[int]], taps: tuple[int, ...]) -> Tensor:
    """Taps [T, A, H] of all texts, one after another."""
    cache, slot, parts = KVCache(target.info.cache, 1, LENGTH), torch.zeros(1, dtype=torch.int64), []
    for text in texts:
        states = target.forward(torch.tensor([text]), chunk_rows(slot, slot, len(text)), cache, taps)
        parts.append(states.features[0].view(len(text), len(taps), -1))
    return torch.cat(parts).clone()


def captured(target: Target, texts: list[list[int]]) -> Captured:
    sizes = torch.tensor([len(text) for text in texts])
    states = read(target, texts, (*TAPS, target.info.layers))
    return Captured(
        ids=torch.tensor([token for text in texts for token in text]),
        doc=torch.arange(len(texts)).repeat_interleave(sizes),
        position=torch.cat([torch.arange(len(text)) for text in texts]),
        domain=torch.zeros(int(sizes.sum()), dtype=torch.int64),
        taps=states[:, :-1], final=states[:, -1], head=target_head(target, 1.0), domains=("text",), layers=TAPS,
    )  # fmt: skip


@pytest.mark.real
@pytest.mark.slow
def test_random_weights_know_far_less_than_the_targets_own() -> None:
    loaded = load_target("smollm2-135m", dtype=torch.float32, prefer="lean")
    target, tokenizer = loaded.target, loaded.tokenizer
    lines = [
        json.loads(line) for name in SETS for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()
    ]
    prompts = [line["turns"][0] if "turns" in line else line["prompt"] for line in lines]
    texts = [ids[:LENGTH] for prompt in prompts if len(ids := tokenizer.encode(prompt)) >= LEAST][:120]
    text = captured(target, texts)
    with torch.inference_mode():
        embedding = target.embed(torch.arange(target.info.vocab)).float().clone()
    material = prepare(text, embedding.clone(), PLAN, None)
    before = beginning(target, text.ids, text.doc, material.labels, text.head, material.lumping)
    brief = finals(target, text.ids, text.doc, (2,), before)[2].brief(text.head, material.lumping)
    data = replace(material, briefs={2: brief}).data(TAPS)
    settings = replace(PLAN.estimate(ranking=True), depths=(2,))
    torch.manual_seed(0)
    random = read(random_target(SMOL, torch.device("cpu"), torch.float32), texts, TAPS).flatten(1)
    found: list[Interval] = []
    for features in (data.features, random):
        rows = cross_fit(replace(data, features=features), text.position, settings)[2].scores
        found.append(resamples(rows.doc, draws=PLAN.draws).mean(rows.surplus))
    trained, untrained = found
    assert trained.low > 0.1
    assert untrained.value < 0.5 * trained.value and untrained.high < trained.low
