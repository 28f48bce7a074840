"""Conversion of GGUF files: what transformers' reader gets wrong is mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_gguf
import torch

from specdec.errors import CheckpointError, UnsupportedError
from specdec.target.files import load_config, load_state, load_tokenizer, resolve, stop_token_ids
from specdec.target.gguf import convert


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


def test_another_file_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path, "m")


def test_an_architecture_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "m.gguf", "plamo")
    with pytest.raises(UnsupportedError, match="plamo"):
        convert(source, tmp_path, "m")
