"""Many requests at once: answers do not depend on load, failures stay alone, nobody is forgotten, the end is clean."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import Live, Setup, Trouble, running, until

from specdec.generate import SpecDecoder
from specdec.sampling import Sampling
from specdec.server.limits import ServerLimits

PROMPT = [40, 41, 42, 43]


def complete(live: Live, prompt: list[int], max_tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, **more}
    return live.web.post("/v1/completions", json=body)


def test_64_greedy_answers_equal_their_offline_ones(live: Live, decoder: SpecDecoder) -> None:
    draw = random.Random(0)
    asked = [[draw.randrange(4, 100) for _ in range(draw.randrange(1, 40))] for _ in range(64)]
    offline = [a.text for a in decoder.generate(asked, Sampling(max_tokens=8), speculate=False)]
    order = list(range(64))
    draw.shuffle(order)
    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(order, pool.map(lambda i: complete(live, asked[i]).json(), order), strict=True))
    assert [answers[i]["choices"][0]["text"] for i in range(64)] == offline
    assert until(lambda: live.state.inside == 0)
    assert live.state.worker.load == (0, 0)


def test_a_request_of_nan_fails_alone(decoder: SpecDecoder) -> None:
    with running(decoder, Setup(slots=3, trouble=Trouble(poison=99))) as live:
        good = complete(live, PROMPT, 40, ignore_eos=True).json()["choices"]
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(complete, live, PROMPT, 40, ignore_eos=True)
            sick = pool.submit(complete, live, [50, 99, 51, 99])
            # meets it while decoding
            later = pool.submit(complete, live, [50, 51], 6, logit_bias={"99": 100})
        assert first.result().json()["choices"] == good
        for failed in (sick.result(), later.result()):
            assert failed.status_code == 500
            assert "not numbers" in failed.json()["error"]["message"]
        streamed = complete(live, [50, 51], 6, logit_bias={"99": 100}, stream=True)
        assert streamed.status_code == 200
        *_, error, done, rest = streamed.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert (done, rest) == ("data: [DONE]", "")
        assert complete(live, PROMPT, 40, ignore_eos=True).json()["choices"] == good
        assert live.web.get("/health").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_told_to_everyone(decoder: SpecDecoder) -> None:
    with running(decoder, Setup(slots=1, trouble=Trouble(fatal=99, delay=0.01))) as live:
        assert live.web.get("/health").status_code == 200
        with ThreadPoolExecutor(3) as pool:
            flying = pool.submit(complete, live, PROMPT, 200, ignore_eos=True)
            assert until(lambda: live.state.worker.load[0] == 1)
            waiting = pool.submit(complete, live, [99], 1)
            flying.cancel()
            live.state.worker.cancel(next(iter(live.state.worker.engine.active.values())).id)
        assert waiting.result().status_code == 500
        assert "engine failed" in waiting.result().json()["error"]["message"]
        assert until(lambda: not live.state.worker.alive)
        assert live.web.get("/health").status_code == 503
        assert complete(live, PROMPT).status_code == 503


def test_time_is_limited(decoder: SpecDecoder) -> None:
    setup = Setup(slots=1, limits=ServerLimits(request_seconds=0.3), trouble=Trouble(delay=0.05))
    with running(decoder, setup) as live:
        late = complete(live, PROMPT, 100, ignore_eos=True)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "request_timeout"
        assert until(lambda: live.state.inside == 0, 2)
        streamed = complete(live, PROMPT, 100, ignore_eos=True, stream=True)
        assert '"code":"request_timeout"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_silence_is_filled_with_comments(decoder: SpecDecoder) -> None:
    setup = Setup(slots=1, limits=ServerLimits(keep_alive_seconds=0.05), trouble=Trouble(delay=0.15))
    with running(decoder, setup) as live:
        assert ": keep-alive\n\n" in complete(live, PROMPT, 3, ignore_eos=True, stream=True).text


def test_a_disconnect_frees_the_slot_and_harms_nobody(decoder: SpecDecoder) -> None:
    with running(decoder, Setup(slots=2, trouble=Trouble(delay=0.01))) as live:
        calm = complete(live, PROMPT, 30, ignore_eos=True).json()["choices"]
        for stream in (False, True):
            with ThreadPoolExecutor(1) as pool:
                staying = pool.submit(complete, live, PROMPT, 30, ignore_eos=True)
                with pytest.raises(httpx.ReadTimeout):
                    body = {"prompt": PROMPT, "max_tokens": 240, "ignore_eos": True, "stream": stream}
                    with httpx.Client(timeout=httpx.Timeout(5, read=0.25)) as client:
                        answer = client.post(f"{live.url}/v1/completions", json=body) if not stream else None
                        assert answer is None
                        with client.stream("POST", f"{live.url}/v1/completions", json=body) as parts:
                            next(parts.iter_lines())
                            raise httpx.ReadTimeout("enough")
            assert staying.result().json()["choices"] == calm
            assert until(lambda: live.state.inside == 0, 2)
            assert live.state.worker.load == (0, 0)


def test_sigterm_lets_running_requests_finish(decoder: SpecDecoder) -> None:
    with running(decoder, Setup(slots=1, trouble=Trouble(delay=0.02))) as live:
        whole = complete(live, PROMPT, 40, ignore_eos=True).json()["choices"]
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(complete(live, PROMPT, 40, ignore_eos=True)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert until(lambda: live.state.inside == 3)
        began = time.monotonic()
        live.server.handle_exit(15, None)
        assert until(lambda: not live.thread.is_alive(), 20)
        for thread in threads:
            thread.join(5)
        assert [a.json()["choices"] for a in answers] == [whole] * 3
        assert not live.state.worker.alive
        assert time.monotonic() - began < 15
        with pytest.raises(httpx.TransportError):
            live.web.get("/health")


def test_sigterm_lets_requests_that_are_being_read_finish(decoder: SpecDecoder) -> None:
    with running(decoder, Setup(slots=1)) as live, ThreadPoolExecutor(1) as pool:
        gate = threading.Event()
        live.state._thread.submit(gate.wait)
        read = pool.submit(complete, live, PROMPT)
        assert until(lambda: live.state.inside == 1)
        live.server.handle_exit(15, None)
        gate.set()
        assert read.result().status_code == 200


def test_a_second_signal_ends_at_once_and_tells_no_traceback(
    decoder: SpecDecoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(slots=1, trouble=Trouble(delay=0.05))
    with running(decoder, setup) as live, ThreadPoolExecutor(1) as pool:
        cut = pool.submit(complete, live, PROMPT, 240, ignore_eos=True)
        assert until(lambda: live.state.inside == 1)
        logger = logging.getLogger("uvicorn.error")
        monkeypatch.setattr(logger, "handlers", [caplog.handler])
        monkeypatch.setattr(logger, "filters", [])
        live.server.handle_exit(15, None)
        live.server.handle_exit(15, None)
        assert until(lambda: not live.thread.is_alive(), 8)
        with contextlib.suppress(httpx.HTTPError):
            assert cut.result(5).status_code >= 500
    assert "CancelledError" not in caplog.text and not any(record.exc_info for record in caplog.records)


def test_too_slow_a_drain_is_cut(decoder: SpecDecoder) -> None:
    setup = Setup(slots=1, limits=ServerLimits(drain_seconds=1), trouble=Trouble(delay=0.05))
    with running(decoder, setup) as live, ThreadPoolExecutor(1) as pool:
        cut = pool.submit(complete, live, PROMPT, 240, ignore_eos=True)
        assert until(lambda: live.state.inside == 1)
        live.server.handle_exit(15, None)
        assert until(lambda: not live.thread.is_alive(), 8)
        with contextlib.suppress(httpx.HTTPError):  # the connection was closed: no answer was pretended
            assert cut.result(5).status_code >= 500
