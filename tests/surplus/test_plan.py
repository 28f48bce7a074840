import pytest

from specdec.errors import RequestError
from specdec.surplus.plan import (
    BUDGETS,
    Sizes,
    candidate_taps,
    check_documents,
    estimated_minutes,
    name_of,
    plan_of,
)


def test_too_little_text_names_the_number_needed() -> None:
    plan = plan_of("quick")
    check_documents(plan, 40, head=False)
    with pytest.raises(RequestError, match=r"40 prompts are needed \(got 1;"):
        check_documents(plan, 1, head=False)
    with pytest.raises(RequestError, match="67 prompts are needed"):
        check_documents(plan, 66, head=True)


def test_unknown_budget() -> None:
    with pytest.raises(RequestError, match="quick, standard, full"):
        plan_of("huge")


def test_candidates_are_sound_and_at_least_six() -> None:
    for layers in (8, 16, 30, 80):
        found = candidate_taps(layers)
        assert len(found) >= 6
        assert all(list(taps) == sorted(set(taps)) and taps[-1] <= layers for taps in found)
    assert candidate_taps(30)[0] == (2, 15, 27)
    assert name_of((2, 15, 27)) == "2+15+27"


def test_a_larger_budget_takes_longer_and_cuts_less() -> None:
    sizes = Sizes(hidden=576, layers=30, vocab=49152, documents=72, outcomes=48, tap_widths=(3, 3, 1))
    minutes = [sum(estimated_minutes(plan, sizes, 6e10).values()) for plan in BUDGETS.values()]
    assert minutes == sorted(minutes)
    assert [len(plan.cuts) for plan in BUDGETS.values()] == sorted(
        (len(plan.cuts) for plan in BUDGETS.values()), reverse=True
    )
    slow, fast = (estimated_minutes(plan_of("quick"), sizes, rate) for rate in (1e10, 2e10))
    assert sum(slow.values()) == pytest.approx(2 * sum(fast.values()))
