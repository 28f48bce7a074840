"""Captured features: right rows, kept within the budget, recomputed when broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_head import HIDDEN
from tiny_training import TableTarget, samples

import training.features as module
from specdec.errors import SpecdecError
from training.features import Capture, Features

ROW_BYTES = 4 * HIDDEN * 2


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", 64)


def test_each_sample_gets_its_own_rows_whatever_the_batch() -> None:
    texts, target = samples(), TableTarget()
    for sample, found in zip(texts, Capture(target, (1, 2, 3), batch_tokens=64)(texts), strict=True):
        ids = torch.from_numpy(sample.ids)
        torch.testing.assert_close(found.features, target.taps[ids])
        torch.testing.assert_close(found.final, target.final[ids])
    assert target.forwards > 3


def test_shards_keep_what_was_captured(tmp_path: Path) -> None:
    texts, target = samples(), TableTarget()
    Features(texts, Capture(target, (1, 2, 3)), tmp_path, 1.0).fill()
    again = TableTarget()
    features = Features(texts, Capture(again, (1, 2, 3)), tmp_path, 1.0)
    assert features.kept == len(texts)
    for index in (0, 7, len(texts) - 1):
        ids = torch.from_numpy(texts[index].ids)
        found = features.take([index])[0]
        torch.testing.assert_close(found.features, target.taps[ids].bfloat16())
        torch.testing.assert_close(found.final, target.final[ids].bfloat16())
    assert again.forwards == 0


def test_other_taps_or_another_target_share_nothing(tmp_path: Path) -> None:
    texts = samples()
    Features(texts, Capture(TableTarget(), (1, 2, 3)), tmp_path, 1.0).fill()
    for target, taps, identity in ((TableTarget(), (1, 2), ""), (TableTarget(), (1, 2, 3), "other")):
        Features(texts, Capture(target, taps), tmp_path, 1.0, identity).take([0])
        assert target.forwards


def test_the_budget_bounds_what_is_kept(tmp_path: Path) -> None:
    texts = samples()
    features = Features(texts, Capture(TableTarget(), (1, 2, 3)), tmp_path, 150 * ROW_BYTES / 1e9)
    assert 0 < features.kept < len(texts)
    features.fill()
    features.take(range(len(texts)))
    held = sum(len(texts[i]) for i in range(features.kept))
    assert held <= 150
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.sha256")))


def test_a_broken_shard_is_computed_again(tmp_path: Path) -> None:
    texts = samples()
    Features(texts, Capture(TableTarget(), (1, 2, 3)), tmp_path, 1.0).fill()
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    target = TableTarget()
    features = Features(texts, Capture(target, (1, 2, 3)), tmp_path, 1.0)
    with pytest.warns(UserWarning, match="broken"):
        features.fill()
    assert (features.rebuilt, target.forwards) == (1, 1)


def test_a_full_disk_is_told_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(SpecdecError, match=r"cache\.gigabytes"):
        Features(samples(), Capture(TableTarget(), (1, 2, 3)), tmp_path, 1.0).fill()
    assert not list(tmp_path.glob(".*"))


def test_the_budget_counts_what_earlier_texts_left(tmp_path: Path) -> None:
    """A run that is interrupted, given more answers and started again keeps features of these alone."""
    budget = 200 * ROW_BYTES / 1e9
    (tmp_path / ".1.half.safetensors").write_bytes(b"killed while writing")
    for seed in range(3):
        features = Features(samples(24, seed), Capture(TableTarget(), (1, 2, 3)), tmp_path, budget)
        features.fill()
        assert features.kept
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.2 * budget * 1e9
