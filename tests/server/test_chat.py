"""POST /v1/chat/completions over plain HTTP: messages, log-probabilities, formats, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serving import MODEL

HELLO = [{"role": "user", "content": "hello"}]


def post(http: httpx.Client, **body: Any) -> httpx.Response:
    text = json.dumps({"messages": HELLO, "temperature": 0, "max_tokens": 8, **body})
    return http.post("/v1/chat/completions", content=text, headers={"Content-Type": "application/json"})


def test_content_parts_and_developer_messages(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    one = post(
        http, messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    ).json()
    two = post(
        http, messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    ).json()
    assert one["choices"] == two["choices"]


def test_logprobs_have_tokens_bytes_and_alternatives(http: httpx.Client) -> None:
    choice = post(http, logprobs=True, top_logprobs=2).json()["choices"][0]
    for entry in choice["logprobs"]["content"]:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2


def test_both_names_of_the_token_limit(http: httpx.Client) -> None:
    usage = post(http, max_tokens=None, max_completion_tokens=3, ignore_eos=True).json()["usage"]
    assert usage["completion_tokens"] == 3
    assert post(http, max_tokens=2, max_completion_tokens=3).json()["error"]["param"] == "max_tokens"


def test_without_a_limit_the_context_is_the_limit(http: httpx.Client) -> None:
    answer = post(http, max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


def test_any_json_object(http: httpx.Client) -> None:
    answer = post(
        http, response_format={"type": "json_object"}, temperature=1, seed=2, max_tokens=200, stop=["}"]
    )
    text = answer.json()["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{")
    assert post(http, response_format={"type": "text"}).json()["choices"] == post(http).json()["choices"]


def test_grammar_answers_do_not_depend_on_speculation(http: httpx.Client) -> None:
    schema = {"type": "array", "items": {"enum": [True, False]}, "minItems": 3, "maxItems": 12}
    wish = {"type": "json_schema", "json_schema": {"name": "flags", "schema": schema}}
    for seed in range(3):
        asked = {"response_format": wish, "temperature": 0.9, "seed": seed, "max_tokens": 200}
        fast, plain = post(http, **asked).json(), post(http, **asked, speculate=False).json()
        assert fast["choices"] == plain["choices"]
        assert 3 <= len(json.loads(fast["choices"][0]["message"]["content"])) <= 12


REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ({"temperatur": 1}, "temperatur"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 10**40}, "seed"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": "x" * 100_000}, "stop.0"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"draft": "head"}, "draft"),
    ({"draft": "somebody"}, "draft"),
    ({"draft": "ngram", "speculate": False}, "draft"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "bogus"}},
            }
        },
        "response_format.json_schema",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "param"), REFUSED, ids=[str(i) + "-" + p for i, (_, p) in enumerate(REFUSED)]
)
def test_refusals_name_the_field(http: httpx.Client, wrong: dict[str, Any], param: str) -> None:
    answer = post(http, **wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"].startswith(param), error
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_neutral_values_of_unsupported_fields_pass(http: httpx.Client) -> None:
    neutral = {"model": MODEL, "tools": [], "tool_choice": "none", "store": False, "modalities": ["text"], "n": 1,
               "service_tier": "auto", "metadata": None, "user": "me", "parallel_tool_calls": True,
               "safety_identifier": "me", "prompt_cache_key": "page", "prompt_cache_retention": "24h"}  # fmt: skip
    assert post(http, **neutral).json()["choices"] == post(http).json()["choices"]
