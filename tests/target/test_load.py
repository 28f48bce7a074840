"""The door: which kind of target comes out, in which dtype, and every broken checkpoint named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.errors import CheckpointError, SpecdecError, UnsupportedError
from specdec.target import load, precision
from specdec.target.adapter import HFTarget
from specdec.target.load import LeanTarget, load_target
from specdec.target.protocol import Target

Checkpoint = Callable[[str], Path]


def loaded(directory: Path, **options: Any) -> Target:
    return load_target(str(directory), **({"dtype": torch.float32} | options)).target


def broken(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A tiny llama whose tensors `change` has edited."""
    path = tiny.save("llama", directory)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(("arch", "kind"), [("qwen3", LeanTarget), ("gpt2", HFTarget)])
def test_lean_where_it_fits_else_the_adapter(arch: str, kind: type, checkpoint: Checkpoint) -> None:
    result = load_target(str(checkpoint(arch)), dtype=torch.float32)
    info = result.target.info
    assert type(result.target) is kind
    assert (info.vocab, info.hidden, info.layers) == (tiny.VOCAB, tiny.HIDDEN, tiny.LAYERS)
    assert (info.max_length, info.stop_ids) == (512, (2,))
    assert info.architecture == type(tiny.build(arch)).__name__
    assert (info.cache.layers, info.cache.head_dim) == (tiny.LAYERS, 8)
    assert result.tokenizer.decode(result.tokenizer("a tree")["input_ids"]) == "a tree"


def test_prefer_is_obeyed(checkpoint: Checkpoint) -> None:
    assert type(loaded(checkpoint("llama"), prefer="adapter")) is HFTarget
    with pytest.raises(UnsupportedError, match="model_type"):
        loaded(checkpoint("gpt2"), prefer="lean")
    with pytest.raises(UnsupportedError, match="device_map"):
        loaded(checkpoint("llama"), prefer="lean", device_map="auto")


def test_a_failed_self_test_falls_back(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: Target) -> None:
        if isinstance(target, LeanTarget):
            raise UnsupportedError("broken on purpose")

    monkeypatch.setattr(load, "self_test", fail)
    assert type(loaded(checkpoint("llama"))) is HFTarget


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # tied and not
def test_fingerprint_and_matrices_are_of_the_model_not_of_its_loader(
    arch: str, checkpoint: Checkpoint
) -> None:
    lean, adapter = loaded(checkpoint(arch)), loaded(checkpoint(arch), prefer="adapter")
    half = loaded(checkpoint(arch), dtype=torch.bfloat16)
    assert lean.info.fingerprint == adapter.info.fingerprint == half.info.fingerprint
    reference = tiny.build(arch)
    matrix = reference.get_output_embeddings().weight
    assert torch.equal(lean.output_embedding(), matrix)
    assert torch.equal(half.output_embedding(), matrix.bfloat16().float())
    tokens = torch.tensor([[3, 5], [7, 11]])
    assert torch.equal(lean.embed(tokens), reference.get_input_embeddings().weight[tokens])
    assert torch.equal(lean.final_norm()[0], reference.model.norm.weight)


def test_other_weights_have_another_fingerprint(tmp_path: Path, checkpoint: Checkpoint) -> None:
    other = tiny.save("llama", tmp_path, seed=1)
    assert loaded(other).info.fingerprint != loaded(checkpoint("llama")).info.fingerprint


NORM = "model.layers.3.input_layernorm.weight"
GATE = "model.layers.7.mlp.gate_proj.weight"
BREAKS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda s: s.pop(NORM), f"lacks.*{NORM}"),
    "unexpected": (lambda s: s.update({"model.extra.weight": torch.zeros(2)}), r"no place for.*model\.extra"),
    "mis-shaped": (lambda s: s.update({GATE: s[GATE][:-1]}), rf"{GATE}.*\(79, 48\)"),
    "nan": (lambda s: s[GATE][5].fill_(torch.nan), f"{GATE}: holds NaN"),
    "infinite": (lambda s: s[NORM][:1].fill_(torch.inf), f"{NORM}: holds NaN or inf"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_broken_weights_name_the_tensor(what: str, tmp_path: Path) -> None:
    change, message = BREAKS[what]
    path = broken(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        loaded(path)
    if what != "mis-shaped":  # transformers words that one itself
        with pytest.raises(CheckpointError):
            loaded(path, prefer="adapter")


def test_an_lm_head_of_its_own_beside_a_tied_config_counts(tmp_path: Path) -> None:
    """As for transformers, which unties what differs."""
    path = broken(tmp_path, lambda s: s.update({"lm_head.weight": torch.randn(tiny.VOCAB, tiny.HIDDEN)}))
    lean, adapter = loaded(path, prefer="lean"), loaded(path, prefer="adapter")
    torch.testing.assert_close(lean.output_embedding(), adapter.output_embedding())
    assert lean.info.fingerprint == adapter.info.fingerprint


@pytest.mark.parametrize("size", ["vocab_size", "num_hidden_layers"])
def test_a_config_without_a_size_is_named(size: str, tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config[size]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=size):
        loaded(path)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_tokenizer_knows_the_end_where_no_config_does(arch: str, tmp_path: Path) -> None:
    path = tiny.save(arch, tmp_path)
    for name in ("config.json", "generation_config.json"):
        about = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({k: v for k, v in about.items() if k != "eos_token_id"}))
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    assert loaded(path).info.stop_ids == (2,)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="trunc"):
        loaded(path)


def test_derived_buffers_and_a_spare_tied_head_are_no_surprise(tmp_path: Path) -> None:
    def add(state: dict[str, Tensor]) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    assert type(loaded(broken(tmp_path, add))) is LeanTarget


def test_unknown_names_and_dtypes(tmp_path: Path) -> None:
    with pytest.raises(SpecdecError, match="no such target"):
        load_target("no-such-target")
    path = tiny.save("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "int3"}))
    with pytest.raises(CheckpointError, match="int3"):
        load_target(str(path), dtype="auto")


def test_dtype_auto_is_the_configs_and_none_is_measured(checkpoint: Checkpoint,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    asked: list[object] = []
    monkeypatch.setattr(load, "fastest_dtype", lambda shapes: asked.append(shapes) or torch.bfloat16)
    assert loaded(checkpoint("llama"), dtype="auto").info.dtype == torch.float32
    assert loaded(checkpoint("llama"), dtype=None).info.dtype == torch.bfloat16
    assert asked == [((80, 48), (48, 48), (160, 48), (48, 80))]


@pytest.mark.parametrize(
    ("narrow", "choice"),
    [((0.5, 0.5), torch.bfloat16), ((0.5, 1.2), torch.float32), ((0.99, 0.5), torch.float32)],
)
def test_bfloat16_must_win_at_every_row_count(narrow: tuple[float, float], choice: torch.dtype,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    times = {torch.float32: (1.0, 1.0), torch.bfloat16: narrow}
    monkeypatch.setattr(precision, "seconds", lambda shapes, dtype: times[dtype])
    assert precision.fastest_dtype.__wrapped__(((8, 8),)) == choice


def test_the_measurement_measures() -> None:
    times = precision.seconds(((64, 48), (48, 64)), torch.float32)
    assert len(times) == len(precision.ROWS) and all(0 < t < 1 for t in times)
