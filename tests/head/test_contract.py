"""What we export, held against the contract of other engines' loaders, written down a second time.

Nothing of layout.py or settings.py is used here: names, shapes, required keys, the id conventions of vLLM
(layer inputs) and SGLang (layer outputs, plus one), and offsets are stated anew, and every tensor must be
consumed and every parameter filled: stricter than the engines, which drop and keep silent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.head.config import HeadConfig
from specdec.head.export import TargetNames, save_raw, save_speculators
from specdec.head.model import DraftHead

CONFIG = HeadConfig(
    hidden=16,
    target_hidden=16,
    taps=(2, 4, 5),
    intermediate=24,
    heads=4,
    kv_heads=2,
    head_dim=6,
    vocab=64,
    draft_vocab=20,
    theta=5e5,
    scaling={"rope_type": "linear", "factor": 2.0},
    max_length=512,
    fingerprint="f00d",
)
TARGET = TargetNames("some/target", ("LlamaForCausalLM",), bos=1, eos=2, max_length=1024)


@pytest.fixture(scope="module")
def head() -> DraftHead:
    generator = torch.Generator().manual_seed(3)
    head = DraftHead(CONFIG)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    head.ids.copy_(torch.arange(20) * 3 + 1)
    return head


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


def engine_parameters(layer: dict[str, Any], draft_vocab: int, taps: int) -> dict[str, tuple[int, ...]]:
    """Parameters an engine builds from the config, with q, k, v and gate, up packed as both engines do."""
    h, i, d = layer["hidden_size"], layer["intermediate_size"], layer["head_dim"]
    rows = (layer["num_attention_heads"] + 2 * layer["num_key_value_heads"]) * d
    return {
        "fc.weight": (h, taps * h),
        "layers.0.self_attn.qkv_proj.weight": (rows, 2 * h),
        "layers.0.self_attn.o_proj.weight": (h, layer["num_attention_heads"] * d),
        "layers.0.mlp.gate_up_proj.weight": (2 * i, h),
        "layers.0.mlp.down_proj.weight": (h, i),
        "layers.0.input_layernorm.weight": (h,),
        "layers.0.hidden_norm.weight": (h,),
        "layers.0.post_attention_layernorm.weight": (h,),
        "norm.weight": (h,),
        "lm_head.weight": (draft_vocab, h),
    }


STACKED = (  # as in both engines: part, whole
    (".q_proj", ".qkv_proj"),
    (".k_proj", ".qkv_proj"),
    (".v_proj", ".qkv_proj"),
    (".gate_proj", ".gate_up_proj"),
    (".up_proj", ".gate_up_proj"),
)


def load_as_engine(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The engines' loading loop; fails on a tensor nobody takes, a parameter nobody fills, a wrong shape."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", None):  # stacking order
        for name in tensors:
            stacked = next((pair for pair in STACKED if pair[0] in name), None)
            if name in ("d2t", "t2d") or (stacked[0][1:] if stacked else None) != part:
                continue
            place = name.replace("midlayer.", "layers.0.")
            place = place.replace(*stacked) if stacked else place
            assert place in pieces, f"{name} is consumed by nobody"
            pieces[place].append(tensors[name])
    filled = {name: torch.cat(found) for name, found in pieces.items() if found}
    assert {name: tuple(tensor.shape) for name, tensor in filled.items()} == wanted
    return filled


def check_ids(tensors: dict[str, Tensor], vocab: int) -> None:
    d2t, t2d = tensors["d2t"], tensors["t2d"]
    assert (d2t.dtype, t2d.dtype, tuple(t2d.shape)) == (torch.int64, torch.bool, (vocab,))
    ids = torch.arange(d2t.shape[0]) + d2t  # SGLang's hot_token_id, vLLM's targets
    assert torch.equal(ids, torch.arange(20) * 3 + 1)
    assert torch.equal(t2d.nonzero().flatten(), ids)


def check_numbers(layer: dict[str, Any]) -> None:
    assert layer["num_hidden_layers"] == 1 and layer["model_type"] == "llama"
    assert layer["max_position_embeddings"] == 1024
    assert layer["rope_theta"] == 5e5 and layer["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert layer["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert layer["attention_bias"] is False and layer["mlp_bias"] is False
    assert layer["tie_word_embeddings"] is False
    assert "sliding_window" not in layer and "layer_types" not in layer


def check_weights(head: DraftHead, filled: dict[str, Tensor]) -> None:
    pairs = {
        "layers.0.self_attn.qkv_proj.weight": head.qkv.weight,
        "layers.0.mlp.gate_up_proj.weight": head.gate_up.weight,
        "lm_head.weight": head.lm_head.weight,
        "layers.0.hidden_norm.weight": head.hidden_norm.weight,
        "layers.0.input_layernorm.weight": head.input_norm.weight,
    }
    for name, weight in pairs.items():
        assert torch.equal(filled[name], weight), name


def test_raw(head: DraftHead, tmp_path: Path) -> None:
    config, tensors = read(save_raw(head, tmp_path / "raw", target=TARGET, dtype=torch.float32))
    check_weights(head, load_as_engine(tensors, engine_parameters(config, config["draft_vocab_size"], 3)))
    check_ids(tensors, config["vocab_size"])
    check_numbers(config)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["target_hidden_size"] == 16 and config["torch_dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    # Both conventions must name the same layers: vLLM takes the top-level ids as they are, SGLang adds one.
    vllm = config["eagle_aux_hidden_state_layer_ids"]
    sglang = [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    assert vllm == sglang == [2, 4, 5]
    assert config["eagle_config"]["use_aux_hidden_state"] is True
    assert not any(
        config[name] for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    )
    assert config["specdec"] == {"version": 1, "target": "some/target", "fingerprint": "f00d"}
    assert "embed_tokens.weight" not in tensors and "speculators_model_type" not in config


def test_speculators(head: DraftHead, tmp_path: Path) -> None:
    config, tensors = read(
        save_speculators(head, tmp_path / "s", target=TARGET, dtype=torch.float32, tokens=4)
    )
    layer = config["transformer_layer_config"]
    assert not any("midlayer" in name for name in tensors)
    check_weights(head, load_as_engine(tensors, engine_parameters(layer, config["draft_vocab_size"], 3)))
    check_ids(tensors, layer["vocab_size"])
    check_numbers(layer)
    assert config["architectures"] == ["Eagle3DraftModel"] and config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad"):
        assert config[name] is False
    block = config["speculators_config"]
    assert block["proposal_methods"][0]["speculative_tokens"] == 4
    assert block["verifier"] == {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}


def test_the_contract_itself_can_fail(head: DraftHead, tmp_path: Path) -> None:
    config, tensors = read(save_raw(head, tmp_path / "raw", target=TARGET))
    wanted = engine_parameters(config, 20, 3)
    with pytest.raises(AssertionError, match="consumed by nobody"):
        load_as_engine(tensors | {"head.weight": torch.ones(1)}, wanted)
    with pytest.raises(AssertionError):
        load_as_engine({name: t for name, t in tensors.items() if name != "lm_head.weight"}, wanted)
