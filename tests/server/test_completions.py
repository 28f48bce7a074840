"""POST /v1/completions over plain HTTP: every kind of prompt, echo, log-probabilities, stops, usage, acceptance."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch
from serving import LENGTH, MODEL

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling

IDS = [[40, 41, 42, 43, 40, 41], [50, 51, 52]]


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def events(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/completions", json={"temperature": 0, "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def law(decoder: SpecDecoder, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [n, V] of what follows each prompt token, by one forward of the target."""
    target = decoder.engine.target
    cache = KVCache(target.info.cache, 1, 256)
    zero = torch.tensor([0])
    states = target.forward(torch.tensor([ids]), chunk_rows(zero, zero, len(ids)), cache, ())
    return target.logits(states.final)[0].log_softmax(-1)


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cde", "ab"], IDS[0], IDS])
def test_every_kind_of_prompt(http: httpx.Client, decoder: SpecDecoder, prompt: Any) -> None:
    body = post(http, prompt=prompt, max_tokens=8)
    many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    offline = decoder.generate(many, Sampling(max_tokens=8), chat=False, speculate=False)
    assert [c["text"] for c in body["choices"]] == [a.text for a in offline]
    assert [c["index"] for c in body["choices"]] == list(range(len(many)))
    assert body["usage"]["prompt_tokens"] == sum(a.prompt_tokens for a in offline)
    assert body["usage"]["completion_tokens"] == sum(len(a.token_ids) for a in offline)


def test_each_prompt_has_room_of_its_own(http: httpx.Client) -> None:
    """A neighbour that leaves three tokens of the context takes nothing from the others."""
    body = post(http, prompt=["abc", "x" * (LENGTH - 3)], ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 16 + 3
    zero = post(http, prompt=["ab", "cd"], max_tokens=0, echo=True)
    assert [c["text"] for c in zero["choices"]] == ["ab", "cd"]
    assert zero["usage"]["completion_tokens"] == 0


def test_loglikelihood_as_lm_eval_asks_for_it(http: httpx.Client, decoder: SpecDecoder) -> None:
    body = post(http, model=MODEL, prompt=IDS, max_tokens=1, logprobs=1, seed=1234, echo=True)
    for ids, choice in zip(IDS, sorted(body["choices"], key=lambda c: c["index"]), strict=True):
        table, told = law(decoder, ids), choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert len(told["token_logprobs"]) == len(told["tokens"]) == len(told["text_offset"]) == len(ids) + 1
        expected = [float(table[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        greedy = [max(top, key=top.get) == token for token, top in zip(told["tokens"][1:-1], told["top_logprobs"][1:-1],
                                                                      strict=True)]  # fmt: skip
        assert greedy == [int(table[i].argmax()) == ids[i + 1] for i in range(len(ids) - 1)]


def test_long_prompts_are_scored_across_chunks(http: httpx.Client, decoder: SpecDecoder) -> None:
    ids = [4 + (i * i) % 90 for i in range(150)]
    for _ in range(2):  # the second time its rows are still in a slot: they must run again
        told = post(http, prompt=ids, max_tokens=1, logprobs=0, echo=True)["choices"][0]["logprobs"]
        expected = law(decoder, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)


def test_echo_without_generation(http: httpx.Client) -> None:
    body = post(http, prompt="hello", max_tokens=0, echo=True, logprobs=2)
    choice = body["choices"][0]
    assert choice["text"] == "hello"
    assert choice["logprobs"]["tokens"] == list("hello")
    assert body["usage"]["completion_tokens"] == 0
    refused = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 0})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"


def test_logprobs_of_emitted_tokens(http: httpx.Client, decoder: SpecDecoder) -> None:
    body = post(http, prompt=IDS[0], max_tokens=10, logprobs=3, ignore_eos=True)
    answer = decoder.generate([IDS[0]], Sampling(max_tokens=10, ignore_eos=True), chat=False)[0]
    table = law(decoder, [*IDS[0], *answer.token_ids])
    expected = [float(table[len(IDS[0]) - 1 + i, token]) for i, token in enumerate(answer.token_ids)]
    told = body["choices"][0]["logprobs"]
    assert told["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert all(len(top) == 3 for top in told["top_logprobs"])  # greedy: the token is among them


def test_streamed_logprobs_and_echo_equal_the_whole(http: httpx.Client) -> None:
    asked = {"prompt": "abcabc", "max_tokens": 12, "logprobs": 1, "echo": True}
    whole, chunks = post(http, **asked)["choices"][0], events(http, **asked)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert [x for part in parts for x in part["logprobs"][key]] == whole["logprobs"][key]


def test_a_stop_string_ends_text_and_usage(http: httpx.Client) -> None:
    full = post(http, prompt=IDS[0], max_tokens=24, ignore_eos=True)
    text = full["choices"][0]["text"]
    stop = text[9:12]
    body = post(http, prompt=IDS[0], max_tokens=24, ignore_eos=True, stop=["never", stop])
    assert body["choices"][0]["text"] == text[: text.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < full["usage"]["completion_tokens"]
    streamed = events(http, prompt=IDS[0], max_tokens=24, ignore_eos=True, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text[: text.index(stop)]
    assert post(http, prompt=IDS[0], max_tokens=4, stop=None)["choices"]


def test_penalties_bias_and_min_p_reach_the_engine(http: httpx.Client, decoder: SpecDecoder) -> None:
    biased = post(http, prompt="ab", max_tokens=5, logit_bias={"70": 100})
    assert biased["choices"][0]["text"] == decoder.decode([70] * 5)
    settings = {"temperature": 0.9, "seed": 4, "min_p": 0.2, "top_k": 20, "top_p": 0.9, "frequency_penalty": 0.5,
                "presence_penalty": 0.2, "repetition_penalty": 1.1, "max_tokens": 16}  # fmt: skip
    offline = decoder.generate(["ab"], Sampling(**settings), chat=False, speculate=False)[0]
    assert post(http, prompt="ab", **settings)["choices"][0]["text"] == offline.text


def test_cached_tokens_are_reported(http: httpx.Client) -> None:
    prompt = [10 + i for i in range(40)]
    post(http, prompt=prompt, max_tokens=2)
    usage = post(http, prompt=[*prompt, 60, 61], max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32


def test_acceptance_is_told_when_asked(http: httpx.Client) -> None:
    asked = {"prompt": [70, 71] * 10, "max_tokens": 40, "logit_bias": {"70": 100}, "ignore_eos": True}
    body = post(http, **asked, return_spec_metrics=True)
    told = body["metrics"]["speculative_decoding"]
    assert told["num_spec_steps"] == len(told["per_step_accepted"]) == sum(told["acceptance_histogram"])
    assert told["num_accepted_draft_tokens"] == sum(told["per_step_accepted"]) > 10
    assert told["num_draft_tokens"] == sum(told["per_step_drafted"])
    assert told["num_spec_tokens"] == 4
    assert told["mean_acceptance_length"] > 2
    assert body["metrics"]["specdec"]["tau"] > 2
    plain = post(http, **asked, return_spec_metrics=True, speculate=False)
    assert plain["choices"] == body["choices"]
    assert plain["metrics"]["speculative_decoding"]["num_spec_steps"] == 0
    for draft, steps in (("none", 0), ("ngram", told["num_spec_steps"]), ("auto", told["num_spec_steps"])):
        drafted = post(http, **asked, return_spec_metrics=True, draft=draft)
        assert drafted["choices"] == body["choices"]
        assert drafted["metrics"]["speculative_decoding"]["num_spec_steps"] == steps
    assert "metrics" not in post(http, **asked)
    chunks = events(http, **asked, return_spec_metrics=True, stream_options={"include_usage": True})
    assert chunks[-1]["metrics"]["speculative_decoding"] == told
    runs = [run for chunk in chunks[:-1] for run in chunk["choices"][0]["specdec"]["runs"]]
    assert "".join(text for text, _ in runs) == body["choices"][0]["text"]
    assert {drafted for _, drafted in runs} == {True, False}


def test_requests_as_load_generators_write_them(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 6, "max_completion_tokens": 6, "stop": None,
            "ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "temperature": 0.0, "repetition_penalty": 1.0, "logprobs": None, "top_k": -1, "best_of": 1}  # fmt: skip
    chunks = events(http, **body)
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert chunks[-1]["choices"] == []
