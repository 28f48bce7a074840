"""What is compared: our loop under each drafter, and transformers' `generate`, plain and with prompt lookup.

Every system answers token ids with token ids, greedily or sampled, over the same weights and dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdec.engine.build import Options
from specdec.engine.request import Request
from specdec.generate import SpecDecoder
from specdec.sampling import Sampling
from specdec.stats import Counters

LOOKUP_TOKENS = 10  # transformers' documented example value of prompt_lookup_num_tokens


@dataclass(frozen=True, slots=True)
class Run:
    """One answer: ids, wall seconds with prefill; of our own systems also counters and seconds after the prefill."""

    tokens: tuple[int, ...]
    seconds: float
    counters: Counters = field(default_factory=Counters)
    decode_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class System:
    """A named way to answer."""

    name: str
    answer: Callable[[Sequence[int], Sampling], Run]


def settle() -> None:
    """Wait for the device, where there is one: neither what came before nor what is still running is timed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(name: str, decoder: SpecDecoder) -> System:
    """Our engine with the decoder's drafter."""

    def answer(prompt: Sequence[int], sampling: Sampling) -> Run:
        stops = frozenset(() if sampling.ignore_eos else decoder.engine.target.info.stop_ids)
        decoder.engine.prefill.forget()  # no answer may profit from the one before
        request = Request("bench", tuple(prompt), sampling, stops)
        settle()
        start = time.perf_counter()
        for _ in decoder.run(request):
            pass
        settle()
        seconds = time.perf_counter() - start
        after = (request.finished or 0.0) - (request.first_token or 0.0)
        return Run(tuple(request.output), seconds, request.counters, after)

    return System(name, answer)


def law_of(sampling: Sampling) -> dict[str, Any]:
    """The settings in the words of `generate`, which otherwise takes those of the model's generation_config.json."""
    law: dict[str, Any] = {
        "do_sample": not sampling.greedy,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if not sampling.greedy:
        law |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
                "min_p": sampling.min_p or None}  # fmt: skip
    return law


def transformers_systems(
    directory: Path, dtype: torch.dtype, stop_ids: Sequence[int], device: torch.device
) -> list[System]:
    """`generate` as a user would call it, without and with prompt lookup, over the same files on the same device."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.eval().to(device)

    def system(name: str, lookup: int | None) -> System:
        def answer(prompt: Sequence[int], sampling: Sampling) -> Run:
            ids = torch.tensor([list(prompt)], device=device)
            extra = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
            end = None if sampling.ignore_eos else list(stop_ids)
            settle()
            start = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=sampling.max_tokens,
                    pad_token_id=0,
                    eos_token_id=end,
                    **law_of(sampling),
                    **extra,
                )
            settle()
            seconds = time.perf_counter() - start
            return Run(tuple(out[0, ids.shape[1] :].tolist()), seconds)

        return System(name, answer)

    return [system("transformers", None), system("transformers-lookup", LOOKUP_TOKENS)]


def our_systems(decoder: SpecDecoder, drafters: Sequence[str], options: Options) -> list[System]:
    """The plain loop first, then each drafter, all over the same loaded weights."""
    systems = [ours("plain", decoder.with_drafter("none", options))]
    return systems + [ours(name, decoder.with_drafter(name, options)) for name in drafters if name != "none"]
