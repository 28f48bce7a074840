from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.attention.native import NativeAttention
from specdec.attention.protocol import Levels, Rows, chunk_rows, level_rows, tree_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import CacheShape, KVCache
from specdec.errors import UnsupportedError
from specdec.native.library import library
from specdec.native.linear import tiles_kind
from specdec.tree import DraftTree, build, chain

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16)
ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
SLOTS, LENGTH = 3, 220


@pytest.fixture(params=range(tiles_kind() + 1), autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bfloat16 as this processor multiplies it, and as one without tiles does."""
    monkeypatch.setattr("specdec.attention.native.tiles_kind", lambda: request.param)


def _cache(size: int, kv_heads: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache(CacheShape(2, kv_heads, size, dtype, torch.device("cpu")), SLOTS, LENGTH)
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=torch.Generator().manual_seed(1)))
    return cache


def _query(b: int, n: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """Queries as a layer hands them over: a view beside keys and values."""
    wide = torch.randn(b, n, heads + 2, size, generator=torch.Generator().manual_seed(2)).to(dtype)
    return wide[:, :, :heads]


def _tree(b: int, n: int) -> DraftTree:
    parents = torch.tensor([[0] + [(7 * i) % i for i in range(1, n)]]).expand(b, n)
    return build(torch.zeros(b, n, dtype=torch.int64), parents)


def _both(query: Tensor, cache: KVCache, rows: Rows, window: int | None = None) -> tuple[Tensor, Tensor]:
    backends = NativeAttention(), ReferenceAttention()
    got, wanted = (
        a.attend(query, cache, 1, a.plan(rows, cache, window), query.shape[-1] ** -0.5) for a in backends
    )
    return got, wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (2, 1, 96)])
@pytest.mark.parametrize("nodes", [1, 5, 64])
def test_trees_agree_with_the_reference(
    nodes: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    cache = _cache(size, kv_heads, dtype)
    rows = tree_rows(torch.tensor([2, 0, 1]), torch.tensor([0, 67, 150]), _tree(3, nodes))
    got, wanted = _both(_query(3, nodes, heads, size, dtype), cache, rows)
    torch.testing.assert_close(got, wanted, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 9, 64])
def test_chunks_and_windows_agree(window: int | None, dtype: torch.dtype) -> None:
    cache = _cache(32, 2, dtype)
    slots, lengths = torch.tensor([0, 1]), torch.tensor([3, 120])
    for rows in (chunk_rows(slots, lengths, 70), tree_rows(slots, lengths, _tree(2, 12))):
        n = rows.positions.shape[1]
        got, wanted = _both(_query(2, n, 6, 32, dtype), cache, rows, window)
        torch.testing.assert_close(got, wanted, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_behind_older_rows_agree(dtype: torch.dtype) -> None:
    cache = _cache(32, 2, dtype)
    bits = torch.tensor([[0b10011, 0b100101], [0b10001, 0b101010]])
    rows = level_rows(
        torch.tensor([2, 1]), torch.tensor([40, 11]), torch.tensor([[42, 42], [13, 14]]), bits, 4
    )
    got, wanted = _both(_query(2, 2, 4, 32, dtype), cache, rows)
    torch.testing.assert_close(got, wanted, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_node_gets_bit_by_bit_what_its_path_gets_alone(dtype: torch.dtype) -> None:
    cache, prefix = _cache(64, 3, dtype), 75
    tree = _tree(1, 40)
    query = _query(1, 40, 9, 64, dtype)
    slots, lengths = torch.tensor([1]), torch.tensor([prefix])
    attention = NativeAttention()
    together = attention.attend(
        query, cache, 0, attention.plan(tree_rows(slots, lengths, tree), cache, None), 0.125
    )
    for node in range(40):
        path = [i for i in range(40) if int(tree.ancestors[0, node]) >> i & 1]
        alone = KVCache(cache.shape, SLOTS, LENGTH + 30)  # of another size, with the path's rows side by side
        alone.kv[:, :, 0, :, :prefix] = cache.kv[:, :, 1, :, :prefix]
        for to, at in enumerate(path):
            alone.kv[:, :, 0, :, prefix + to] = cache.kv[:, :, 1, :, prefix + at]
        for first in (0, len(path) - 1):  # all of the path at once; its last node behind what is committed
            own = path[first:]
            chained = chain(torch.zeros(1, len(own), dtype=torch.int64))
            rows = tree_rows(torch.tensor([0]), lengths + first, chained)
            got = attention.attend(query[:, own], alone, 0, attention.plan(rows, alone, None), 0.125)
            assert torch.equal(got[0, -1], together[0, node]), node


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nodes", "prefix"), [(1, 1000), (1, 1501), (40, 1000)])
def test_threads_change_nothing(nodes: int, prefix: int, dtype: torch.dtype) -> None:
    """Three key heads, and for forty nodes three pieces each: two, four and five threads share what is left over, and
    of one node where there are keys enough."""
    cache = KVCache(_cache(64, 3, dtype).shape, 1, prefix + 64)
    cache.kv.normal_(generator=torch.Generator().manual_seed(1))
    query = _query(1, nodes, 9, 64, dtype)
    rows = tree_rows(torch.tensor([0]), torch.tensor([prefix]), _tree(1, nodes))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 5):
            torch.set_num_threads(threads)
            attention = NativeAttention()
            results.append(attention.attend(query, cache, 0, attention.plan(rows, cache, None), 0.125))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_requests_do_not_touch_each_other() -> None:
    cache = _cache(32, 2, torch.float32)
    slots, lengths = torch.tensor([0, 1, 2]), torch.tensor([200, 3, 64])
    query, attention = _query(3, 8, 4, 32, torch.float32), NativeAttention()
    rows = tree_rows(slots, lengths, _tree(3, 8))
    together = attention.attend(query, cache, 0, attention.plan(rows, cache, None), 0.2)
    for b in range(3):
        one = tree_rows(slots[b : b + 1], lengths[b : b + 1], _tree(1, 8))
        alone = attention.attend(query[b : b + 1], cache, 0, attention.plan(one, cache, None), 0.2)
        assert torch.equal(alone[0], together[b])


def test_hidden_rows_of_numbers_that_are_none_are_no_harm_but_visible_ones_are() -> None:
    cache = _cache(32, 2, torch.float32)
    rows = tree_rows(torch.tensor([0]), torch.tensor([20]), chain(torch.zeros(1, 2, dtype=torch.int64)))
    cache.kv[:, :, 0, :, 60:] = torch.nan  # beyond the tree
    cache.kv[:, :, 1] = torch.nan  # another request
    got, _ = _both(_query(1, 2, 4, 32, torch.float32), cache, rows)
    assert not got.isnan().any()
    cache.kv[1, 0, 0, :, 7] = torch.nan
    got, _ = _both(_query(1, 2, 4, 32, torch.float32), cache, rows)
    assert got.isnan().all()


def test_what_has_no_kernel_is_refused_by_name() -> None:
    rows = chunk_rows(torch.tensor([0]), torch.tensor([0]), 1)
    attention = NativeAttention()
    with pytest.raises(UnsupportedError, match="divisible by 16"):
        attention.plan(rows, _cache(24, 1, torch.float32), None)
    cache = _cache(16, 1, torch.float32)
    with pytest.raises(UnsupportedError, match="soft cap"):
        attention.attend(
            _query(1, 1, 1, 16, torch.float32), cache, 0, attention.plan(rows, cache, None), 1.0, 30.0
        )


def test_levels_of_equal_width_know_the_positions_of_older_ones() -> None:
    slots, lengths, bits = torch.tensor([2, 0]), torch.tensor([9, 4]), torch.ones(2, 3, dtype=torch.int64)
    levels, positions = Levels.of(slots, lengths, 3, 4, windowed=True), []
    for level in range(4):
        positions.append((lengths + level)[:, None].expand(2, 3))
        got, wanted = levels.rows(level, bits), torch.cat(positions, dim=1)
        alike = level_rows(slots, lengths, positions[-1], bits, 3 * level, wanted)
        assert torch.equal(got.positions, alike.positions)
        assert torch.equal(got.index.indices, alike.index.indices)
        assert got.offset == alike.offset
        assert got.tree_positions is not None
        assert torch.equal(got.tree_positions, wanted)


def test_a_window_needs_the_positions_of_older_tree_rows() -> None:
    rows = level_rows(torch.tensor([0]), torch.tensor([5]), torch.tensor([[7]]), torch.tensor([[0b101]]), 2)
    with pytest.raises(AssertionError):
        NativeAttention().plan(rows, _cache(16, 1, torch.float32), 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of a process")
def test_a_thread_that_ends_takes_its_scratch_with_it() -> None:
    cache, length = KVCache(CacheShape(1, 1, 16, torch.float32, torch.device("cpu")), 1, 10_000), 9_000
    rows, query = (
        chunk_rows(torch.tensor([0]), torch.tensor([length]), 48),
        _query(1, 48, 1, 16, torch.float32),
    )
    attention = NativeAttention()

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

    def run(threads: int) -> None:
        for _ in range(threads):
            one = threading.Thread(
                target=lambda: attention.attend(query, cache, 0, attention.plan(rows, cache, None), 0.25)
            )
            one.start()
            one.join()

    run(4)  # whatever else is made once
    before, scratch = resident(), length * 48 * 4
    run(40)
    assert resident() - before < 10 * scratch
