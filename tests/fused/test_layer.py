"""The fused kernels of a decoder layer against torch's operations (interpreted), and their registers on sm_90.

Run as a program under TRITON_INTERPRET=1 this file computes every case and writes the errors as JSON, as
tests/attention/test_triton.py does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import tell, told
from torch import Tensor
from torch.nn import functional as F

from specdec.cache import CacheShape, KVCache, RowIndex
from specdec.fused import layer, product
from specdec.layers.heads import Heads
from specdec.layers.norm import RMSNorm
from specdec.layers.rope import Angles, Rope, frequencies

PLACE = torch.device("cpu")  # of every tensor; a test with a GPU puts them there
HALF = torch.float16  # numpy, in which triton interprets, has no bfloat16
ULPS = {torch.float32: 2e-6, HALF: 2e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(PLACE, dtype)


def off(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def plain_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    module = RMSNorm(x.shape[-1], eps)
    module.weight = torch.nn.Parameter(weight)
    return module(x).detach()  # with gradients: torch's operations


def norm_case(width: int, dtype: torch.dtype) -> float:
    x, weight = draw(2, 3, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    wide = torch.full((2, 3, 2 * width + 2), 7.0, dtype=dtype, device=PLACE)
    layer.norm(x, weight, 1e-5, wide[..., width : 2 * width])
    assert bool((wide[..., :width] == 7).all() and (wide[..., 2 * width :] == 7).all()), (
        "wrote beside its place"
    )
    wanted = plain_norm(x, weight)
    return max(off(layer.norm(x, weight, 1e-5), wanted), off(wide[..., width : 2 * width], wanted))


def gate_case(width: int, dtype: torch.dtype) -> float:
    x = draw(3, 2 * width, dtype=dtype)
    a, b = x.chunk(2, dim=-1)
    return off(layer.gate(x), F.silu(a) * b)


def place_case(queries: int, kv_heads: int, size: int, dtype: torch.dtype) -> float:
    ours, theirs = (KVCache(CacheShape(2, kv_heads, size, dtype, PLACE), 3, 20) for _ in range(2))
    packed = draw(2, 3, queries + 2 * kv_heads, size, dtype=dtype)
    slots = torch.tensor([[2, 1], [0, 1]], device=PLACE)[:, 0]  # a column, as a batch hands it over
    index = RowIndex(slots, torch.tensor([[4, 9], [5, 1], [6, 17]], device=PLACE).T)
    angles = Angles(Rope(frequencies(size, 1e4), 20, dtype, PLACE), index.indices)
    heads = Heads(packed, kv_heads, angles)
    query, key, value = heads.turned()
    theirs.write(1, index, key, value)
    rope = angles.rope
    layer.place(packed, rope.cos, rope.sin, index.indices, ours.kv[1], slots, index.indices)
    assert not ours.kv[0].any(), "wrote to another layer"
    return max(off(packed[:, :, :queries], query), off(ours.kv, theirs.kv))


def product_case(inputs: int, outputs: int, dtype: torch.dtype, before: str = "", bias: bool = False,
                 plus: bool = False, cut: product.Cut = (4, 64, 4)) -> float:  # fmt: skip
    x = draw(1, 1, 2 * inputs if before == "gate" else inputs, dtype=dtype)
    weight, factor = draw(outputs, inputs, dtype=dtype, seed=1), draw(inputs, dtype=dtype, seed=2)
    shift = draw(outputs, dtype=dtype, seed=3) if bias else None
    residual = draw(1, 1, outputs, dtype=dtype, seed=4) if plus else None
    got = product.product(x, weight, shift, cut, plus=residual, factor=factor if before == "norm" else None,
                          eps=1e-5, gated=before == "gate")  # fmt: skip
    if before == "norm":
        x = plain_norm(x, factor)
    elif before == "gate":
        a, b = x.chunk(2, dim=-1)
        x = F.silu(a) * b
    wanted = x.double() @ weight.double().T
    for more in (shift, residual):
        wanted = wanted if more is None else wanted + more.double()
    return off(got, wanted)


F32 = torch.float32
CASES: dict[str, Callable[[], float]] = {
    "norm": lambda: norm_case(64, F32),
    "norm, odd width": lambda: norm_case(100, F32),
    "norm, half": lambda: norm_case(576, HALF),
    "gate": lambda: gate_case(96, F32),
    "gate, blocks": lambda: gate_case(700, F32),
    "gate, half": lambda: gate_case(96, HALF),
    "place": lambda: place_case(6, 2, 32, F32),
    "place, SmolLM2's heads": lambda: place_case(9, 3, 64, F32),
    "place, one head, head 48": lambda: place_case(1, 1, 48, F32),
    "place, half": lambda: place_case(4, 2, 64, HALF),
    "product": lambda: product_case(64, 10, F32),
    "product, several steps": lambda: product_case(250, 9, F32),
    "product behind a norm": lambda: product_case(72, 12, F32, "norm", bias=True),
    "product behind a long norm": lambda: product_case(300, 12, F32, "norm", plus=True),
    "product behind a gate": lambda: product_case(72, 12, F32, "gate", plus=True),
    "product, half": lambda: product_case(576, 30, HALF, "norm", plus=True, cut=(2, 1024, 4)),
}
NUMBERS = ("width", "y_row", "rows", "kv_slot", "kv_head", "kv_row", "inputs", "outputs")


def main() -> None:
    tell(CASES)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_torch(name: str) -> None:
    error = told(__file__, name)
    assert error < ULPS[HALF if "half" in name or "SmolLM2's" in name else F32] * (1 if "half" in name else 2)


def compiled(
    kernel: Any, constants: dict[str, Any], warps: int, folder: Path, absent: tuple[str, ...] = ()
) -> str:
    """What the assembler for sm_90 says of a kernel in bfloat16."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource, compile

    constants = constants | dict.fromkeys(absent)
    kinds = {name: "*bf16" for name in kernel.arg_names}
    types = dict.fromkeys(NUMBERS, "i32") | {
        "slots": "*i64",
        "indices": "*i64",
        "positions": "*i64",
        "eps": "fp32",
    }
    kinds |= {name: kind for name, kind in types.items() if name in kinds}
    kinds |= dict.fromkeys(constants, "constexpr")
    odd = {*constants, "eps", "rows"}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in odd}
    built = compile(ASTSource(kernel, kinds, constexprs=constants, attrs=even), target=GPUTarget("cuda", 90, 32),
                    options={"num_warps": warps, "enable_fp_fusion": True})  # fmt: skip
    (folder / "kernel.ptx").write_text(built.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(folder / "kernel.ptx"), "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("absent", [("bias", "plus"), ("bias", "factor"), ("bias", "plus", "factor")])
@pytest.mark.parametrize("sizes", [(576, 960), (1536, 576), (4096, 6144), (14336, 4096)])
def test_products_of_a_row_keep_to_registers(
    absent: tuple[str, ...], sizes: tuple[int, int], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from specdec.fused.layer_kernels import product_kernel

    gate = absent == ("bias", "factor")
    kind = product.Kind(*sizes, torch.bfloat16, torch.device("cuda"), norm=not gate, gate=gate, plus=gate)
    for out, into, warps in product.candidates(kind):
        constants = {"GATED": gate, "BLOCK_OUT": out, "BLOCK_IN": into}
        report = compiled(product_kernel, constants, warps, tmp_path, absent)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spilled is not None and spilled.groups() == ("0", "0"), report


def test_small_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from specdec.fused.layer_kernels import gate_kernel, norm_kernel, place_kernel

    places = {"TURNED": 40, "QUERIES": 32, "KV_HEADS": 8, "HALF": 64, "BLOCK_HEADS": 4, "BLOCK_HALF": 64}
    for kernel, constants, warps in ((norm_kernel, {"BLOCK": 4096}, 8), (gate_kernel, {"BLOCK": 512}, 4),
                                     (place_kernel, places, 2)):  # fmt: skip
        report = compiled(kernel, constants, warps, tmp_path)
        assert "0 bytes spill stores, 0 bytes spill loads" in report, report


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_equal_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(sys.modules[__name__], "PLACE", torch.device("cuda"))
    for half, most in ((HALF, 2e-3), (torch.bfloat16, 1.6e-2)):
        monkeypatch.setattr(sys.modules[__name__], "HALF", half)
        assert CASES[name]() < (most if "half" in name else 1e-5)


@pytest.mark.gpu
def test_trials_on_a_gpu_give_right_products() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kind = product.Kind(576, 960, torch.bfloat16, torch.device("cuda"), norm=True, gate=False, plus=True)
    trial = product.Trial.of(kind)
    for cut in product.candidates(kind):
        assert off(trial.ours(3, cut), trial.theirs(3)) < 2e-2


def test_nothing_but_cuda_tensors_without_gradients_take_them() -> None:
    with torch.no_grad():
        assert not layer.can_norm(draw(2, 64), 64)
        row = draw(1, 64)
        assert product.cut_for(row, draw(3, 64), norm=False, gate=False, plus=False) is None


if __name__ == "__main__":
    main()
