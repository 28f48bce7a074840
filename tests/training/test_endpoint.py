"""The endpoint client against a real local server that fails in every way it should survive."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from specdec.errors import SpecdecError, UnsupportedError
from training.endpoint import Endpoint, EndpointAnswerer, api_key
from training.responses import Answer

pytest.importorskip("httpx")

Script = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]]


class Server:
    """Runs `script(number of the request, its body)`; remembers what it was asked and how many at once."""

    def __init__(self, script: Script) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = self.most = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers["authorization"])
                    number = len(outer.asked)
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                status, headers, reply = (
                    script(number, body) if self.path == "/v1/completions" else (404, {}, {})
                )
                with lock:
                    outer.busy -= 1
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                with contextlib.suppress(ConnectionError):  # a client that timed out has gone
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], Server]]:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running: list[Server] = []

    def start(script: Script) -> Server:
        running.append(Server(script))
        return running[-1]

    yield start
    for server in running:
        server.http.shutdown()
        server.http.server_close()


def ids(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """The reply of a server that returns token ids: the prompt, each id plus one."""
    choice = {"text": "?", "token_ids": [i + 1 for i in body["prompt"]], "finish_reason": "length"}
    return 200, {}, {"choices": [choice]}


def ask(server: Server, prompts: int = 6, **settings: Any) -> list[Answer]:
    options = {"backoff": 0.01, "timeout": 5.0, "concurrent": 4, **settings}
    answerer = EndpointAnswerer(Endpoint(server.url, "m", **options), lambda text: [ord(c) for c in text], 99)
    lists = [[10 * i, 10 * i + 1] for i in range(prompts)]
    return sorted(answerer.answer(lists, [0.5] * prompts, list(range(prompts)), 7))


EXPECTED = [Answer(i, [10 * i + 1, 10 * i + 2], "length") for i in range(6)]


def test_prompts_go_out_as_ids_with_all_settings(serve: Callable[[Script], Server]) -> None:
    server = serve(lambda _, body: ids(body))
    assert ask(server, api_key="secret") == EXPECTED
    assert set(server.keys) == {"Bearer secret"}
    assert {"model": "m", "prompt": [20, 21], "max_tokens": 7, "temperature": 0.5, "top_p": 1.0, "seed": 2,
            "stream": False, "return_token_ids": True, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0} in server.asked  # fmt: skip


def test_a_servers_own_settings_do_not_bend_the_targets_law(serve: Callable[[Script], Server]) -> None:
    """vLLM and SGLang take what a request leaves open from the model's generation_config.json, such as Qwen's."""
    theirs = {"top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    used: list[dict[str, Any]] = []

    def opinionated(_: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        used.append({name: body.get(name, own) for name, own in theirs.items()})
        return ids(body)

    assert ask(serve(opinionated)) == EXPECTED
    assert used == [{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}] * 6


def test_many_at_once_but_not_more_than_asked(serve: Callable[[Script], Server]) -> None:
    def slow(_: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.05)
        return ids(body)

    server = serve(slow)
    assert len(ask(server, prompts=12)) == 12
    assert 2 <= server.most <= 4


@pytest.mark.parametrize("failure", [(503, {}, {}), (429, {"Retry-After": "0"}, {}), (200, {}, b"<html>"),
                                     (200, {}, {"choices": []}), (200, {}, [])])  # fmt: skip
def test_passing_failures_are_tried_again_and_nothing_is_lost(
    serve: Callable[[Script], Server], failure: tuple[int, dict[str, str], Any]
) -> None:
    server = serve(lambda number, body: failure if number % 3 == 1 else ids(body))
    assert ask(server) == EXPECTED
    assert len(server.asked) > 6


def test_timeouts_are_tried_again(serve: Callable[[Script], Server]) -> None:
    def sleepy(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.6 if number == 1 else 0)
        return ids(body)

    assert ask(serve(sleepy), timeout=0.3) == EXPECTED


def test_an_endpoint_without_token_ids_is_read_as_text(serve: Callable[[Script], Server]) -> None:
    def strict(_: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if "return_token_ids" in body:
            return 400, {}, {"error": {"message": "Unrecognized request argument: return_token_ids"}}
        return 200, {}, {"choices": [{"text": "ab", "finish_reason": "stop" if body["seed"] else "length"}]}

    server = serve(strict)
    assert ask(server, prompts=2, concurrent=1) == [
        Answer(0, [97, 98], "length"),
        Answer(1, [97, 98, 99], "stop"),
    ]
    assert len(server.asked) == 3


def test_requests_in_flight_survive_what_the_first_one_learned(serve: Callable[[Script], Server]) -> None:
    """Several go out with a field that the endpoint objects to before it has said so of the first."""

    def strict(_: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.05)
        for name in ("return_token_ids", "min_p"):
            if name in body:
                return 400, {}, {"error": {"message": f"this server does not know the field {name!r}"}}
        return 200, {}, {"choices": [{"text": "ab", "finish_reason": "length"}]}

    server = serve(strict)
    assert [answer.token_ids for answer in ask(server)] == [[97, 98]] * 6
    assert server.asked[-1]["top_k"] == -1, "what it does not object to is still sent"


def collect(server: Server, **settings: Any) -> tuple[list[Answer], SpecdecError]:
    answerer = EndpointAnswerer(
        Endpoint(server.url, "m", backoff=0.01, concurrent=2, **settings), lambda _: [], 99
    )
    found: list[Answer] = []
    with pytest.raises(SpecdecError) as caught:
        for answer in answerer.answer([[i] for i in range(20)], [0.0] * 20, [0] * 20, 7):
            found.append(answer)
    return found, caught.value


def test_a_refusal_ends_the_run_after_what_was_in_flight(serve: Callable[[Script], Server]) -> None:
    def locked(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (401, {}, {"error": "no key"}) if body["prompt"] == [5] else ids(body)

    server = serve(locked)
    found, error = collect(server)
    assert "401" in str(error) and "Set SPECDEC_API_KEY" in str(error)
    assert len(found) == len(server.asked) - 1, "every answer the server gave was handed on"
    assert len(server.asked) <= 8, "and nothing new was asked"


def test_a_lasting_failure_says_how_often_and_what_to_do(serve: Callable[[Script], Server]) -> None:
    found, error = collect(serve(lambda *_: (500, {}, {"error": "CUDA"})), retries=2)
    assert found == [] and "failed 3 times" in str(error) and "CUDA" in str(error)
    assert error.remedy is not None and "answers so far are kept" in error.remedy


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    answerer = EndpointAnswerer(Endpoint("http://127.0.0.1:9", "m", retries=1, backoff=0.01), lambda _: [], 0)
    with pytest.raises(SpecdecError, match="ConnectError"):
        list(answerer.answer([[1]], [0.0], [0], 1))


def test_an_abandoned_answer_cancels_what_is_in_flight(serve: Callable[[Script], Server]) -> None:
    def slow(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0 if number == 1 else 0.3)
        return ids(body)

    server = serve(slow)
    answers = EndpointAnswerer(Endpoint(server.url, "m", concurrent=2), lambda _: [], 0).answer(
        [[i] for i in range(50)], [0.0] * 50, [0] * 50, 1
    )
    next(answers)
    started = time.monotonic()
    answers.close()  # type: ignore[attr-defined]  # a generator, though only an iterator is promised
    assert time.monotonic() - started < 1 and len(server.asked) < 6


def test_addresses_and_numbers_are_checked() -> None:
    assert Endpoint("http://host/v1/", "m").completions == "http://host/v1/completions"
    assert Endpoint("http://host:8000", "m").completions == "http://host:8000/v1/completions"
    with pytest.raises(SpecdecError, match="endpoint"):
        Endpoint("host:8000", "m")
    with pytest.raises(SpecdecError, match="endpoint concurrent"):
        Endpoint("http://host", "m", concurrent=0)


def test_without_httpx_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(UnsupportedError, match="pip install httpx"):
        list(EndpointAnswerer(Endpoint("http://host", "m"), lambda _: [], 0).answer([[1]], [0.0], [0], 1))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert api_key() is None
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert api_key() == "theirs"
    monkeypatch.setenv("SPECDEC_API_KEY", "ours")
    assert api_key() == "ours"


def test_a_target_without_a_stop_id_gets_none(serve: Callable[[Script], Server]) -> None:
    server = serve(lambda *_: (200, {}, {"choices": [{"text": "ab", "finish_reason": "stop"}]}))
    answerer = EndpointAnswerer(Endpoint(server.url, "m"), lambda text: [ord(c) for c in text], None)
    (answer,) = answerer.answer([[1]], [0.0], [0], 7)
    assert answer.token_ids == [97, 98]
