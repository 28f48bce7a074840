"""The fused kernels of a decoder layer against torch's operations (interpreted), and their registers on sm_90.

Run as a program under TRITON_INTERPRET=1 this file computes every case and writes the errors as JSON, as
tests/attention/test_triton.py does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import tell, told
from sm90 import assembled, shared, spilled
from torch import Tensor
from torch.nn import functional as F

from specdec.cache import CacheShape, KVCache, RowIndex
from specdec.fused import cuts, layer, product, trial
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


def two_norms_case(width: int, dtype: torch.dtype) -> float:
    x, other = (draw(2, 3, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, other_weight = (draw(width, dtype=dtype, seed=seed) for seed in (2, 3))
    got = layer.two_norms(x, weight, other.transpose(0, 1).contiguous().transpose(0, 1), other_weight, 1e-5)
    return off(got, torch.cat([plain_norm(x, weight), plain_norm(other, other_weight)], dim=-1))


def lookup_case(width: int, dtype: torch.dtype) -> float:
    table, tokens = draw(9, width, dtype=dtype), torch.tensor([[8, 0, 3], [3, 1, 8]], device=PLACE)
    return off(layer.lookup(tokens[:, ::2], table), F.embedding(tokens[:, ::2], table))


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
    ahead = draw(40, 80, dtype=dtype)
    layer.place(packed, rope.cos, rope.sin, index.indices, ours.kv[1], slots, index.indices, ahead)
    assert not ours.kv[0].any(), "wrote to another layer"
    return max(off(packed[:, :, :queries], query), off(ours.kv, theirs.kv))


SPLIT = cuts.Cut(16, 64, 4, 2, 3)
TILES, SPLIT_TILES = cuts.Cut(64, 64, 4, 2, tma=True), cuts.Cut(64, 64, 4, 2, 3, tma=True)
SHORT, TILE, WHOLE = cuts.Cut(4, 64, 4), cuts.Cut(16, 64, 2, 2), cuts.Cut(16, 32, 4)


def product_case(inputs: int, outputs: int, dtype: torch.dtype, *, rows: int = 1, norm: bool = False,
                 paired: bool = False, bias: bool = False, plus: bool = False,
                 cut: cuts.Cut = SHORT) -> float:  # fmt: skip
    lines = outputs * (2 if paired else 1)
    x, weight, factor = (draw(1, rows, inputs, dtype=dtype), draw(lines, inputs, dtype=dtype, seed=1),
                         draw(inputs, dtype=dtype, seed=2))  # fmt: skip
    shift = draw(lines, dtype=dtype, seed=3) if bias else None
    residual = draw(1, rows, outputs, dtype=dtype, seed=4) if plus else None
    got = product.product(x, weight, shift, cut, plus=residual, factor=factor if norm else None, eps=1e-5,
                          paired=paired)  # fmt: skip
    wanted = (plain_norm(x, factor) if norm else x).double() @ weight.double().T
    wanted = wanted if shift is None else wanted + shift.double()
    if paired:
        a, b = wanted.chunk(2, dim=-1)
        wanted = F.silu(a) * b
    return off(got, wanted if residual is None else wanted + residual.double())


def large_norm_case(rows: int, cut: cuts.Cut) -> float:
    """A value that a norm's weight takes beyond float16, and the norm itself back into it."""
    x, weight = draw(1, rows, 64, dtype=HALF), draw(32, 64, dtype=HALF, seed=1)
    x[..., 3] = 9000
    factor = torch.full((64,), 8.0, dtype=HALF, device=PLACE)
    got = product.product(x, weight, None, cut, factor=factor, eps=1e-5)
    return off(got, plain_norm(x, factor).double() @ weight.double().T) if bool(got.isfinite().all()) else 1.0


def twice(case: Callable[..., float], *given: Any, **named: Any) -> float:
    """What the first run leaves must not mislead the second."""
    return max(case(*given, **named), case(*given, **named))


F32 = torch.float32
CASES: dict[str, Callable[[], float]] = {
    "norm": lambda: norm_case(64, F32),
    "norm, odd width": lambda: norm_case(100, F32),
    "norm, half": lambda: norm_case(576, HALF),
    "two norms": lambda: two_norms_case(100, F32),
    "two norms, half": lambda: two_norms_case(576, HALF),
    "lookup": lambda: lookup_case(40, F32),
    "lookup, blocks": lambda: lookup_case(2100, F32),
    "lookup, half": lambda: lookup_case(576, HALF),
    "gate": lambda: gate_case(96, F32),
    "gate, blocks": lambda: gate_case(700, F32),
    "gate, half": lambda: gate_case(96, HALF),
    "place": lambda: place_case(6, 2, 32, F32),
    "place, SmolLM2's heads": lambda: place_case(9, 3, 64, F32),
    "place, one head, head 48": lambda: place_case(1, 1, 48, F32),
    "place, half": lambda: place_case(4, 2, 64, HALF),
    "product": lambda: product_case(64, 10, F32),
    "product, several steps": lambda: product_case(250, 9, F32, bias=True, plus=True),
    "product behind a norm": lambda: product_case(72, 12, F32, norm=True, bias=True),
    "product behind a long norm": lambda: product_case(300, 12, F32, norm=True, plus=True),
    "product in pairs": lambda: product_case(72, 11, F32, norm=True, paired=True, bias=True),
    "product, half": lambda: product_case(576, 30, HALF, norm=True, plus=True, cut=cuts.Cut(2, 1024, 4)),
    "product, one step": lambda: product_case(100, 9, F32, norm=True, cut=cuts.Cut(4, 128, 4)),
    "product in pairs, one step": lambda: product_case(
        72, 9, F32, norm=True, paired=True, cut=cuts.Cut(2, 128, 4)
    ),
    "product of rows": lambda: product_case(128, 32, F32, rows=5, bias=True, plus=True, cut=TILE),
    "product of rows behind a norm": lambda: product_case(120, 48, F32, rows=20, norm=True, cut=TILE),
    "product of rows in pairs": lambda: product_case(
        72, 32, F32, rows=16, norm=True, paired=True, bias=True, cut=TILE
    ),
    "product of rows, half": lambda: product_case(576, 32, HALF, rows=3, norm=True, plus=True, cut=TILE),
    "product of many rows behind a norm": lambda: product_case(
        96, 32, F32, rows=40, norm=True, paired=True, bias=True, cut=TILE
    ),
    "product of many rows with a norm inside": lambda: product_case(
        96, 32, F32, rows=40, norm=True, paired=True, bias=True, cut=cuts.Cut(16, 32, 2, 2)
    ),
    "product of rows, inputs split": lambda: twice(
        product_case, 250, 48, F32, rows=5, bias=True, plus=True, cut=SPLIT
    ),
    "product of rows, inputs split behind a norm": lambda: product_case(
        192, 32, F32, rows=20, norm=True, cut=SPLIT
    ),
    "product of rows, inputs split in pairs": lambda: product_case(
        72, 32, F32, rows=40, norm=True, paired=True, bias=True, cut=SPLIT
    ),
    "product of rows, inputs split, half": lambda: product_case(
        576, 32, HALF, rows=3, norm=True, plus=True, cut=SPLIT
    ),
    "product of rows by the copy engine": lambda: product_case(
        256, 128, F32, rows=5, bias=True, plus=True, cut=TILES
    ),
    "product of rows by the copy engine behind a norm": lambda: product_case(
        200, 64, F32, rows=20, norm=True, cut=TILES
    ),
    "product of rows by the copy engine in pairs": lambda: product_case(
        256, 128, F32, rows=64, norm=True, paired=True, bias=True, cut=TILES
    ),
    "product of rows by the copy engine, inputs split": lambda: twice(
        product_case, 264, 128, F32, rows=33, bias=True, plus=True, cut=SPLIT_TILES
    ),
    "product of rows by the copy engine, half": lambda: product_case(
        576, 128, HALF, rows=16, norm=True, plus=True, cut=SPLIT_TILES
    ),
    "large norm, half": lambda: large_norm_case(1, SHORT),
    "large norm of rows, half": lambda: large_norm_case(5, TILE),
    "large norm of rows, inputs split, half": lambda: large_norm_case(5, SPLIT),
    "large norm of rows, at once, half": lambda: large_norm_case(5, WHOLE),
    "product of rows, at once": lambda: product_case(128, 32, F32, rows=5, bias=True, plus=True, cut=WHOLE),
    "product of rows, at once behind a norm": lambda: product_case(
        120, 48, F32, rows=20, norm=True, cut=WHOLE
    ),
    "product of rows, at once in pairs": lambda: product_case(
        72, 32, F32, rows=16, norm=True, paired=True, bias=True, cut=WHOLE
    ),
    "product of rows, at once, half": lambda: product_case(
        576, 32, HALF, rows=3, norm=True, plus=True, cut=cuts.Cut(16, 128, 8)
    ),
}
NUMBERS = ("width", "y_row", "rows", "kv_slot", "kv_head", "kv_row", "inputs", "outputs", "count", "splits")


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
    constants = constants | dict.fromkeys(absent)
    kinds = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(NUMBERS, "i32") | {"eps": "fp32"}
    kinds |= dict.fromkeys(("slots", "indices", "positions", "tokens"), "*i64") | {
        "partial": "*fp32",
        "turns": "*i32",
    }
    kinds |= {"ahead": "i32"} if "tiles" in kernel.arg_names else {}  # elsewhere it is a matrix
    for name, size in (("x_tiles", "BLOCK_ROWS"), ("tiles", "BLOCK_OUT")):
        if size in constants:
            kinds[name] = f"tensordesc<bf16[{constants[size]}, {constants['BLOCK_IN']}]>"
    odd = {*constants, "eps", "rows", "splits", "x_tiles", "tiles"}
    even = [name for name in kernel.arg_names if name not in odd]
    return assembled(kernel, kinds, constants, even, {"num_warps": warps}, folder)


@pytest.mark.parametrize("rows", cuts.ROWS)
@pytest.mark.parametrize("absent", [("bias", "plus"), ("bias", "factor")])
@pytest.mark.parametrize("sizes", [(576, 960), (1152, 960), (1536, 576), (4096, 14336), (14336, 4096)])
def test_products_of_few_rows_keep_to_registers(
    rows: int, absent: tuple[str, ...], sizes: tuple[int, int], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from specdec.fused import product_kernels

    paired = absent == ("bias", "plus")
    kind = cuts.Kind(*sizes, torch.bfloat16, torch.device("cuda"), paired, paired, not paired, rows)
    for cut in cuts.candidates(kind):
        constants = {"PAIRED": paired, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.into}
        if rows == 1:
            constants["WHOLE"] = cut.into >= sizes[0]
            report = compiled(product_kernels.row_kernel, constants, cut.warps, tmp_path, absent)
        elif cut.stages:
            constants |= {"BLOCK_ROWS": rows, "STAGES": cut.stages}
            nbytes = 2 * sizes[0] * sizes[1] * (2 if paired else 1)
            before = ("factor",) if product.norm_first(torch.bfloat16, rows, nbytes, cut) else ()
            before += ("partial", "turns") if cut.splits == 1 else ()
            before += () if cut.tma else ("x_tiles", "tiles")
            report = compiled(product_kernels.rows_kernel, constants, cut.warps, tmp_path, (*absent, *before))
            text = (tmp_path / "kernel.ptx").read_text()
            assert ("wgmma.mma" if cut.tma else "mma") in text, "outside the tensor cores"
            assert "cp.async.bulk.prefetch.L2" in text
            assert ("cp.async.bulk.tensor" if cut.tma else "cp.async.cg.shared.global") in text
        else:
            constants |= {"BLOCK_ROWS": rows, "PARTS": cuts.parts_of(sizes[0], cut.into)}
            report = compiled(product_kernels.whole_rows_kernel, constants, cut.warps, tmp_path, absent)
            text = (tmp_path / "kernel.ptx").read_text()
            assert "mma.sync" in text, "outside the tensor cores"
            first, second = text.split("griddepcontrol.wait", 1)
            assert first.count("ld.global") >= 4 and "ld.global" in second, "the matrix is not on its way"
        assert spilled(report) == (0, 0), report
        assert shared(report) <= 227 * 1024, report


def test_small_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from specdec.fused.layer_kernels import (
        gate_kernel,
        lookup_kernel,
        norm_kernel,
        place_kernel,
        two_norms_kernel,
    )

    places = {"TURNED": 40, "QUERIES": 32, "KV_HEADS": 8, "HALF": 64, "BLOCK_HEADS": 4, "BLOCK_HALF": 64,
              "BLOCKS": 12, "FETCHERS": 2}  # fmt: skip
    for kernel, constants, warps in ((norm_kernel, {"BLOCK": 4096}, 8), (gate_kernel, {"BLOCK": 512}, 4),
                                     (two_norms_kernel, {"BLOCK": 4096}, 8), (lookup_kernel, {"BLOCK": 1024}, 4),
                                     (place_kernel, places, 2)):  # fmt: skip
        report = compiled(kernel, constants, warps, tmp_path)
        assert spilled(report) == (0, 0), report


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
@pytest.mark.parametrize("rows", cuts.ROWS)
def test_trials_on_a_gpu_give_right_products(rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kind = cuts.Kind(576, 960, torch.bfloat16, torch.device("cuda"), True, False, True, rows)
    one = trial.Trial.of(kind)
    for cut in cuts.candidates(kind):
        assert off(one.ours(3, cut), one.theirs(3)) < 2e-2


@pytest.mark.parametrize("fault", [None, "wrong", "nan", "raises"])
def test_a_cut_that_is_wrong_or_does_not_launch_is_not_tried(
    fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = cuts.Kind(64, 32, torch.float32, torch.device("cpu"), False, False, True, 16)

    def ours(one: trial.Trial, index: int, cut: cuts.Cut) -> Tensor:
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        y = one.theirs(index).clone()
        y[0, 3] *= {None: 1.001, "wrong": 1.2, "nan": torch.nan}[fault]
        return y

    monkeypatch.setattr(trial.Trial, "ours", ours)
    assert trial._right(trial.Trial.of(kind), WHOLE) == (fault is None)


@pytest.mark.parametrize("sizes", [(576, 576), (4096, 4096)])
def test_only_devices_with_a_copy_engine_try_it(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before sm_90 a trial would compile kernels that threads feed one step after another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 + device.index, 0))
    monkeypatch.setattr(cuts, "_processors", lambda _: 132)
    cuts._copies.cache_clear()
    for index in range(3):
        kind = cuts.Kind(*sizes, torch.bfloat16, torch.device("cuda", index), False, False, True, 16)
        assert any(cut.tma for cut in cuts.candidates(kind)) == (index > 0)
        assert not all(cut.tma for cut in cuts.candidates(kind))
    cuts._copies.cache_clear()


def test_a_cut_is_for_matrices_as_they_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trial found of dense, aligned ones must not be launched over others."""
    monkeypatch.setattr(trial, "applies", lambda _: True)
    x, whole = torch.empty(5, 64), torch.empty(64 * 64 + 1)
    kind = cuts.Kind(64, 64, x.dtype, x.device, False, False, False, 16)
    monkeypatch.setattr(trial, "_cuts", {kind: TILE})
    found = [trial.cut_for(x, weight, norm=False, paired=False, plus=False)
             for weight in (whole[:-1].view(64, 64), whole[1:].view(64, 64), whole[:-1].view(64, 64).T)]  # fmt: skip
    assert found == [TILE, None, None]


def test_the_copy_engine_is_told_of_rows_and_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is to fetch, and can: of what does not begin at whole 16 bytes, threads fetch."""
    pytest.importorskip("triton")
    from specdec.fused import product_kernels

    given: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **constants: given.append(arguments)

    monkeypatch.setattr(product_kernels, "rows_kernel", Kernel())
    x, whole = draw(5, 64), draw(64 * 64 + 1)
    for weight, cut in ((whole[:-1], TILES), (whole[1:], TILES), (whole[:-1], TILE)):
        product.product(x, weight.view(64, 64), None, cut)
    x_tiles, tiles = given[0][8:10]
    assert (x_tiles.base.data_ptr(), list(x_tiles.shape), x_tiles.block_shape) == (
        x.data_ptr(),
        [5, 64],
        [16, 64],
    )
    assert (tiles.base.data_ptr(), list(tiles.shape), tiles.block_shape) == (
        whole.data_ptr(),
        [64, 64],
        [64, 64],
    )
    assert given[1][8:10] == given[2][8:10] == (None, None)


def test_nothing_but_cuda_tensors_without_gradients_take_them() -> None:
    with torch.no_grad():
        assert not layer.can_norm(draw(2, 64), 64)
        row = draw(1, 64)
        assert trial.cut_for(row, draw(3, 64), norm=False, paired=False, plus=False) is None


if __name__ == "__main__":
    main()
