"""Fused growth and walk against torch (interpreted), their registers on sm_90, their launches.

Run as a program under TRITON_INTERPRET=1 this file grows and walks every case both ways and writes what differs as
JSON; triton reads that variable when it is imported, so the tests start it once in a process of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from interpreted import tell, told
from sm90 import assembled, spilled
from tiny_head import HIDDEN, Embed, tiny_head
from torch import Tensor

from specdec import accept
from specdec import tree as trees
from specdec.accept import Verdict
from specdec.attention.reference import ReferenceAttention
from specdec.drafting import growth as plainly
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.fused_growth import FusedGrowth
from specdec.drafting.growth import Growth, growth_of
from specdec.drafting.protocol import Context, Shape
from specdec.fused import available, growth
from specdec.tree import DraftTree


@dataclass(frozen=True)
class Grown:
    """A proposal; logits of few distinct values have many `ties`."""

    shape: Shape
    vocabulary: int = 50
    batch: int = 1
    share: int = growth.SHARE
    ties: bool = False
    dtype: torch.dtype = torch.float32
    hidden: int = 20


GROWN = {
    "chain": Grown(Shape(7, 1, 8)),
    "chains of a batch": Grown(Shape(3, 1, 3), batch=3),
    "one level": Grown(Shape(1, 4, 4), batch=3),
    "four shares": Grown(Shape(3, 4, 16), batch=3, share=16),
    "sixteen shares": Grown(Shape(2, 3, 8), vocabulary=1000, share=16),
    "width 10": Grown(Shape(3, 10, 60), vocabulary=1000),
    "seven levels": Grown(Shape(7, 4, 64)),
    "a full tree": Grown(Shape(7, 10, 60), vocabulary=1000),
    "width 16": Grown(Shape(2, 16, 64), share=16),
    "tree smaller than the width": Grown(Shape(2, 10, 4)),
    "two nodes": Grown(Shape(2, 4, 2)),
    "fewer candidates than nodes": Grown(Shape(1, 4, 60)),
    "vocabulary smaller than the width": Grown(Shape(2, 10, 30), vocabulary=7),
    "rows of one share shorter than the width": Grown(Shape(2, 4, 9), vocabulary=18, share=16),
    "ties": Grown(Shape(3, 4, 20), batch=3, share=16, ties=True),
    "bfloat16": Grown(Shape(2, 4, 16), share=16, ties=True, dtype=torch.bfloat16),
    "outputs in several blocks": Grown(Shape(2, 4, 16), batch=2, hidden=1100),
    "a word full of head rows": Grown(Shape(99, 8, 64), vocabulary=9),
}
WALKS = {  # nodes, width, batch, whether the trees end early
    "root": (1, 1, 1, False), "two nodes": (2, 2, 3, False), "narrow": (9, 3, 1, False), "64 nodes": (64, 64, 3, False),
    "inert padding": (24, 12, 5, True),
}  # fmt: skip


def stable_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top_log_probs` with the lowest index first among equals on every device, where topk takes any."""
    best = torch.sort(logits.float().log_softmax(dim=-1), dim=-1, descending=True, stable=True)
    return best.values[..., :count], best.indices[..., :count]


def differences(case: Grown, device: str) -> list[str]:
    """What of a proposal is not what torch makes of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(case.vocabulary, device=device) * 2
    plain, fused = Growth(ids, case.shape), FusedGrowth(ids, case.shape)
    rows, wrong = 1, list[str]()
    while not plain.depth or plain.worth_another():
        logits = torch.randn(case.batch, rows, case.vocabulary, generator=generator) * 3
        logits = (logits.round() if case.ties else logits).to(device, case.dtype)
        y = torch.randn(case.batch, rows, case.hidden, generator=generator).to(device)
        if not torch.equal(plain.level(logits, y), fused.level(logits, y)):
            wrong.append("y")
        wrong += unequal(plain, fused, ("tokens", "bits", "at", "depth", "count", "rows_before"))
        wrong += [] if torch.allclose(plain.scores, fused.scores, atol=1e-5) else ["scores of a level"]
        rows = plain.width
    roots = torch.arange(case.batch, device=device) + 7
    return wrong + unlike(plain.finish(roots), fused.finish(roots))


def unequal(one: object, other: object, names: tuple[str, ...]) -> list[str]:
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return [n for n, (a, b) in pairs.items() if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)]


def unlike(wanted: DraftTree, got: DraftTree) -> list[str]:
    assert wanted.scores is not None and got.scores is not None
    wrong = unequal(wanted, got, ("tokens", "parents", "depths", "ancestors", "sizes"))
    return wrong + ([] if torch.allclose(wanted.scores, got.scores, atol=1e-5) else ["scores of the tree"])


def sick(device: str) -> list[str]:
    """NaN and infinities must leave trees, whichever."""
    shape, wrong = Shape(2, 4, 9), list[str]()
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.randn(1, 1, 50).index_fill(2, torch.tensor([3, 20]), bad).to(device)
        for given in (logits, torch.full_like(logits, bad)):
            fused = FusedGrowth(torch.arange(50, device=device), shape)
            y = fused.level(given, given.new_zeros(1, 1, 20))
            fused.level(given.expand(1, 4, 50), y)
            tree = fused.finish(torch.tensor([1], device=device))
            rebuilt = trees.build(tree.tokens, tree.parents)
            wrong += unequal(tree, rebuilt, ("depths", "ancestors", "sizes"))
            wrong += [] if bool((tree.tokens >= 0).all() & (tree.tokens < 50).all()) else [f"tokens of {bad}"]
    return wrong


def walk_differences(nodes: int, width: int, batch: int, early: bool, device: str) -> list[str]:
    """What of verdicts on trees of few tokens, so that paths stand, is not what torch says."""
    wrong = list[str]()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        parents = (torch.rand(batch, nodes, generator=generator) * torch.arange(nodes)).long()
        if width < nodes:  # no path longer than the verdict is wide
            parents = torch.where(torch.arange(nodes) < width, parents, 0)
        sizes = torch.randint(0, nodes + 1, (batch,), generator=generator) if early else None
        tokens, chosen = (torch.randint(0, 3, (batch, nodes), generator=generator) for _ in range(2))
        tree = trees.build(tokens.to(device), parents.to(device), None if sizes is None else sizes.to(device))
        chosen = chosen.to(device)
        wanted = plain_walk(tree, chosen, width)
        wrong += unequal(wanted, walk(tree, chosen, width), ("kept", "counts", "tokens", "offered"))
    return wrong


def walk(tree: DraftTree, chosen: Tensor, width: int) -> Verdict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "runs", lambda _: True)
        return accept.walk(tree, chosen, width)


def plain_walk(tree: DraftTree, chosen: Tensor, width: int) -> Verdict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "runs", lambda _: False)
        return accept.walk(tree, chosen, width)


def proposals(device: str) -> list[str]:
    """A drafter's trees, with torch and with the kernels."""
    head = tiny_head().to(device)
    head.freeze()
    embed, found = Embed(), list[DraftTree]()
    embed.weight = embed.weight.to(device)
    prompt, features = torch.arange(6, device=device), torch.randn(6, 3 * HIDDEN, device=device)
    where = torch.zeros(1, dtype=torch.int64, device=device)
    for fused in (False, True):
        drafter = EagleDrafter(head, embed, ReferenceAttention(), 1, 64)
        drafter.admit(0, prompt, features, 9)
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(available, "runs", lambda _, fused=fused: fused)
            assert isinstance(growth_of(head.ids, Shape(3, 4, 12), head.dtype), FusedGrowth) == fused
            found.append(drafter.propose(Context(where, where + 9, where + 6), Shape(3, 4, 12)))
    return unlike(*found) + unequal(*found, ("levels",))


def checks(device: str) -> dict[str, Callable[[], list[str]]]:
    grown = {f"grow: {name}": functools.partial(differences, case, device) for name, case in GROWN.items()}
    walked = {
        f"walk: {name}": functools.partial(walk_differences, *case, device) for name, case in WALKS.items()
    }
    return grown | walked | {"sick logits": lambda: sick(device), "proposals": lambda: proposals(device)}


def run(name: str, device: str) -> list[str]:
    """The differences of one check, in the shares of its case."""
    case = GROWN.get(name.removeprefix("grow: "))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plainly, "top_log_probs", stable_top)
        patch.setattr(growth, "SHARE", case.share if case else growth.SHARE)
        return checks(device)[name]()


def main() -> None:
    torch.set_num_threads(1)
    tell({name: functools.partial(run, name, "cpu") for name in checks("cpu")})


@pytest.mark.parametrize("name", checks("cpu"))
def test_interpreted_kernels_do_what_torch_does(name: str) -> None:
    assert told(__file__, name) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", checks("cuda"))
def test_compiled_kernels_do_what_torch_does(name: str) -> None:
    assert available.runs(torch.device("cuda"))
    assert run(name, "cuda") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocabulary", [8192, 32000, 128256])
def test_compiled_kernels_at_full_size(vocabulary: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plainly, "top_log_probs", stable_top)
        assert differences(Grown(Shape(7, 10, 60), vocabulary, batch=3), "cuda") == []


WORDS = {
    "words", "ids", "old_at", "old_bits", "tokens", "parents", "new_tokens", "new_at", "new_bits", "roots",
    "out_tokens", "out_parents", "depths", "ancestors", "sizes", "chosen", "kept", "counts", "emitted", "offered",
}  # fmt: skip
FLOATS = {"peaks", "totals", "old_scores", "scores", "new_scores", "out_scores"}
FIRST = dict.fromkeys(("old_scores", "old_at", "old_bits"))


def compiled(name: str, vocabulary: int, width: int = 10, nodes: int = 60) -> tuple[str, dict[str, Any], int]:
    """(kernel, its constants, warps) of a launch over this vocabulary with an H of 576."""
    shares = growth.share_blocks(vocabulary, width)
    levels = functools.partial(growth.level_blocks, splits=shares["SPLITS"], width=width, hidden=576)
    return {
        "shares": ("shares_kernel", shares, growth.share_warps(shares["BLOCK"])),
        "first level": ("level_kernel", FIRST | levels(1), growth.LEVEL_WARPS),
        "level": ("level_kernel", levels(width), growth.LEVEL_WARPS),
        "rerank": ("rerank_kernel", growth.tree_blocks(growth.capacity(width, 7), nodes), growth.TREE_WARPS),
        "walk": ("walk_kernel", {"NODES": nodes, "WIDTH": 8, "BLOCK": 64}, 1),
    }[name]


@pytest.mark.parametrize("vocabulary", [8192, 32000, 128256])
@pytest.mark.parametrize("name", ["shares", "first level", "level"])
def test_no_register_spills_at_a_level(name: str, vocabulary: int, tmp_path: Path) -> None:
    assert spills(tmp_path, *compiled(name, vocabulary)) == (0, 0)


@pytest.mark.parametrize("nodes", [60, 64])
@pytest.mark.parametrize("name", ["rerank", "walk"])
def test_no_register_spills_at_the_end(name: str, nodes: int, tmp_path: Path) -> None:
    assert spills(tmp_path, *compiled(name, 8192, 10 if nodes == 60 else growth.WIDEST, nodes)) == (0, 0)


def spills(folder: Path, name: str, constants: dict[str, Any], warps: int) -> tuple[int, int]:
    """Bytes of (stores, loads) that ptxas spills on sm_90."""
    pytest.importorskip("triton")
    from specdec.fused import growth_kernels, walk_kernels

    kernel = getattr(walk_kernels if name == "walk_kernel" else growth_kernels, name)
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("logits", "y", "new_y"), "*bf16")
    kinds |= dict.fromkeys(WORDS, "*i64") | dict.fromkeys(FLOATS, "*fp32")
    pointers = [n for n in kernel.arg_names if kinds[n][0] == "*" and n not in constants]
    return spilled(assembled(kernel, kinds, constants, pointers, {"num_warps": warps}, folder))


class Recorder:
    """Stands in for a kernel: `kernel[grid](...)` is counted, nothing runs."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *_: Any, **constants: Any) -> None:
        self.launches += 1


def test_two_launches_a_level_and_one_for_the_tree_and_nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from specdec.fused import growth_kernels, walk_kernels

    recorder, shape = Recorder(), Shape(7, 10, 60)
    for name in ("shares_kernel", "level_kernel", "rerank_kernel"):
        monkeypatch.setattr(growth_kernels, name, recorder)
    monkeypatch.setattr(walk_kernels, "walk_kernel", recorder)
    logits, y, roots = torch.zeros(2, 10, 8192), torch.zeros(2, 10, 576), torch.zeros(2, dtype=torch.int64)
    fused = FusedGrowth(torch.arange(8192), shape)
    with HostReads() as reads:
        fused.level(logits[:, :1], y[:, :1])
        while fused.worth_another():
            fused.level(logits, y)
        tree = fused.finish(roots)
        assert recorder.launches == 2 * 7 + 1
        walk(tree, tree.tokens, 8)
    assert recorder.launches == 2 * 7 + 2
    assert (fused.count, fused.found.tokens.shape) == (610, (2, 610))
    assert reads == []


def test_what_the_kernels_cannot_grow_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, wide = torch.arange(50), Shape(2, growth.WIDEST + 1, 60)
    assert not isinstance(growth_of(ids, replace(wide, width=4), torch.float32), FusedGrowth), "on a CPU"
    monkeypatch.setattr(available, "runs", lambda _: True)
    assert isinstance(growth_of(ids, replace(wide, width=growth.WIDEST), torch.float32), FusedGrowth)
    assert not isinstance(growth_of(ids, wide, torch.float32), FusedGrowth)


def test_importing_needs_no_triton() -> None:
    code = (
        "import sys, specdec.fused.growth, specdec.fused.walk, specdec.drafting.fused_growth;"
        "sys.exit(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


if __name__ == "__main__":
    main()
