"""The load generator against a live server: what it counts, and what its figures mean."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from serving import MODEL, Setup, load, running

from bench.serving import Load, Trace, arriving, measure, summarise, tau

HELLO = [{"role": "user", "content": "hello"}]


def some(url: str, requests: int = 4) -> Load:
    return Load(url, MODEL, [HELLO], 8, 0.0, requests, 10.0, 10.0, 0)


def test_points_against_a_live_server(tmp_path: Path) -> None:
    with running(load(tmp_path), Setup()) as live:
        fast = asyncio.run(measure(some(live.url), "speculative", clients=2))
        plain = asyncio.run(measure(some(live.url), "plain", rate=50.0))
        broken = asyncio.run(
            measure(Load(live.url, "other", [HELLO], 8, 0.0, 2, 1.0, 1.0, 0), "plain", clients=1)
        )
    assert (fast["requests"], fast["errors"], fast["tokens"]) == (4, 0, 32)
    assert fast["loop"] == "closed"
    assert fast["tau"] >= 1
    assert fast["goodput_per_second"] == pytest.approx(4 / fast["seconds"], rel=0.01)
    assert (plain["tokens"], plain["tau"], plain["loop"]) == (32, 1.0, "open")
    assert broken["errors"] == 2
    assert broken["first_error"].startswith("404")


def test_figures() -> None:
    traces = [Trace(0.0, [0.1, 0.2, 0.4], 5), Trace(0.0, [20.0, 20.1], 2), Trace(0.0, error="x")]
    row = summarise(some(""), traces, 2.0)
    assert (row["requests"], row["errors"], row["tokens"]) == (3, 1, 7)
    assert row["tokens_per_second"] == 3.5
    assert row["goodput_per_second"] == 0.5  # the second was late
    assert row["itl_ms_p50"] == pytest.approx(100)


def test_tau_from_either_kind_of_counters() -> None:
    assert tau({"tokens": 10, "rounds": 10}, {"tokens": 40, "rounds": 20}) == 3.0
    assert tau({}, {"drafts": 10, "accepted": 15}) == 2.5
    assert tau({}, {}) is None


def test_arrivals_do_not_wait() -> None:
    async def slow() -> Trace:
        await asyncio.sleep(0.2)
        return Trace(0.0)

    began = time.perf_counter()
    assert len(asyncio.run(arriving(slow, 1000.0, 20, 0))) == 20
    assert time.perf_counter() - began < 2
