"""The kernels that use AMX's tiles, on processors with AVX-512 BF16 alone: the same tests, tiles emulated in C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.native import linear

HERE = Path(__file__).parent
TESTS = (HERE / "test_linear.py", HERE / "test_whole.py", HERE.parent / "attention" / "test_native.py")
COMPILER = """#!/bin/sh
case "$*" in *--version*) exec cc "$@" ;; esac
exec cc -include {header} -D__AMX_BF16__ -D__AMX_TILE__ "$@"
"""


@pytest.mark.skipif(
    linear.tiles_kind() != linear.AVX512, reason="has tiles, or not what they need beside them"
)
def test_kernels_by_tiles(tmp_path: Path) -> None:
    compiler = tmp_path / "cc-with-tiles"
    compiler.write_text(COMPILER.format(header=HERE / "amx_emulated.h"))
    compiler.chmod(0o755)
    environment = os.environ | {"CC": str(compiler), "SPECDEC_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=HERE.parent.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert run("-c", "from specdec.native.linear import told; print(told())") == "bfloat16 by AMX tiles\n"
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, TESTS))
