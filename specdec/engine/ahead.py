"""Whether rounds may run as recorded programs: two small answers are held against plain forwards at start-up.

A driver, a backend or a capture that goes wrong must not be found out by a user's answer.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.none import NoDrafter
from specdec.engine.budget import Budget
from specdec.engine.engine import Engine, Limits
from specdec.engine.graphs import CudaRecording, GraphedTarget, Recording
from specdec.engine.pipeline import Pipeline
from specdec.engine.request import Request
from specdec.sampling import Sampling
from specdec.target.load import LeanTarget
from specdec.target.protocol import Target

PROMPT, WANTED, STEPS = 16, 12, 64  # tokens of a trial's prompts and answers; steps it may take
GAP = 0.25  # of the logits' spread, by which a token may miss the plain forward's likeliest: bfloat16 flips near ties
OFF = 0.02  # of probability, by which a drawn token may miss its place in the plain forward's distribution


@torch.inference_mode()
def run_ahead(engine: Engine, recording: Recording | None = None) -> str | None:
    """Give an engine a pipeline if its rounds can be recorded and say what the target says; else the reason why not.

    Args:
        recording: None takes CUDA graphs.
    """
    target = engine.target.inner if isinstance(engine.target, GraphedTarget) else engine.target
    recording = recording or CudaRecording()
    engine.refused = _unfit(target, engine) or _tried(target, engine, recording)
    if engine.refused is None:
        depth = engine.budget.limit.depth
        engine.pipeline = Pipeline(target, engine.drafter, engine.cache, depth, recording)
    return engine.refused


def _unfit(target: Target, engine: Engine) -> str | None:
    if not isinstance(target, LeanTarget):
        return "the target runs through transformers"
    if not isinstance(engine.drafter, EagleDrafter | NoDrafter):
        return f"the drafter {engine.drafter.name} works on the host"
    if engine.budget.limit.sampled:
        return "sampled chains are drawn and tested with numbers of the host"
    return None


def _tried(target: Target, engine: Engine, recording: Recording) -> str | None:
    """Answer two prompts, one drawn, in a small engine of the same shape of trees."""
    limits = Limits(slots=2, length=4 * (PROMPT + WANTED), chunk=PROMPT)
    drafter = engine.drafter
    if isinstance(drafter, EagleDrafter):
        drafter = EagleDrafter(drafter.head, drafter.embed, drafter.attention, limits.slots, limits.length)
    shape = engine.budget.limit
    small = Engine(target, drafter, Budget(None, shape, adaptive=False), limits)
    small.pipeline = Pipeline(target, drafter, small.cache, shape.depth, recording)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(target.info.vocab, (2, PROMPT), generator=generator).tolist()
    requests = [Request(f"trial {heat:g}", tuple(prompt), Sampling(temperature=heat, seed=0, max_tokens=WANTED),
                        frozenset()) for prompt, heat in zip(prompts, (0.0, 1.0), strict=True)]  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore"):  # what a failed recording tells is returned
            return _failure(small, requests)
    except Exception as error:  # whatever a driver or a backend refuses, rounds still run step by step
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def _failure(small: Engine, requests: list[Request]) -> str | None:
    """Answer the first request alone, then all together: two programs, greedy and drawn."""
    for group in (requests[:1], requests):
        _answer(small, group)
        for request in group:
            if wrong := _wrong(small.target, request):
                return wrong
    return None


def _answer(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        request.finish, request.finished, request.slot, request.prefilled = None, None, -1, 0
        request.output.clear()
        engine.add(request)
    for _ in range(STEPS):
        if not engine.busy:
            return
        engine.step()
        if engine.pipeline is None:
            raise RuntimeError(engine.refused)
    raise RuntimeError("recorded rounds do not come to an end")


def _wrong(target: Target, request: Request) -> str | None:
    """Does the answer follow from plain forwards over the whole of it?"""
    if len(request.output) != WANTED:
        return "a recorded round failed"
    text = torch.tensor([(*request.prompt, *request.output[:-1])], device=target.info.device)
    slot = torch.zeros(1, dtype=torch.int64, device=target.info.device)
    cache = KVCache(target.info.cache, 1, text.shape[1])
    final = target.forward(text, chunk_rows(slot, slot, text.shape[1]), cache, ()).final
    logits = target.logits(final)[0, PROMPT - 1 :].float().cpu()
    tokens = torch.tensor(request.output)[:, None]
    off = _missed(logits, tokens, request) if request.uniforms is not None else _short(logits, tokens)
    most = OFF if request.uniforms is not None else GAP
    return None if off <= most else f"recorded rounds are off by {off:.1e}"


def _short(logits: Tensor, tokens: Tensor) -> float:
    """By how much of the logits' spread the tokens miss the likeliest."""
    return float((logits.max(dim=1).values - logits.gather(1, tokens)[:, 0]).max() / logits.std())


def _missed(logits: Tensor, tokens: Tensor, request: Request) -> float:
    """By how much probability the tokens' places miss the request's own random numbers."""
    assert request.uniforms is not None
    above = logits.double().softmax(dim=1).cumsum(dim=1)
    top = above.gather(1, tokens)[:, 0]
    below = top - logits.double().softmax(dim=1).gather(1, tokens)[:, 0]
    u = request.uniforms[: len(tokens)]
    return float(torch.maximum(u - top, below - u).max())
