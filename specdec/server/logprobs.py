"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.engine.logprobs import TokenLogprob
from specdec.target.vocabulary import Vocabulary

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have (vLLM's convention)


def chat_logprobs(vocabulary: Vocabulary, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    return {
        "content": [
            {
                **_entry(vocabulary, one.token, one.logprob),
                "top_logprobs": [_entry(vocabulary, token, value) for token, value in one.top],
            }
            for one in logprobs
        ],
        "refusal": None,
    }


def _entry(vocabulary: Vocabulary, token: int, value: float) -> dict[str, Any]:
    return {
        "token": vocabulary.text(token),
        "logprob": _finite(value),
        "bytes": list(vocabulary.bytes(token)),
    }


def completion_logprobs(
    vocabulary: Vocabulary, logprobs: Sequence[TokenLogprob | int], offset: int = 0
) -> dict[str, Any]:
    """The `logprobs` object of a completion choice.

    Args:
        vocabulary: of the target.
        logprobs: one per token; a bare token id has none (the first of a prompt).
        offset: characters of the choice's text before the first token.
    """
    out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in logprobs:
        text = vocabulary.text(one if isinstance(one, int) else one.token)
        out["tokens"].append(text)
        out["text_offset"].append(offset)
        out["token_logprobs"].append(None if isinstance(one, int) else _finite(one.logprob))
        out["top_logprobs"].append(None if isinstance(one, int) else _table(vocabulary, one, text))
        offset += len(text)
    return out


def _table(vocabulary: Vocabulary, one: TokenLogprob, text: str) -> dict[str, float]:
    """Alternatives by text, likeliest first; the token itself is always among them."""
    table: dict[str, float] = {}
    for token, value in one.top:
        table.setdefault(vocabulary.text(token), _finite(value))  # of two tokens that look alike the likelier
    table.setdefault(text, _finite(one.logprob))
    return table


def _finite(value: float) -> float:
    return max(value, LOWEST) if value == value else LOWEST
