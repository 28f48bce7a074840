"""Loading and saving heads: bit-exact round trips, and every kind of broken file named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.errors import CheckpointError, MismatchError, UnsupportedError
from specdec.head.checkpoint import load_head, open_head
from specdec.head.config import HeadConfig
from specdec.head.export import TargetNames, save_raw, save_speculators
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads

NAMES = TargetNames("tiny/target", ("LlamaForCausalLM",), bos=1, eos=2)
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
    eps=1e-6,
    theta=500.0,
    max_length=128,
    fingerprint="abc",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SAVERS = {"raw": save_raw, "speculators": save_speculators}


def random_head(config: HeadConfig = CONFIG, seed: int = 0) -> DraftHead:
    generator = torch.Generator().manual_seed(seed)
    head = DraftHead(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    head.ids.copy_(torch.randperm(config.vocab, generator=generator)[: config.draft_vocab].sort().values)
    return head


def logits(head: DraftHead) -> Tensor:
    """Two steps, the second from the fed-back output: touches every weight and switch."""
    c = head.config
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 5, len(c.taps) * c.target_hidden, generator=generator, dtype=head.dtype)
    embedded = torch.randn(1, 5, c.hidden, generator=generator, dtype=head.dtype)

    def attend(heads: Heads, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in heads.turned())
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    with torch.no_grad():
        angles = head.angles(torch.arange(5)[None])
        y = head(embedded, head.fuse(features), angles, attend)
        return torch.cat([head.logits(y), head.logits(head(embedded, head.feedback(y), angles, attend))])


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, **changes: Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return save_raw(random_head(), tmp_path / "head", target=NAMES, dtype=torch.float32)


@pytest.mark.parametrize("layout", SAVERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True, "norm_output": True},
        {"scaling": LLAMA3, "window": 32, "taps": (0, 1, 3, 6), "draft_vocab": 64},
    ],
    ids=["portable", "residual", "before_fc", "eagle31", "rest"],
)
def test_round_trip_gives_the_same_logits_bit_for_bit(
    tmp_path: Path, layout: str, changes: dict[str, Any]
) -> None:
    head = random_head(replace(CONFIG, **changes))
    again = load_head(SAVERS[layout](head, tmp_path / "head", target=NAMES, dtype=torch.float32))
    assert again.config == head.config
    assert torch.equal(again.ids, head.ids)
    assert torch.equal(logits(again), logits(head))


def test_export_of_an_import_of_an_export_is_the_same_file(tmp_path: Path) -> None:
    head = random_head()
    first = save_raw(head, tmp_path / "a", target=NAMES)
    other = save_speculators(load_head(first), tmp_path / "b", target=NAMES)
    last = save_raw(load_head(other), tmp_path / "c", target=NAMES)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (last / name).read_bytes()
    assert load_head(first).dtype == torch.bfloat16
    assert load_head(first, dtype=torch.float32).dtype == torch.float32


def test_pickled_weights_load_without_running_code(raw: Path) -> None:
    expected = logits(load_head(raw))
    torch.save(load_file(raw / "model.safetensors"), raw / "pytorch_model.bin")
    (raw / "model.safetensors").unlink()
    opened = open_head(raw)
    assert opened.weights == "pytorch_model.bin"
    assert torch.equal(logits(opened.head), expected)
    torch.save({"fc.weight": Path}, raw / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_head(raw)


def test_embeddings_are_noted_and_their_shape_is_checked(raw: Path) -> None:
    assert not open_head(raw).has_embedding
    edit_tensors(raw, embed_tokens__weight=torch.zeros(64, 16))
    assert open_head(raw).has_embedding
    assert open_head(raw).target == "tiny/target"
    edit_tensors(raw, embed_tokens__weight=torch.zeros(63, 16))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
        load_head(raw)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("midlayer__self_attn__q_proj__weight", None, "missing"),
        ("midlayer__self_attn__q_norm__weight", torch.ones(6), "not part"),
        ("lm_head__weight", torch.zeros(21, 16), "wrong shape"),
        ("midlayer__mlp__up_proj__weight", torch.full((24, 16), torch.nan), "NaN"),
        ("norm__weight", torch.full((16,), torch.inf), "infinite"),
        ("fc__weight", torch.zeros(16, 48, dtype=torch.int64), "floating"),
        ("d2t", None, "missing"),
        ("d2t", torch.arange(20) * 3, "outside"),
        ("d2t", torch.cat([torch.zeros(19), -torch.ones(1)]).long(), "rise"),
        ("d2t", torch.zeros(20), "whole numbers"),
        ("d2t", torch.zeros(19, dtype=torch.int64), "wrong shape"),
        ("t2d", torch.ones(64, dtype=torch.bool), "same tokens"),
    ],
)
def test_a_bad_tensor_is_named(raw: Path, key: str, value: Tensor | None, words: str) -> None:
    edit_tensors(raw, **{key: value})
    with pytest.raises(CheckpointError, match=words) as caught:
        load_head(raw)
    assert key.replace("__", ".") in str(caught.value)


def test_a_missing_mask_is_fine(raw: Path) -> None:
    edit_tensors(raw, t2d=None)
    assert torch.equal(load_head(raw).ids, random_head().ids)


@pytest.mark.parametrize("size", [4, 200, -100])
def test_a_truncated_file_is_named(raw: Path, size: int) -> None:
    path = raw / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        load_head(raw)


def test_missing_files_are_named(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(CheckpointError, match="no such head"):
        load_head(tmp_path / "nothing")
    (raw / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_head(raw)
    (raw / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_head(raw)
    (raw / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_head(raw)


def test_a_target_that_is_no_name_is_refused(raw: Path) -> None:
    edit_config(raw, specdec={"target": ["x"]})
    with pytest.raises(CheckpointError, match=r"specdec\.target: must be text"):
        open_head(raw)


def test_an_eagle_2_head_is_called_by_its_name(raw: Path) -> None:
    tensors = {"fc.weight": torch.zeros(16, 32), "layers.0.self_attn.q_proj.weight": torch.zeros(24, 16)}
    save_file(tensors, raw / "model.safetensors")
    with pytest.raises(UnsupportedError, match="EAGLE-2"):
        load_head(raw)


def test_a_tensor_under_two_names_is_refused(raw: Path) -> None:
    edit_tensors(raw, layers__0__hidden_norm__weight=torch.ones(16))
    with pytest.raises(CheckpointError, match="twice"):
        load_head(raw)


def test_taps_beyond_the_target_are_refused(raw: Path) -> None:
    assert load_head(raw, target_layers=8).config.taps == (2, 4, 5)
    with pytest.raises(MismatchError, match="beyond"):
        load_head(raw, target_layers=4)
