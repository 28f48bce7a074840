"""How a product of few rows may be cut for our kernels: values, no launches.

Decoding one token reads every matrix once and multiplies it by one row, a small tree by as many rows as nodes. Small
matrices cost launching and waiting, large ones reading; which cut is best is for a trial to say (trial.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from specdec.fused.available import power

ROWS = (1, 16, 32, 64)  # numbers of rows that kernels are cut for
SHORT = 1024  # inputs that one step takes whole
SMALL = 2**24  # bytes of a matrix that costs more in launching and waiting than in reading
PART = 128  # inputs of one of the products that make up a step of all inputs
HELD = 2**16  # numbers that eight warps hold in registers
SPLITS, STEPS = 8, 6  # of the inputs at most; of one program at least
GROUP = 64  # lines of a matrix that a warp group multiplies at once
UNDER_WAY = 9  # steps that shared memory holds
PROCESSORS = 132  # of an H100 or H200, where there is nothing to ask
FIRST = 256  # inputs of every line of a large matrix that are fetched before a program's turn, at least
LULL = 2**23  # numbers of a matrix that could be read in the lull between two kernels


class Cut(NamedTuple):
    """Outputs of a program, inputs of a step, warps; and for several rows, steps under way: 0 takes all inputs at once,
    in products of `into`. `splits` programs share the inputs of their outputs. `ahead` inputs of every line are fetched
    before a program's turn. `tma`: the device's copy engine fetches tiles of the matrix, not threads."""

    out: int
    into: int
    warps: int
    stages: int = 0
    splits: int = 1
    ahead: int = FIRST
    tma: bool = False


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


class Tile(NamedTuple):
    """Of a large matrix: lines of a program, inputs of a step, warps, steps under way, programs of a multiprocessor,
    and whether the copy engine fetches."""

    lines: int
    into: int
    warps: int
    stages: int
    beside: int = 1
    tma: bool = False


LARGE = (
    Tile(32, 128, 4, 4, 2), Tile(64, 64, 4, 6, 2), Tile(128, 128, 8, 4),
    Tile(128, 64, 4, 4, 2, True), Tile(128, 64, 4, 6, 1, True), Tile(128, 128, 8, 4, 1, True),
)  # fmt: skip
"""Of some twenty where threads fetch, the first three held the fastest on an H200, at 16 and at 64 rows. The copy
engine's have not run on one."""


def enough(rows: int) -> int:
    """The least number of rows that kernels are cut for and that holds so many."""
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
        copies = _copies(kind.device)
        cuts = [_filling(kind, tile, halves) for tile in LARGE if copies or not tile.tma]
        cuts += [cut._replace(ahead=_lull(kind, cut)) for cut in cuts]
        return [cut for cut in dict.fromkeys(cuts)
                if kind.outputs % cut.out == 0 and (cut.out >= GROUP or not cut.tma)]  # fmt: skip
    wide = 16 if kind.lines <= 2048 else 32 // halves
    if kind.outputs % wide:
        return []
    cuts = [Cut(wide, 128, 4 if wide == 32 or kind.rows == 64 else 2, 4)]
    # warps enough to hold the squares, so that the norm is no launch of its own
    if kind.norm and kind.rows == 64:
        cuts.append(Cut(wide, 128, 8, 4))
    room = PART * parts_of(kind.inputs, PART)
    held = (kind.rows + 16 * halves) * room
    if not (kind.norm or kind.paired or kind.outputs % GROUP) and _copies(kind.device):
        cuts.append(_all_under_way(kind))
    # of 64 rows one step took three to five times as long as several; beyond so much, sixteen warps spill
    if kind.rows == 16 and held <= 3 * HELD // 2:
        cuts.append(Cut(16, PART, 8 if held <= HELD else 16))
    return cuts


def _filling(kind: Kind, tile: Tile, halves: int) -> Cut:
    """The inputs split until programs fill the device, all of them at once."""
    blocks = -(-kind.lines // tile.lines)
    most = min(SPLITS, kind.inputs // (STEPS * tile.into), tile.beside * _processors(kind.device) // blocks)
    return Cut(tile.lines // halves, tile.into, tile.warps, tile.stages, max(1, most), tma=tile.tma)


def _all_under_way(kind: Kind) -> Cut:
    """The copy engine fetches all that a program reads at once: a short matrix costs one wait."""
    steps = -(-kind.inputs // GROUP)
    splits = -(-steps // UNDER_WAY)
    return Cut(GROUP, GROUP, 4, -(-steps // splits), splits, kind.inputs, tma=True)


def _lull(kind: Kind, cut: Cut) -> int:
    """Inputs of every line that a lull has time to fetch; whole 16 bytes."""
    return max(FIRST, LULL // (kind.lines * cut.splits) // FIRST * FIRST)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _copies(device: torch.device) -> bool:
    """Has the device a copy engine for tiles? Before sm_90 Triton lets threads fetch them, one step after another."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (9, 0)


def parts_of(inputs: int, into: int) -> int:
    """Products of `into` inputs that hold them all; triton wants a power of two."""
    return power(1, -(-inputs // into))
