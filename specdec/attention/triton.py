"""Tree attention by our own split-KV kernels: tilings, checks and the launch; the default on CUDA.

Knows nothing of models or graphs, and imports triton only inside functions. Everything a launch needs from
the device (lengths, slots, ancestor bits) is read by the kernel: a captured launch is right at every length.

Dimension legend: B requests, N new rows of each, Hq query heads, Hkv KV heads, S cache rows, D head size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.attention.protocol import Rows
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.fused import keys
from specdec.fused.available import launching, power
from specdec.fused.turns import COUNTERS, turns

WORD = 64  # tree rows per ancestor word
MAX_SPLITS = 64
WAVES = 2  # programs per multiprocessor that the splits aim at
MERGED_ROWS = 16  # rows that are merged at a time, at most
HELD = 2**15  # float32 of other splits read at a time, times warps: all on their way together, none spilled
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one launch cuts its work; constant in a graph.

    Attributes:
        rows: packed query rows (node x group) of one program.
        keys: cache rows of one step of its loop.
        head: head size, rounded up to a power of two.
        splits: shares the keys are cut into.
        least: keys below which a share is not cut further, a multiple of `keys`.
        worth: keys that are read in the time it takes to merge one split; 0 cuts `splits` whatever that takes.
        merged: rows that are merged at a time.
        warps, stages: of the compiler.
    """

    rows: int
    keys: int
    head: int
    splits: int
    least: int
    worth: int
    merged: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """The kernel's, and the compiler's."""
        held = HELD // self.warps // (self.merged * self.head)
        return {
            "LEAST": self.least, "MERGED_ROWS": self.merged, "MERGED_PARTS": max(1, held), "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys, "BLOCK_HEAD": self.head, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def tiling(packed: int, pairs: int, capacity: int, head_dim: int, dtype: torch.dtype, words: int = 1,
           multiprocessors: int = 1) -> Tiling:  # fmt: skip
    """The tiling for `packed` = N * group rows of `pairs` = B * Hkv over slots of `capacity` rows.

    Every tile here compiles for sm_90 without spilling registers; a test compiles them. Small batches cut
    the keys until every multiprocessor has work, but a share keeps at least one block of keys.

    One program merges what its tile's splits have left. It reads perhaps 64 bytes a cycle, so that a split of 64 rows
    of head 128 takes 512 cycles, in which tensor cores fold about 64 keys, and other cores an eighth of that.
    """
    head = power(16, head_dim)
    if dtype == torch.float32:  # exact products run outside the tensor cores, in small tiles
        widest, keys, warps, stages = (32 if head <= 128 else 16), 16, 8, 2
    elif head > 128:
        widest, keys, warps, stages = 64, 32, 8, 2
    elif words > 1:  # ancestor words gathered key by key take registers
        widest, keys, warps, stages = 32, 64, 4, 3
    elif packed > 64 and pairs * -(-packed // 128) >= multiprocessors:
        widest, keys, warps, stages = 128, 64, 8, 3
    else:
        widest, keys, warps, stages = 64, 64, 4, 3
    rows = min(widest, power(16, packed))
    programs = pairs * -(-packed // rows)
    splits = max(1, min(WAVES * multiprocessors // programs, MAX_SPLITS, capacity // keys))
    worth = min(packed, rows) * head // (1024 if dtype == torch.float32 else 128)
    return Tiling(rows, keys, head, splits, keys, worth, min(MERGED_ROWS, power(4, packed)), warps, stages)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None,
    *,
    offset: int,
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    tree_positions: Tensor | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of tree rows over the committed rows of their slot and their ancestors among the tree rows.

    On one device, all calls must be in one order: where keys are split, they count in one place.

    Args:
        q: [B, N, Hq, D]; k_cache, v_cache: [slots, Hkv, S, D] views of one layer, new rows already written.
        slots: int64 [B]; lengths: int64 [B] committed rows.
        ancestors: int64 [B, N], or [B, N, words] for more than 64 tree rows, bit j = cache row lengths + j;
            None for a causal chunk (row i sees everything up to cache row lengths + offset + i).
        offset: tree rows stored before the first of the N new ones.
        scale, softcap: score = q k scale, then softcap * tanh(score / softcap).
        window: a row sees a key iff its position minus the key's is below it; needs `positions` int64 [B, N]
            and, behind older tree rows, `tree_positions` int64 [B, offset + N].
        splits: shares of the keys; chosen for this machine when None.

    Returns: [B, N, Hq, D] of q's dtype. Rows that see nothing are zero.

    Raises:
        UnsupportedError: no triton, no CUDA tensors, a dtype or a number of rows the kernels cannot take.
    """
    _refuse(q, ancestors, offset)
    if window is not None:
        assert positions is not None, "a window needs positions"
        assert ancestors is None or tree_positions is not None or offset == 0, "a window needs tree positions"
        tree_positions = positions if tree_positions is None else tree_positions
    b, n, heads, d = q.shape
    kv_heads = k_cache.shape[1]
    cut = tiling(n * heads // kv_heads, b * kv_heads, k_cache.shape[2], d, q.dtype, _words(ancestors),
                 _multiprocessors(q.device))  # fmt: skip
    cut = cut if splits is None else replace(cut, splits=splits, worth=0)
    view = _View(q, k_cache, v_cache, slots, lengths, ancestors, positions, tree_positions, offset, window)
    return _launch(view, cut, *score_factors(scale, softcap))


@dataclass(frozen=True, slots=True)
class _View:
    """The tensors of one launch."""

    q: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    lengths: Tensor
    ancestors: Tensor | None
    positions: Tensor | None
    tree_positions: Tensor | None
    offset: int
    window: int | None

    def pointers(self) -> list[Tensor | None]:
        """Inputs in the kernel's order; those without a use are None, which drops their code."""
        near = (self.positions, self.tree_positions) if self.window is not None else (None, None)
        index = (self.slots, self.lengths, self.ancestors, *near)
        return [self.q, self.keys, self.values, *(None if x is None else x.contiguous() for x in index)]

    def strides(self) -> tuple[int, ...]:
        """Of q (request, node, head), then of the cache (slot, head, row), which keys and values share."""
        assert self.q.stride(3) == self.keys.stride(3) == 1, "head_dim must be the innermost, dense dimension"
        assert self.keys.stride() == self.values.stride(), "keys and values must be views of one cache"
        return (*self.q.stride()[:3], *self.keys.stride()[:3])


def _launch(view: _View, cut: Tiling, scale: float, softcap: float | None) -> Tensor:
    b, n, heads, d = view.q.shape
    kv_heads = view.keys.shape[1]
    tiles, pairs = -(-n * heads // kv_heads // cut.rows), b * kv_heads
    if tiles * pairs > COUNTERS:
        cut = replace(cut, splits=1)
    out = torch.empty((b, n, heads, d), dtype=view.q.dtype, device=view.q.device)
    left: tuple[Tensor | None, ...] = (None, None, None)
    if cut.splits > 1:
        lse = torch.empty((pairs, tiles, cut.splits, cut.rows), dtype=torch.float32, device=out.device)
        left = (lse.new_empty(*lse.shape, cut.head), lse, turns(out.device))
    _kernels(out.device.type).split_kernel[tiles, pairs, cut.splits](
        *view.pointers(), out, *left, n, view.offset, scale, softcap, view.window, *view.strides(),
        cut.splits, cut.worth, KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD=d, WORDS=_words(view.ancestors),
        **cut.constants(), **launching(),
    )  # fmt: skip
    return out


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(scale, softcap) in base 2; under a soft cap the scale gives 2 x log2(e), x being tanh's argument."""
    if softcap is None:
        return scale * math.log2(math.e), None
    return scale / softcap * 2 * math.log2(math.e), softcap * math.log2(math.e)


def _words(ancestors: Tensor | None) -> int:
    return ancestors.shape[2] if ancestors is not None and ancestors.dim() == 3 else 1


def _refuse(q: Tensor, ancestors: Tensor | None, offset: int) -> None:
    if q.dtype not in DTYPES:
        raise UnsupportedError(
            "the triton kernels cannot attend in this dtype", field="dtype", value=str(q.dtype),
            allowed="float16, bfloat16, float32", remedy="Use the reference attention.",
        )  # fmt: skip
    words = _words(ancestors)
    if ancestors is not None and offset + q.shape[1] > WORD * words:
        raise UnsupportedError(
            "more tree rows than bits in their ancestor words", field="nodes", value=offset + q.shape[1],
            allowed=f"at most {WORD * words}", remedy="Pass ancestors as [B, N, words].",
        )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; one elsewhere (the interpreter runs programs one after another)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _kernels(device: str) -> Any:
    """The module of kernels, for tensors of this kind of device.

    Raises:
        UnsupportedError: triton is not installed, or the tensors are not on CUDA and it does not interpret.
    """
    try:
        import triton
    except ImportError as error:
        raise UnsupportedError(
            "triton is not installed", field="attention", value="triton",
            remedy="Install a CUDA build of torch, which brings it, or use the reference attention.",
        ) from error  # fmt: skip
    if device != "cuda" and not triton.knobs.runtime.interpret:
        raise UnsupportedError(
            "the triton kernels run on CUDA only", field="device", value=device, allowed="cuda",
            remedy="Use the reference attention, or set TRITON_INTERPRET=1 to debug them on the CPU.",
        )  # fmt: skip
    from specdec.attention import triton_kernels

    keys.settle_all()
    keys.settle(triton_kernels)
    return triton_kernels


class TritonAttention:
    """The kernels behind the `TreeAttention` protocol: causal chunks, whole trees and drafting levels."""

    name = "triton"

    def plan(self, rows: Rows, cache: KVCache, window: int | None) -> tuple[Rows, int | None]:
        """Nothing is prepared: the kernel reads lengths and bits itself."""
        return rows, window

    def attend(self, query: Tensor, cache: KVCache, layer: int, plan: tuple[Rows, int | None], scale: float,
               softcap: float | None = None) -> Tensor:  # fmt: skip
        """query [B, N, H, D] -> [B, N, H, D]; see `tree_attention`."""
        rows, window = plan
        return tree_attention(
            query, cache.kv[layer, 0], cache.kv[layer, 1], rows.slots, rows.lengths, rows.ancestors,
            offset=rows.offset, scale=scale, window=window, positions=rows.positions,
            tree_positions=rows.tree_positions, softcap=softcap,
        )  # fmt: skip
