import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.errors import CheckpointError, MismatchError, RequestError, SpecdecError
from specdec.surplus.figures import draw_all
from specdec.surplus.page import findings, make_page, show, table
from specdec.surplus.run import Report
from specdec.surplus.values import Value, claim_row, clean, undecided
from specdec.surplus.verdicts import without_head
from specdec.surplus.write import changes, comparable, read_report, write_report


def number(value: float, spread: float = 0.1) -> Value:
    return {"value": value, "low": value - spread, "high": value + spread, "n": 100, "documents": 20}


def cell(depth: int, **more: str) -> Value:
    names = ("surplus", "gap", "ceiling", "captured", "alpha", "entropy")
    row: Value = {name: number(0.1 * (i + depth)) for i, name in enumerate(names)}
    return row | {
        "key": {"taps": "1+4+6", "depth": str(depth), **more},
        "top": {"1": number(0.5)},
        "control_spread": 0.01,
    }


def values(**changes: Any) -> Value:
    """A report with a head, every part present."""
    depths = {"1": number(0.6), "2": {"value": None, "low": None, "high": None, "n": 0, "documents": 20}}
    run = {
        "tau": number(2.5), "tau_predicted": 2.4, "tau_predicted_interval": number(2.4), "tau_expected": None,
        "alpha": depths,
        "by_domain": [{"domain": "maths", "documents": 20, "tau": number(2.6)},
                      {"domain": "<b>", "documents": 1, "tau": None}],
    }  # fmt: skip
    terms = ("unrecoverable", "capacity", "training", "drift", "total")
    made: Value = {
        "version": 1, "kind": "head", "target": {"name": "tiny<script>", "fingerprint": "f"}, "taps_used": "1+4+6",
        "temperature": 1.0, "seed": 0, "budget": "quick", "cuts": ["few depths"], "told": {"command": "specdec report"},
        "documents": {"predictors": 40, "outcomes": 20}, "rows": 1000, "symbols": 41, "domain_names": ["maths", "<b>"],
        "floor": {"tv_mean": 1e-6, "tv_max": 1e-5, "rows": 10},
        "cells": [cell(2), cell(3), cell(2, domain="maths")], "thin": [{"depth": "3", "domain": "<b>"}],
        "bank": {"2": {"n-gram": 2.1}},
        "bounds": {"cells": 3, "below": 1, "broken": ["depth 3 domain <b>"]},
        "permuted": {"surplus": number(0.01), "excess": number(0.02), "holds": True},
        "feature_error": [{"depth": 2, "share": number(-1.0), "kl": number(0.5), "size": number(0.6)}],
        "taps": [{"taps": "8", "gap": number(0.2), "behind": number(0, 0), "depths": [2],
                  "alpha": {"2": number(0.7)}, "tau": 2.1, "alignment": None, "energy": 0.9},
                 {"taps": "1+4+6", "gap": number(0.3), "behind": number(0.1, 0.01), "depths": [2],
                  "alpha": {"2": number(0.6)}, "tau": 2.0, "alignment": 3.0, "energy": 0.8}],
        "domains": [{"domain": "maths", "alpha": number(0.7), "tau": 2.0}],
        "geometry": {"bins": [{"entropy": "< 0.5 nats", "spectrum": [0.5, 0.3, 0.0], "effective_rank": number(3),
                               "participation": number(2), "anisotropy": number(9)}],
                     "kl_forecast_ratio": 1.0, "tv_forecast_ratio": 1.0},
        "entropy": {"shannon": number(2.0), "gini_simpson": number(0.7), "renyi_2": number(1.5), "tail_mass": 0.02,
                    "information_full": number(1.2), "information_lumped": number(1.1)},
        "cross_check": {"e1": number(0.3), "e2": number(0.31), "allowed": 0.03, "holds": True},
        "curve": {"2": {"points": [{"contexts": n, "gap": number(1 / n)} for n in (100, 200)], "limit": 0.1,
                        "exponent": 0.5}},
        "noise": {"name": "noise", "doses": [0.0, 1.0], "surplus": [number(0.3), number(0.2)], "rising": False,
                  "holds": True},
        "claims": [*without_head(), {"name": "F1 raw", "number": number(-0.5), "threshold": "<= -0.3",
                                     "verdict": "holds", "impressive": True, "note": "a & b"}],
        "prediction": [{"shape": "tree", "domain": "maths", "depth": 1, "predicted": 0.6, "erfc": 0.6, "probe": None,
                        "measured": number(0.61)}],
        "calibration": [{"depth": 2, "ece": 0.05, "temperature": 1.2, "gap": number(0.3), "gap_tempered": 0.28,
                         "excess_entropy": number(0.1), "residual": 0.01, "coverage": number(0.97)}],
        "waterfall": [{"depth": 2} | {name: number(0.1) for name in terms}],
        "engine": {"chain": run},
    }  # fmt: skip
    return made | changes


def plan_values() -> Value:
    absent = dict.fromkeys(("floor", "noise", "curve", "cross_check", "permuted"))
    return values(kind="plan", engine={}, prediction=[], calibration=[], waterfall=[], **absent)


ROWS: list[Any] = [({"source": "probe", "depth": 2}, {"gap": torch.tensor([0.1, 0.2])})]


def test_the_page_stands_alone_and_trusts_no_name() -> None:
    told = values()
    page = make_page(told, draw_all(told))
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)  # nothing is fetched from anywhere
    assert "http" not in page.replace("http-equiv", "")
    assert "<script>" not in page
    assert "tiny&lt;script&gt;" in page
    assert "a &amp; b" in page
    assert "$" not in page  # every place of the template was filled


def test_the_checks_say_what_does_not_hold() -> None:
    page = make_page(values(), [])
    assert "BROKEN in 1: depth 3 domain &lt;b&gt;" in page
    assert "0 within 2 standard errors" in page
    assert "log share -1.000" in page
    blind = {"surplus": number(0.3), "excess": number(0.3), "holds": False}
    assert "NOT 0" in make_page(values(permuted=blind, bounds={"cells": 3, "below": 0, "broken": []}), [])


def test_figures_have_titles_captions_and_both_formats() -> None:
    drawn = draw_all(values())
    assert [each.name for each in drawn] == [
        "surplus", "waterfall", "prediction", "domains", "taps", "fisher", "calibration", "doses", "curve",
    ]  # fmt: skip
    for each in drawn:
        assert each.svg.startswith(b"<?xml")
        assert each.png.startswith(b"\x89PNG")
        assert len(each.caption) > 40


def test_many_domains_have_room_and_those_without_a_number_none() -> None:
    def height(svg: bytes) -> float:
        return float(re.findall(rb'height="([0-9.]+)pt"', svg)[0])

    def drawn(count: int, thin: int) -> list[bytes]:
        names = [f"d{i}" for i in range(count + thin)]
        rows = [{"domain": name, "documents": 9, "tau": number(2) if i < count else None}
                for i, name in enumerate(names)]  # fmt: skip
        runs = {"chain": values()["engine"]["chain"] | {"by_domain": rows}}
        return [
            each.svg for each in draw_all(values(engine=runs, domain_names=names)) if each.name == "domains"
        ]

    assert height(drawn(40, 0)[0]) > 2 * height(drawn(2, 0)[0])
    assert height(drawn(2, 40)[0]) == height(drawn(2, 0)[0])
    assert drawn(0, 40) == []


def test_a_plan_draws_what_it_has() -> None:
    told = plan_values()
    assert [each.name for each in draw_all(told)] == ["surplus", "domains", "taps", "fisher"]
    assert "tokens per forward with a chain" in " ".join(findings(told))
    make_page(told, [])


def test_findings_quote_the_numbers() -> None:
    told = " ".join(findings(values()))
    assert "2.50 [2.40, 2.60] tokens per forward with a chain" in told
    assert "2.40 [2.30, 2.50] (4.0% off)" in told
    assert "layers 8 leave the smallest gap" in told
    assert "layers 1+4+6, used here, leave 0.100 [0.090, 0.110] more" in told
    taps = next(each for each in draw_all(values()) if each.name == "taps")
    assert "within noise" not in taps.caption  # their own intervals overlap, the distance does not reach 0


def test_findings_say_why_the_head_is_where_it_is() -> None:
    def told(**terms: float) -> str:
        rows = [{"depth": k} | {name: number(value, 0.01) for name, value in terms.items()} for k in (2, 4)]
        return " ".join(findings(values(waterfall=rows)))

    text = told(unrecoverable=0.2, capacity=0.1, training=0.5, drift=0.0, total=0.8)
    assert "own gap is 0.800 nats; its largest part, 0.500, is training shortfall. More text" in text
    # A head that is ahead of the probes is not bounded by them, whatever their gap.
    text = told(unrecoverable=1.8, capacity=0.0, training=-0.7, drift=0.4, total=1.5)
    assert "0.700 below that of a small probe" in text
    assert "At k = 4 27% of the head's gap is feature drift" in text
    assert "holds: F1 raw; fails: none" in text  # names as the table has them
    page = make_page(values(selection=[{"depth": 1, "forced": 0.31, "survivors": 0.31, "rounds": 0.26}]), [])
    assert "<td>0.310, 0.310, 0.260</td>" in page
    assert "<td>0.970 [0.870, 1.070]</td>" in page


def test_numbers_and_tables() -> None:
    assert show(number(0.5)) == "0.500 [0.400, 0.600]"
    assert show(None) == "-"
    assert show({"value": 1.0, "low": None, "high": None}) == "1.000"
    assert clean(float("nan")) is None
    assert table(("a",), []) == "<p>Not measured in this run.</p>"
    assert "<td>&lt;i&gt;</td>" in table(("a",), [("<i>",)])
    assert undecided("F9", "> 0", "why")["note"] == "why"
    assert claim_row.__doc__


def test_a_report_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "report"
    page = write_report(Report(values(), ROWS), out)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.json",
        "figures",
        "contexts.parquet",
    }
    assert read_report(out) == json.loads((out / "report.json").read_text())
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(out / "contexts.parquet").to_pydict()
    assert found["source"] == ["probe", "probe"]
    assert found["gap"] == pytest.approx([0.1, 0.2])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(Report(values(rows=float("nan")), ROWS), tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_writing_a_report_touches_nothing_beside_it(tmp_path: Path) -> None:
    mine = tmp_path / "report.tmp"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    write_report(Report(values(), ROWS), tmp_path / "report")
    assert (mine / "thesis.txt").exists()


def test_an_existing_directory_is_an_error_unless_it_is_a_report_to_replace(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(Report(values(), ROWS), out)
    with pytest.raises(RequestError, match="exists already"):
        write_report(Report(values(), ROWS), out)
    write_report(Report(values(seed=5), ROWS), out, force=True)
    assert read_report(out)["seed"] == 5
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="no report"):
        write_report(Report(values(), ROWS), mine, force=True)
    assert (mine / "thesis.txt").exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("specdec.surplus.write.write_parquet", full)
    with pytest.raises(SpecdecError, match="No space left on device"):
        write_report(Report(values(), ROWS), tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a report"):
        read_report(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"version": 99, "cells": []}))
    with pytest.raises(MismatchError, match="another layout"):
        read_report(tmp_path / "b.json")


def test_changes_are_apart_only_when_intervals_are() -> None:
    a, b = values(), values(temperature=0.7)
    b["engine"] = {"chain": values()["engine"]["chain"] | {"tau": number(3.5)}}
    words = {name: word for name, _, _, word in changes(a, b)}
    assert words["tau, chain"] == "apart"
    assert words["head's gap, depth 2"] == "within noise"
    assert words["gap, depth 2"] == "within noise"
    assert words["alpha(2), chain"] == "no interval"
    assert comparable(a, b) == ["temperature: 1.0 against 0.7"]
    assert comparable(a, values(target={"name": "other", "fingerprint": "g"}))[0].startswith("target")
