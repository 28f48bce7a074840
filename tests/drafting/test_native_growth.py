"""Growth by C kernels against torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec import tree as trees
from specdec.drafting import native_growth
from specdec.drafting.growth import Growth, growth_of
from specdec.drafting.native_growth import NativeGrowth
from specdec.drafting.protocol import Shape
from specdec.native.library import library
from specdec.tree import DraftTree

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels")


@dataclass(frozen=True)
class Case:
    """A proposal; logits of few distinct values have many `ties`."""

    shape: Shape
    vocabulary: int = 50
    batch: int = 1
    ties: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "chain": Case(Shape(7, 1, 8)),
    "chains of a batch": Case(Shape(3, 1, 3), batch=3),
    "one level": Case(Shape(1, 4, 4), batch=3),
    "a full tree": Case(Shape(7, 10, 60), vocabulary=1000, batch=2),
    "seven levels": Case(Shape(7, 4, 64)),
    "tree smaller than the width": Case(Shape(2, 10, 4)),
    "two nodes": Case(Shape(2, 4, 2)),
    "fewer candidates than nodes": Case(Shape(1, 4, 60), batch=2),
    "vocabulary smaller than the width": Case(Shape(2, 10, 30), vocabulary=7),
    "ties": Case(Shape(3, 4, 20), batch=3, ties=True),
    "bfloat16": Case(Shape(2, 4, 16), ties=True, dtype=torch.bfloat16),
    "a word full of head rows": Case(Shape(99, 8, 64), vocabulary=9),
    "more rows than words have bits": Case(Shape(99, 10, 64), vocabulary=11),
    "levels that must pay": Case(Shape(7, 4, 60, level_floor=0.6), vocabulary=1000, batch=2),
    "frontiers that must pay": Case(Shape(7, 8, 60, node_floor=0.02), vocabulary=200),
    "frontiers of a batch": Case(Shape(7, 8, 60, node_floor=0.02), vocabulary=200, batch=3),
    "frontiers so narrow that levels are many": Case(Shape(16, 6, 32, node_floor=0.01), vocabulary=10),
    "frontiers that never pay": Case(Shape(3, 4, 9, node_floor=1.1)),
    "nodes that must pay": Case(Shape(3, 4, 60, prices=tuple(0.01 * n for n in range(60))), batch=2),
    "nodes that never pay": Case(Shape(2, 4, 60, prices=tuple(2.0 * n for n in range(60)))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_grows_what_torch_grows(case: Case, request: pytest.FixtureRequest) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(case.vocabulary) * 2
    plain, native = Growth(ids, case.shape), growth_of(ids, case.shape, case.dtype)
    assert isinstance(native, NativeGrowth)
    rows, narrow = 1, False
    while not plain.depth or plain.worth_another():
        assert not native.depth or native.worth_another()
        logits = torch.randn(case.batch, rows, case.vocabulary, generator=generator) * 3
        logits = (logits.round() if case.ties else logits).to(case.dtype)
        y = torch.randn(case.batch, rows, 20, generator=generator, dtype=torch.float64)
        assert torch.equal(plain.level(logits, y), native.level(logits, y))
        for name in ("tokens", "bits", "at"):
            assert torch.equal(getattr(plain, name), getattr(native, name)), name
        assert (plain.depth, plain.count, plain.rows_before) == (
            native.depth,
            native.count,
            native.rows_before,
        )
        torch.testing.assert_close(native.scores, plain.scores)
        assert native.promise() == pytest.approx(plain.promise(), rel=1e-5)
        assert native.count <= native.found.tokens.shape[1], "written behind the candidates' room"
        rows = plain.tokens.shape[1]
        narrow = narrow or rows < case.shape.width
    assert not native.worth_another()
    assert narrow or "frontiers" not in request.node.callspec.id
    roots = torch.arange(case.batch) + 7
    same(plain.finish(roots), native.finish(roots))


def same(wanted: DraftTree, got: DraftTree) -> None:
    for name in ("tokens", "parents", "depths", "ancestors", "sizes"):
        assert torch.equal(getattr(wanted, name), getattr(got, name)), name
    assert (wanted.scores is None) == (got.scores is None)
    if wanted.scores is not None and got.scores is not None:
        torch.testing.assert_close(got.scores, wanted.scores, equal_nan=True)


def test_rows_of_odd_strides_are_read_right() -> None:
    ids, shape = torch.arange(50), Shape(2, 4, 9)
    logits, y = torch.randn(2, 1, 100)[..., ::2], torch.randn(2, 1, 40)[..., ::2]
    one, other = NativeGrowth(ids, shape), Growth(ids, shape)
    assert torch.equal(one.level(logits, y), other.level(logits, y))
    roots = torch.arange(6)[::3]
    same(other.finish(roots), one.finish(roots))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_sick_logits_leave_trees_whichever(bad: float) -> None:
    logits = torch.randn(1, 1, 50).index_fill(2, torch.tensor([3, 20]), bad)
    for given in (logits, torch.full_like(logits, bad)):
        growth = NativeGrowth(torch.arange(50), Shape(2, 4, 9))
        y = growth.level(given, given.new_zeros(1, 1, 20))
        assert growth.tokens.shape == (1, 4), "without a floor levels are equally wide"
        growth.level(given.expand(1, 4, 50), y)
        tree = growth.finish(torch.tensor([1]))
        same(trees.build(tree.tokens, tree.parents, scores=tree.scores), tree)
        assert bool(((tree.tokens >= 0) & (tree.tokens < 50)).all())


def test_what_the_kernels_cannot_grow_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(ids: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> type[Growth]:
        return type(growth_of(ids, shape, dtype))

    ids, wide = torch.arange(50), Shape(2, native_growth.MOST + 1, 60)
    assert kind(ids, wide) is Growth
    assert kind(ids, Shape(2, native_growth.MOST, 60)) is NativeGrowth
    assert kind(ids, Shape(2, 4, 60), torch.float16) is Growth
    assert kind(ids[::2], Shape(2, 4, 60)) is Growth
    monkeypatch.setattr(native_growth, "library", lambda: None)
    assert kind(ids, Shape(2, 4, 60)) is Growth
