"""One door for every kind of target, and errors that name what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.errors import CheckpointError, SpecdecError
from specdec.target.files import (
    check_finite,
    load_config,
    load_state,
    load_tokenizer,
    resolve,
    stop_token_ids,
)

Checkpoint = Callable[[str], Path]


@pytest.fixture
def own(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may harm."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def reshard(directory: Path, suffix: str) -> None:
    """Split the weights over two files with an index."""
    whole = directory / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    base, placed = ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"), dict[str, str]()
    for part in range(2):
        name = f"{base.split('.')[0]}-{part}.{suffix}"
        piece = {key: state[key].clone() for key in sorted(state)[part::2]}
        save_file(piece, directory / name) if suffix == "safetensors" else torch.save(piece, directory / name)
        placed |= dict.fromkeys(piece, name)
    (directory / f"{base}.index.json").write_text(json.dumps({"weight_map": placed}))


def test_a_directory_is_itself(own: Path) -> None:
    files = resolve(str(own))
    assert (files.name, files.directory) == (str(own), own)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_give_the_same_tensors(own: Path, suffix: str) -> None:
    whole = {name: tensor.clone() for name, tensor in load_state(own).items()}
    reshard(own, suffix)
    state = load_state(resolve(str(own)).directory)
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_read(own: Path, zipped: bool) -> None:
    whole = {name: tensor.clone() for name, tensor in load_state(own).items()}
    (own / "model.safetensors").unlink()
    torch.save(whole, own / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    state = load_state(own)
    assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)


def test_pickled_code_is_not_run(own: Path) -> None:
    (own / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, own / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_state(own)


def test_a_table_that_holds_no_tensors_is_refused(own: Path) -> None:
    (own / "model.safetensors").unlink()
    torch.save({"a": 1}, own / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a table of tensors"):
        load_state(own)


def test_a_truncated_file_names_the_tensor_that_is_cut(own: Path) -> None:
    path = own / "model.safetensors"
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    path.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_state(own)
    assert caught.value.field == last


@pytest.mark.parametrize("raw", [b"", b"\xff" * 40, b"\x08\0\0\0\0\0\0\0[1, 2]  "])
def test_a_file_without_a_header_is_named(own: Path, raw: bytes) -> None:
    (own / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is no safetensors file"):
        load_state(own)


def test_a_truncated_pickle_is_named(own: Path) -> None:
    state = {name: tensor.clone() for name, tensor in load_state(own).items()}
    (own / "model.safetensors").unlink()
    torch.save(state, own / "pytorch_model.bin")
    raw = (own / "pytorch_model.bin").read_bytes()
    (own / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_state(own)


def test_a_missing_shard_and_a_missing_tensor_are_named(own: Path) -> None:
    reshard(own, "safetensors")
    first = own / "model-0.safetensors"
    state = load_file(first)
    lost = min(state)
    save_file({name: tensor for name, tensor in state.items() if name != lost}, first)
    with pytest.raises(CheckpointError) as caught:
        load_state(own)
    assert caught.value.field == lost
    first.unlink()
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors"):
        resolve(str(own))


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../out.safetensors"}}']
)
def test_a_broken_index_is_refused(own: Path, index: str) -> None:
    (own / "model.safetensors").rename(own.parent / "out")
    (own / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError):
        resolve(str(own))


def test_nan_is_named(own: Path) -> None:
    state = {name: tensor.clone() for name, tensor in load_state(own).items()}
    check_finite(state)
    state["model.norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight: "):
        check_finite(state)


def test_a_directory_without_config_or_weights_is_refused(own: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(tmp_path / "empty"))
    (own / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve(str(own))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_broken_config_is_named(own: Path, text: str) -> None:
    (own / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(own)


@pytest.mark.parametrize("name", ["", "smollm3", "./nowhere", "a/b/c", "x/missing.gguf", "/nowhere/model"])
def test_an_unknown_name_lists_what_is_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecdecError, match="no such target") as caught:
        resolve(name, cache_dir=tmp_path)
    assert caught.value.value == name and "smollm2-135m" in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(SpecdecError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "model.onnx"))


def test_a_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecdecError, match="no such directory here") as caught:
        resolve("no-such-org/no-such-model")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)


def test_a_hub_snapshot_is_a_directory(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[str]]()

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        assert not any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in ignore_patterns)
        assert any(fnmatch("consolidated.safetensors", pattern) for pattern in ignore_patterns)  # a twin
        if "pytorch_model*.bin" in allow_patterns:
            torch.save({"a": torch.ones(1)}, own / "pytorch_model.bin")
        return str(own)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("org/model").directory == own and len(asked) == 1
    (own / "model.safetensors").unlink()
    assert load_state(resolve("org/model").directory).keys() == {"a"}


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 2}, (5, 6)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [0]}, (0,)),
        (None, {"text_config": {"eos_token_id": 4}}, (4,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_stop_ids_come_from_generation_config_first(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], stops: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_token_ids(tmp_path) == stops


@pytest.mark.parametrize("eos", ["2", [1, "2"], -1, True, 1.5])
def test_a_stop_id_that_is_none_is_refused(tmp_path: Path, eos: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        stop_token_ids(tmp_path)


def test_a_directory_without_tokenizer_says_so(own: Path) -> None:
    (own / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(own)
    (own / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(own)
