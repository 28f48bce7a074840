"""Bodies, heads, keys and times that a server must not put up with."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from serving import Live

from specdec.errors import SpecdecError
from specdec.server.limits import ServerLimits

TIGHT = ServerLimits(body_bytes=2000, body_seconds=0.4, header_seconds=0.4)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def tight(serve: Callable[..., AbstractContextManager[Live]]) -> Iterator[Live]:
    with serve(slots=1, limits=TIGHT, api_key="sesame") as one:
        yield one


def raw(live: Live, *parts: bytes, wait: float = 3.0) -> bytes:
    """What the server says to these bytes, a moment apart, until it closes or says no more for a while."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as line:
        for part in parts:
            line.sendall(part)
            time.sleep(0.1)
        said = b""
        try:
            while part := line.recv(65536):
                said += part
        except TimeoutError:
            said += b"<still open>"
        except ConnectionResetError:
            said += b""  # closed with bytes of ours unread
        return said


def test_large_bodies_are_refused(tight: Live) -> None:
    big = json.dumps({"prompt": "x" * 5000})
    answer = tight.web.post("/tokenize", content=big, headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"

    def parts() -> Iterator[bytes]:  # no content-length: counted as it comes
        for _ in range(50):
            yield b"x" * 100

    assert tight.web.post("/tokenize", content=parts(), headers=JSON).status_code == 413


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "null", "3", '"text"', "{'a': 1}", '{"prompt": NaN', "[" * 900, "\x00", '{"a":1}{"b":2}'],
)
def test_malformed_bodies_are_400(tight: Live, body: str) -> None:
    answer = tight.web.post("/tokenize", content=body, headers=JSON)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_utf8_or_no_json_type(tight: Live) -> None:
    assert tight.web.post("/tokenize", content=b'{"prompt": "\xff\xfe"}', headers=JSON).status_code == 400
    plain = tight.web.post("/tokenize", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400


def test_slow_bodies_are_given_up(tight: Live) -> None:
    began = time.monotonic()
    said = raw(tight, b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                      b"Content-Type: application/json\r\n\r\n{")  # fmt: skip
    assert said.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_slow_heads_are_hung_up_on(tight: Live, start: bytes) -> None:
    assert raw(tight, start) == b""


def test_a_slow_second_head_is_hung_up_on(tight: Live) -> None:
    said = raw(tight, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HT")
    assert said.startswith(b"HTTP/1.1 200")
    assert not said.endswith(b"<still open>")


def test_header_tricks(tight: Live) -> None:
    fat = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 400_000 + b"\r\n\r\n"
    assert not raw(tight, fat).startswith(b"HTTP/1.1 2")
    assert raw(tight, b"NONSENSE\r\n\r\n").startswith(b"HTTP/1.1 400")
    both = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nhello"
    assert raw(tight, both).startswith(b"HTTP/1.1 400")
    huge = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999\r\n\r\n"
    assert raw(tight, huge).startswith(b"HTTP/1.1 413")


SMUGGLED = [
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\nhello",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX-Na me: y\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("request_", SMUGGLED, ids=range(len(SMUGGLED)))
def test_smuggling_and_broken_heads_are_4xx_and_hung_up_on(tight: Live, request_: bytes) -> None:
    said = raw(tight, request_)
    assert said.startswith((b"HTTP/1.1 40", b"HTTP/1.1 41")), said[:80]
    assert said.count(b"HTTP/1.1 ") == 1, "a second request was seen in it"
    assert b"<still open>" not in said
    assert tight.web.get("/health").status_code == 200


def test_length_and_chunks_together_are_one_request(tight: Live) -> None:
    inner = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    both = (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % len(inner)) + inner  # fmt: skip
    for head in (both, both.replace(b"POST /tokenize", b"GET /health")):
        said = raw(tight, head, wait=1.0)
        assert said.startswith(b"HTTP/1.1 400")
        assert b"ambiguous_length" in said
        assert b'"version"' not in said, "what a proxy takes for a body was answered as a request"
        assert b"<still open>" not in said


def test_many_prompts_are_refused_before_they_are_read(tight: Live) -> None:
    body = {"prompt": ["x"] * 400, "max_tokens": 1}
    answer = tight.web.post("/v1/completions", json=body, headers={"Authorization": "Bearer sesame"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_sequences"
    body = {"prompt": "x", "n": 128, "best_of": 10**30, "max_tokens": 1}
    answer = tight.web.post("/v1/completions", json=body, headers={"Authorization": "Bearer sesame"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")


def test_the_key_guards_v1_alone(tight: Live) -> None:
    for path in ("/v1/models", "/v1/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"},
                        {"Authorization": "Basic sesame"}, {"Authorization": "Bearer sesame2"}):  # fmt: skip
            answer = tight.web.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert tight.web.get("/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200
    for path in ("/health", "/metrics", "/version", "/"):
        assert tight.web.get(path).status_code == 200
    twice = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nAuthorization: Bearer no\r\n\r\n"
    assert raw(tight, twice, wait=0.3).startswith(b"HTTP/1.1 401")


def test_unknown_paths_and_methods_are_error_objects(tight: Live) -> None:
    missing = tight.web.get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = tight.web.get("/tokenize")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("wrong", [{"queue": -1}, {"request_seconds": 0.0}, {"drain_seconds": float("nan")}])
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecdecError, match=next(iter(wrong))):
        ServerLimits(**wrong)  # type: ignore[arg-type]  # int and float by name
