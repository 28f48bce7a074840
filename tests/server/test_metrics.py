"""/metrics: vLLM's names as its own benchmark scrapes them, and figures that agree with the answers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from serving import Live

from specdec.engine.request import Piece, Request
from specdec.sampling import Sampling
from specdec.server.acceptance import speculative_decoding
from specdec.server.events import Step
from specdec.server.metrics import Metrics

VLLM = (
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
)
OURS = ("specdec:tau", "specdec:alpha", "specdec:nodes_bucket", "specdec:depth_bucket", "specdec:phase_seconds_total",
        "specdec:verify_ms", "specdec:budget_nodes", "specdec:budget_paused", "specdec:reached_total")  # fmt: skip


def scrape(live: Live) -> dict[str, float]:
    """Every sample by name and its own labels."""
    found = {}
    for line in live.web.get("/metrics").text.splitlines():
        match = re.fullmatch(r"([a-z0-9_:]+)\{(.*)\} (\S+)", line)
        if match:
            assert 'engine="0"' in match[2], line
            assert 'model_name="tiny-llama"' in match[2], line
            own = [part for part in match[2].split(",") if part.split("=")[0] not in ("engine", "model_name")]
            found[match[1] + "".join(own)] = float(match[3])
    return found


@pytest.fixture(scope="module")
def numbers(
    serve: Callable[..., AbstractContextManager[Live]],
) -> tuple[dict[str, float], list[Any]]:
    """What a fresh server tells after three requests, and their acceptance blocks."""
    with serve(slots=2) as live:
        told = []
        for prompt in ([70, 71] * 10, [70, 71] * 10, [9, 8, 7]):
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 30, "logit_bias": {"70": 100},
                    "ignore_eos": True, "return_spec_metrics": True}  # fmt: skip
            told.append(live.web.post("/v1/completions", json=body).json())
        return scrape(live), told


def test_names(numbers: tuple[dict[str, float], object]) -> None:
    for name in (*VLLM, *OURS):
        assert any(key.startswith(name) for key in numbers[0]), name


def test_figures_agree_with_the_answers(
    numbers: tuple[dict[str, float], list[Any]],
) -> None:
    found, told = numbers
    blocks = [answer["metrics"]["speculative_decoding"] for answer in told]
    for name, key in (("drafts", "num_spec_steps"), ("draft_tokens", "num_draft_tokens"),
                      ("accepted_tokens", "num_accepted_draft_tokens")):  # fmt: skip
        assert found[f"vllm:spec_decode_num_{name}_total"] == sum(block[key] for block in blocks)
    by_position = [
        v for k, v in found.items() if k.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total")
    ]
    assert sum(by_position) == found["vllm:spec_decode_num_accepted_tokens_total"]
    assert by_position == sorted(by_position, reverse=True)
    assert found["vllm:generation_tokens_total"] == 90
    assert found["vllm:prompt_tokens_total"] == 43
    assert found["vllm:prefix_cache_hits_total"] == 19
    assert found['vllm:request_success_totalfinished_reason="length"'] == 3
    assert found["vllm:time_to_first_token_seconds_count"] == 3
    assert found["vllm:e2e_request_latency_seconds_count"] == 3
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0
    assert found["specdec:tau"] == pytest.approx(
        found["specdec:round_tokens_total"] / found["specdec:rounds_total"]
    )


def test_the_first_token_is_awaited_from_arrival_on(
    serve: Callable[..., AbstractContextManager[Live]],
) -> None:
    """A prompt may wait long for the tokenizer before it is a request of the engine."""
    with serve(slots=1) as live:
        live.state._thread.submit(time.sleep, 0.4)
        live.web.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2})
        found = scrape(live)
    assert found["vllm:time_to_first_token_seconds_sum"] > 0.3
    assert found["vllm:e2e_request_latency_seconds_sum"] > 0.3


def test_rounds_that_land_together_are_counted_each(live: Live) -> None:
    """Rounds in flight land at once when the batch changes: all are seen before the first of their pieces leaves."""
    metrics = Metrics(live.state.worker, "tiny-llama")
    request = Request("a", (1,), Sampling(), frozenset())
    metrics.saw("a", 5, 2)  # of a round that followed the prefill in the same step
    assert metrics.observe(request, Piece("a", (7,), (False,), ("x",))) is None
    metrics.saw("a", 12, 4)
    metrics.saw("a", 1, 0)
    pieces = [Piece("a", (1,) * (n + 1), (True,) * n + (False,), ("x",) * (n + 1)) for n in (2, 4, 0)]
    steps = [metrics.observe(request, piece) for piece in pieces]
    assert steps == [Step(2, 2), Step(4, 4), None]
    told = speculative_decoding([step for step in steps if step])
    assert told["acceptance_histogram"] == [0, 0, 1, 0, 1]
    assert "vllm:spec_decode_num_drafts_total" in metrics.text().decode()
