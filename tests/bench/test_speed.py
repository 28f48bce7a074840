"""The arithmetic of the speed bench: ratios, intervals, decode-only times, the README's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import record
from bench.readme import table
from bench.speed import Job, summarise
from bench.systems import Run, law_of
from specdec.sampling import Sampling
from specdec.stats import Counters


@pytest.fixture
def job(tmp_path: Path) -> Job:
    path = tmp_path / "chat.jsonl"
    path.write_text("{}\n")
    return Job("chat", path, [(1,), (2,)])


def _runs(seconds: float, *, tokens: int = 11, decode: float | None = None) -> list[list[Run]]:
    return [[Run(tuple(range(tokens)), seconds, Counters(), decode)] for _ in range(2)]


def test_speedups_are_ratios_of_rates(job: Job) -> None:
    runs = {"plain": _runs(2.0, decode=1.0), "auto": _runs(1.5, decode=0.5), "transformers": _runs(4.0)}
    rows = {row["system"]: row for row in summarise(job, runs)}
    assert rows["auto"]["over_plain"] == pytest.approx(2.0 / 1.5, abs=1e-3)
    assert rows["auto"]["over_transformers"] == pytest.approx(4.0 / 1.5, abs=1e-3)
    assert rows["auto"]["decode_over_plain"] == pytest.approx(2.0)
    assert rows["auto"]["same_tokens_as_plain"] == 1.0
    assert "decode_over_plain" not in rows["transformers"]


def test_different_tokens_are_counted(job: Job) -> None:
    runs = {"plain": _runs(1.0), "ngram": _runs(1.0, tokens=9)}
    assert summarise(job, runs)[1]["same_tokens_as_plain"] == 0.0


def test_the_table_names_every_system(job: Job) -> None:
    runs = {"transformers": _runs(4.0), "plain": _runs(2.0), "auto": _runs(1.0)}
    shared = {"target": "t", "dtype": "torch.float32", "temperature": 0.0, "max_tokens": 8, "machine": "m",
              "threads": 2, "argv": ["specdec", "bench"]}  # fmt: skip
    text = table([{**shared, **row} for row in summarise(job, runs)])
    assert "head and n-grams, x plain" in text and "plain loop" in text
    assert "| chat | 2.8 | 11.0 | 4.00 | 2.00 | 2.00 | - |" in text


def test_transformers_draws_under_the_law_that_ours_draw_under() -> None:
    assert law_of(Sampling()) == {"do_sample": False, "repetition_penalty": 1.0}
    assert law_of(Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)) == {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
    }  # fmt: skip


def test_results_say_what_was_run_and_not_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        str(tmp_path / "bench" / "gpu.py"),
        "--out",
        str(tmp_path / "results"),
        "--sets",
        "bench/prompts/qa.jsonl",
    ]
    monkeypatch.setattr("sys.argv", argv)
    assert record.environment()["argv"] == ["gpu.py", "--out", "results", "--sets", "bench/prompts/qa.jsonl"]
