"""config.json -> HeadConfig: every convention of layer ids, missing keys, rotary spellings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.errors import CheckpointError, MismatchError, UnsupportedError
from specdec.head.export import TargetNames, raw_config, speculators_config
from specdec.head.settings import IDS, head_config, resolve_taps, rope_of

OFFICIAL: dict[str, Any] = {  # shape of the Llama-3.1-8B release
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "vocab_size": 128256,
    "draft_vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 8192}  # fmt: skip


def test_the_official_release_needs_its_taps_named() -> None:
    with pytest.raises(MismatchError, match=r"--taps.*2,16,29"):
        head_config(OFFICIAL, "raw", target_layers=32)
    config = head_config(OFFICIAL, "raw", taps=(2, 16, 29))
    assert (config.theta, config.head_dim, config.max_length) == (10000.0, 128, 2048)
    assert not config.norm_before_residual and config.target_hidden == 4096 and config.fingerprint is None


def nested(ids: list[int]) -> dict[str, Any]:
    return {"eagle_config": {IDS: ids, "use_aux_hidden_state": True}}


@pytest.mark.parametrize(
    ("config", "given", "taps"),
    [
        ({IDS: [2, 16, 29]}, None, (2, 16, 29)),
        (nested([1, 15, 28]), None, (2, 16, 29)),
        ({IDS: [2, 16, 29], **nested([1, 15, 28])}, (2, 16, 29), (2, 16, 29)),
        ({"eagle_config": {"layer_ids": [2, 16, 29]}}, None, (2, 16, 29)),
        ({IDS: [29, 2, 16]}, None, (2, 16, 29)),
        ({}, (1, 9, 17, 25, 33), (1, 9, 17, 25, 33)),
    ],
)
def test_layer_ids_of_every_convention(
    config: dict[str, Any], given: tuple[int, ...] | None, taps: tuple[int, ...]
) -> None:
    assert resolve_taps(config, given, 36) == taps


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({IDS: [2, 16, 29], **nested([2, 16, 29])}, None),
        ({IDS: [2, 16, 29]}, (2, 16, 28)),
        (nested([1, 15, 28]), (1, 15, 28)),
    ],
)
def test_contradicting_ids_are_refused(config: dict[str, Any], given: tuple[int, ...] | None) -> None:
    with pytest.raises(MismatchError, match="disagree"):
        resolve_taps(config, given, None)


def test_a_missing_residual_switch_depends_on_the_layout() -> None:
    raw = head_config(OFFICIAL, "raw", taps=(2, 16, 29))
    full = speculators_config(raw, TargetNames("t"), torch.bfloat16, 3)
    assert head_config(full, "speculators") == raw
    del full["norm_before_residual"]
    assert head_config(full, "speculators").norm_before_residual


def test_rotary_spellings() -> None:
    assert rope_of({}) == (10000.0, None)
    assert rope_of({"rope_theta": 5e5, "rope_scaling": None}) == (5e5, None)
    assert rope_of({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}) == (7.0, None)
    assert rope_of({"rope_scaling": {"type": "linear", "factor": 2.0}}) == (
        10000.0,
        {"type": "linear", "factor": 2.0},
    )
    assert rope_of({"rope_parameters": LLAMA3}) == (10000.0, LLAMA3)
    with pytest.raises(UnsupportedError, match="yarn"):
        rope_of({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        rope_of({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}})
    with pytest.raises(CheckpointError, match="two different"):
        rope_of({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", "wide", "hidden_size"),
        ("vocab_size", True, "vocab_size"),
        ("num_key_value_heads", 5, "kv_heads"),
        ("draft_vocab_size", 200000, "draft_vocab"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("norm_output", "yes", "norm_output"),
        (IDS, "2,16,29", IDS),
        (IDS, [2, 2, 29], "taps"),
        ("specdec", "x", "specdec"),
        ("specdec", {"fingerprint": 5}, "specdec.fingerprint"),
        ("eagle_config", [1], "eagle_config"),
        ("rope_scaling", "linear", "rope_scaling"),
        ("rope_parameters", [1], "rope_parameters"),
        ("rope_parameters", {"rope_type": "linear", "factor": "x"}, "rope_scaling.factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": None}, "rope_scaling.factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}, "rope_scaling.factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": 10**400}, "rope_scaling.factor"),
        ("rope_parameters", LLAMA3 | {"low_freq_factor": 4}, "rope_scaling.low_freq_factor"),
        ("rope_theta", "abc", "rope_theta"),
        ("rope_theta", -1, "theta"),
        ("rope_theta", float("nan"), "rope_theta"),
        ("layer_types", 5, "layer_types"),
        ("head_dim", 63, "head_dim"),
    ],
    ids=str,
)
def test_a_bad_key_is_named(key: str, value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        head_config({IDS: [2, 16, 29]} | OFFICIAL | {key: value}, "raw")


@pytest.mark.parametrize(("key", "value"), [("model_type", "gemma"), ("hidden_act", "gelu")])
def test_another_layer_is_refused(key: str, value: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        head_config(OFFICIAL | {key: value}, "raw", taps=(2, 16, 29))


def test_a_stray_window_key_is_no_window() -> None:
    config = {IDS: [2, 16, 29]} | OFFICIAL | {"sliding_window": 2048}
    assert head_config(config, "raw").window is None
    assert head_config(config | {"layer_types": ["sliding_attention"]}, "raw").window == 2048


def test_our_own_keys_stay_in_their_block() -> None:
    config = head_config({IDS: [2, 16, 29], "specdec": {"fingerprint": "f"}} | OFFICIAL, "raw")
    written = raw_config(config, TargetNames("t", max_length=9000), torch.bfloat16)
    assert written["specdec"] == {"version": 1, "target": "t", "fingerprint": "f"}
    assert written["max_position_embeddings"] == 9000
    assert written["eagle_config"][IDS] == [1, 15, 28] and written[IDS] == [2, 16, 29]


def test_the_embedded_target_has_the_name_other_engines_know() -> None:
    head = head_config(OFFICIAL, "raw", taps=(2, 16, 29))
    config = speculators_config(head, TargetNames("smollm2-135m"), torch.bfloat16, 3)
    assert config["speculators_config"]["verifier"]["name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["specdec"]["target"] == "smollm2-135m"  # ours, which is read first
