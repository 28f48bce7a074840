"""Requests as they come in, strictly: unknown fields, wrong types and unsupported wishes are refused by name.

Knows the wire format alone. Ranges that `Sampling` checks are left to it: one rule, one place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from specdec.unicode import lone_surrogate

MAX_CHOICES = 128  # OpenAI's bound on n
MAX_STOPS, LONGEST_STOP = 4, 512
MAX_TOP_LOGPROBS = 20
MOST_NAMES = 1024  # in one JSON object: far more than fields; as many tokens as a logit_bias may name


def _encodable(text: str) -> str:
    """Half a surrogate pair is valid JSON but no text."""
    if lone_surrogate(text) is not None:
        raise ValueError("is not valid Unicode (a lone surrogate)")
    return text


def _few(value: Any) -> Any:
    """Every unknown name is a complaint of its own, and a body holds a million of them."""
    if isinstance(value, dict) and len(value) > MOST_NAMES:
        raise PydanticCustomError("too_many_names", f"has more than {MOST_NAMES} names")
    return value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def neutral(*values: Any) -> BeforeValidator:
    """For fields of the OpenAI API that this server does not have: null and values that change nothing pass."""

    def check(value: Any) -> None:
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise ValueError("is not supported by this server; leave it out")

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_one_or_many)]
Number = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]  # a body holds millions of items: one complaint is enough


class Strict(BaseModel):
    """No unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    _few_names = model_validator(mode="before")(_few)


class StreamOptions(Strict):
    """`include_usage`: a last chunk with usage; `continuous_usage_stats`: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Annotated[None, neutral(False)] = None


class JsonSchema(Strict):
    name: Text = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must be: text, any JSON object, or an instance of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        return self


class Generation(Strict):
    """What both endpoints share.

    Beyond OpenAI's: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos as in vLLM; `speculate` false runs
    the request plainly; `draft` names who may draft for it; `return_spec_metrics` adds acceptance to the answer.
    """

    model: Text | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(_few)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    speculate: bool | None = None
    draft: Literal["auto", "head", "ngram", "none"] | None = None
    return_spec_metrics: bool | None = None
    # who asks, and hints to OpenAI's caches: no answer depends on them
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def limit(self) -> int | None:
        """Tokens asked for, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _agree(self) -> Generation:
        both = None not in (self.max_tokens, self.max_completion_tokens)
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true, and only with it")
        if self.speculate is False and self.draft not in (None, "none"):
            raise ValueError("draft goes with speculation; leave out speculate: false")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn. What clients send back of an answer, fields that say "none" included, must be taken as history."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[TextPart]
    name: Text | None = None
    refusal: Annotated[None, neutral()] = None
    annotations: Annotated[None, neutral([])] = None
    audio: Annotated[None, neutral()] = None
    function_call: Annotated[None, neutral()] = None
    tool_calls: Annotated[None, neutral([])] = None

    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[None, neutral([])] = None
    tool_choice: Annotated[None, neutral("none", "auto")] = None
    parallel_tool_calls: Annotated[None, neutral(True, False)] = None
    functions: Annotated[None, neutral([])] = None
    function_call: Annotated[None, neutral("none", "auto")] = None
    modalities: Annotated[None, neutral(["text"])] = None
    audio: Annotated[None, neutral()] = None
    prediction: Annotated[None, neutral()] = None
    reasoning_effort: Annotated[None, neutral()] = None
    verbosity: Annotated[None, neutral()] = None
    service_tier: Annotated[None, neutral("auto", "default")] = None
    store: Annotated[None, neutral(False)] = None
    metadata: Annotated[None, neutral({})] = None
    web_search_options: Annotated[None, neutral()] = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true, and only with it")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: Text | Many[Text] | Many[int] | Many[Many[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
    suffix: Annotated[None, neutral("")] = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per sequence to complete."""
        prompt: Any = self.prompt
        flat = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        many: list[str] | list[list[int]] = [prompt] if flat else prompt  # an empty list is refused later
        return many

    @model_validator(mode="after")
    def _no_search(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of other than n is not supported by this server")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Many[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt or messages: give exactly one of them")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Text | None = None
    tokens: Many[int]
