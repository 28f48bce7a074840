"""The measured cost table: complete, remembered by model and drafter, made anew when its file is broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import engines
import pytest
from torch import Tensor
from toy import FakeDrafter, ToyTarget, neighbours

from specdec.attention.protocol import Rows
from specdec.cache import KVCache
from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.none import NoDrafter
from specdec.engine import costs
from specdec.engine.cost_table import CostTable
from specdec.engine.engine import Limits
from specdec.target.protocol import States, Target
from specdec.tree import MAX_NODES


def _scratch(target: Target, slots: int, length: int = 64) -> KVCache:
    return KVCache(target.info.cache, slots, length + MAX_NODES)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every work takes two milliseconds, whatever else this machine does."""
    monkeypatch.setattr(costs, "_least_ms", lambda works, *_: dict.fromkeys(works, 2.0))


def test_a_table_covers_batches_and_nodes_and_more_never_costs_less() -> None:
    target = ToyTarget()
    table = costs.measure(target, NgramDrafter(), _scratch(target, 8))
    assert list(table.verify) == [1, 2, 4, 8]
    assert (table.level, table.extend) == ({}, {})
    for batch, row in table.verify.items():
        assert next(iter(row)) == 1
        assert all(batch * nodes <= costs.MOST_ROWS or nodes == 1 for nodes in row)
        assert list(row.values()) == sorted(row.values())
    assert CostTable.from_dict(table.as_dict()) == table


@pytest.mark.parametrize("length", [2, 3, 40])
def test_trees_stay_within_the_rows_of_a_short_context(
    length: int, target_of: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels do not look where they write."""
    target, farthest = target_of("llama"), list[int]()
    drafter = engines.eagle(target, engines.random_head(target, range(20)), Limits(1, length))
    forward = target.forward

    def watched(tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        farthest.append(int(rows.index.indices.max()))
        return forward(tokens, rows, cache, taps)

    def once(works: Mapping[tuple[int, int], Callable[[], object]], *_: int) -> dict[tuple[int, int], float]:
        return {name: float(work() is None) + 2.0 for name, work in works.items()}

    monkeypatch.setattr(target, "forward", watched)
    monkeypatch.setattr(costs, "_least_ms", once)
    table = costs.measure(target, drafter, _scratch(target, 1, length))
    costs.busy_then(table, target, drafter, _scratch(target, 1, length))
    assert max(farthest) < length + MAX_NODES


def test_a_heads_levels_are_measured_and_its_slots_left_clean(target_of: Callable[..., Target]) -> None:
    target = target_of("llama")
    drafter = engines.eagle(target, engines.random_head(target, range(20)), Limits(2, 128))
    table = costs.measure(target, drafter, _scratch(target, 2))
    assert list(table.level) == list(table.extend) == [1, 2]
    assert all(lane.rows == 0 and not lane.tokens for lane in drafter.lanes)
    assert table.draft_ms(1, 3) > table.draft_ms(1, 1) > 0


def test_measured_once_then_remembered(clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, measured = ToyTarget(), []
    measure = costs.measure
    monkeypatch.setattr(costs, "measure", lambda *given: measured.append(given) or measure(*given))
    first = costs.remembered(target, NgramDrafter(), _scratch(target, 1), tmp_path / "new" / "place")
    assert costs.remembered(target, NgramDrafter(), _scratch(target, 1), tmp_path / "new" / "place") == first
    assert len(measured) == 1
    costs.remembered(target, NoDrafter(), _scratch(target, 1), tmp_path / "new" / "place")
    costs.remembered(target, NgramDrafter(), _scratch(target, 2), tmp_path / "new" / "place")
    assert len(measured) == 3, "another drafter or batch is another table"
    assert len([*(tmp_path / "new" / "place").iterdir()]) == 3, "temporary files stayed behind"


@pytest.mark.parametrize("part", ["verify", "level"])
def test_a_table_of_a_busy_moment_is_not_believed(
    part: str, clock: None, target_of: Callable[..., Target], tmp_path: Path
) -> None:
    """Taken beside other work, a level of drafting once looked dearer than a forward, and stayed so for good."""
    target = target_of("llama")
    drafter = engines.eagle(target, engines.random_head(target, range(20)), Limits(1, 128))
    table = costs.remembered(target, drafter, _scratch(target, 1), tmp_path)
    (file,) = tmp_path.iterdir()
    told = json.loads(file.read_text())
    told[part] = {
        key: {n: 500.0 for n in value} if part == "verify" else 500.0 for key, value in told[part].items()
    }
    file.write_text(json.dumps(told))
    again = costs.remembered(target, drafter, _scratch(target, 1), tmp_path)
    assert again == table
    assert CostTable.from_dict(json.loads(file.read_text())) == again
    assert all(lane.rows == 0 and not lane.tokens for lane in drafter.lanes)
    quick = {key: {n: 1e-3 for n in row} for key, row in table.as_dict()["verify"].items()}
    file.write_text(json.dumps(table.as_dict() | {"verify": quick, "level": {}, "extend": {}}))
    assert costs.remembered(target, drafter, _scratch(target, 1), tmp_path).verify_ms(1, 1) == 1e-3, (
        "slower now"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"verify": {}, "level": {}, "extend": {}}', "\x00\xff"])
def test_a_broken_file_is_measured_anew_and_replaced(text: str, clock: None, tmp_path: Path) -> None:
    target, drafter = ToyTarget(), FakeDrafter(neighbours)
    table = costs.remembered(target, drafter, _scratch(target, 1), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text, encoding="latin-1")
    again = costs.remembered(target, drafter, _scratch(target, 1), tmp_path)
    assert again.verify.keys() == table.verify.keys()
    assert costs.remembered(target, drafter, _scratch(target, 1), tmp_path) == again


def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    target = ToyTarget()
    (tmp_path / "file").write_text("in the way")
    assert costs.remembered(target, NgramDrafter(), _scratch(target, 1), tmp_path / "file").verify[1]
