"""The self-test passes on every target that is right, and fails on each way of being wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from specdec.attention.protocol import Rows
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.target.adapter import adapt
from specdec.target.files import TargetFiles
from specdec.target.load import LeanTarget, load_weights
from specdec.target.protocol import States, Target
from specdec.target.selftest import self_test, tree_difference

Checkpoint = Callable[[str], Path]


class Wrong(LeanTarget):
    """A target whose tree forwards go wrong in one way."""

    def __init__(self, right: LeanTarget, spoil: Callable[[Rows], Rows]) -> None:
        super().__init__(right.decoder, right.info)
        self.spoil = spoil

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        return super().forward(tokens, self.spoil(rows) if rows.ancestors is not None else rows, cache, taps)


def lean(directory: Path, dtype: torch.dtype = torch.float32) -> LeanTarget:
    target = load_weights(TargetFiles("tiny", directory), dtype, {"": "cpu"}, "lean")
    assert isinstance(target, LeanTarget)
    return target


@pytest.mark.parametrize("arch", tiny.LEAN + tiny.ADAPTER_ONLY)
def test_trees_equal_paths_beyond_the_window(arch: str, checkpoint: Checkpoint) -> None:
    targets: list[Target] = [adapt(tiny.build(arch), arch)]
    if arch in tiny.LEAN:
        targets.append(lean(checkpoint(arch)))
    for target in targets:
        self_test(target)
        assert tree_difference(target, prefix=2 * tiny.WINDOW) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_its_tolerance(dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    self_test(lean(checkpoint("llama"), dtype))


def own_row_only(rows: Rows) -> Rows:
    n = rows.positions.shape[1]
    return replace(rows, ancestors=(torch.ones(n, dtype=torch.int64) << torch.arange(n))[None])


def everything_before(rows: Rows) -> Rows:
    n = rows.positions.shape[1]
    return replace(rows, ancestors=((torch.full((n,), 2) << torch.arange(n)) - 1)[None])


def cache_row_as_position(rows: Rows) -> Rows:
    return replace(rows, positions=rows.index.indices)


@pytest.mark.parametrize("spoil", [own_row_only, everything_before, cache_row_as_position])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_forward_is_refused_by_name(spoil: Callable[[Rows], Rows], dtype: torch.dtype,
                                            checkpoint: Checkpoint) -> None:  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM: .*relative difference 0\.\d+"):
        self_test(Wrong(lean(checkpoint("llama"), dtype), spoil))


def test_nan_is_refused(checkpoint: Checkpoint) -> None:
    target = lean(checkpoint("mistral"))
    target.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(UnsupportedError, match="nan"):
        self_test(target)
