"""Writing: whole or not at all, and nothing else in the directory is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.errors import CheckpointError
from specdec.head import files
from specdec.head.config import HeadConfig
from specdec.head.export import TargetNames, save_raw
from specdec.head.model import DraftHead
from specdec.head.pretrained import shipped_head

CONFIG = HeadConfig(
    hidden=32,
    target_hidden=32,
    taps=(1,),
    intermediate=8,
    heads=2,
    kv_heads=1,
    head_dim=16,
    vocab=12,
    draft_vocab=12,
)


def head(fill: float = 0.5) -> DraftHead:
    made = DraftHead(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(fill)
    made.ids.copy_(torch.arange(12))
    return made


def test_a_second_save_replaces_the_head_and_keeps_the_logs(tmp_path: Path) -> None:
    first = save_raw(head(), tmp_path / "deep" / "run", target=TargetNames("t"))
    (first / "train_log.jsonl").write_text("{}")
    save_raw(head(0.25), first, target=TargetNames("u"))
    again = files.read_files(first)
    assert again.config["specdec"]["target"] == "u"
    assert bool((again.tensors["fc.weight"] == 0.25).all())
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "model.safetensors", "train_log.jsonl"]
    assert [p.name for p in first.parent.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    kept = save_raw(head(), tmp_path / "run", target=TargetNames("t"))
    before = (kept / "model.safetensors").read_bytes()
    monkeypatch.setattr(files, "save_file", full)
    for name in ("run", "new"):
        with pytest.raises(CheckpointError, match="No space left"):
            save_raw(head(), tmp_path / name, target=TargetNames("t"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (kept / "model.safetensors").read_bytes() == before


def test_a_head_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        save_raw(DraftHead(CONFIG), tmp_path / "nan", target=TargetNames("t"))
    packed = head()
    packed.freeze()
    if packed.fc.weight.numel() == 0:  # packing exists on this machine
        with pytest.raises(CheckpointError, match="packed"):
            save_raw(packed, tmp_path / "packed", target=TargetNames("t"))
    assert not any(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_raw(head(), tmp_path / "taken", target=TargetNames("t"))


def test_configs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="not a JSON object"):
        files.read_config(tmp_path)


def test_shipped_heads_are_found_by_plain_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.head.pretrained.FOLDER", tmp_path)
    written = save_raw(head(), tmp_path / "tiny", target=TargetNames("t"))
    assert shipped_head("tiny") == written
    for name in ("", ".", "..", "other", "org/tiny", str(written), "../" + tmp_path.name + "/tiny"):
        assert shipped_head(name) is None
