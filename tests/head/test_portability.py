"""Which engines can load what, by switch, layout and layer-id field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.head.config import HeadConfig
from specdec.head.export import TargetNames, save_raw, save_speculators
from specdec.head.model import DraftHead
from specdec.head.portability import check

V1, V2, SGLANG = "vLLM (V1 runner)", "vLLM (V2 runner)", "SGLang"
LLAMA_CPP, EAGLE, SPECULATORS = "llama.cpp", "EAGLE (SafeAILab)", "speculators"
ENGINES = {V1, V2, SGLANG, LLAMA_CPP, EAGLE, SPECULATORS}
CONFIG = HeadConfig(
    hidden=16,
    target_hidden=16,
    taps=(2, 5, 7),
    intermediate=8,
    heads=2,
    kv_heads=1,
    head_dim=8,
    vocab=12,
    draft_vocab=6,
)
IDS = "eagle_aux_hidden_state_layer_ids"
EVERY_OTHER = torch.arange(6) * 2


def saved(directory: Path, layout: str = "raw", ids: Tensor = EVERY_OTHER, **changes: Any) -> Path:
    head = DraftHead(replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(0.5)
    head.ids.copy_(ids)
    save = save_raw if layout == "raw" else save_speculators
    return save(head, directory / "head", target=TargetNames("t"))


def unable(path: Path, layers: int | None = 10) -> set[str]:
    verdicts = check(path, target_layers=layers, taps=(2, 5, 7))
    assert {verdict.engine for verdict in verdicts} == ENGINES
    assert all(verdict.reasons for verdict in verdicts if not verdict.ok)
    return {verdict.engine for verdict in verdicts if not verdict.ok}


def test_a_portable_raw_head_loads_everywhere_but_in_speculators(tmp_path: Path) -> None:
    assert unable(saved(tmp_path)) == {SPECULATORS}


def test_a_speculators_head(tmp_path: Path) -> None:
    assert unable(saved(tmp_path, "speculators")) == {SGLANG, EAGLE}


@pytest.mark.parametrize(
    ("changes", "engines"),
    [
        ({"norm_before_residual": True}, {SGLANG, EAGLE}),
        ({"norm_before_fc": True}, {EAGLE}),
        ({"fc_norm": True}, {LLAMA_CPP, EAGLE}),
        ({"norm_output": True}, {LLAMA_CPP, EAGLE}),
        ({"window": 64}, {SGLANG, LLAMA_CPP, EAGLE}),
        (
            {
                "scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            {EAGLE},
        ),
        ({"head_dim": 6}, {EAGLE}),
    ],
)
def test_each_switch_costs_engines(tmp_path: Path, changes: dict[str, Any], engines: set[str]) -> None:
    assert unable(saved(tmp_path, **changes)) == engines | {SPECULATORS}


def edit(directory: Path, change: Any) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def test_ids_at_the_top_alone_are_lost_on_sglang_unless_they_are_its_default(tmp_path: Path) -> None:
    head = edit(saved(tmp_path), lambda c: c.pop("eagle_config"))
    assert SGLANG not in unable(head, layers=10)  # 2, 5, 7 is the default of 10 layers
    assert SGLANG in unable(head, layers=12)
    assert SGLANG in unable(head, layers=None)


def test_nested_ids_alone_are_off_by_one_in_vllm_and_unseen_by_llama_cpp(tmp_path: Path) -> None:
    head = edit(saved(tmp_path), lambda c: c.pop(IDS))
    wrong = unable(head, layers=12)
    assert {V1, V2, LLAMA_CPP} <= wrong and SGLANG not in wrong
    reason = next(v.reasons[0] for v in check(head, target_layers=12) if v.engine == V1)
    assert "[1, 4, 6]" in reason and "[2, 5, 7]" in reason


def test_a_missing_residual_switch_means_another_thing_to_llama_cpp(tmp_path: Path) -> None:
    head = edit(saved(tmp_path, "speculators"), lambda c: c.pop("norm_before_residual"))
    assert LLAMA_CPP in unable(head)


def test_a_missing_draft_vocabulary_size(tmp_path: Path) -> None:
    head = edit(saved(tmp_path, vocab=6, ids=torch.arange(6)), lambda c: c.pop("draft_vocab_size"))
    assert unable(head) == {SGLANG, LLAMA_CPP, SPECULATORS}


def test_other_depths_and_tap_counts(tmp_path: Path) -> None:
    assert EAGLE in unable(saved(tmp_path), layers=12)
    four = save_four(tmp_path)
    wrong = {v.engine for v in check(four) if not v.ok}
    assert {V1, V2, LLAMA_CPP, EAGLE} <= wrong


def save_four(directory: Path) -> Path:
    return saved(directory / "four", taps=(1, 2, 5, 7))
