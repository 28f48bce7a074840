"""What kernels are found by must not depend on who was launched first, nor on what was asked of kernels before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.fused import keys

PACKAGE = Path(keys.__file__).parent
FIRST = """
import importlib, json, sys
from specdec.fused import keys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (9, 0)
order, attention_first = json.loads(sys.argv[1]), sys.argv[2] == "True"
from specdec.attention import triton
if attention_first:
    triton._kernels("cuda")
kernels = [getattr(importlib.import_module(f"specdec.fused.{module}_kernels"), name) for module, name in order]
keys.settle_all()
attention = triton._kernels("cuda")
kernels = {kernel.__name__: kernel.cache_key for kernel in [*kernels, attention.split_kernel]}
print(json.dumps(kernels))
"""
READ = [("product", "rows_kernel"), ("growth", "rerank_kernel"), ("largest", "largest_kernel"),
        ("overlap", "wait_for_others"), ("product", "row_kernel")]  # fmt: skip


def test_keys_do_not_depend_on_the_order_of_launches() -> None:
    """Triton 3.9 sees to that itself; before, this fails without `settle_all`."""
    pytest.importorskip("triton")
    told = []
    for order, attention_first in ((READ, False), (READ[::-1], True)):
        run = [sys.executable, "-c", FIRST, json.dumps(order), str(attention_first)]
        told.append(json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout))
    assert told[0] == told[1]


def test_every_module_of_kernels_is_named() -> None:
    found = {path.name.removesuffix("_kernels.py") for path in PACKAGE.glob("*_kernels.py")}
    assert found == set(keys.MODULES)


@pytest.mark.parametrize("further", [False, True])
def test_the_next_kernel_may_start_while_one_waits(further: bool, tmp_path: Path) -> None:
    """With SPECDEC_OVERLAP=2: the launch of the next one comes before the wait for those before, not after it."""
    pytest.importorskip("triton")
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
os.environ["SPECDEC_OVERLAP"] = {"2" if further else "1"!r}
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (9, 0)
from pathlib import Path
from sm90 import assembled
from specdec.fused.layer_kernels import gate_kernel
kinds = dict.fromkeys(gate_kernel.arg_names, "*bf16") | {{"width": "i32"}}
assembled(gate_kernel, kinds, {{"BLOCK": 512}}, ["x", "y", "width"], {{"num_warps": 4}}, Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    text = (tmp_path / "kernel.ptx").read_text()
    assert (text.index("griddepcontrol.launch_dependents") < text.index("griddepcontrol.wait")) == further
