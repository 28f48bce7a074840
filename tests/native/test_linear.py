from __future__ import annotations

import pytest
import torch

from specdec.layers.linear import Projection
from specdec.native import linear as native
from specdec.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16)
KINDS = range(native.tiles_kind() + 1)  # whatever multiplies bfloat16 here, and what a lesser processor does


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply bfloat16 in one of the ways."""
    monkeypatch.setattr(native, "tiles_kind", lambda: request.param)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (50, 33), (1, 7), (160, 96), (530, 2080)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 16, 17, 30, 32, 49, 100])
def test_products_are_right(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, w, bias = (
        _random(*s, dtype=dtype, seed=i)
        for i, s in enumerate([(rows, inputs), (outputs, inputs), (outputs,)])
    )
    wanted = x.double() @ w.double().T + bias.double()
    got = native.linear(x, native.pack(w), outputs, bias)
    assert got.dtype == dtype and got.shape == wanted.shape
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((got.double() - wanted).abs() <= rounding * wanted.abs() + inputs * 1e-6).all()


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, packed = _random(100, 96, dtype=dtype), native.pack(_random(112, 96, dtype=dtype, seed=1))
    alone = torch.cat([native.linear(x[i : i + 1], packed, 112) for i in range(100)])
    for rows in (2, 4, 6, 11, 16, 17, 24, 32, 49, 100):
        assert torch.equal(native.linear(x[:rows], packed, 112), alone[:rows]), rows


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    x, packed = _random(7, 64, dtype=dtype), native.pack(_random(200, 64, dtype=dtype, seed=1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.linear(x, packed, 200))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    x = torch.ones(3, 32, dtype=dtype)
    x[1, 5] = torch.nan
    y = native.linear(x, native.pack(torch.ones(20, 32, dtype=dtype)), 20)
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


def test_bfloat16_rounds_as_torch_does() -> None:
    # ties, a denormal, large ones
    exact = torch.tensor([1.0, 1.00390625, 1.01171875, -3.0e38, 1e-40, 65280.0])
    y = native.linear(torch.ones(1, 1, dtype=torch.bfloat16), native.pack(exact[:, None]), 6)
    assert torch.equal(y[0], exact.bfloat16())


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [16, 17, 31])
def test_packing_can_be_undone(outputs: int, dtype: torch.dtype) -> None:
    weight = _random(outputs, 24, dtype=dtype)
    assert torch.equal(native.unpack(native.pack(weight), outputs, 24), weight)


def test_a_packed_projection_keeps_its_weight_and_its_result() -> None:
    projection = Projection(40, 24, bias=True).requires_grad_(False)
    projection.weight.copy_(_random(24, 40, dtype=torch.float32))
    projection.bias.copy_(_random(24, dtype=torch.float32))  # type: ignore[union-attr]
    weight, x = projection.weight.clone(), _random(2, 3, 40, dtype=torch.float32, seed=3)
    wanted = projection(x)
    projection.pack()
    assert projection.packing == "native" and projection.weight.numel() == 0
    torch.testing.assert_close(projection(x), wanted)
    assert torch.equal(projection.plain_weight(), weight)
