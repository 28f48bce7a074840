"""Letting go of OpenMP threads: they end, results stay, and they come back when there is work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specdec.native import workers

PROGRAM = """
import os, time, torch
from specdec.native.workers import release_workers
torch.set_num_threads(3)
x = torch.randn(2_000_000)
def alive(): return len(os.listdir("/proc/self/task"))
def settled(wanted):
    for _ in range(200):
        if alive() == wanted: break
        time.sleep(0.01)
    return alive()
before = alive()
total = x.exp().sum()
during = alive()
let_go = release_workers()
after = settled(during - 2)
assert torch.equal(total, x.exp().sum())
print(before, during, let_go, after, alive())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux tells them")
def test_a_team_goes_and_comes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, during, let_go, after, again = map(int, done.stdout.split())
    if not let_go:
        pytest.skip("another OpenMP than GNU's, or none")
    assert during - before == 2 and after == before and again == during


def test_where_nothing_is_known_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "MAPS", tmp_path / "absent")
    assert workers.release_workers() == 0
    named = tmp_path / "maps"
    named.write_text("7f00-7f01 r-xp 00000000 08:01 42   /nowhere/libgomp.so.1\n")
    monkeypatch.setattr(workers, "MAPS", named)
    assert workers.release_workers() == 0
