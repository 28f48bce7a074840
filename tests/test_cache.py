"""The slot cache against a plain dictionary of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.cache import CacheShape, KVCache, RowIndex
from specdec.errors import UnsupportedError
from specdec.native import placing

LAYERS, HEADS, DIM, SLOTS, LENGTH = 2, 3, 4, 4, 24
SHAPE = CacheShape(LAYERS, HEADS, DIM, torch.float32, torch.device("cpu"))
Model = dict[tuple[int, int], float]  # (slot, row) -> the number its keys hold


def rows_of(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct keys and values for rows named by numbers. [B, N] -> [B, N, HEADS, DIM] twice"""
    inner = torch.arange(HEADS * DIM).view(HEADS, DIM) / 100
    keys = numbers[..., None, None].float() + inner
    return keys, -keys


def fill(cache: KVCache, slots: list[int], starts: list[int], numbers: Tensor, *, spans: bool) -> None:
    indices = torch.tensor(starts)[:, None] + torch.arange(numbers.shape[1])
    where = RowIndex(torch.tensor(slots), indices, list(zip(slots, starts, strict=True)) if spans else None)
    keys, values = rows_of(numbers)
    for layer in range(LAYERS):
        cache.write(layer, where, keys + 1000 * layer, values - 1000 * layer)


def assert_holds(cache: KVCache, model: Model) -> None:
    for (slot, row), number in model.items():
        keys, values = rows_of(torch.tensor(number))
        for layer in range(LAYERS):
            assert torch.equal(cache.kv[layer, 0, slot, :, row], keys + 1000 * layer), (slot, row)
            assert torch.equal(cache.kv[layer, 1, slot, :, row], values - 1000 * layer), (slot, row)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True),
    st.data(),
    st.booleans(),
)
def test_write_stores_rows_where_they_belong(slots: list[int], data: st.DataObject, spans: bool) -> None:
    """Both ways of writing, few requests and many, leave the same cache; other rows stay untouched."""
    width = data.draw(st.integers(1, 6))
    starts = [data.draw(st.integers(0, LENGTH - width)) for _ in slots]
    numbers = torch.arange(1, len(slots) * width + 1).view(len(slots), width)
    cache = KVCache(SHAPE, SLOTS, LENGTH)
    fill(cache, slots, starts, numbers, spans=spans)
    model = {
        (slot, start + j): float(numbers[b, j])
        for b, (slot, start) in enumerate(zip(slots, starts, strict=True))
        for j in range(width)
    }
    assert_holds(cache, model)
    written = torch.zeros(SLOTS, LENGTH, dtype=torch.bool)
    for slot, row in model:
        written[slot, row] = True
    assert bool((cache.kv.permute(2, 4, 0, 1, 3, 5)[~written] == 0).all())


def on_host(cache: KVCache, slots: Tensor, lengths: Tensor, kept: Tensor) -> None:
    cache.keep(slots, lengths, kept)


def on_host_by_torch(cache: KVCache, slots: Tensor, lengths: Tensor, kept: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "keep", lambda *_: False)
        cache.keep(slots, lengths, kept)


def on_device(cache: KVCache, slots: Tensor, lengths: Tensor, kept: Tensor) -> None:
    cache.compact(slots, lengths, kept)


@pytest.mark.parametrize("keep", [on_host, on_host_by_torch, on_device])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_keep_moves_accepted_rows_to_the_front(
    keep: Callable[[KVCache, Tensor, Tensor, Tensor], None], data: st.DataObject
) -> None:
    slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=3, unique=True))
    nodes = data.draw(st.integers(1, 8))
    lengths = [data.draw(st.integers(0, LENGTH - nodes)) for _ in slots]
    chains = [sorted({0, *data.draw(st.sets(st.integers(0, nodes - 1)))}) for _ in slots]
    width = max(map(len, chains))
    kept = torch.tensor([chain + chain[-1:] * (width - len(chain)) for chain in chains])
    numbers = torch.arange(1, len(slots) * LENGTH + 1).view(len(slots), LENGTH)
    cache = KVCache(SHAPE, SLOTS, LENGTH)
    fill(cache, slots, [0] * len(slots), numbers, spans=False)
    keep(cache, torch.tensor(slots), torch.tensor(lengths), kept)
    model: Model = {}
    for b, slot in enumerate(slots):
        model |= {(slot, row): float(numbers[b, row]) for row in range(lengths[b])}
        model |= {
            (slot, lengths[b] + j): float(numbers[b, lengths[b] + at]) for j, at in enumerate(chains[b])
        }
    assert_holds(cache, model)
    idle = [slot for slot in range(SLOTS) if slot not in slots]
    assert bool((cache.kv[:, :, idle] == 0).all())


def test_keep_away_from_the_cpu_never_asks_the_host() -> None:
    """Meta tensors hold no values: any host read of one raises."""
    cache = KVCache(CacheShape(1, 1, 2, torch.float32, torch.device("meta")), 2, 8)
    index = torch.zeros(1, dtype=torch.int64, device="meta")
    cache.keep(index, index, torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        index.tolist()


def test_keep_reads_all_rows_before_it_writes_any() -> None:
    cache = KVCache(SHAPE, SLOTS, LENGTH)
    fill(cache, [1], [0], torch.arange(8)[None], spans=True)
    cache.keep(torch.tensor([1]), torch.tensor([2]), torch.tensor([[0, 2, 3, 4]]))
    assert_holds(cache, {(1, 0): 0, (1, 1): 1, (1, 2): 2, (1, 3): 4, (1, 4): 5, (1, 5): 6})


@settings(deadline=None, max_examples=20)
@given(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1), st.integers(0, LENGTH))
def test_copy_prefix(source: int, target: int, rows: int) -> None:
    cache = KVCache(SHAPE, SLOTS, LENGTH)
    numbers = torch.arange(1, SLOTS * LENGTH + 1).view(SLOTS, LENGTH)
    fill(cache, list(range(SLOTS)), [0] * SLOTS, numbers, spans=False)
    cache.copy_prefix(source, target, rows)
    model = {(slot, row): float(numbers[slot, row]) for slot in range(SLOTS) for row in range(LENGTH)}
    model |= {(target, row): float(numbers[source, row]) for row in range(rows)}
    assert_holds(cache, model)


def test_bytes_are_counted() -> None:
    cache = KVCache(SHAPE, SLOTS, LENGTH)
    assert SHAPE.row_bytes() == LAYERS * 2 * HEADS * DIM * 4
    assert cache.bytes() == SHAPE.row_bytes() * SLOTS * LENGTH


def test_too_little_memory_is_refused_with_the_size() -> None:
    with pytest.raises(UnsupportedError, match=r"slots x length.*GiB: lower max_length or slots") as caught:
        KVCache(SHAPE, 2**30, 2**30)
    assert caught.value.field == "slots x length"


def test_compaction_is_the_fused_kernel_s_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr("specdec.fused.available.runs", lambda device: True)
    monkeypatch.setattr("specdec.fused.settle.compact", lambda *tensors: asked.append(tensors))
    cache, where = (
        KVCache(SHAPE, SLOTS, LENGTH),
        (torch.tensor([1]), torch.tensor([4]), torch.tensor([[0, 2]])),
    )
    cache.compact(*where)
    assert len(asked) == 1 and all(x is y for x, y in zip(asked[0], (cache.kv, *where), strict=True)), (
        "once, with these"
    )
