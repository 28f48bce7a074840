"""The running requests of one round as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafting.protocol import Context
from specdec.engine.request import Request
from specdec.sampling import BatchSampling, Seen
from specdec.tree import MAX_NODES


@dataclass(frozen=True, slots=True)
class Batch:
    """B requests of one round.

    Attributes:
        requests: in slot order.
        context: slots, roots, lengths.
        sampling: their settings as tensors.
        uniforms: float64 [B, MAX_NODES + 1] random numbers from the next output position on.
        seen: counts for penalties, or None.
        tests: float64 [B, MAX_NODES] fresh random numbers for block verification, or None without sampled chains.
    """

    requests: tuple[Request, ...]
    context: Context
    sampling: BatchSampling
    uniforms: Tensor
    seen: Seen | None
    tests: Tensor | None = None

    @staticmethod
    def of(requests: Sequence[Request], vocab: int, device: torch.device, *, chains: bool = False) -> Batch:
        """Gather running requests. Sampling tensors are small and made anew each round."""
        columns = torch.tensor(
            [(r.slot, r.root, r.length) for r in requests], dtype=torch.int64, device=device
        )
        sampling = BatchSampling.of([r.sampling for r in requests], vocab, device)
        fresh = torch.stack([r.fresh(2 * MAX_NODES) for r in requests]).to(device) if chains else None
        draws, tests = (None, None) if fresh is None else fresh.chunk(2, dim=1)
        only = tuple(r.only for r in requests) if any(r.only for r in requests) else None
        context = Context(columns[:, 0], columns[:, 1], columns[:, 2], sampling.temperature, draws, only=only)
        seen = count_seen(requests, vocab, device, root=True) if sampling.penalties is not None else None
        return Batch(tuple(requests), context, sampling, draw_ahead(requests, sampling, device), seen, tests)


def draw_ahead(requests: Sequence[Request], sampling: BatchSampling, device: torch.device) -> Tensor:
    """u_t of the next output positions, float64 [B, MAX_NODES + 1]; zeros where nobody samples."""
    ahead = torch.zeros(len(requests), MAX_NODES + 1, dtype=torch.float64)
    if not sampling.greedy:
        for row, request in enumerate(requests):
            if request.uniforms is not None:
                at = len(request.output)
                ahead[row] = request.uniforms[at : at + MAX_NODES + 1]
    return ahead.to(device)


def count_seen(requests: Sequence[Request], vocab: int, device: torch.device, *, root: bool) -> Seen:
    """Token counts of prompts and outputs. The newest token is left to the tree, whose root it is (`root`);
    at the end of a prompt the tree's root is the last prompt token, which must not count as output."""
    prompt = torch.zeros(len(requests), vocab, dtype=torch.int32)
    output = torch.zeros(len(requests), vocab, dtype=torch.int32)
    for row, request in enumerate(requests):
        if not request.sampling.penalised:
            continue
        prompt[row] = torch.bincount(torch.tensor(request.prompt), minlength=vocab)[:vocab]
        if root:
            output[row] = torch.bincount(
                torch.tensor(request.output[:-1], dtype=torch.int64), minlength=vocab
            )[:vocab]
        else:
            output[row, request.prompt[-1]] = -1
    return Seen(prompt.to(device), output.to(device))
