"""`specdec export`: the right target, the head's own precision, and verdicts that see what lies on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.head.checkpoint import open_head
from specdec.head.export import TargetNames, save_raw

Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def head(model: Path, tmp_path: Path) -> Path:
    """In float32, and in a directory that names its target."""
    made = engines.random_head(engines.load(model.parent, "llama", "lean"), range(20))
    return save_raw(made, tmp_path / "head", target=TargetNames(str(model)), dtype=torch.float32)


@pytest.fixture
def export(specdec: Export) -> Export:
    return lambda *words: specdec("export", *words)


def edit(head: Path, **changes: Any) -> None:
    """Set keys of config.json; None takes them out."""
    config = json.loads((head / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (head / "config.json").write_text(json.dumps(kept))


def edited(target: Path, place: Path, **changes: Any) -> Path:
    """A copy whose config.json says otherwise."""
    shutil.copytree(target, place)
    edit(place, **changes)
    return place


def drop(head: Path, *tensors: str) -> None:
    file = head / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in tensors}, file)


@pytest.mark.parametrize("layout", ["raw", "speculators"])
def test_an_export_keeps_target_and_precision(
    export: Export, head: Path, tmp_path: Path, layout: str
) -> None:
    code, _, err = export(head, "--format", layout, "--out", tmp_path / "out")
    assert code == 0, err
    before, after = open_head(head), open_head(tmp_path / "out")
    assert after.layout == layout
    assert after.target == before.target
    assert after.head.config.fingerprint == before.head.config.fingerprint is not None
    for name, tensor in before.head.state_dict().items():
        assert torch.equal(tensor, after.head.state_dict()[name])
        assert tensor.dtype == after.head.state_dict()[name].dtype


def test_a_head_that_names_no_target_needs_one_told(export: Export, head: Path, model: Path) -> None:
    edit(head, specdec=None)
    code, _, err = export(head, "--out", head.parent / "out")
    assert code == 2 and "target: the head's files name no target" in err and "--target" in err
    assert export(head, "--out", head.parent / "out", "--target", model)[0] == 0


def test_a_target_of_other_sizes_is_refused(export: Export, head: Path, model: Path, tmp_path: Path) -> None:
    other = edited(model, tmp_path / "other", vocab_size=127)
    code, _, err = export(head, "--out", tmp_path / "out", "--target", other)
    assert code == 2 and "vocab: head and target differ" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "none-such"}, "no family that transformers knows"),
        ({"model_type": "none-such", "auto_map": {"AutoConfig": "code.Config"}}, "is not run"),
        ({"architectures": []}, "names no architecture"),
    ],
)
def test_a_target_that_nobody_knows_is_refused(
    export: Export, head: Path, model: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    other = edited(model, tmp_path / "other", **changes)
    code, _, err = export(head, "--out", tmp_path / "out", "--target", other)
    assert code == 2 and told in err


def test_a_target_without_an_end_gives_none(export: Export, head: Path, model: Path, tmp_path: Path) -> None:
    other = edited(model, tmp_path / "other", eos_token_id=None)
    (other / "generation_config.json").unlink(missing_ok=True)
    code, _, err = export(head, "--format", "raw", "--out", tmp_path / "out", "--target", other)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None


def test_check_tells_verdicts_and_what_to_mind(export: Export, head: Path, tmp_path: Path) -> None:
    code, out, _ = export("--check", head)
    told = dict(line.split(": ", 1) for line in out.splitlines())
    assert told["vLLM (V1 runner)"] == 'yes (mind: pass "method": "eagle3")'
    assert told["speculators"].startswith("no: reads its own layout")
    assert code == 0, "a head in another layout than an engine's is no failure"
    assert export(head, "--out", tmp_path / "out")[0] == 0
    code, out, _ = export("--check", tmp_path / "out")
    assert code == 0 and "SGLang: no: reads the raw layout only" in out
    edit(head, norm_before_residual=True)
    assert export("--check", head)[0] == 1


def test_check_takes_taps(export: Export, head: Path) -> None:
    taps: Sequence[int] = open_head(head).head.config.taps
    edit(head, eagle_aux_hidden_state_layer_ids=None, eagle_config=None)
    code, _, err = export("--check", head)
    assert code == 2 and "--taps" in err
    code, out, _ = export("--check", head, "--taps", ",".join(map(str, taps)))
    assert code in (0, 1) and "vLLM" in out


def test_check_looks_at_tensors(export: Export, head: Path) -> None:
    drop(head, "lm_head.weight")
    code, out, err = export("--check", head)
    assert (code, out) == (2, "") and "lm_head.weight" in err
