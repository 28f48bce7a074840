"""Compiles a Triton kernel for sm_90 without a GPU, as it is launched there: with kernels that overlap."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def assembled(kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], even: Iterable[str],
              options: Mapping[str, Any], folder: Path) -> str:  # fmt: skip
    """What ptxas says of a kernel, and the shared memory it wants; its PTX is left in `folder`/kernel.ptx.

    Args:
        kinds: type of each argument that is no constant; even: arguments that are multiples of 16.
    """
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource, compile

    from specdec.fused import overlap_kernels

    overlap_kernels.OVERLAPS = tl.constexpr(True)  # for good: triton forbids that it changes between kernels
    all_kinds = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, all_kinds, constexprs=dict(constants), attrs=divisible)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options})
    path = folder / "kernel.ptx"
    path.write_text(built.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return f"{said}{built.metadata.shared} bytes shared when launched\n"


def spilled(report: str) -> tuple[int, int]:
    """Bytes of (stores, loads) that ptxas spills."""
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert found is not None, report
    return int(found[1]), int(found[2])


def shared(report: str) -> int:
    """Bytes of shared memory that a launch asks for; sm_90 has 227 KiB for one program."""
    found = re.search(r"(\d+) bytes shared when launched", report)
    assert found is not None, report
    return int(found[1])
