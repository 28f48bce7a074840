"""`python -m bench.kernels`: tree attention on a CUDA device, each backend against this machine's floor.

Ceilings first (copy bandwidth, bf16 matrix rate), then triton, flash, flex and dense SDPA over lengths,
batches and tree sizes. Each output is checked against float32 before it is timed. Rows are appended to
`results/kernels.jsonl` point by point. Knows nothing of models, only of their head shapes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import Ceiling, ceilings, layer_seconds
from bench.record import append
from specdec import tree as trees
from specdec.attention.flash import FlashAttention
from specdec.attention.protocol import TreeAttention, tree_rows
from specdec.attention.triton import TritonAttention, tree_attention
from specdec.cache import CacheShape, KVCache
from specdec.errors import SpecdecError, UnsupportedError

FOOTPRINT = 256 * 2**20  # bytes of keys and values walked by one graph, several times any L2
MOST_LAYERS = 256
TOLERANCE = 1e-2  # relative error of bf16 attention; more is a bug, not rounding
# flex's own choice for these shapes spills registers on sm_90
FLEX_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
FLEX_BLOCK = 128

Attend = Callable[[int], Tensor]  # layer -> [B, N, Hq, D]


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention of a model: query heads, KV heads, head size."""

    query: int
    kv: int
    size: int


MODELS = {"8b": Heads(32, 8, 128), "135m": Heads(9, 3, 64), "1.5b": Heads(12, 2, 128)}


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: `nodes` tree rows of `batch` requests behind `length` committed rows."""

    model: str
    length: int
    batch: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Random queries, keys and values of a point, and random trees."""

    cache: KVCache
    queries: Tensor  # [layers, B, N, Hq, D]
    slots: Tensor
    lengths: Tensor
    tree: trees.DraftTree
    scale: float


def floor(point: Point, ceiling: Ceiling) -> float:
    """Seconds one layer needs at least: each visible key and value read once, each product done once."""
    heads = MODELS[point.model]
    rows = point.batch * (point.length + point.nodes)
    ends = 2 * point.batch * point.nodes * heads.query * heads.size
    moved = 2 * (2 * rows * heads.kv * heads.size + ends)
    return ceiling.seconds(moved, 4 * rows * point.nodes * heads.query * heads.size)


def make_problem(point: Point, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Normal random tensors (zeros would run faster), random parents, layers enough to fill FOOTPRINT."""
    heads = MODELS[point.model]
    generator = torch.Generator(device).manual_seed(0)
    capacity = point.length + FLEX_BLOCK
    layer = 2 * point.batch * heads.kv * capacity * heads.size * dtype.itemsize
    layers = min(MOST_LAYERS, max(2, -(-FOOTPRINT // layer))) if device.type == "cuda" else 2
    cache = KVCache(CacheShape(layers, heads.kv, heads.size, dtype, device), point.batch, capacity)
    for plane in cache.kv:
        plane.normal_(generator=generator)
    size = (layers, point.batch, point.nodes, heads.query, heads.size)
    queries = torch.randn(size, generator=generator, device=device).to(dtype)
    index = torch.arange(point.nodes, device=device).expand(point.batch, -1)
    draw = torch.rand(index.shape, generator=generator, device=device)
    tree = trees.build(torch.zeros_like(index), (draw * index).long())
    lengths = torch.full((point.batch,), point.length, device=device)
    return Problem(cache, queries, torch.arange(point.batch, device=device), lengths, tree, heads.size**-0.5)


def through(attention: TreeAttention, problem: Problem) -> Attend:
    """A backend of the engine, as the engine calls it."""
    plan = attention.plan(tree_rows(problem.slots, problem.lengths, problem.tree), problem.cache, None)
    return lambda layer: attention.attend(problem.queries[layer], problem.cache, layer, plan, problem.scale)


def split_by(splits: int, problem: Problem) -> Attend:
    """The triton kernels with a fixed number of splits, to check the choice of `tiling`."""
    p = problem
    return lambda layer: tree_attention(
        p.queries[layer], p.cache.kv[layer, 0], p.cache.kv[layer, 1], p.slots, p.lengths, p.tree.ancestors,
        offset=0, scale=p.scale, splits=splits,
    )  # fmt: skip


def dense(problem: Problem) -> Attend:
    """SDPA under a boolean mask, query heads packed into rows so that keys are never repeated."""
    _, b, n, heads, d = problem.queries.shape
    kv_heads, capacity = problem.cache.kv.shape[3:5]
    tree_row = torch.arange(capacity, device=problem.lengths.device) - problem.lengths[:, None]
    bits = problem.tree.ancestors[:, :, None] >> tree_row.clamp(0, 63)[:, None]
    sees = (tree_row < 0)[:, None] | ((bits & 1).bool() & (tree_row < 64)[:, None])
    mask = sees[:, None].repeat(1, 1, heads // kv_heads, 1)

    def attend(layer: int) -> Tensor:
        q = problem.queries[layer].view(b, n, kv_heads, -1, d).permute(0, 2, 3, 1, 4)
        keys, values = problem.cache.kv[layer].unbind(0)
        packed = q.flatten(2, 3)
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=problem.scale)
        return out.view(q.shape).permute(0, 3, 1, 2, 4).reshape(b, n, heads, d)

    return attend


def flex(problem: Problem, compiled: bool = True) -> Attend:
    """FlexAttention with partial blocks only, the one form whose splits follow the device-side length."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    lengths, ancestors, n = problem.lengths, problem.tree.ancestors, problem.tree.nodes
    b, capacity = problem.slots.shape[0], problem.cache.kv.shape[4]

    def sees(request: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        tree_row = key - lengths[request]
        bit = (ancestors[request, row] >> tree_row.clamp(0, 63)) & 1
        return (tree_row < 0) | ((tree_row < n) & (bit == 1))

    blocks = torch.arange(capacity // FLEX_BLOCK, dtype=torch.int32, device=lengths.device)
    used = -(-(lengths + n) // FLEX_BLOCK)
    mask = BlockMask.from_kv_blocks(
        used.int()[:, None, None], blocks.expand(b, 1, 1, -1).contiguous(), BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees, seq_lengths=(n, capacity),
    )  # fmt: skip
    attention: Any = flex_attention
    if compiled:
        torch.compiler.reset()  # every point is a new shape; do not run into the recompile limit
        attention = torch.compile(flex_attention, dynamic=False)
    options = FLEX_OPTIONS if compiled else None

    def attend(layer: int) -> Tensor:
        keys, values = problem.cache.kv[layer].unbind(0)
        out: Tensor = attention(
            problem.queries[layer].transpose(1, 2), keys, values, block_mask=mask, scale=problem.scale,
            enable_gqa=True, kernel_options=options,
        )  # fmt: skip
        return out.transpose(1, 2)

    return attend


def backends(point: Point, args: argparse.Namespace) -> dict[str, Callable[[Problem], Attend]]:
    """Builders by name. Flex compiles for each shape, so it runs for the largest tree of even groups only."""
    heads = MODELS[point.model]
    group = heads.query // heads.kv
    every: dict[str, Callable[[Problem], Attend]] = {
        "triton": lambda problem: through(TritonAttention(), problem),
        "flash": lambda problem: through(FlashAttention(), problem),
        "sdpa": dense,
    }
    if point.nodes == max(args.nodes) and group & (group - 1) == 0:
        every["flex"] = flex
    chosen = {name: build for name, build in every.items() if name in args.backends}
    return chosen | {f"triton/{s}": lambda problem, s=s: split_by(s, problem) for s in args.splits}


def relative_error(problem: Problem, out: Tensor) -> float:
    """Error of layer 0 against float32 attention, norm over norm, for the first and the last request."""
    worst = 0.0
    for b in {0, out.shape[0] - 1}:
        end = int(problem.lengths[b]) + problem.tree.nodes
        lane = problem.cache.kv[0, :, b, :, :end].float()
        keys, values = lane.repeat_interleave(out.shape[2] // lane.shape[1], 1)
        tree_row = torch.arange(problem.tree.nodes, device=out.device)
        sees = torch.ones(problem.tree.nodes, end, dtype=torch.bool, device=out.device)
        sees[:, end - problem.tree.nodes :] = ((problem.tree.ancestors[b][:, None] >> tree_row) & 1).bool()
        score = problem.queries[0, b].float().transpose(0, 1) @ keys.transpose(1, 2) * problem.scale
        expected = (score.masked_fill(~sees, -torch.inf).softmax(-1) @ values).transpose(0, 1)
        worst = max(worst, float((out[b].float() - expected).norm() / expected.norm()))
    return worst


def measure(
    point: Point, ceiling: Ceiling, args: argparse.Namespace, device: torch.device | None = None
) -> list[dict[str, Any]]:
    """One row per backend; a backend that cannot run leaves its reason. On a CPU, times are of plain calls."""
    device = torch.device("cuda") if device is None else device
    problem = make_problem(point, device)
    rows = []
    for name, build in backends(point, args).items():
        row = {"kind": "attention", **asdict(point), "backend": name, "floor_us": floor(point, ceiling) * 1e6}
        try:
            attend = build(problem)
            row["relative_error"] = relative_error(problem, attend(0))
            row["us"] = layer_seconds(attend, problem.cache.kv.shape[0], device) * 1e6
            row["wrong"] = not row["relative_error"] < TOLERANCE
        except (SpecdecError, RuntimeError, NotImplementedError) as error:
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Microseconds per layer, one line per point; a wrong result is marked."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    shown = Table(*Point.__slots__, "floor us", *names, title="tree attention, us per layer")
    for point, group in itertools.groupby(rows, key=lambda row: tuple(row[f] for f in Point.__slots__)):
        cells = {row["backend"]: row for row in group}
        least = next(iter(cells.values()))["floor_us"]
        shown.add_row(*map(str, point), f"{least:.1f}", *(_cell(cells.get(name)) for name in names))
    return shown


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "refused" if "refused" in row else f"{row['us']:.1f}" + (" WRONG" if row["wrong"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one sentence where there is no CUDA device."""
    args = _arguments(argv)
    console = Console(stderr=True)
    try:
        if not torch.cuda.is_available():
            raise UnsupportedError(
                "this bench measures CUDA kernels", field="device", value="cpu", allowed="cuda",
                remedy="Run it on a machine with an NVIDIA GPU and a CUDA build of torch.",
            )  # fmt: skip
    except UnsupportedError as error:
        console.print(str(error), markup=False)
        return 2
    return _run(args, console)


def _run(args: argparse.Namespace, console: Console) -> int:
    deadline = time.monotonic() + 60 * args.minutes
    torch.cuda.set_device(0)
    ceiling = ceilings()
    append("kernels", [{"kind": "ceiling", **asdict(ceiling)}], results=args.results)
    console.print(f"copy {ceiling.bytes / 1e12:.2f} TB/s, matrices {ceiling.operations / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    points = [Point(*p) for p in itertools.product(args.models, args.lengths, args.batches, args.nodes)]
    for done, point in enumerate(points):
        if time.monotonic() > deadline:
            console.print(f"out of time after {done} of {len(points)} points")
            break
        fresh = measure(point, ceiling, args)
        append("kernels", [*fresh], results=args.results)
        rows += fresh
        torch.cuda.empty_cache()
    console.print(table(rows))
    return int(any(row.get("wrong") for row in rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.kernels", description="Tree attention on a CUDA device.")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["8b", "135m"], help="whose head shapes"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 8192, 32768], help="tokens of context"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="requests at once")
    parser.add_argument("--nodes", nargs="+", type=int, default=[64, 16, 32, 1], help="of a tree")
    parser.add_argument(
        "--backends", nargs="+", default=["triton", "flash", "flex", "sdpa"], help="to compare"
    )
    parser.add_argument("--splits", nargs="*", type=int, default=[], help="also triton with these splits")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before the next point after this")
    parser.add_argument("--results", type=Path, default=None, help="folder of kernels.jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
