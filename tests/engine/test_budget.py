"""The budget: interpolated costs, prices of nodes and levels, switching off what does not pay and trying again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec.drafting.protocol import PLAIN, Shape
from specdec.engine.budget import FEWEST, NEW_PAUSE, Budget
from specdec.engine.cost_table import CostTable
from specdec.engine.experience import LONGEST_PAUSE, SHORTEST_PAUSE, TRIAL
from specdec.tree import DraftTree, chain

TABLE = CostTable({1: {1: 10.0, 4: 16.0, 8: 20.0}, 4: {1: 20.0, 4: 40.0}}, {1: 2.0, 4: 4.0}, {1: 3.0, 4: 5.0})
LIMIT = Shape(depth=6, width=4, nodes=8)


@pytest.mark.parametrize(
    ("batch", "nodes", "ms"),
    [
        (1, 1, 10),
        (1, 4, 16),
        (1, 2, 12),
        (1, 6, 18),
        (1, 16, 40),
        (4, 1, 20),
        (2, 1, 10 + 10 / 3),
        (8, 1, 40),
    ],
)
def test_verification_is_interpolated_and_extrapolated(batch: int, nodes: int, ms: float) -> None:
    assert TABLE.verify_ms(batch, nodes) == pytest.approx(ms)


def test_drafting_costs_the_extension_and_the_further_levels() -> None:
    assert TABLE.draft_ms(1, 0) == 0
    assert TABLE.draft_ms(1, 1) == 3
    assert TABLE.draft_ms(1, 4) == 9
    assert TABLE.draft_ms(4, 2) == 9
    assert CostTable(TABLE.verify, {}, {}).draft_ms(1, 3) == 0


def test_a_table_survives_json() -> None:
    assert CostTable.from_dict(json.loads(json.dumps(TABLE.as_dict()))) == TABLE


BROKEN: list[Any] = [
    None, [], 3, {}, {"verify": {}}, {"verify": {}, "level": {}, "extend": {}},
    {"verify": {"1": 4}, "level": {}, "extend": {}}, {"verify": {"1": {"2": 1.0}}, "level": {}, "extend": {}},
    {"verify": {"1": {"1": -1.0}}, "level": {}, "extend": {}},
    {"verify": {"one": {"1": 1.0}}, "level": {}, "extend": {}},
    {"verify": {"1": {"1": float("nan")}}, "level": {}, "extend": {}},
    {"verify": {"1": {"1": 1.0}}, "level": {"1": 1.0}, "extend": {}},
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN, ids=str)
def test_what_is_no_table_is_a_value_error(data: Any) -> None:
    with pytest.raises(ValueError):
        CostTable.from_dict(data)


def test_a_fixed_budget_always_answers_its_limit() -> None:
    assert Budget(None, LIMIT).shape(3) == LIMIT
    assert Budget(TABLE, LIMIT, adaptive=False).shape(3) == LIMIT
    assert Budget(TABLE, PLAIN).shape(3) == PLAIN


def test_floors_are_what_a_node_and_a_level_cost_in_tokens() -> None:
    shape = Budget(TABLE, LIMIT).shape(1)
    assert (shape.depth, shape.width, shape.nodes) == (6, 4, 8)
    assert shape.node_floor == pytest.approx((20.0 - 10.0) / 7 / 10.0)  # ms of one node at 10 ms a token
    assert 2.0 / 10.0 < shape.level_floor < 1
    assert shape.prices[0] == 0
    assert list(shape.prices) == sorted(shape.prices)
    assert shape.prices[7] == pytest.approx(1.0)


def test_dear_nodes_have_a_higher_floor() -> None:
    cheap = CostTable({1: {1: 10.0, 8: 11.0}}, {}, {})
    assert Budget(cheap, LIMIT).shape(1).node_floor < Budget(TABLE, LIMIT).shape(1).node_floor
    assert Budget(cheap, LIMIT).shape(1).level_floor == 0


def _tree(nodes: int, batch: int = 1) -> DraftTree:
    return chain(torch.ones(batch, nodes, dtype=torch.int64))


def test_speculation_that_earns_less_is_paused_and_tried_again() -> None:
    budget = Budget(TABLE, LIMIT)
    for pause in (SHORTEST_PAUSE, 2 * SHORTEST_PAUSE):
        for _ in range(TRIAL):
            assert budget.shape(1) != PLAIN
            budget.note(budget.shape(1), _tree(8), emitted=1)
        for _ in range(pause):
            assert budget.shape(1) == PLAIN
            budget.note(PLAIN, _tree(1), emitted=1)
        assert budget.shape(1) != PLAIN


def test_pauses_grow_to_a_bound_and_shrink_after_success() -> None:
    budget = Budget(TABLE, LIMIT)
    for _ in range(8):
        for _ in range(TRIAL):
            budget.note(LIMIT, _tree(8), emitted=1)
        budget.trials[1].paused = 0
    assert budget.trials[1].pause == LONGEST_PAUSE
    for _ in range(4 * TRIAL + 1):
        budget.note(LIMIT, _tree(8), emitted=6)
    assert budget.trials[1].pause == SHORTEST_PAUSE


def test_speculation_that_pays_goes_on_and_batch_sizes_are_judged_apart() -> None:
    budget = Budget(TABLE, LIMIT)
    for _ in range(3 * TRIAL):
        budget.note(LIMIT, _tree(8), emitted=5)
        budget.note(LIMIT, _tree(8, batch=4), emitted=4)
        budget.trials[4].paused = 0
    assert budget.shape(1) != PLAIN
    for _ in range(TRIAL):
        budget.note(LIMIT, _tree(8, batch=4), emitted=4)
    assert PLAIN in (budget.shape(4), budget.shape(3))
    assert budget.shape(1) != PLAIN


def test_a_request_that_runs_alone_is_soon_tried_again() -> None:
    budget = Budget(TABLE, LIMIT)
    for batch, rounds in ((1, TRIAL), (4, TRIAL // 2)):
        for _ in range(rounds):
            budget.note(LIMIT, _tree(8, batch), emitted=batch)
    assert budget.trials[1].paused == budget.trials[4].paused == SHORTEST_PAUSE
    budget.welcome(3)  # one of many changes little
    assert budget.trials[1].paused == SHORTEST_PAUSE
    budget.welcome(0)
    assert budget.trials[1].paused == NEW_PAUSE and budget.trials[4].paused == SHORTEST_PAUSE


def test_rounds_that_find_nothing_to_draft_are_no_loss() -> None:
    budget = Budget(TABLE, LIMIT)
    for _ in range(4 * TRIAL):
        budget.note(LIMIT, _tree(1), emitted=1)
    assert budget.shape(1) != PLAIN


def test_a_round_is_judged_by_the_time_it_took_beside_its_forward() -> None:
    """Three tokens pay for this tree as the table has it, and not for drafting of twice the forward, however fast
    the machine is in that minute."""
    for speed in (1.0, 1.7):
        for draft, paid in ((0.3, True), (2.0, False)):
            budget = Budget(TABLE, LIMIT)
            for _ in range(TRIAL):
                budget.note(PLAIN, _tree(1), 1, {"draft": 0.0, "verify": speed, "accept": 0.05 * speed})
            for _ in range(2 * TRIAL):
                seconds = {"draft": draft * speed, "verify": speed, "accept": 0.1 * speed}
                budget.note(LIMIT, replace(_tree(8), levels=2), 3, seconds)
                budget.trials[1].paused = 0
            assert (budget.trials[1].pause == SHORTEST_PAUSE) == paid


def test_many_requests_are_judged_sooner() -> None:
    for batch, enough in ((1, TRIAL), (4, TRIAL // 2), (16, FEWEST)):
        budget = Budget(TABLE, LIMIT)
        for _ in range(enough):
            assert budget.shape(batch) != PLAIN
            budget.note(LIMIT, _tree(8, batch), emitted=batch)
        assert budget.shape(batch) == PLAIN


def test_what_a_trial_has_to_read_first_does_not_count() -> None:
    """Speculation that pays is not given up because much was written before it was tried."""
    budget = Budget(TABLE, LIMIT)
    for turn in range(2 * TRIAL):
        seconds = {"draft": 4.0 if turn == 0 else 0.2, "verify": 1.0, "accept": 0.0}
        budget.note(LIMIT, _tree(8), emitted=3 - turn % 2, seconds=seconds)
    assert budget.shape(1) != PLAIN and budget.trials[1].pause == SHORTEST_PAUSE


def test_trees_that_take_longer_than_the_table_says_are_found_out() -> None:
    """Three tokens pay for a tree of twice a token's time, and not where it turns out to take twice that,
    whatever the machine's speed; prices follow."""
    for speed in (1.0, 1.7):
        for ratio, paid in ((2.0, True), (4.0, False)):
            budget = Budget(TABLE, LIMIT)
            for _ in range(TRIAL):
                budget.note(PLAIN, _tree(1), 1, {"draft": 0.0, "verify": speed, "accept": 0.0})
            before = budget.shape(1).prices
            for _ in range(2 * TRIAL):
                seconds = {"draft": 0.0, "verify": ratio * speed, "accept": 0.0}
                budget.note(LIMIT, _tree(8), 3, seconds)
                budget.trials[1].paused = 0
            assert (budget.trials[1].pause == SHORTEST_PAUSE) == paid
            budget.trials.clear()
            assert (budget.shape(1).prices[7] > before[7] * 1.5) == (not paid)


def _live(budget: Budget, rounds: int, emitted: int, ms: Callable[[int, int], float]) -> int:
    """Rounds that speculated, of so many of one request; ms(round, nodes) of a forward."""
    speculated = 0
    for number in range(rounds):
        shape = budget.shape(1)
        nodes = 8 if shape.depth else 1
        seconds = {"draft": 0.0, "verify": ms(number, nodes) / 1e3, "accept": 0.0}
        budget.note(shape, _tree(nodes), emitted if shape.depth else 1, seconds)
        speculated += shape.depth > 0
    return speculated


@pytest.mark.parametrize("dearer", [2, 4])
def test_a_table_that_flatters_trees_is_found_out_although_speculation_seems_to_pay(dearer: int) -> None:
    budget = Budget(TABLE, LIMIT)
    ms = {1: 10.0, 8: dearer * 20.0}
    emitted = 2 * dearer - 1  # pays by the table, not by the clock
    assert _live(budget, 400, emitted, lambda _, nodes: ms[nodes]) < 200
    assert _live(budget, 1000, emitted, lambda _, nodes: ms[nodes]) < 60


def test_a_minute_that_made_plain_rounds_look_slow_is_forgotten() -> None:
    """Something else ran until just before the second trial: against what plain rounds took then, trees look cheap."""
    table = CostTable({1: {1: 10.0, 8: 25.0}}, {}, {})
    budget, ms = Budget(table, LIMIT), {1: 10.0, 8: 25.0}
    busy = TRIAL + SHORTEST_PAUSE
    _live(budget, 1000, 2, lambda number, nodes: ms[nodes] * (2 if number < busy else 1))
    assert _live(budget, 1000, 2, lambda _, nodes: ms[nodes]) < 60


def test_speculation_that_pays_is_seldom_interrupted() -> None:
    assert _live(Budget(TABLE, LIMIT), 2000, 3, lambda _, nodes: {1: 10.0, 8: 20.0}[nodes]) > 1975


def test_looking_in_vain_is_no_loss_however_long_it_takes() -> None:
    budget = Budget(TABLE, LIMIT)
    for _ in range(4 * TRIAL):
        budget.note(LIMIT, _tree(1), 1, {"draft": 1.0, "verify": 1.0, "accept": 0.0})
    assert budget.shape(1) != PLAIN


def test_nothing_is_learned_from_plain_rounds() -> None:
    budget = Budget(TABLE, LIMIT)
    budget.note(PLAIN, _tree(1), emitted=1)
    assert budget.trials == {}


def test_fixed_rounds_get_whole_sizes_by_what_they_brought() -> None:
    """Drafts that are accepted earn large trees, drafts that are not small ones or none; prices cut nothing."""
    flat = CostTable({1: {1: 10.0, 8: 10.5, 64: 12.0}}, {1: 1.0}, {1: 1.0})
    steep = CostTable({1: {1: 10.0, 8: 15.0, 64: 60.0}}, {1: 1.0}, {1: 1.0})
    limit, chosen = Shape(depth=6, width=4, nodes=60), {}
    for name, table in (("flat", flat), ("steep", steep)):
        budget = Budget(table, limit, fixed=True)
        first = budget.shape(1)  # by what heads usually bring
        assert first == limit if name == "flat" else 1 < first.nodes < limit.nodes
        for _ in range(TRIAL - 1):
            budget.earned(1, 60, 6, promised=2.0, emitted=4)
        chosen[name] = budget.shape(1)
        assert chosen[name] in budget.sizes()
        assert chosen[name].prices == ()
    assert chosen["flat"].nodes > chosen["steep"].nodes
    budget = Budget(steep, limit, fixed=True)
    for _ in range(TRIAL):
        budget.earned(1, 60, 6, promised=2.0, emitted=1)
    assert budget.shape(1) == PLAIN
    assert [(s.depth, s.nodes) for s in budget.sizes()] == [(6, 60), (5, 30), (4, 15), (3, 7)]


def _answers(gain: float, requests: int) -> float:
    """Plain decoding's milliseconds over those of answers of 128 tokens, one after another, on a small target on a GPU
    (H200, SmolLM2's shape), where each doubling of a tree brings `gain` accepted drafts."""
    table = CostTable({1: {1: 0.43, 16: 0.73, 64: 0.88}}, {1: 0.08}, {1: 0.10})
    budget, spent, tokens = Budget(table, Shape(7, 10, 60), fixed=True), 0.0, 0.0
    for _ in range(requests):
        budget.welcome(0)
        done = 0.0
        while done < 128:
            shape = budget.shape(1)
            emitted = 1 + gain * math.log2(shape.nodes)
            spent += table.verify_ms(1, shape.nodes) + table.draft_ms(1, shape.depth)
            if shape != PLAIN:
                budget.earned(1, shape.nodes, shape.depth, promised=1.0, emitted=emitted)
            done += emitted
        tokens += done
    return 0.43 * tokens / spent


def test_where_whole_sizes_cannot_pay_looking_for_them_costs_little() -> None:
    assert _answers(gain=0.1, requests=20) > 0.97
    assert _answers(gain=0.3, requests=1) > 0.97
    assert _answers(gain=0.35, requests=20) > 0.98


def test_whole_sizes_that_pay_are_found_although_they_seem_dear() -> None:
    dear = _answers(gain=0.8, requests=20)
    assert dear > 1.2
