"""Log-probabilities of emitted tokens, from the target's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the target, and the likeliest alternatives as (id, value)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of one token per row of logits [n, V], with the `top` likeliest alternatives."""
    table = logits.float().log_softmax(dim=-1)
    best = table.topk(min(top, table.shape[-1]), dim=-1) if top else None
    out = []
    for i, token in enumerate(tokens):
        pairs = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True) if best else ()
        out.append(TokenLogprob(token, float(table[i, token]), tuple(pairs)))
    return out
