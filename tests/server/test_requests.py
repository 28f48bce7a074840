"""Whatever a client writes, the request parser answers with a 2xx or a 4xx that is an error object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import MODEL, Live, Setup, running

from specdec.generate import SpecDecoder
from specdec.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Strict,
    TokenizeRequest,
)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 5), st.floats(), st.text(max_size=8),
    st.sampled_from(["\ud800", "a" * 3000, 10**400, -1, 2**63, 1e308, "stop", "\x00", "json_object", MODEL]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def asked(model: Any, always: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A request that is right but for a few fields, known and unknown ones, which hold anything."""
    names = st.sampled_from([*model.model_fields, "surprise", "\ud800"])
    few = st.dictionaries(names, ANYTHING, max_size=3)
    return few.map(lambda wrong: {**always, "max_tokens": 2, **wrong})


@pytest.fixture(scope="module")
def quick(decoder: SpecDecoder) -> Iterator[tuple[Live, httpx.Client]]:
    """A server and a client that stays connected, so that many examples take little time."""
    with running(decoder, Setup(slots=4)) as live:
        yield live, live.web


def check(http: httpx.Client, path: str, body: Any) -> None:
    answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert len(answer.content) < 2000, "an error echoes what came in"
        assert error["param"] is not None or error["code"] in ("invalid_json", "invalid_body")
    assert b'"code":"internal_error"' not in answer.content


@settings(max_examples=40)
@given(body=asked(ChatRequest, {"messages": [{"role": "user", "content": "hi"}]}))
def test_chat_never_fails(quick: tuple[Live, httpx.Client], body: dict[str, Any]) -> None:
    check(quick[1], "/v1/chat/completions", body)


@settings(max_examples=40)
@given(body=asked(CompletionRequest, {"prompt": "hi"}))
def test_completions_never_fail(quick: tuple[Live, httpx.Client], body: dict[str, Any]) -> None:
    check(quick[1], "/v1/completions", body)


@settings(max_examples=25)
@given(
    body=ANYTHING,
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
)
def test_bodies_of_any_shape(quick: tuple[Live, httpx.Client], body: Any, path: str) -> None:
    check(quick[1], path, body)


MANY = 2000
NAMES = {f"name{i}": "x" for i in range(MANY)}
WRONG: list[tuple[type[Strict], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [{}] * MANY}),
    (CompletionRequest, {"prompt": [*[1] * MANY, "x"]}),
    (CompletionRequest, {"prompt": [["x"] * MANY] * 3}),
    (CompletionRequest, {"prompt": "x", **NAMES}),
    (CompletionRequest, {"prompt": "x", "logit_bias": NAMES}),
    (ChatRequest, {"messages": [1] * MANY}),
    (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}] * 3}),
    (ChatRequest, {"messages": [{"role": "user", "content": "x", **NAMES}]}),
    (TokenizeRequest, {"messages": [1] * MANY}),
    (DetokenizeRequest, {"tokens": ["x"] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), WRONG, ids=range(len(WRONG)))
def test_a_body_full_of_mistakes_is_not_complained_about_item_by_item(
    model: type[Strict], body: dict[str, Any]
) -> None:
    """A body of 8 MiB held the event loop for two minutes, and eight gigabytes."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() < 10


def test_nothing_is_left_behind(quick: tuple[Live, httpx.Client]) -> None:
    live, http = quick
    assert http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
    assert live.state.inside == 0
    assert live.state.worker.load == (0, 0)


def test_the_document_lists_every_endpoint(quick: tuple[Live, httpx.Client]) -> None:
    document = quick[1].get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health", "/version",
        "/metrics", "/tokenize", "/detokenize",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_schemathesis_finds_no_5xx(quick: tuple[Live, httpx.Client], path: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    live, http = quick
    document = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    document.config.update(base_url=live.url)

    @settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=document[path]["POST"].as_strategy())
    def never_fails(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("max_tokens") is None and "completions" in path:
            case.body["max_tokens"] = 2  # else answers go on to the end of the context
        answer = case.call(timeout=60)
        assert answer.status_code < 500, answer.text

    never_fails()
