from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from specdec.cache import CacheShape, KVCache, RowIndex
from specdec.layers.gate import gated
from specdec.layers.norm import RMSNorm
from specdec.layers.rope import Rope, frequencies, rotate
from specdec.native import elementwise
from specdec.native.library import library
from specdec.native.placing import can_place, place

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_rounds_where_torch_does(dtype: torch.dtype) -> None:
    norm = RMSNorm(64, 1e-5).requires_grad_(False)
    norm.weight = torch.nn.Parameter(_random(64, dtype=dtype, seed=1), requires_grad=False)
    x = _random(2, 5, 64, dtype=dtype)
    wanted = norm(x)  # gradients are possible here: torch's operations
    with torch.no_grad():
        assert elementwise.applies(x, 64)
        got = norm(x)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_rounds_where_torch_does(dtype: torch.dtype) -> None:
    x = _random(7, 96, dtype=dtype)
    x[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-30, -1e30])
    gate, up = x.chunk(2, dim=-1)
    with torch.no_grad():
        got = gated(x)
    torch.testing.assert_close(
        got, F.silu(gate) * up, atol=1e-6, rtol=2**-7 if dtype == torch.bfloat16 else 2e-6
    )


def test_what_is_no_number_stays_so() -> None:
    x = _random(2, 64, dtype=torch.float32)
    x[1, 3] = torch.nan
    with torch.no_grad():
        assert gated(x)[1, 3].isnan() and not gated(x)[0].isnan().any()
        assert elementwise.norm(x, torch.ones(64), 1e-5)[1].isnan().all()


def test_gradients_are_left_to_torch() -> None:
    x = _random(2, 64, dtype=torch.float32).requires_grad_()
    gated(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_placing_is_rotating_and_writing(dtype: torch.dtype) -> None:
    shape = CacheShape(2, 2, 32, dtype, torch.device("cpu"))
    ours, theirs = KVCache(shape, 3, 20), KVCache(shape, 3, 20)
    heads = _random(2, 3, 6 + 4, 32, dtype=dtype)
    slots = torch.tensor([[2, 1], [0, 1]])[:, 0]  # a column, as a batch hands it over
    indices = torch.tensor([[4, 9], [5, 1], [6, 17]]).T
    cos, sin = Rope(frequencies(32, 1e4), 20, dtype, torch.device("cpu")).at(indices)
    turned = rotate(heads[:, :, :8], cos, sin)
    theirs.write(1, RowIndex(slots, indices), turned[:, :, 6:], heads[:, :, 8:])
    with torch.no_grad():
        assert can_place(heads, ours.kv[1])
        place(heads, cos, sin, ours.kv[1], slots, indices)
    exact = {"atol": 2**-8, "rtol": 2**-7} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(heads[:, :, :8], turned, **exact)
    torch.testing.assert_close(ours.kv, theirs.kv, **exact)
    assert ours.kv[0].abs().sum() == 0
