"""Kernels for a device elsewhere: the ones an engine launches are found without it, compiled, and packed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ONE = """
import sys
from pathlib import Path
import torch
from bench import abroad
from specdec.layers.norm import RMSNorm
abroad.CACHE = Path(sys.argv[1])
kernels = abroad.Kernels()
with abroad.abroad(kernels):
    norm = RMSNorm(64, 1e-5).to("meta", torch.bfloat16)
    for rows in (1, 1, 8):
        norm(torch.empty(1, rows, 64, dtype=torch.bfloat16, device="meta"))
assert list(kernels.names.values()) == ["norm_kernel"] and not kernels.failed, (kernels.names, kernels.failed)
print(abroad.pack(Path(sys.argv[2]), abroad.CACHE))
"""


def test_a_kernel_is_compiled_once_and_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    cache, archive = tmp_path / "cache", tmp_path / "kernels.tar.xz"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    told = subprocess.run([sys.executable, "-c", ONE, str(cache), str(archive)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert told.returncode == 0, told.stderr
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert len(names) == int(told.stdout) and all(name.startswith(str(cache).lstrip("/")) for name in names)
    assert {Path(name).suffix for name in names} == {".cubin", ".json"}


def test_what_an_engine_launches_is_counted() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.abroad", "none.tar.xz", "--count", "--models", "random-135m",
               "--batches", "2"]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and not told.stderr, told.stderr
    kinds = {line.split()[1]: int(line.split()[0]) for line in told.stdout.splitlines()[:-1]}
    assert kinds["split_kernel"] > 5 and kinds["rows_kernel"] > 5 and kinds["row_kernel"] >= 5
    # of layers, of drafting, of a round's end
    for part in ("norm", "place", "level", "rerank", "keep", "settle"):
        assert f"{part}_kernel" in kinds


ROWS = """
import torch
from bench import abroad
from specdec.fused import cuts
from specdec.fused.product import product
kernels = abroad.Kernels(compiled=False)
with abroad.abroad(kernels):
    x, weight = (torch.empty(size, 576, dtype=torch.bfloat16, device="meta") for size in (64, 960))
    kind = cuts.Kind(576, 960, x.dtype, x.device, False, False, False, 16)
    for cut in cuts.candidates(kind):
        product(x[:16], weight, None, cut)
    tried = len(kernels.names)
    for cut in cuts.candidates(kind):
        for rows in (2, 5, 12):
            product(x[:rows], weight, None, cut)
assert len(kernels.names) == tried >= 3 and not kernels.failed, (tried, kernels.names, kernels.failed)
"""


def test_what_a_trial_compiles_serves_every_number_of_rows() -> None:
    pytest.importorskip("triton")
    told = subprocess.run([sys.executable, "-c", ROWS], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
