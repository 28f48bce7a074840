"""Compiling ahead: every process is heard of, whatever becomes of it."""

from __future__ import annotations

import time

from bench import warm


def test_how_every_process_ended_is_told() -> None:
    start = time.monotonic()
    jobs = [("bench.ceilings",), ("bench.missing",), ("http.server", "0"), ("bench.intervals",)]
    told = warm.run(jobs, 15.0)
    assert told.pop(("http.server", "0")) == "cut off"
    assert told.pop(("bench.missing",)) == "exit code 1"
    assert set(told.values()) == {"done"} and len(told) == 2
    assert time.monotonic() - start < 60


def test_every_product_and_number_of_rows_is_compiled() -> None:
    words = [set(command) for command in warm.commands()]
    for model in ("8b", "135m"):
        for product in ("qkv", "out", "gate_up", "down", "head"):
            for rows in ("1", "16", "32", "64"):
                assert sum({model, product, rows} <= seen for seen in words) == 1
