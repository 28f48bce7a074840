"""`specdec train --push-to-hub`: what leaves the machine, and that a wrong name or the Hub costs no finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from specdec.cli.main import main

run = pytest.importorskip("training.run", reason="needs the extra train")


class Hub:
    """Stands in for HfApi: keeps what was uploaded, or fails."""

    uploaded: tuple[str, ...] = ()
    failure: Exception | None = None

    def create_repo(self, name: str, *, exist_ok: bool) -> None:
        if Hub.failure is not None:
            raise Hub.failure

    def upload_folder(self, *, folder_path: Path, repo_id: str, ignore_patterns: list[str]) -> None:
        files = [str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()]
        Hub.uploaded = tuple(sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns)))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as a run leaves it; `train` gives it back at once."""
    out = tmp_path / "out"
    for name in ("config.json", "model.safetensors", "README.md", "run/responses.jsonl", "run/features/0.pt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    monkeypatch.setattr(run, "train", lambda order: out)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "failure", None)
    return out


def words(out: Path, repository: str) -> list[str]:
    return ["train", "--prompts", "p.jsonl", "--out", str(out), "--push-to-hub", repository]


def test_the_runs_own_folder_stays_here(finished: Path) -> None:
    assert main(words(finished, "org/name")) == 0
    assert Hub.uploaded == ("README.md", "config.json", "model.safetensors")


def test_a_wrong_name_is_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(order: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(run, "train", never)
    for name in ("org/na me", "a/b/c", ""):
        assert main(words(tmp_path, name)) == 2
        assert "push_to_hub: is no name of a repository" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [OSError("401 Unauthorized\nmore"), RuntimeError("")])
def test_a_hub_that_refuses_leaves_the_head_and_says_where(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Exception
) -> None:
    monkeypatch.setattr(Hub, "failure", failure)
    assert main(words(finished, "org/name")) == 2
    told = capsys.readouterr().err
    assert "was not pushed" in told and f"hf upload org/name {finished}" in told
    assert "Traceback" not in told
