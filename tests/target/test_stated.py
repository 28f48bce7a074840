"""What is wrong with a config.json is told of it, and before anything else is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from specdec.errors import CheckpointError, SpecdecError, UnsupportedError
from specdec.target import adapter
from specdec.target.files import load_config
from specdec.target.load import load_target


def harmed(tmp_path: Path, arch: str = "llama", **change: object) -> str:
    path = tiny.save(arch, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    return str(path)


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"vocab_size": "128"}, CheckpointError, "^config.json: .*vocab_size.*expected int"),
        ({"rms_norm_eps": None}, CheckpointError, "^config.json: .*rms_norm_eps"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            CheckpointError,
            "^config.json: .*low_freq_fac",
        ),
        ({"model_type": "frob"}, UnsupportedError, "^model_type in config.json: .*'frob'.*newer"),
        (
            {"model_type": "frob", "auto_map": {}},
            UnsupportedError,
            "frob.*Code that comes with a model is not run",
        ),
        ({"model_type": "t5"}, UnsupportedError, "t5.*all decoder|encoder-decoder.*t5"),
    ],
)
def test_the_field_is_named(
    change: dict[str, object], kind: type[SpecdecError], told: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=told):
        load_target(harmed(tmp_path, **change))


def test_infinities_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    path = harmed(tmp_path, attention_dropout={"__float__": "Infinity"})
    assert load_config(Path(path))["attention_dropout"] == float("inf")
    assert load_target(path, dtype=torch.float32).target.info.layers == tiny.LAYERS


def test_quantised_weights_may_want_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanting(*_: object, **__: object) -> None:
        raise ImportError("requires bitsandbytes: `pip install bitsandbytes`")

    monkeypatch.setattr(adapter.AutoModelForCausalLM, "from_pretrained", wanting)
    with pytest.raises(UnsupportedError, match=r"cannot build this model: .*pip install bitsandbytes"):
        load_target(
            harmed(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        )


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.save("llama", tmp_path)
    about = json.loads((path / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "Frob", "auto_map": {"AutoTokenizer": ["frob.Frob", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))
    with pytest.raises(CheckpointError, match=r"tokenizer: cannot be loaded: .*custom code"):
        load_target(str(path))
