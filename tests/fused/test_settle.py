"""Kernels that end a round against the torch code they stand in for, interpreted and on a GPU (see test_layer.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreted import tell, told
from sm90 import assembled, spilled
from torch import Tensor

from specdec import tree as trees
from specdec.accept import Verdict, walk
from specdec.cache import CacheShape, KVCache
from specdec.drafting.pairs import Pairs
from specdec.drafting.protocol import Context
from specdec.engine.program import Program, Seats, Standing
from specdec.fused import available
from specdec.sampling import largest

TWICE = (2, 0, 1, 1)  # slots of a batch of three in a program for four


@contextmanager
def fused(on: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(available, "runs", lambda _: on)
        yield


def verdict_of(b: int, nodes: int, device: str, seed: int = 0) -> tuple[trees.DraftTree, Verdict]:
    """Random trees and where random targets lead; requests of one slot are alike."""
    generator = torch.Generator().manual_seed(seed)
    parents = (torch.rand(b, nodes, generator=generator) * torch.arange(nodes)).long()
    tokens = torch.randint(3, (b, nodes), generator=generator)
    chosen, scores = (
        torch.randint(3, (b, nodes), generator=generator),
        -torch.rand(b, nodes, generator=generator),
    )
    if b == len(TWICE):
        parents[3], tokens[3], chosen[3], scores[3] = parents[2], tokens[2], chosen[2], scores[2]
    with fused(False):
        tree = trees.build(tokens.to(device), parents.to(device), scores=scores.to(device))
        return tree, walk(tree, chosen.to(device), min(nodes, 8))


def slots_of(b: int, device: str) -> Tensor:
    return torch.tensor(TWICE[:b], device=device)


def same(made: list[list[Tensor]]) -> bool:
    return all(torch.allclose(a.double(), b.double(), equal_nan=True) for a, b in zip(*made, strict=True))


def compaction(b: int, head: int, device: str) -> bool:
    made = []
    for on in (False, True):
        cache = KVCache(CacheShape(3, 2, head, torch.float32, torch.device(device)), 4, 40)
        cache.kv.copy_(torch.randn(cache.kv.shape, generator=torch.Generator().manual_seed(0)))
        _, verdict = verdict_of(b, 20, device)
        slots = slots_of(b, device)
        with fused(on):
            cache.compact(slots, 5 + slots, verdict.kept)
        rows = torch.arange(40, device=device) < 5 + torch.arange(4, device=device)[:, None]
        for slot, count in zip(slots.tolist(), verdict.counts.tolist(), strict=True):
            rows[slot, : 5 + slot + count] = True  # what lies behind is anybody's
        made.append([cache.kv.permute(2, 4, 0, 1, 3, 5)[rows]])
    return same(made)


def pairs(b: int, device: str) -> bool:
    made = []
    for on in (False, True):
        kept = object.__new__(Pairs)
        kept.features, kept.tokens = (
            torch.zeros(4, 30, 50, device=device),
            torch.zeros(4, 30, dtype=torch.int64, device=device),
        )
        kept.counts = torch.tensor([3, 0, 7, 1], device=device)
        _, verdict = verdict_of(b, 12, device)
        features = torch.randn(b, 12, 50, generator=torch.Generator().manual_seed(1)).to(device)
        if b == len(TWICE):
            features[3] = features[2]
        with fused(on):
            kept.observe(slots_of(b, device), features, verdict)
        made.append([kept.features, kept.tokens, kept.counts])
    return same(made)


def read_pairs(b: int, dtype: torch.dtype, device: str) -> bool:
    made = []
    for on in (False, True):
        kept = object.__new__(Pairs)
        draws = torch.Generator().manual_seed(0)
        kept.features = torch.randn(4, 30, 50, generator=draws).to(device)
        kept.tokens = torch.randint(90, (4, 30), generator=draws).to(device)
        kept.counts = torch.tensor([3, 0, 7, 1], device=device)
        last = torch.randn(4, 40, generator=draws).to(device, dtype)
        kept.drafter, kept.width = SimpleNamespace(head=SimpleNamespace(dtype=dtype), last=last), 9
        slots, y = slots_of(b, device), torch.randn(b, 9, 40, generator=draws).to(device, dtype)
        if b == len(TWICE):
            y[3] = y[2]
        with fused(on):
            features, tokens, rows = kept._take(Context(slots, slots, 20 + 2 * slots, fixed=True))
            left = kept._leave(slots, y)
        assert features.dtype == left.dtype == dtype
        places = [rows.slots, rows.lengths, rows.positions, rows.index.indices]
        made.append([features, tokens, *places, left, last])
    return same(made)


def settled(b: int, nodes: int, scored: bool, drafting: bool, device: str) -> bool:
    made = []
    for on in (False, True):
        standing, seats = Standing.of(4, 64, torch.device(device)), Seats.of(b, 9, torch.device(device))
        seats.slots.copy_(slots_of(b, device))
        standing.lengths.copy_(torch.tensor([10, 20, 30, 40]))
        tree, verdict = verdict_of(b, nodes, device)
        peaks = torch.zeros(b, nodes, device=device)
        peaks[0, verdict.kept[0, -1]] = torch.nan
        waiting = torch.tensor([1, 2, 3, 4], device=device)
        program = object.__new__(Program)
        holder = object.__new__(Pairs)
        holder.counts = waiting
        for name, value in {"standing": standing, "pairs": holder if drafting else None}.items():
            object.__setattr__(program, name, value)
        tree = (
            tree
            if scored
            else trees.DraftTree(tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.sizes)
        )
        with fused(on):
            program._settle(seats, tree, verdict, peaks)
        made.append([standing.lengths, standing.roots, waiting, seats.report, seats.promised])
    return same(made) and bool(made[1][3][0, 3] == 1) and not bool(made[1][3][1:, 3].any())


def largest_entries(width: int, device: str) -> bool:
    x = torch.randint(-50, 50, (3, 2, width), generator=torch.Generator().manual_seed(0)).float().to(device)
    x[1, 0, width // 2] = x[2, 1, 0] = torch.nan
    x[0, 1] = -torch.inf
    with fused(False):
        wanted = largest(x)
    with fused(True):
        values, indices = largest(x)
    first = torch.where(x == wanted[0][..., None], torch.arange(width, device=device), width).amin(-1)
    return same([[wanted[0]], [values]]) and bool(((indices == first) | wanted[0].isnan()).all())


CASES: dict[str, Callable[[str], bool]] = {
    "compaction": lambda device: compaction(3, 32, device),
    "compaction, a request twice": lambda device: compaction(4, 32, device),
    "compaction, head 48": lambda device: compaction(1, 48, device),
    "pairs": lambda device: pairs(3, device),
    "pairs, a request twice": lambda device: pairs(4, device),
    "pairs read": lambda device: read_pairs(3, torch.float32, device),
    "pairs read, a request twice": lambda device: read_pairs(4, torch.float32, device),
    "pairs read, half": lambda device: read_pairs(2, torch.float16, device),
    "standings": lambda device: settled(3, 12, True, True, device),
    "standings, a request twice": lambda device: settled(4, 60, True, True, device),
    "largest": lambda device: largest_entries(100, device),
    "largest, several shares": lambda device: largest_entries(9000, device),
    "standings without a head": lambda device: settled(2, 1, False, False, device),
}


def main() -> None:
    tell({name: functools.partial(case, "cpu") for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_do_what_torch_does(name: str) -> None:
    assert told(__file__, name)


def test_kernels_of_pairs_compile_for_sm_90(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from specdec.fused.pairs_kernels import keep_kernel, leave_kernel, take_kernel

    constants = {"WIDTH": 8, "BLOCK": 1024}
    whole = ("kept", "emitted", "slots", "waiting", "tokens", "to_tokens", "lengths", "first", "indices")
    for kernel in (keep_kernel, take_kernel, leave_kernel):
        kinds = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(whole, "*i64")
        kinds |= dict.fromkeys(("nodes", "width", "room", "hidden"), "i32")
        even = [name for name in kernel.arg_names if name not in {*constants, "nodes", "room"}]
        report = assembled(kernel, kinds, constants, even, {"num_warps": 4}, tmp_path)
        assert spilled(report) == (0, 0), report
        assert "griddepcontrol.wait" in (tmp_path / "kernel.ptx").read_text(), "starts too early"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_do_what_torch_does(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert CASES[name]("cuda")


if __name__ == "__main__":
    main()
