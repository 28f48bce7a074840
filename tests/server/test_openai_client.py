"""The official client against a live server: both endpoints, streams, async, error classes, cancellation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from serving import MODEL, Live, Setup, Trouble, running, until

from specdec.generate import SpecDecoder
from specdec.sampling import Sampling
from specdec.server.limits import ServerLimits

HELLO = [{"role": "user", "content": "hello"}]


def test_chat_equals_the_library(client: openai.OpenAI, decoder: SpecDecoder) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=30)
    offline = decoder.generate([HELLO], Sampling(max_tokens=30), speculate=False)[0]
    assert answer.choices[0].message.content == offline.text
    assert answer.choices[0].finish_reason == offline.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(offline.token_ids)
    assert answer.usage.prompt_tokens == offline.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion"
    assert answer.model == MODEL


def test_an_answer_is_history_of_the_next_turn(client: openai.OpenAI) -> None:
    """As every chat loop does it: the client's own message object goes back."""
    messages: list[Any] = [*HELLO]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=5)
    asked = {"role": "user", "content": "more"}
    messages += [first.choices[0].message, asked]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=5)
    plain = {"role": "assistant", "content": first.choices[0].message.content}
    again = client.chat.completions.create(
        model=MODEL, messages=[*HELLO, plain, asked], temperature=0, max_tokens=5
    )
    assert second.choices == again.choices
    full = plain | {
        "tool_calls": [],
        "annotations": [],
        "audio": None,
        "function_call": None,
        "refusal": None,
    }
    client.chat.completions.create(model=MODEL, messages=[*HELLO, full, asked], max_tokens=1)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    with pytest.raises(openai.BadRequestError, match="tool_calls: is not supported"):
        client.chat.completions.create(model=MODEL, messages=[plain | {"tool_calls": [call]}, asked])


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=0, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {c.id for c in chunks} == {chunks[0].id}


def test_continuous_usage_counts_up(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, max_tokens=12, stream=True, stream_options=options,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_bursts_say_the_same(decoder: SpecDecoder) -> None:
    """Two choices at once, in bursts and evenly: the same text; evenly, in more chunks than rounds gave."""
    chunks: dict[bool, list[openai.types.Completion]] = {}
    for burst in (True, False):
        setup = Setup(burst=burst, trouble=Trouble(delay=0.03))
        with running(decoder, setup) as live, live.client() as client:
            chunks[burst] = list(
                client.completions.create(
                    model=MODEL, prompt="abab abab", temperature=0, max_tokens=40, n=2, stream=True,
                    extra_body={"ignore_eos": True},
                )
            )  # fmt: skip
            assert [c.choices[0].finish_reason for c in chunks[burst]].count("length") == 2
    for index in (0, 1):
        burst, even = (
            [c.choices[0].text for c in chunks[b] if c.choices[0].index == index] for b in (True, False)
        )
        assert "".join(burst) == "".join(even)
        assert len(burst) < len(even)


def test_completions_stream_equals_whole(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "once upon", "temperature": 0.8, "seed": 3, "max_tokens": 20}
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_async_client_runs_side_by_side(live: Live, client: openai.OpenAI) -> None:
    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as own:

            async def one(seed: int) -> str:
                made = await own.completions.create(
                    model=MODEL, prompt="abc", temperature=1, seed=seed, max_tokens=10
                )
                return made.choices[0].text

            return await asyncio.gather(*map(one, range(6)))

    together = asyncio.run(many())
    alone = [
        client.completions.create(model=MODEL, prompt="abc", temperature=1, seed=s, max_tokens=10)
        .choices[0]
        .text
        for s in range(6)
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_choices_are_seeded_apart(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": HELLO, "temperature": 1, "seed": 7, "max_tokens": 12}
    answer = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    single = client.chat.completions.create(**asked)
    assert single.choices[0].message.content == texts[0]
    assert answer.usage is not None
    assert single.usage is not None
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "specdec"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_error_classes(live: Live, decoder: SpecDecoder) -> None:
    with live.client() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=HELLO)
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**9)
        with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
            tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
            client.chat.completions.create(model=MODEL, messages=HELLO, tools=[tool])
    with running(decoder, Setup(api_key="sesame")) as locked:
        with locked.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        with locked.client(api_key="sesame") as client:
            assert client.models.list().data[0].id == MODEL


def test_a_full_queue_is_a_rate_limit(decoder: SpecDecoder) -> None:
    setup = Setup(slots=1, limits=ServerLimits(queue=0), trouble=Trouble(delay=0.05))
    with running(decoder, setup) as live, live.client() as client:
        with client.completions.create(
            model=MODEL, prompt="abc", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        ):
            with pytest.raises(openai.RateLimitError) as busy:
                client.completions.create(model=MODEL, prompt="abc", max_tokens=1)
            assert int(busy.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.BadRequestError, match="at most 1"):
            client.completions.create(model=MODEL, prompt="abc", n=2, max_tokens=1)


def test_closing_a_stream_frees_the_slot(decoder: SpecDecoder) -> None:
    with running(decoder, Setup(slots=1, trouble=Trouble(delay=0.02))) as live, live.client() as client:
        stream = client.completions.create(
            model=MODEL, prompt="abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        assert live.state.worker.load == (1, 0)
        stream.close()
        assert until(lambda: live.state.worker.load == (0, 0), 2)
        assert until(lambda: live.state.inside == 0)


def test_a_cancelled_task_frees_the_slot(decoder: SpecDecoder) -> None:
    async def leave(live: Live) -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as own:
            work = own.completions.create(
                model=MODEL, prompt="abc", max_tokens=200, extra_body={"ignore_eos": True}
            )
            asking = asyncio.ensure_future(work)
            assert await asyncio.to_thread(until, lambda: live.state.worker.load == (1, 0))
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    with running(decoder, Setup(slots=1, trouble=Trouble(delay=0.02))) as live:
        asyncio.run(leave(live))
        assert until(lambda: live.state.worker.load == (0, 0), 2)
        assert 'finished_reason="abort",model_name="tiny-llama"} 1.0' in live.state.metrics.text().decode()


def test_structured_answers_parse(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
              "required": ["yes", "kind"], "additionalProperties": False}  # fmt: skip
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=1, seed=5, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )  # fmt: skip
    value = json.loads(answer.choices[0].message.content or "")
    assert type(value["yes"]) is bool
    assert value["kind"] in ("a", "b")
    assert answer.choices[0].finish_reason == "stop"
