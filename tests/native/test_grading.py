"""The C kernel that grades logits, against the same in torch, row by row and at every width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specdec.native.grading import KINDS, can_grade, grade
from specdec.native.library import library
from training.losses import Graded, Loss
from training.losses import grade as torch_grade

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

DTYPES = [torch.float32, torch.bfloat16]


def rows(width: int, dtype: torch.dtype, count: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, distributions (one of them certain), which grades which, weights."""
    generator = torch.Generator().manual_seed(width)
    logits = (3 * torch.randn(count, width, generator=generator)).to(dtype)
    p = (4 * torch.randn(5, width, generator=generator)).softmax(-1)
    p[3] = 0.0
    p[3, width // 2] = 1.0
    index = torch.randint(5, (count,), generator=generator)
    index[:5] = torch.arange(5)
    return logits, p.to(dtype), index, torch.rand(count, generator=generator)


def both(width: int, dtype: torch.dtype, loss: Loss) -> tuple[Graded, Tensor, Graded, Tensor]:
    logits, p, index, weights = rows(width, dtype)
    expected, gradient = torch_grade(logits.float(), p[index].float(), loss)
    found = Graded(*grade(logits, p, index, weights, loss.kind, loss.lk_rate))
    return found, logits, expected, gradient * weights[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 100, 8192, 8201])
def test_equals_torch(kind: str, dtype: torch.dtype, width: int) -> None:
    found, gradient, expected, wanted = both(width, dtype, Loss(kind, 2.5))
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.overlap, expected.overlap, rtol=1e-5, atol=1e-6)
    slack = {"rtol": 1e-4, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(gradient.float(), wanted, **slack)
    if dtype == torch.float32:  # of equals torch may take another
        assert torch.equal(found.hit, expected.hit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside(kind: str) -> None:
    logits, p, index, weights = rows(1000, torch.bfloat16)
    alone = [logits[r : r + 1].clone() for r in range(len(logits))]
    single = [grade(one, p, index[r : r + 1], weights[r : r + 1], kind, 3.0) for r, one in enumerate(alone)]
    together = grade(logits, p, index, weights, kind, 3.0)
    assert torch.equal(torch.cat(alone), logits)
    for number, whole in enumerate(together):
        assert torch.equal(torch.cat([one[number] for one in single]), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_told(kind: str, bad: float) -> None:
    """The trainer drops such steps; it must see them."""
    logits, p, index, weights = rows(50, torch.float32)
    logits[2, 49] = bad
    loss, overlap, _ = grade(logits, p, index, weights, kind, 3.0)
    assert loss.isnan().tolist() == overlap.isnan().tolist() == [r == 2 for r in range(9)]
    assert logits[2].isnan().all()
    assert logits[[0, 1, 3]].isfinite().all()


def test_knows_what_it_can_do() -> None:
    assert can_grade(torch.zeros(1, 2)) and not can_grade(torch.zeros(1, 2, dtype=torch.float64))
    assert not can_grade(torch.zeros(1, 2, device="meta"))
