"""`python -m bench.steps`: one forward over trees of 1 to 64 nodes, drafting, whole rounds; each against its floor.

The floor of a step is the time that reading all weights and the committed keys and values takes at the measured copy
bandwidth. Targets are named as for `specdec generate`; `random-8b` is an 8B Llama of random weights and `random-135m`
a SmolLM2, for mechanics only. Rows go to `results/steps.jsonl` as they are made. `--device cpu` runs the plain half
anywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.ceilings import ceilings
from bench.record import append
from bench.whole_round import measure as measure_rounds
from bench.whole_round import random_head, randomise
from specdec.attention.choose import choose_attention
from specdec.attention.protocol import tree_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.engine.build import parse_tree
from specdec.engine.graphs import CudaRecording
from specdec.head.checkpoint import load_head
from specdec.head.pretrained import shipped_head
from specdec.sampling import likeliest
from specdec.target.lean import LeanConfig, LeanDecoder
from specdec.target.load import LeanTarget, load_target
from specdec.target.protocol import Target, TargetInfo
from specdec.tree import MAX_NODES, chain

REPEATS = 15
RANDOM, SMALL = "random-8b", "random-135m"
DRAFT_VOCAB = 32000  # of a random head
LOUD = 32.0  # of embeddings that all layers together do not drown
EIGHT_B = LeanConfig(
    vocab=128256, hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, eps=1e-5, theta=5e5,
    scaling=None, max_length=8192, qkv_bias=False, out_bias=False, qk_norm=False, tied=False, windows=(None,) * 32,
)  # fmt: skip
SMOL = replace(EIGHT_B, vocab=49152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
               theta=1e5, tied=True, windows=(None,) * 30)  # fmt: skip
SHAPES = {RANDOM: EIGHT_B, SMALL: SMOL}


def random_target(
    config: LeanConfig, device: torch.device, dtype: torch.dtype, name: str = RANDOM, steady: bool = False
) -> LeanTarget:
    """A lean target of random weights, made on the device.

    Args:
        steady: with a text of its own that no rounding changes, see `_count`; not for tied weights.
    """
    with torch.device("meta"):
        decoder = LeanDecoder(config, ReferenceAttention())
    decoder = decoder.to(dtype).to_empty(device=device)
    randomise(decoder)
    if steady:
        _count(decoder)
    if config.tied:
        decoder.head.weight = decoder.embedding
    decoder.freeze()
    choice = choose_attention(decoder.cache_shape(), config.heads)
    decoder.attention = choice.attention
    info = TargetInfo(name, "LlamaForCausalLM", config.vocab, config.hidden, config.layers, config.max_length, (),
                      dtype, device, "random", decoder.cache_shape())  # fmt: skip
    return LeanTarget(decoder, info, choice)


def any_target(name: str, device: torch.device, dtype: torch.dtype) -> LeanTarget:
    """A model by its name, or one of `SHAPES` with random weights."""
    if name in SHAPES:
        return random_target(SHAPES[name], device, dtype, name)
    target = load_target(name, dtype=dtype, device=device, prefer="lean").target
    assert isinstance(target, LeanTarget)
    return target


def _count(decoder: LeanDecoder) -> None:
    """Let the likeliest token after t be t + 1, by far: random weights alone leave so many near ties that two ways to
    add up in bfloat16 soon say different things, and a known text is worth nothing."""
    assert not decoder.config.tied
    decoder.embedding.data.normal_(0, LOUD)
    decoder.head.weight.data.copy_(decoder.embedding.data.roll(1, 0) / LOUD)


def weight_bytes(target: LeanTarget) -> int:
    """Bytes that a step reads: all parameters, the embedding only where it is the LM head, too."""
    decoder = target.decoder
    total = sum(p.numel() * p.element_size() for p in decoder.parameters())
    return (
        total if decoder.config.tied else total - decoder.embedding.numel() * decoder.embedding.element_size()
    )


def step(target: Target, cache: KVCache, batch: int, nodes: int, prefix: int) -> Callable[[], None]:
    """A forward over B chains of N nodes, and the likeliest token after each."""
    device = target.info.device
    slots = torch.arange(batch, device=device)
    lengths = torch.full((batch,), prefix, device=device)
    tree = chain(torch.ones(batch, nodes, dtype=torch.int64, device=device))

    def work() -> None:
        states = target.forward(tree.tokens, tree_rows(slots, lengths, tree), cache, ())
        likeliest(target.logits(states.final))

    return work


@torch.inference_mode()
def median_ms(work: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds, host time included, as a decoding loop sees it."""
    times = []
    for turn in range(REPEATS + 3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@torch.inference_mode()
def measure(
    target: LeanTarget, args: argparse.Namespace, bandwidth: float | None
) -> Iterator[dict[str, Any]]:
    """One row per batch and number of nodes."""
    info = target.info
    cache = KVCache(info.cache, max(args.batches), args.prefix + 64)
    recording = CudaRecording() if info.device.type == "cuda" else None
    for batch in args.batches:
        for nodes in args.nodes:
            read = weight_bytes(target) + batch * args.prefix * info.cache.row_bytes()
            row: dict[str, Any] = {"target": info.name, "attention": target.decoder.attention.name, "batch": batch,
                                   "nodes": nodes, "prefix": args.prefix, "dtype": str(info.dtype)}  # fmt: skip
            work = step(target, cache, batch, nodes, args.prefix)
            row["plain_ms"] = round(median_ms(work, info.device), 4)
            if recording is not None:
                row["captured_ms"] = round(median_ms(recording.record(work), info.device), 4)
            if bandwidth is not None:
                row["floor_ms"] = round(1e3 * read / bandwidth, 4)
            yield row


@torch.inference_mode()
def whole_rounds(
    target: LeanTarget, args: argparse.Namespace, bandwidth: float | None
) -> Iterator[dict[str, Any]]:
    """One row per batch for the default tree: drafting alone, and the round as one program, one ahead of the host."""
    info, shape = target.info, parse_tree(args.tree)
    assert shape is not None
    shipped = shipped_head(info.name)
    if shipped is None:
        head = random_head(target, DRAFT_VOCAB)
    else:
        head = load_head(shipped, target_layers=info.layers, dtype=info.dtype, device=info.device)
        head.freeze()
    for row in measure_rounds(target, head, args.batches, shape, args.prefix, median_ms):
        if info.device.type == "cuda":
            cache = KVCache(info.cache, row["batch"], args.prefix + MAX_NODES)
            work = step(target, cache, row["batch"], shape.nodes, args.prefix)
            row["captured_verify_ms"] = round(median_ms(CudaRecording().record(work), info.device), 4)
        if bandwidth is not None:
            verify = weight_bytes(target) + row["batch"] * args.prefix * info.cache.row_bytes()
            row["draft_floor_ms"] = round(1e3 * row["draft_bytes"] / bandwidth, 4)
            row["token_floor_ms"] = round(1e3 * verify / bandwidth, 4)
            row["floor_ms"] = round(row["draft_floor_ms"] + row["token_floor_ms"], 4)
        yield row


def round_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds of drafting and of whole rounds, the best over its floor."""
    made = Table(
        "target",
        "batch",
        "nodes",
        "token ms",
        "captured",
        "floor",
        "draft ms",
        "captured",
        "floor",
        "round ms",
        "captured",
        "floor",
        "x floor",
    )
    for row in rows:
        best = min(row["plain_round_ms"], row.get("captured_round_ms", row["plain_round_ms"]))
        cells = [row["target"], str(row["batch"]), str(row["nodes"])]
        for key in ("plain_token_ms", "captured_token_ms", "token_floor_ms", "plain_draft_ms", "captured_draft_ms",
                    "draft_floor_ms", "plain_round_ms", "captured_round_ms", "floor_ms"):  # fmt: skip
            cells.append(f"{row[key]:.3f}" if key in row else "")
        made.add_row(*cells, f"{best / row['floor_ms']:.2f}" if "floor_ms" in row else "")
    return made


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds, and the best over the floor."""
    made = Table("target", "attention", "batch", "nodes", "plain ms", "captured ms", "floor ms", "x floor")
    for row in rows:
        best, floor = min(row["plain_ms"], row.get("captured_ms", row["plain_ms"])), row.get("floor_ms")
        made.add_row(row["target"], row["attention"], str(row["batch"]), str(row["nodes"]), f"{row['plain_ms']:.3f}",
                     f"{row['captured_ms']:.3f}" if "captured_ms" in row else "", f"{floor:.3f}" if floor else "",
                     f"{best / floor:.2f}" if floor else "")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every target; rows are kept as they come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", nargs="+", default=["smollm2-135m", RANDOM], help="models, or shapes with random weights"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="requests at once")
    parser.add_argument(
        "--nodes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="tokens checked in one forward"
    )
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of context (default: 1024)")
    parser.add_argument("--tree", default="7/10/60", help="of the whole rounds: depth/children/nodes")
    parser.add_argument(
        "--no-ceiling", action="store_true", help="measure no copy bandwidth, hence no floors: saves 8 GiB"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device, rows, rounds = torch.device(args.device), list[dict[str, Any]](), list[dict[str, Any]]()
    bandwidth = None
    if device.type == "cuda" and not args.no_ceiling:
        ceiling = ceilings()
        bandwidth = ceiling.bytes
        append("steps", [{"kind": "ceiling", **asdict(ceiling)}])
    for name in args.targets:
        target = any_target(name, device, torch.bfloat16)
        for row in measure(target, args, bandwidth):
            rows.append(row)
            append("steps", [row])
        for row in whole_rounds(target, args, bandwidth):
            rounds.append(row)
            append("steps", [row])
        del target
    Console().print(table(rows))
    Console().print(round_table(rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
