"""Which products our kernels do faster than cuBLAS, found out once for each size, at the first forward.

That depends on the matrix and the machine. Trials run on matrices that no cache holds, and what is wrong or does not
launch is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.fused.available import applies
from specdec.fused.cuts import ROWS, Cut, Kind, candidates, enough
from specdec.fused.layer import gate, norm
from specdec.fused.product import product
from specdec.fused.proof import copies_proven

# bytes of matrices that a trial walks, several times any L2 cache; a larger one is tried by itself
POOL = 2**29
MOST, REPEATS = 128, 5  # matrices of a trial; runs of it
SLACK = 1e-2  # between two roundings of one product; bfloat16's norms come to 0.006
_cuts: dict[Kind, Cut | None] = {}


def cut_for(x: Tensor, weight: Tensor, *, norm: bool, paired: bool, plus: bool) -> Cut | None:
    """How to cut this product, if it is one for the kernels: few rows, where a trial found them faster."""
    if not applies(x) or x.dtype != weight.dtype or x.numel() > ROWS[-1] * x.shape[-1]:
        return None
    if weight.data_ptr() % 16 or not weight.is_contiguous():
        return None  # a trial's matrices are not so: what is fetched ahead has to begin at whole 16 bytes
    outputs = weight.shape[0] // (2 if paired else 1)
    kind = Kind(
        weight.shape[1], outputs, x.dtype, x.device, norm, paired, plus, enough(x.numel() // x.shape[-1])
    )
    if kind not in _cuts:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing can be timed now
        _cuts[kind] = _tried(kind, weight)
    return _cuts[kind]


@dataclass(frozen=True, slots=True)
class Trial:
    """Random matrices and rows for one kind of product, and ways to multiply them by number of the matrix."""

    kind: Kind
    weights: Tensor
    x: Tensor
    factor: Tensor | None
    residual: Tensor | None

    @staticmethod
    def of(kind: Kind, weight: Tensor | None = None) -> Trial:
        """Given a `weight` that fills any cache, nothing but it is multiplied."""
        draws = torch.Generator(kind.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws, device=kind.device).to(kind.dtype)

        if weight is None:
            count = max(1, min(MOST, POOL // kind.nbytes))
            weights = torch.empty(count, kind.lines, kind.inputs, dtype=kind.dtype, device=kind.device)
            weights.normal_(0, kind.inputs**-0.5, generator=draws)
        else:
            weights = weight.detach()[None]
        return Trial(kind, weights, draw(1, kind.rows, kind.inputs), draw(kind.inputs) if kind.norm else None,
                     draw(1, kind.rows, kind.outputs) if kind.plus else None)  # fmt: skip

    def theirs(self, index: int) -> Tensor:
        """By cuBLAS, and our small kernels around it."""
        x = self.x if self.factor is None else norm(self.x, self.factor, 1e-5)
        if self.residual is not None:
            return torch.addmm(self.residual[0], x[0], self.weights[index].t())[None]
        y = F.linear(x, self.weights[index])
        return gate(y) if self.kind.paired else y

    def ours(self, index: int, cut: Cut) -> Tensor:
        """By the kernel."""
        return product(self.x, self.weights[index], None, cut, plus=self.residual, factor=self.factor, eps=1e-5,
                       paired=self.kind.paired)  # fmt: skip


def _tried(kind: Kind, weight: Tensor) -> Cut | None:
    cuts = [cut for cut in candidates(kind) if not cut.tma or copies_proven(kind.device)]
    if not cuts:
        return None
    try:
        return _fastest(Trial.of(kind, weight if kind.nbytes > POOL else None), cuts)
    except torch.OutOfMemoryError:  # of a device that an engine has filled: cuBLAS needs no room of ours
        return None


def _fastest(trial: Trial, cuts: Sequence[Cut]) -> Cut | None:
    least, best = _milliseconds(trial.theirs, len(trial.weights)), None
    for cut in cuts:
        if not _right(trial, cut):
            continue
        taken = _milliseconds(functools.partial(trial.ours, cut=cut), len(trial.weights))
        if taken < least:
            least, best = taken, cut
    return best


def _right(trial: Trial, cut: Cut) -> bool:
    """Does the kernel launch here, and say what cuBLAS says? What does not is left out, however fast."""
    try:
        ours, theirs = trial.ours(0, cut).double(), trial.theirs(0).double()
    except Exception:  # triton's own kinds, of a device that lacks room or an instruction
        return False
    return float((ours - theirs).norm()) <= SLACK * float(theirs.norm())


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
