"""Counters: tau, conditional and unconditional acceptance, against rounds counted by hand."""

from __future__ import annotations

import json
import math

import pytest

from specdec.stats import PHASES, Counters, total


def _counted() -> Counters:
    """Four rounds: (emitted, offered, nodes), and one that a stop cut short."""
    counters = Counters()
    for emitted, offered, nodes in ((3, 4, 8), (1, 4, 8), (2, 1, 2), (1, 0, 1)):
        counters.add_round(emitted, offered, nodes, cut=False)
    counters.add_round(4, 4, 8, cut=True)
    return counters


def test_tau_leaves_cut_rounds_out() -> None:
    counters = _counted()
    assert (counters.rounds, counters.emitted, counters.cut) == (4, 7, 1)
    assert counters.tau == 7 / 4
    assert counters.drafted == 7 + 7 + 1 + 0


def test_alpha_is_conditional_on_having_been_reached_and_offered() -> None:
    # depth 1 was offered three times and accepted twice; depth 2 reached and offered once (the round that
    # accepted one node of one level was not offered more), accepted once; depth 3 reached once, refused
    assert _counted().alpha() == [2 / 3, 1.0, 0.0]


def test_accepted_per_position_counts_all_rounds() -> None:
    assert _counted().accepted_per_position() == [2 / 4, 1 / 4, 0.0]


def test_nothing_happened() -> None:
    empty = Counters()
    assert math.isnan(empty.tau)
    assert empty.alpha() == empty.accepted_per_position() == []
    assert empty.as_dict()["tau"] is None


def test_sums_add_up() -> None:
    one, two = _counted(), _counted()
    one.seconds["draft"] = 1.5
    two.seconds["draft"] = 0.25
    both = total([one, two])
    assert both.tau == one.tau
    assert both.alpha() == one.alpha()
    assert (both.rounds, both.cut, both.seconds["draft"]) == (8, 2, 1.75)
    assert one.rounds == 4, "the parts were changed"


def test_the_dict_is_plain_json() -> None:
    facts = json.loads(json.dumps(_counted().as_dict()))
    assert facts["tau"] == 1.75
    assert facts["alpha"] == pytest.approx([0.6667, 1.0, 0.0])
    assert set(facts["seconds"]) == set(PHASES)
