"""Bodies, heads, keys and times that a server must not put up with."""

from __future__ import annotations

import copy
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
from serving import LENGTH, Live, until
from tokenizers import normalizers

from specdec.errors import RequestError, SpecdecError
from specdec.generate import SpecDecoder
from specdec.server.limits import ServerLimits
from specdec.server.reading import Reader
from specdec.server.schema import Message
from specdec.target.vocabulary import Vocabulary

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


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"prompt": "\xff\xfe"}', "can't decode byte 0xff in position 12"),
        (b"[" * 2000, "nested too deep"),
        (b'{"prompt": [%s]}' % (b"9" * 5000), "Exceeds the limit (4300 digits)"),
    ],
)
def test_json_that_the_parser_gives_up_on_is_told_why(live: Live, body: bytes, why: str) -> None:
    answer = live.web.post("/tokenize", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert why in answer.json()["error"]["message"]


def test_bodies_of_no_json_type(tight: Live) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # the second is what curl -d sends
        plain = tight.web.post("/tokenize", content='{"prompt": "x"}', headers={"Content-Type": kind})
        assert plain.status_code == 400
        assert plain.json()["error"]["message"].endswith("send it with Content-Type: application/json")
    wrong = tight.web.post("/tokenize", content="[]", headers=JSON)
    assert "must be a JSON object" in wrong.json()["error"]["message"]


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


@contextmanager
def held(live: Live) -> Iterator[None]:
    """The thread that reads prompts is busy."""
    gate = threading.Event()
    live.state._thread.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


def test_text_that_cannot_fit_is_refused_unread(serve: Callable[..., AbstractContextManager[Live]]) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    with serve(slots=1) as live, pytest.MonkeyPatch.context() as patch:
        most = live.state.reader.most_bytes
        assert LENGTH <= most < 20 * LENGTH
        for length, status in ((LENGTH - 1, 200), (LENGTH, 400), (most, 400)):
            answer = live.web.post("/v1/completions", json={"prompt": "x" * length, "max_tokens": 1})
            assert answer.status_code == status
        patch.setattr(type(live.state.decoder.tokenizer), "encode", never)
        patch.setattr(type(live.state.decoder), "encode", never)
        long = "x" * (most + 1)
        turn = {"messages": [{"role": "user", "content": long}]}
        asked = [("/v1/completions", {"prompt": long}), ("/tokenize", {"prompt": long}),
                 ("/v1/chat/completions", turn), ("/tokenize", turn)]  # fmt: skip
        for path, body in asked:
            answer = live.web.post(path, json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in body
            assert "is longer than the context" in answer.json()["error"]["message"]


def test_what_a_template_leaves_out_does_not_count(decoder: SpecDecoder) -> None:
    tokenizer = copy.deepcopy(decoder.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    own = SpecDecoder(replace(decoder.loaded, tokenizer=tokenizer), decoder.engine)
    reader = Reader(own, Vocabulary(tokenizer, decoder.engine.target.info.vocab))
    thought = "x" * 2 * reader.most_bytes + "</think>"
    assert len(reader.messages([Message(role="user", content=thought + "hi")])) == 2
    with pytest.raises(RequestError, match="longer than the context"):
        reader.messages([Message(role="user", content="hi" + thought[:-1])])


def test_a_long_conversation_is_rendered_once(decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(decoder, Vocabulary(decoder.tokenizer, decoder.engine.target.info.vocab))
    turns = [Message(role="user", content="x" * (reader.most_bytes // 2))]
    same = decoder.encode([turn.plain() for turn in turns])
    render, calls = decoder.tokenizer.apply_chat_template, []
    monkeypatch.setattr(
        decoder.tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or render(*a, **k)
    )
    assert reader.messages(turns) == same
    assert len(calls) == 1


def test_a_tokenizer_that_rewrites_text_gets_slack(decoder: SpecDecoder) -> None:
    tokenizer, vocab = copy.deepcopy(decoder.tokenizer), decoder.engine.target.info.vocab
    strict = Reader(decoder, Vocabulary(tokenizer, vocab)).most_bytes
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    own = SpecDecoder(replace(decoder.loaded, tokenizer=tokenizer), decoder.engine)
    assert Reader(own, Vocabulary(tokenizer, vocab)).most_bytes == 4 * strict


def test_reading_counts_towards_time_and_queue(serve: Callable[..., AbstractContextManager[Live]]) -> None:
    limits = ServerLimits(request_seconds=0.5, queue=0)
    whole, count = {"prompt": "abc", "max_tokens": 1}, {"prompt": "abc"}
    with serve(slots=1, limits=limits) as live, ThreadPoolExecutor(1) as pool:
        for path, body in (("/v1/completions", whole), ("/tokenize", count)):
            with held(live):
                first = pool.submit(live.web.post, path, json=body)
                assert until(lambda: live.state.inside == 1)
                second = live.web.post("/v1/completions", json=whole)
                assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
                late = first.result()
            assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
            assert live.state.inside == 0
            assert live.web.post(path, json=body).status_code == 200


def test_who_hangs_up_while_being_read_is_forgotten(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    turn = {"messages": [{"role": "user", "content": "abc"}]}
    asked = [("/v1/completions", {"prompt": "abc", "stream": True}), ("/v1/completions", {"prompt": "abc"}),
             ("/v1/chat/completions", turn), ("/tokenize", turn), ("/detokenize", {"tokens": [4]})]  # fmt: skip
    for path, body in asked:
        text = json.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
        with held(live):
            with socket.create_connection((host, int(port))) as line:
                line.sendall(f"{head}\r\n\r\n{text}".encode())
                assert until(lambda: live.state.inside == 1)
            assert until(lambda: live.state.inside == 0, 2)


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
