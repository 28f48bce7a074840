"""The kernel bench without a GPU: it refuses, and what it would time computes attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.ceilings import Ceiling
from bench.kernels import (
    MODELS,
    Heads,
    Point,
    Problem,
    dense,
    flex,
    floor,
    main,
    make_problem,
    relative_error,
    table,
)
from bench.kernels import through as through_backend
from specdec.attention.reference import ReferenceAttention


def test_it_refuses_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert "NVIDIA GPU" in " ".join(capsys.readouterr().err.split())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "build", [dense, lambda p: flex(p, compiled=False), lambda p: through_backend(ReferenceAttention(), p)]
)
def test_what_is_timed_is_attention(build: Callable[[Problem], Callable[[int], torch.Tensor]]) -> None:
    problem = make_problem(Point("1.5b", 128, 2, 9), torch.device("cpu"), torch.float32)
    out = build(problem)(0)
    assert relative_error(problem, out) < 1e-5
    assert relative_error(problem, out.roll(1, 1)) > 1e-1


def test_the_floor_is_memory_for_long_prefixes_and_arithmetic_for_none() -> None:
    ceiling = Ceiling(bytes=4e12, operations=8e14)
    long = Point("8b", 32768, 1, 1)
    assert MODELS["8b"] == Heads(32, 8, 128)
    keys_and_values = 2 * 2 * 32769 * 8 * 128
    assert floor(long, ceiling) == pytest.approx(keys_and_values / 4e12, rel=1e-3)
    operations = 4 * 64 * (1024 + 64) * 64 * 32 * 128
    assert floor(Point("8b", 1024, 64, 64), Ceiling(1e15, 8e14)) == pytest.approx(operations / 8e14)


def test_the_table_shows_refusals_and_wrong_results() -> None:
    point = {"model": "8b", "length": 1024, "batch": 1, "nodes": 64, "floor_us": 1.0}
    rows = [
        point | {"backend": "triton", "us": 2.0, "wrong": False},
        point | {"backend": "flex", "us": 3.0, "wrong": True},
        point | {"backend": "flash", "refused": "not installed"},
    ]
    cells = [next(iter(column.cells)) for column in table(rows).columns]
    assert cells == ["8b", "1024", "1", "64", "1.0", "2.0", "3.0 WRONG", "refused"]
