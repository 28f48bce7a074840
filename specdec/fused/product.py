"""A layer's product for few rows in one launch, with what comes before and after; where it beats cuBLAS here.

Decoding one token reads every matrix once and multiplies it by one row, a small tree by as many rows as nodes. Which of
the two is faster depends on the matrix and the machine, so each size is tried once, at the first forward, on matrices
that no cache holds. Dimension legend: R rows, W inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.fused.available import applies, launching, power
from specdec.fused.layer import gate, norm

POOL = (
    2**29
)  # bytes of matrices that a trial walks, several times any L2 cache; a larger one is tried by itself
MOST, REPEATS = 128, 5  # matrices of a trial; runs of it
SHORT = 1024  # inputs that one step takes whole
ROWS = (1, 16, 32, 64)  # numbers of rows that kernels are cut for
SMALL = 2**24  # bytes of a matrix that costs more in launching and waiting than in reading
BESIDE = 32  # rows whose squares fit the registers beside their products; of more, the norm comes first
SLACK = 1e-2  # between two roundings of one product; bfloat16's norms come to 0.006
PART = 128  # inputs of one of the products that make up a step of all inputs
FEWEST = 16  # rows that are cheap to read for every block of outputs
SPLITS, STEPS = 8, 6  # of the inputs at most; of one program at least
BLOCKS = 1024  # of outputs, at most, where inputs are split
PROCESSORS = 132  # of an H100 or H200, where there is nothing to ask
HELD = 2**16  # numbers that eight warps hold in registers; numbers of the rows that shared memory holds


class Cut(NamedTuple):
    """Outputs of a program, inputs of a step, warps; and for several rows, steps under way: 0 takes all inputs at once,
    in products of `into`. `splits` programs share the inputs of their outputs."""

    out: int
    into: int
    warps: int
    stages: int = 0
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A product and what goes with it: sizes, dtype, and whether a norm or a residual does.

    `outputs` are what comes out; where `paired`, the matrix has twice as many, for the gated activation. `rows` is one
    of ROWS, the least that is enough.
    """

    inputs: int
    outputs: int
    dtype: torch.dtype
    device: torch.device
    norm: bool
    paired: bool
    plus: bool
    rows: int = 1

    @property
    def lines(self) -> int:
        """Of the matrix."""
        return self.outputs * (2 if self.paired else 1)

    @property
    def nbytes(self) -> int:
        """Of the matrix."""
        return self.lines * self.inputs * self.dtype.itemsize


FEW = (Cut(32, 128, 4, 4), Cut(64, 64, 4, 6), Cut(128, 64, 8, 4))
MANY = (Cut(128, 64, 8, 4), Cut(128, 64, 8, 4, 2), Cut(256, 64, 8, 4), Cut(64, 64, 4, 6, 2))
"""For large matrices and up to 16 rows, or more: `out` in lines, and `splits` as programs of one multiprocessor."""
_cuts: dict[Kind, Cut | None] = {}


def cut_for(x: Tensor, weight: Tensor, *, norm: bool, paired: bool, plus: bool) -> Cut | None:
    """How to cut this product, if it is one for the kernels: few rows, where a trial found them faster."""
    if not applies(x) or x.dtype != weight.dtype or x.numel() > ROWS[-1] * x.shape[-1]:
        return None
    outputs = weight.shape[0] // (2 if paired else 1)
    kind = Kind(
        weight.shape[1], outputs, x.dtype, x.device, norm, paired, plus, _enough(x.numel() // x.shape[-1])
    )
    if kind not in _cuts:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing can be timed now
        _cuts[kind] = _tried(kind, weight)
    return _cuts[kind]


def _enough(rows: int) -> int:
    return next(most for most in ROWS if rows <= most)


def candidates(kind: Kind) -> list[Cut]:
    """Cuts worth trying: long loads for each thread, programs for every multiprocessor."""
    halves = 2 if kind.paired else 1  # each output takes two lines of the matrix
    if kind.rows > 1:
        return _tiles(kind, halves)
    if kind.inputs <= SHORT:
        return [Cut(4 // halves, power(16, kind.inputs), 4)]
    if 2048 < kind.inputs <= 4096:  # all of a line at once keeps more of it on its way
        return [Cut(4 // halves, 1024, 4), *(Cut(out, 4096, 4) for out in (2, 1)[halves - 1 :])]
    return [Cut(4 // halves, 1024, 4), Cut(2 // halves, 2048, 4)]


def _tiles(kind: Kind, halves: int) -> list[Cut]:
    """Cuts for several rows. What is small wants few steps, what is large much of the matrix on its way."""
    if kind.dtype.itemsize != 2 or kind.inputs % 8 or kind.lines * kind.inputs >= 2**31:
        return []
    if kind.nbytes > SMALL:
        cuts = [_filling(kind, cut, halves) for cut in (FEW if kind.rows <= FEWEST else MANY)]
        return [cut for cut in dict.fromkeys(cuts) if kind.outputs % cut.out == 0]
    wide = 16 if kind.lines <= 2048 else 32 // halves
    if kind.outputs % wide:
        return []
    cuts = [Cut(wide, 128, 4 if wide == 32 or kind.rows == 64 else 2, 4)]
    room = PART * _parts(kind.inputs, PART)
    held = (kind.rows + 16 * halves) * room
    if kind.rows * room <= HELD and held <= 3 * HELD // 2:  # beyond, sixteen warps spill
        cuts.append(Cut(16, PART, 8 if held <= HELD else 16))
    return cuts


def _filling(kind: Kind, cut: Cut, halves: int) -> Cut:
    """A cut of lines as one of outputs, the inputs split until programs fill the device, all of them at once."""
    blocks = -(-kind.lines // cut.out)
    most = min(SPLITS, kind.inputs // (STEPS * cut.into), cut.splits * _processors(kind.device) // blocks)
    return cut._replace(out=cut.out // halves, splits=max(1, most))


@functools.cache
def _processors(device: torch.device) -> int:
    there = torch.cuda.is_available()
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if there else PROCESSORS


def _parts(inputs: int, into: int) -> int:
    """Products of `into` inputs that hold them all; triton wants a power of two."""
    return power(1, -(-inputs // into))


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut, *, plus: Tensor | None = None,
    factor: Tensor | None = None, eps: float = 0.0, paired: bool = False,
) -> Tensor:  # fmt: skip
    """after(norm(x) W^T + bias) + plus for a few rows, in one launch.

    Args:
        x: [..., W], R rows in all, at most 64.
        weight: [O, W]; bias: [O] or None. Twice as many where `paired`: then `after` is the gated activation, of
            lines o and O + o.
        plus: [..., O], added at the end.
        factor: weight [W] of a norm of `eps` that comes first.

    Returns: [..., O] of x's dtype. Sums are float32.
    """
    from specdec.fused import product_kernels as kernels

    lines, inputs = weight.shape
    outputs, rows = lines // (2 if paired else 1), x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], outputs)
    blocks = -(-outputs // cut.out)
    given = (x.contiguous(), weight, bias, None if plus is None else plus.contiguous(), factor, y)
    sizes = {
        "PAIRED": paired,
        "BLOCK_OUT": cut.out,
        "BLOCK_IN": cut.into,
        "num_warps": cut.warps,
    } | launching()
    if rows == 1:
        kernels.row_kernel[(blocks,)](*given, inputs, outputs, eps, WHOLE=cut.into >= inputs, **sizes)
        return y
    sizes["BLOCK_ROWS"] = max(16, _enough(rows))
    if factor is not None and cut.stages and (rows > BESIDE or cut.splits > 1):
        given = (norm(x, factor, eps).contiguous(), *given[1:4], None, y)
    if cut.stages:
        left: tuple[Tensor | None, ...] = (None, None)
        if cut.splits > 1:
            room = (cut.splits, sizes["BLOCK_ROWS"], lines)
            left = (torch.empty(room, dtype=torch.float32, device=x.device), _turns(x.device))
        kernels.rows_kernel[blocks, cut.splits](
            *given, *left, rows, inputs, outputs, eps, STAGES=cut.stages, SPLITS=cut.splits, **sizes
        )
    else:
        kernels.whole_rows_kernel[(blocks,)](
            *given, rows, inputs, outputs, eps, PARTS=_parts(inputs, cut.into), **sizes
        )
    return y


@functools.cache
def _turns(device: torch.device) -> Tensor:
    """Of blocks whose inputs are split: how many programs are done. Kernels leave zeros, and no two run at once."""
    return torch.zeros(BLOCKS, dtype=torch.int32, device=device)


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
    cuts = candidates(kind)
    if not cuts:
        return None
    trial = Trial.of(kind, weight if kind.nbytes > POOL else None)
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
