"""A target spread by accelerate answers as the whole one does. A disk stands in for a second device: layers there go
through the same hooks, which bring weights and states together for each forward."""

from __future__ import annotations

from pathlib import Path

import engines
import pytest
import tiny
import torch
from torch import Tensor

from specdec import Options, Sampling, SpecDecoder
from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.cli.options import device_map_of
from specdec.drafting.protocol import Shape
from specdec.errors import SpecdecError, UnsupportedError
from specdec.head.export import TargetNames, save_raw
from specdec.target.adapter import HFTarget
from specdec.target.load import DeviceMap, load_target
from specdec.target.protocol import Target

SPREAD: dict[str, str | int] = {
    "model.embed_tokens": "cpu",
    **{f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(tiny.LAYERS)},
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models"))


def load(model: Path, device_map: DeviceMap | None) -> Target:
    return load_target(str(model), dtype=torch.float32, prefer="adapter", device_map=device_map).target


@torch.inference_mode()
def seen(target: Target) -> list[Tensor]:
    """Logits, taps of first, middle and last layer, embeddings, LM head, norm."""
    tokens, zero = torch.arange(3, 20)[None], torch.zeros(1, dtype=torch.int64)
    rows = chunk_rows(zero, zero, tokens.shape[1])
    states = target.forward(tokens, rows, KVCache(target.info.cache, 1, 32), (0, 4, tiny.LAYERS))
    return [target.logits(states.final), states.features, target.embed(tokens), target.output_embedding(),
            target.final_norm()[0]]  # fmt: skip


@pytest.mark.parametrize("device_map", ["auto", SPREAD])
def test_a_spread_target_equals_the_whole_one(model: Path, device_map: DeviceMap) -> None:
    whole, spread = load(model, None), load(model, device_map)
    assert isinstance(spread, HFTarget) and spread.info == whole.info
    hooked = any(p.is_meta for p in spread.model.parameters())
    assert hooked == (device_map is SPREAD)
    for ours, theirs in zip(seen(spread), seen(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_a_decoder_over_a_spread_target_drafts_and_answers_alike(model: Path, tmp_path: Path) -> None:
    options = Options(dtype=torch.float32, device="cpu", slots=2, tree=Shape(3, 4, 12))
    whole = SpecDecoder.from_pretrained(str(model), "none", options)
    head = save_raw(engines.random_head(whole.engine.target, range(20, 60)), tmp_path / "head",
                    target=TargetNames("tiny/llama"), dtype=torch.float32)  # fmt: skip
    spread = SpecDecoder.from_pretrained(
        str(model), head, Options(torch.float32, slots=2, tree=Shape(3, 4, 12), device_map=SPREAD)
    )
    assert isinstance(spread.engine.target, HFTarget)
    short = Sampling(max_tokens=8, ignore_eos=True)
    prompts = ["abc abc", "What?"]
    wanted, given = whole.generate(prompts, short), spread.generate(prompts, short)
    assert [a.token_ids for a in given] == [a.token_ids for a in wanted]


@pytest.mark.parametrize(
    ("module", "told"), [("lm_head", "LM head"), ("model.norm", "final norm"), ("model.embed_tokens", "embedding")]
)  # fmt: skip
def test_what_every_round_reads_must_have_a_device(tmp_path: Path, module: str, told: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{told} without a device"):
        load(tiny.save("qwen2", tmp_path), {**SPREAD, module: "disk"})


def test_the_lean_decoder_and_nonsense_are_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="one device"):
        load_target(str(model), dtype=torch.float32, prefer="lean", device_map="auto")
    for place in ("nowhere", 77):
        with pytest.raises(UnsupportedError, match=r"device_map\['model'\]: cannot be used here"):
            load(model, {"lm_head": "cpu", "model": place})
    with pytest.raises(UnsupportedError, match="everywhere"):
        load(model, "everywhere")


def test_maps_are_read_from_text() -> None:
    assert device_map_of(None) is None and device_map_of("auto") == "auto"
    assert device_map_of('{"model": 0, "lm_head": "cpu"}') == {"model": 0, "lm_head": "cpu"}
    for text in ("everywhere", "[1]", '{"a": [1]}', "{"):
        with pytest.raises(SpecdecError, match="no placement"):
            device_map_of(text)
