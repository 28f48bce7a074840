"""A layer in one call gives, bit by bit, what its steps give one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_head import tiny_head

from specdec.attention.native import NativeAttention
from specdec.attention.protocol import chunk_rows, tree_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Context, Shape
from specdec.native import linear as native
from specdec.native.library import library
from specdec.target.lean import LeanConfig, LeanDecoder
from specdec.tree import build

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
PLAIN = LeanConfig(
    vocab=64, hidden=96, intermediate=160, layers=3, heads=6, kv_heads=2, head_dim=32, eps=1e-5, theta=1e4,
    scaling=None, max_length=256, qkv_bias=False, out_bias=False, qk_norm=False, tied=False, windows=(None,) * 3,
)  # fmt: skip
FAMILIES = {
    "llama": PLAIN,
    "mistral": replace(PLAIN, windows=(8, None, 8)),
    "qwen2": replace(PLAIN, qkv_bias=True, out_bias=True),
    "qwen3": replace(PLAIN, qk_norm=True, hidden=64),
}
KINDS = [(torch.float32, 0), *((torch.bfloat16, kind) for kind in range(native.tiles_kind() + 1))]


@pytest.fixture(params=KINDS, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """In every way that this processor multiplies it."""
    kind = request.param[1]
    monkeypatch.setattr(native, "tiles_kind", lambda: kind)
    monkeypatch.setattr("specdec.layers.whole.tiles_kind", lambda: kind)
    monkeypatch.setattr("specdec.layers.linear.packing_of", lambda weight: "native")
    kind_of: torch.dtype = request.param[0]
    return kind_of


def _decoder(config: LeanConfig, dtype: torch.dtype) -> LeanDecoder:
    decoder = LeanDecoder(config, NativeAttention())
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    decoder.to(dtype).freeze()
    return decoder


@torch.inference_mode()
def _outputs(decoder: LeanDecoder) -> tuple[torch.Tensor, ...]:
    """Of a prompt and a tree behind it, for two requests in slots out of order."""
    generator = torch.Generator().manual_seed(1)
    cache, slots = KVCache(decoder.cache_shape(), 3, 64), torch.tensor([2, 0])
    text = torch.randint(0, 64, (2, 20), generator=generator)
    tokens = torch.randint(0, 64, (2, 9), generator=generator)
    tree = build(tokens, torch.tensor([[0] + [(5 * i) % i for i in range(1, 9)]]).expand(2, -1))
    first = decoder(text, chunk_rows(slots, torch.tensor([0, 0]), 20), cache, (1, 3, 1))
    then = decoder(tokens, tree_rows(slots, torch.tensor([20, 17]), tree), cache, (0, 2))
    return first.final, first.features, then.final, then.features, cache.kv


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_layer_is_its_steps(family: str, dtype: torch.dtype) -> None:
    decoder = _decoder(FAMILIES[family], dtype)
    whole = _outputs(decoder)
    assert decoder.whole is not None
    decoder.whole = None
    apart = _outputs(decoder)
    assert all(x.isfinite().all() for x in whole)
    assert all(torch.equal(x, y) for x, y in zip(whole, apart, strict=True))


def test_a_head_s_layer_is_its_steps(dtype: torch.dtype) -> None:
    head = tiny_head(hidden=64, target_hidden=64, intermediate=96, head_dim=32).to(dtype)
    head.freeze()
    assert head.whole is not None

    def draft() -> tuple[torch.Tensor, ...]:
        embedding = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        drafter = EagleDrafter(head, lambda tokens: embedding[tokens], NativeAttention(), 1, 64)
        features = torch.randn(9, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
        drafter.admit(0, torch.arange(9), features, 7)
        one = torch.tensor([0])
        tree = drafter.propose(Context(one, torch.tensor([7]), torch.tensor([9])), Shape(4, 3, 12))
        return tree.tokens, tree.parents, drafter.last, drafter.cache.kv

    with torch.inference_mode():
        whole = draft()
        head.whole = None
        apart = draft()
    assert all(torch.equal(x, y) for x, y in zip(whole, apart, strict=True))


def _wide(decoder: LeanDecoder) -> None:
    decoder.attention = ReferenceAttention()


def _graded(decoder: LeanDecoder) -> None:
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("change", [_wide, _graded])
def test_what_is_not_all_in_c_goes_step_by_step(
    change: Callable[[LeanDecoder], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = _decoder(PLAIN, torch.float32)
    monkeypatch.setattr("specdec.layers.whole.Whole.run", None)  # to be called by nobody
    cache, none = KVCache(decoder.cache_shape(), 1, 16), torch.tensor([0])
    with torch.no_grad():
        change(decoder)
        decoder(torch.tensor([[3]]), chunk_rows(none, none, 1), cache, ())


@pytest.mark.parametrize(
    "odd", [replace(PLAIN, head_dim=16), replace(PLAIN, hidden=80), replace(PLAIN, intermediate=100)]
)
def test_odd_sizes_have_no_whole_layer(odd: LeanConfig) -> None:
    assert _decoder(odd, torch.float32).whole is None
