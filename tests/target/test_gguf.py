"""Conversion of GGUF files: what transformers' reader gets wrong is mended."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGUFWriter
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

from specdec.errors import CheckpointError, SpecdecError, UnsupportedError
from specdec.layers.rope import frequencies
from specdec.target.files import load_config, load_state, load_tokenizer, resolve, stop_token_ids
from specdec.target.gguf import convert, state_attention
from specdec.target.gguf_rope import FACTORS, SCALING, state_rope
from specdec.target.lean import LeanConfig


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("smol")
    return resolve(str(tiny_gguf.write(home / "m.gguf")), cache_dir=home / "cache").directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("qwen")
    source = tiny_gguf.write(home / "m.gguf", "qwen2", "qwen2", twin_head=True)
    return resolve(str(source), cache_dir=home / "cache").directory


def test_weights_are_float32_and_tied_ones_are_saved_once(smol: Path) -> None:
    state = load_state(smol)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert "lm_head.weight" not in state
    wanted = torch.from_numpy(tiny_gguf._tensors(False, False)["token_embd.weight"])
    assert torch.equal(state["model.embed_tokens.weight"], wanted)


def test_config_forgets_the_quantization(smol: Path) -> None:
    config = load_config(smol)
    assert "quantization_config" not in config
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32" and config["num_key_value_heads"] == tiny_gguf.KV


def test_smollm_splits_digits_and_round_trips(smol: Path) -> None:
    tokenizer = load_tokenizer(smol)
    assert tokenizer.tokenize("1212") == ["1", "2", "1", "2"]
    for text in ("12  345 a", "grüße, 世界 \n\t x", "  a a"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.chat_template is not None
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [tiny_gguf.END_OF_TURN]


def test_qwen_normalises_and_stops_at_both_ends(qwen: Path) -> None:
    assert json.loads((qwen / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    assert stop_token_ids(qwen) == (tiny_gguf.END_OF_TURN, tiny_gguf.END_OF_TEXT)


def test_an_embedding_stored_twice_is_tied_to_the_output_copy(qwen: Path) -> None:
    state, stored = load_state(qwen), tiny_gguf._tensors(True, True)
    assert "lm_head.weight" not in state and load_config(qwen)["tie_word_embeddings"] is True
    assert torch.equal(state["model.embed_tokens.weight"], torch.from_numpy(stored["output.weight"]))
    assert "model.layers.0.self_attn.q_proj.bias" in state


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "m.gguf")
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"m\.gguf.*truncated"):
        resolve(str(source), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "targets").glob(".m-*"))  # nothing is left behind


@pytest.mark.parametrize("refused", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_disk_that_refuses_is_an_os_error_whoever_writes(tmp_path: Path, refused: str) -> None:
    path, place = tiny_gguf.write(tmp_path / "t.gguf"), tmp_path / "new"
    (place / refused).mkdir(parents=True)
    with pytest.raises(OSError, match=r"(?i)directory"):
        convert(path, place, "t")


def test_a_part_of_a_split_file_says_how_to_join_it(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"m-00001-of-00003\.gguf: is one of 3 parts.*--merge"):
        convert(tmp_path / "m-00001-of-00003.gguf", tmp_path, "m")


def test_a_directory_of_several_files_lists_them(tmp_path: Path) -> None:
    for name in ("m-q4.gguf", "m-q8.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SpecdecError, match=r"several .gguf files.*m-q4\.gguf, m-q8\.gguf.*Name one"):
        resolve(str(tmp_path))


def test_another_file_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path, "m")


def test_an_architecture_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "m.gguf", "plamo")
    with pytest.raises(UnsupportedError, match="plamo"):
        convert(source, tmp_path, "m")


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
SIZE, THETA = 8, 500000.0
PLAIN, SCALED = frequencies(SIZE, THETA), frequencies(SIZE, THETA, LLAMA3)
DIVIDED = {FACTORS[0]: PLAIN / SCALED}


def llama() -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=4)


def test_llama_3s_positions_come_from_their_divisors(tmp_path: Path) -> None:
    more = {name: divisors.numpy() for name, divisors in DIVIDED.items()}
    source = tiny_gguf.write(tmp_path / "m.gguf", said={"rope.freq_base": THETA}, more=more)
    config = LeanConfig.read(load_config(resolve(str(source), cache_dir=tmp_path / "cache").directory))
    assert torch.allclose(frequencies(config.head_dim, config.theta, config.scaling), SCALED, rtol=1e-4)
    assert not torch.allclose(SCALED, PLAIN, rtol=0.1)


def test_a_tensor_that_would_be_dropped_in_silence_is_named(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.ones(tiny_gguf.HIDDEN, dtype=np.float32)}
    with pytest.raises(UnsupportedError, match=r"leaves out.*blk\.0\.attn_q\.bias.*safetensors"):
        convert(tiny_gguf.write(tmp_path / "m.gguf", more=bias), tmp_path, "m")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"type": "yarn", "factor": 1.0}, {"rope_type": "default"}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    ],
)
def test_a_scaling_by_name_is_carried_over(said: dict[str, object], wanted: dict[str, object]) -> None:
    config, ones = llama(), {FACTORS[0]: torch.ones(SIZE // 2)}  # which scale nothing
    state_rope(
        config, {"rope.freq_base": THETA} | {SCALING + key: value for key, value in said.items()}, ones
    )
    assert config.rope_parameters == {"rope_theta": THETA} | wanted


@pytest.mark.parametrize(
    ("said", "factors", "told"),
    [
        ({"type": "frob", "factor": 4.0}, {}, "frob.*none, linear, yarn"),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 8.0},
            {},
            "yarn_beta_fast: is not carried over.*safetensors",
        ),
        ({}, {FACTORS[0]: torch.full((SIZE // 2,), 3.0)}, "not Llama 3's"),
    ],
)
def test_positions_that_no_config_can_state_are_refused(
    said: dict[str, object], factors: dict[str, torch.Tensor], told: str
) -> None:
    with pytest.raises(UnsupportedError, match=told):
        state_rope(llama(), {SCALING + key: value for key, value in said.items()}, factors)


def test_short_and_long_factors_are_longrope() -> None:
    config = Phi3Config(hidden_size=64, num_attention_heads=4)
    factors = {name: torch.full((6,), float(n)) for n, name in enumerate(FACTORS) if n}
    state_rope(config, {"rope.dimension_count": 12, SCALING + "original_context_length": 128}, factors)
    assert config.rope_parameters == {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6, "original_max_position_embeddings": 128,
    }  # fmt: skip


def test_gemma_scales_its_full_layers_and_the_largest_its_queries() -> None:
    config = Gemma3TextConfig(num_hidden_layers=62, hidden_size=96, num_attention_heads=4, head_dim=16)
    said = {"block_count": 62, SCALING + "factor": 8.0, "attention.sliding_window": 32}
    state_attention("gemma3", said, {}, config)
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert (config.query_pre_attn_scalar, config.sliding_window) == (24, 32)
