"""Prefill: a prompt enters its slot chunk by chunk; what an earlier request left there is not computed again."""

from __future__ import annotations

import torch

from specdec.attention.protocol import chunk_rows
from specdec.cache import KVCache
from specdec.drafting.protocol import Drafter
from specdec.engine.batch import count_seen, draw_ahead
from specdec.engine.logprobs import TokenLogprob, token_logprobs
from specdec.engine.request import Request
from specdec.layers.linear import spare_rows
from specdec.sampling import BatchSampling, choose, process
from specdec.target.protocol import States, Target
from specdec.tree import MAX_NODES, root_only

WORTH_COPYING = 8  # shared tokens below which a prefix is simply computed
SCORED_ROWS = 64  # logits of so many prompt tokens are held at once


class Prefill:
    """Places requests in slots and runs their prompts.

    `held[slot]` are the tokens whose rows the cache holds from the start of a slot, also after its request ended.
    """

    def __init__(self, target: Target, drafter: Drafter, cache: KVCache, chunk: int) -> None:
        self.target, self.drafter, self.cache, self.chunk = target, drafter, cache, chunk
        self.held: list[tuple[int, ...]] = [() for _ in range(cache.slots)]

    def place(self, request: Request, free: list[int]) -> None:
        """Choose a slot and take over the longest prefix that some slot already holds."""
        shared = self._shared(request)
        source = max(shared, key=shared.__getitem__)
        spent = source in free and shared[source] == len(self.held[source])  # else others may want its rest
        slot = source if spent else min(free, key=lambda s: (shared[s], len(self.held[s])))
        rows = _spared(request, shared[source])
        self._take_over(request, source, slot, rows if rows >= WORTH_COPYING else 0)

    def _shared(self, request: Request) -> dict[int, int]:
        """How many of the first tokens of its prompt each slot holds."""
        return {slot: _common(held, request.prompt) for slot, held in enumerate(self.held)}

    def _take_over(self, request: Request, source: int, slot: int, rows: int) -> None:
        rows = self.drafter.reuse(source, slot, rows)
        self.cache.copy_prefix(source, slot, rows)
        request.slot, request.prefilled, request.reused = slot, rows, rows
        self.held[slot] = request.prompt[:rows]

    def _look_again(self, request: Request) -> None:
        """Requests that came together were placed before any of their prompts had run: the first has, by now."""
        shared = self._shared(request)
        source = max(shared, key=shared.__getitem__)
        rows = _spared(request, shared[source])
        if rows - request.reused >= WORTH_COPYING:
            self._take_over(request, source, request.slot, rows)

    def advance(self, request: Request) -> tuple[int | None, list[TokenLogprob]]:
        """Run the next chunk; after the last one, the first emitted token (and its log-probability if asked)."""
        if request.prefilled == request.reused:
            self._look_again(request)
        start = request.prefilled
        stop = min(start + self.chunk, len(request.prompt))
        device = self.target.info.device
        states = self._run(request.slot, start, request.prompt[start:stop])
        request.prefilled = stop
        request.features.append(states.features[0])
        self.held[request.slot] = request.prompt[:stop]
        if request.prompt_logprobs is not None:
            self._score(request, states.final, start, request.prompt_logprobs)
        if stop < len(request.prompt):
            return None, []
        token, logprobs = self._first(request, self.target.logits(states.final[:, -1:]))
        prompt = torch.tensor(request.prompt, dtype=torch.int64, device=device)
        self.drafter.admit(request.slot, prompt, torch.cat(request.features), token)
        request.features = []
        return token, logprobs

    def _run(self, slot: int, start: int, part: tuple[int, ...]) -> States:
        """The target over a part of a prompt. Rows that pad it are written behind it, where the next ones go."""
        device, room = self.target.info.device, self.cache.length - MAX_NODES - start - len(part)
        spare = spare_rows(len(part), room, self.target.info.dtype, device)
        tokens = torch.tensor([[*part, *part[:1] * spare]], dtype=torch.int64, device=device)
        where, length = (torch.tensor([x], device=device) for x in (slot, start))
        rows = chunk_rows(where, length, tokens.shape[1])
        states = self.target.forward(tokens, rows, self.cache, self.drafter.taps)
        return States(states.final[:, : len(part)], states.features[:, : len(part)])

    def _score(self, request: Request, final: torch.Tensor, start: int, top: int) -> None:
        """Log-probabilities of the prompt tokens that follow the rows of a chunk, final [1, n, H]."""
        following = request.prompt[start + 1 : start + 1 + final.shape[1]]
        for at in range(0, len(following), SCORED_ROWS):
            tokens = following[at : at + SCORED_ROWS]
            logits = self.target.logits(final[:, at : at + len(tokens)])
            request.prompt_scores += token_logprobs(logits[0], tokens, top)

    def _first(self, request: Request, logits: torch.Tensor) -> tuple[int, list[TokenLogprob]]:
        vocab, device = self.target.info.vocab, logits.device
        sampling = BatchSampling.of([request.sampling], vocab, device)
        tree = root_only(torch.tensor([request.prompt[-1]], device=device))
        seen = count_seen([request], vocab, device, root=False) if sampling.penalties is not None else None
        allowed = None if request.constraint is None else request.constraint.allowed(tree, 0).to(device)[None]
        processed = process(logits, tree, sampling, seen, allowed)
        if bool(logits.amax().isnan()):
            raise ValueError("the target's logits are not numbers (NaN)")
        token = int(choose(processed, tree, sampling, draw_ahead([request], sampling, device)))
        wanted = request.sampling.logprobs
        return token, [] if wanted is None else token_logprobs(logits[0], [token], wanted)

    def forget(self) -> None:
        """Start from nothing: no later prompt takes over rows of an earlier one."""
        self.held = [() for _ in self.held]

    def release(self, request: Request) -> None:
        """The slot keeps its rows for whoever comes with the same beginning."""
        request.features = []
        if request.output:
            self.held[request.slot] = (*request.prompt, *request.output)[: request.length]

    def wipe(self, slot: int) -> None:
        """Zero what a failed request left: NaN in rows that a mask hides would still spoil sums (0 x NaN)."""
        self.cache.kv[:, :, slot].zero_()
        self.held[slot] = ()


def _spared(request: Request, shared: int) -> int:
    """Rows that need not run where so many tokens are shared: the last one has to, for the first emitted token."""
    if request.prompt_logprobs is not None:
        return 0  # logits are not kept: what is to be scored has to run
    return min(shared, len(request.prompt) - 1)


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the shared beginning."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
