"""Usage and acceptance of an answer: OpenAI's `usage`, vLLM's `metrics.speculative_decoding`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.engine.request import Request
from specdec.server.events import Step


def usage(firsts: Sequence[Request], completion: int) -> dict[str, Any]:
    """OpenAI's block. A prompt that several choices share counts once.

    Args:
        firsts: the first choice of every prompt.
        completion: emitted tokens of all choices, those of the stop included.
    """
    tokens = sum(len(request.prompt) for request in firsts)
    return {
        "prompt_tokens": tokens,
        "completion_tokens": completion,
        "total_tokens": tokens + completion,
        "prompt_tokens_details": {"cached_tokens": sum(request.reused for request in firsts)},
    }


def acceptance(request: Request, steps: Sequence[Step]) -> dict[str, Any]:
    """The `metrics` block of one sequence; plain rounds are no steps.

    >>> steps = [Step(3, 3), Step(3, 3)]
    >>> speculative_decoding(steps)["mean_acceptance_length"]
    4.0
    """
    return {"speculative_decoding": speculative_decoding(steps), "specdec": request.counters.as_dict()}


def speculative_decoding(steps: Sequence[Step]) -> dict[str, Any]:
    """vLLM's per-request block, along the accepted path: `drafted` is the depth a tree offered."""
    accepted, drafted = [s.accepted for s in steps], [s.offered for s in steps]
    deepest = max(drafted, default=0)
    histogram = [0] * (deepest + 1)
    for count in accepted:
        histogram[count] += 1
    return {
        "mean_acceptance_length": round(1 + sum(accepted) / len(steps), 4) if steps else None,
        "draft_acceptance_rate": round(sum(accepted) / sum(drafted), 4) if steps else None,
        "acceptance_histogram": histogram,
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted),
        "num_spec_tokens": deepest,
        "per_step_accepted": accepted,
        "per_step_drafted": drafted,
    }
