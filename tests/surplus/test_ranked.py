import pytest

from specdec.errors import RequestError
from specdec.surplus.ranked import f3, gaps_of, lengths_of
from specdec.surplus.values import Value


def number(value: float, spread: float) -> Value:
    return {"value": value, "low": value - spread, "high": value + spread, "n": 9, "documents": 9}


GAPS = {str(i): number(0.1 + 0.1 * i, 0.001) for i in range(7)}


def test_a_faithful_ranking_holds_and_its_reverse_fails() -> None:
    lengths = {name: number(3 - 0.2 * i, 0.01) for i, name in enumerate(GAPS)}
    row = f3(GAPS, lengths)
    assert row["verdict"] == "holds"
    assert row["impressive"]
    assert row["number"]["value"] == pytest.approx(1.0)
    reverse = {name: number(1 + 0.2 * i, 0.01) for i, name in enumerate(GAPS)}
    assert f3(GAPS, reverse)["verdict"] == "fails"


def test_noise_leaves_it_undecided() -> None:
    lengths = {name: number(3 - 0.2 * i, 2.0) for i, name in enumerate(GAPS)}
    assert f3(GAPS, lengths)["verdict"] == "undecided"


def test_bad_input() -> None:
    with pytest.raises(RequestError, match="was not ranked"):
        f3(GAPS, {"99": number(2, 0.1)})
    with pytest.raises(RequestError, match="a ranking needs 6"):
        f3(GAPS, {name: number(2, 0.1) for name in list(GAPS)[:3]})
    with pytest.raises(RequestError, match="it is a plan report"):
        lengths_of([{"engine": {}, "taps_used": "1"}], "chain")
    head = {"engine": {"chain": {"tau": number(2, 0.1)}}, "taps_used": "1"}
    assert lengths_of([head], "chain") == {"1": number(2, 0.1)}
    with pytest.raises(RequestError, match="two heads"):
        lengths_of([head, head], "chain")
    old, new = {"taps": "1", "gap": number(1, 0)}, {"taps": "2", "gap": number(1, 0), "behind": number(0, 0)}
    assert gaps_of({"taps": [old, new]}) == {"1": number(1, 0), "2": number(0, 0)}
