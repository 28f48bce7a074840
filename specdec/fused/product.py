"""A layer's product for a single row in one launch, with what comes before and after; where it beats cuBLAS here.

Decoding one token reads every matrix once and multiplies it by one row. Which of the two is faster depends on the
matrix and the machine, so each size is tried once, at the first forward, on matrices that no cache holds.
Dimension legend: W inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.fused.available import applies, launching
from specdec.fused.layer import gate, norm

POOL = 2**28  # bytes of matrices that a trial walks, several times any L2; larger ones are left to cuBLAS
MOST, REPEATS = 32, 5  # matrices of a trial; runs of it
SHORT = 1024  # inputs that one step takes whole
GATED = 4096  # inputs beyond which activating them in every program costs more than a launch

Cut = tuple[int, int, int]
"""Outputs of a program, inputs of a step, warps."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A product and what goes with it: sizes, dtype, and whether a norm, a gate or a residual does."""

    inputs: int
    outputs: int
    dtype: torch.dtype
    device: torch.device
    norm: bool
    gate: bool
    plus: bool


_cuts: dict[Kind, Cut | None] = {}


def cut_for(x: Tensor, weight: Tensor, *, norm: bool, gate: bool, plus: bool) -> Cut | None:
    """How to cut this product, if it is one for the kernel: a single row, where a trial found it faster."""
    if not applies(x) or x.dtype != weight.dtype or x.numel() != x.shape[-1]:
        return None
    kind = Kind(weight.shape[1], weight.shape[0], x.dtype, x.device, norm, gate, plus)
    if kind not in _cuts:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing can be timed now
        _cuts[kind] = _tried(kind)
    return _cuts[kind]


def candidates(kind: Kind) -> list[Cut]:
    """Cuts worth trying: long loads for each thread, programs for every multiprocessor."""
    if kind.inputs * kind.outputs * kind.dtype.itemsize > POOL or (kind.gate and kind.inputs > GATED):
        return []
    if kind.inputs <= SHORT:
        return [(4, 1 << (kind.inputs - 1).bit_length(), 4)]
    return [(2, 2048, 4), (4, 1024, 4)]


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut, *, plus: Tensor | None = None,
    factor: Tensor | None = None, eps: float = 0.0, gated: bool = False,
) -> Tensor:  # fmt: skip
    """before(x) W^T + bias + plus for one row, in one launch.

    Args:
        x: [..., W], or [..., 2 * W] where `gated`: then the gated activation comes first; one row.
        weight: [O, W]; bias: [O] or None.
        plus: [..., O], added at the end.
        factor: weight [W] of a norm of `eps` that comes first.

    Returns: [..., O] of x's dtype. Sums are float32.
    """
    from specdec.fused.layer_kernels import product_kernel

    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    block_out, block_in, warps = cut
    product_kernel[(-(-outputs // block_out),)](
        x.contiguous(), weight, bias, None if plus is None else plus.contiguous(), factor, y, inputs, outputs, eps,
        GATED=gated, BLOCK_OUT=block_out, BLOCK_IN=block_in, num_warps=warps, **launching(),
    )  # fmt: skip
    return y


@dataclass(frozen=True, slots=True)
class Trial:
    """Random matrices and a row for one kind of product, and ways to multiply them by number of the matrix."""

    kind: Kind
    weights: Tensor
    x: Tensor
    factor: Tensor | None
    residual: Tensor | None

    @staticmethod
    def of(kind: Kind) -> Trial:
        draws = torch.Generator(kind.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws, device=kind.device).to(kind.dtype)

        count = max(1, min(MOST, POOL // (kind.inputs * kind.outputs * kind.dtype.itemsize)))
        weights = torch.empty(count, kind.outputs, kind.inputs, dtype=kind.dtype, device=kind.device)
        weights.normal_(0, kind.inputs**-0.5, generator=draws)
        return Trial(kind, weights, draw(1, 1, kind.inputs * (2 if kind.gate else 1)),
                     draw(kind.inputs) if kind.norm else None,
                     draw(1, 1, kind.outputs) if kind.plus else None)  # fmt: skip

    def theirs(self, index: int) -> Tensor:
        """By cuBLAS, and our small kernels before it."""
        x = gate(self.x) if self.kind.gate else self.x
        x = x if self.factor is None else norm(x, self.factor, 1e-5)
        if self.residual is None:
            return F.linear(x, self.weights[index])
        return torch.addmm(self.residual[0], x[0], self.weights[index].t())[None]

    def ours(self, index: int, cut: Cut) -> Tensor:
        """By the kernel."""
        return product(self.x, self.weights[index], None, cut, plus=self.residual, factor=self.factor, eps=1e-5,
                       gated=self.kind.gate)  # fmt: skip


def _tried(kind: Kind) -> Cut | None:
    cuts = candidates(kind)
    if not cuts:
        return None
    trial = Trial.of(kind)
    least, best = _milliseconds(trial.theirs, len(trial.weights)), None
    for cut in cuts:
        taken = _milliseconds(functools.partial(trial.ours, cut=cut), len(trial.weights))
        if taken < least:
            least, best = taken, cut
    return best


def _milliseconds(call: Callable[[int], Tensor], count: int) -> float:
    """Of `count` calls captured in one graph, the fastest of several replays."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)))
    return min(times)
