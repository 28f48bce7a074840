"""The load generator against live servers: what it counts, what its figures mean, how servers are started."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

import serving

from bench import record
from bench.load import Load, Messages, System, Trace, arriving, in_turn, since, summarise, tau
from bench.servers import Setup, command, running, systems_at
from bench.serving import Bench, one_by_one, together, warm_up
from specdec.errors import SpecdecError

HELLO: Messages = [{"role": "user", "content": "hello"}]
LOAD = Load(max_tokens=8, first_slo=60.0, token_slo=60.0)


def test_points_against_a_live_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record.append, "__kwdefaults__", {"results": tmp_path})
    with serving.running(serving.load(tmp_path / "target"), serving.Setup()) as live:
        bench = Bench(systems_at("specdec", live.url), LOAD, {"target": "tiny"})
        asyncio.run(warm_up(bench))
        alone = asyncio.run(one_by_one(bench, "chat", [HELLO] * 3))
        closed = asyncio.run(together(bench, [[HELLO] * 2] * 2, clients=2))
        opened = asyncio.run(together(bench, [[HELLO] * 2] * 2, rate=50.0))
    for rows, requests in ((alone, 3), (closed, 4), (opened, 4)):
        fast, plain = rows
        assert fast["system"] == "specdec"
        assert (fast["requests"], fast["errors"], fast["tokens"]) == (requests, 0, 8 * requests)
        assert fast["over_same server, plain"] == pytest.approx(1 / plain["over_specdec"], rel=0.01)
        assert fast["tau"] >= 1
        assert plain["tau"] == 1.0
        assert plain["itl_chunk_ms_p50"] > 0
    assert closed[0]["goodput_per_second"] == pytest.approx(4 / closed[0]["seconds"], rel=0.01)
    assert [row["loop"] for row in (*alone, *closed, *opened)] == ["closed"] * 4 + ["open"] * 2
    written = [json.loads(line) for line in (tmp_path / "serving.jsonl").read_text().splitlines()]
    assert [row["system"] for row in written] == ["specdec", "same server, plain"] * 3


def test_no_server_answers_a_prompt_twice_where_a_plain_one_is_compared_with() -> None:
    ours = [System("specdec", "a", "m"), System("same server, plain", "a", "m", plain=True)]
    assert Bench(ours, LOAD, {}).alone() == ours
    other = System("plain", "b", "m")
    assert Bench([*ours, other], LOAD, {}).alone() == [ours[0], other]


def test_failures_are_counted_and_told(tmp_path: Path) -> None:
    with serving.running(serving.load(tmp_path), serving.Setup()) as live:
        broken = Bench([System("x", live.url, "other")], LOAD, {})
        with pytest.raises(SpecdecError, match="404"):
            asyncio.run(warm_up(broken))
    with pytest.raises(SpecdecError, match="no OpenAI-compatible server"):
        systems_at("specdec", live.url)


def test_figures() -> None:
    traces = [
        Trace(0.0, [(0.1, 1), (0.2, 2), (0.5, 5)], 5),
        Trace(0.0, [(20.0, 1), (20.1, 2)], 2),
        Trace(0.0, error="x"),
    ]
    row = summarise(Load(), traces, 2.0)
    assert (row["requests"], row["errors"], row["tokens"]) == (3, 1, 7)
    assert row["tokens_per_second"] == 3.5
    assert row["goodput_per_second"] == 0.5  # the second was late
    assert row["itl_chunk_ms_p50"] == pytest.approx(100)
    assert row["itl_chunk_ms_p99"] == pytest.approx(296, abs=1)  # of 100, 300, 100
    # 300 ms brought three tokens
    assert row["itl_token_ms_p50"] == row["itl_token_ms_p99"] == pytest.approx(100)


def test_tau_from_either_kind_of_counters() -> None:
    assert tau(since({"tokens": 10, "rounds": 10}, {"tokens": 40, "rounds": 20})) == 3.0
    assert tau({"drafts": 10, "accepted": 15}) == 2.5
    assert tau({}) is None


def test_arrivals_do_not_wait_and_keep_their_order() -> None:
    async def slow(messages: Messages) -> Trace:
        await asyncio.sleep(0.2)
        return Trace(float(messages[0]["content"]))

    began = time.perf_counter()
    asked = [[{"role": "user", "content": str(i)}] for i in range(20)]
    traces = asyncio.run(arriving(slow, asked, 1000.0, 0))
    assert [trace.sent for trace in traces] == list(range(20))
    assert time.perf_counter() - began < 2


def test_sets_take_turns() -> None:
    one, two = (
        [[{"role": "user", "content": f"{name}{i}"}] for i in range(n)] for name, n in (("a", 2), ("b", 1))
    )
    assert [m[0]["content"] for m in in_turn([one, two], 5)] == ["a0", "b0", "a1", "a0", "b0"]


def test_a_server_that_ends_at_once_is_told_with_its_log() -> None:
    with (
        pytest.raises(SpecdecError, match="out of order"),
        running((sys.executable, "-c", "raise SystemExit('out of order')")),
    ):
        pass


def test_command_lines(tmp_path: Path) -> None:
    (line, _) = command("plain", Setup("some-target", slots=3))
    assert line[2:] == (
        "specdec.cli.main",
        "serve",
        "some-target",
        "--plain",
        "--slots",
        "3",
        "--dtype",
        "auto",
    )
    with pytest.raises(SpecdecError, match="scripts/conformance"):
        command("vllm", Setup(vllm_env=tmp_path))
