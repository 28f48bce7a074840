"""The unroll: alignment, what each row sees, the fast attention, and parity with the decoder's drafter."""

from __future__ import annotations

import pytest
import torch
from tiny_head import HIDDEN, VOCAB, Embed, tiny_head
from torch import Tensor

from specdec.attention.protocol import Rows, chunk_rows, level_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from training.diagonal import causal_with_diagonals, flex, plain
from training.unroll import Unroll, graded_rows, shifted

STEPS = 4


def batch(b: int = 2, t: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(b, t, 3 * HIDDEN, generator=generator)
    return features, torch.randint(VOCAB, (b, t), generator=generator)


def every(tokens: Tensor, steps: int = STEPS) -> list[Tensor]:
    return [torch.ones_like(tokens, dtype=torch.bool)] * steps


def test_shift_moves_left_and_repeats_the_end() -> None:
    assert shifted(torch.tensor([[1, 2, 3]]), 1).tolist() == [[2, 3, 3]]


def test_graded_rows_predict_masked_tokens_within_the_sequence() -> None:
    mask = torch.tensor([[False, False, False, True, True, True]])
    lengths = torch.tensor([5])
    assert graded_rows(mask, lengths, 0)[0].tolist() == [False, True, True, False, False, False]
    assert graded_rows(mask, lengths, 1)[0].tolist() == [True, True, False, False, False, False]


def drafted(head: DraftHead, embed: Embed, features: Tensor, tokens: Tensor, at: int) -> list[Tensor]:
    """Logits at depths 0 .. STEPS - 1 of a chain on the text's own tokens, over a KV cache, as the engine drafts."""
    cache, attention = KVCache(head.cache_shape(), 1, 64), ReferenceAttention()
    slot, length = torch.tensor([0]), torch.tensor([at + 1])

    def run(token: Tensor, g: Tensor, rows: Rows) -> Tensor:
        plan = attention.plan(rows, cache, None)

        def attend(heads: Heads, scale: float) -> Tensor:
            return attention.attend(heads.store(cache, 0, rows.index), cache, 0, plan, scale)

        y: Tensor = head(embed(token), g, head.angles(rows.positions), attend)
        return y

    prompt = chunk_rows(slot, torch.tensor([0]), at + 1)
    y = run(tokens[None, 1 : at + 2], head.fuse(features[None, : at + 1]), prompt)[:, -1:]
    out = [head.logits(y)[0, 0]]
    for depth in range(1, STEPS):
        bits = torch.tensor([[(1 << depth) - 1]])
        rows = level_rows(slot, length, torch.tensor([[at + depth]]), bits, depth - 1)
        y = run(tokens[None, at + 1 + depth : at + 2 + depth], head.feedback(y), rows)
        out.append(head.logits(y)[0, 0])
    return out


@pytest.mark.parametrize(
    "changes", [{}, {"norm_output": True, "fc_norm": True}, {"norm_before_residual": True}]
)
@torch.no_grad()
def test_step_k_equals_the_drafter_at_depth_k(changes: dict[str, bool]) -> None:
    head, embed = tiny_head(**changes), Embed()
    features, tokens = batch()
    unrolled = Unroll(head, embed)(features, tokens, every(tokens))
    for row, at in ((0, 0), (0, 5), (1, 7)):
        expected = drafted(head, embed, features[row], tokens[row], at)
        for step in range(STEPS):
            found = head.logits(unrolled[step].y.view(*tokens.shape, -1)[row, at])
            assert (found - expected[step]).abs().max() < 1e-4


def test_only_the_rows_asked_for_come_back_and_nothing_else_changes() -> None:
    head, embed = tiny_head(), Embed()
    features, tokens = batch()
    full = Unroll(head, embed)(features, tokens, every(tokens))
    some = [torch.rand(tokens.shape, generator=torch.Generator().manual_seed(s)) < 0.4 for s in range(STEPS)]
    for part, whole, wanted in zip(Unroll(head, embed)(features, tokens, some), full, some, strict=True):
        assert part.rows.tolist() == wanted.flatten().nonzero()[:, 0].tolist()
        torch.testing.assert_close(part.y, whole.y[part.rows])


def test_padding_changes_nothing() -> None:
    head, embed = tiny_head(), Embed()
    features, tokens = batch()
    short = Unroll(head, embed)(features[:1, :9], tokens[:1, :9], every(tokens[:1, :9], 2))
    padded = Unroll(head, embed)(features, tokens, every(tokens, 2))
    for step in range(2):
        torch.testing.assert_close(short[step].y[:7], padded[step].y[:7])


def gradients(head: DraftHead, unroll: Unroll) -> list[Tensor]:
    features, tokens = batch()
    head.zero_grad()
    sum(done.y.square().sum() for done in unroll(features, tokens, every(tokens))).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in head.parameters() if p.grad is not None]


def test_checkpointing_gives_the_same_gradients() -> None:
    head, embed = tiny_head(), Embed()
    kept = gradients(head, Unroll(head, embed))
    recomputed = gradients(head, Unroll(head, embed, checkpointing=True))
    assert kept and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(kept, recomputed, strict=True)
    )


def test_stopped_gradients_differ_from_those_that_pass_through() -> None:
    head, embed = tiny_head(), Embed()
    through = gradients(head, Unroll(head, embed))
    cut = gradients(head, Unroll(head, embed, stopped=True))
    assert not torch.allclose(through[0], cut[0])


def test_a_window_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="window"):
        Unroll(tiny_head(window=4), Embed())


@pytest.mark.parametrize("own", [0, 1, 3])
def test_merged_attention_equals_one_softmax(own: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    query, key, value = tensor(2, 4, 9, 8), tensor(2, 2, 9, 8), tensor(2, 2, 9, 8)
    own_key, own_value = tensor(2, 2, 9, own, 8), tensor(2, 2, 9, own, 8)
    inputs = [query, key, value, own_key, own_value]
    weight = torch.randn(2, 4, 9, 8, generator=generator)
    fast = causal_with_diagonals(*inputs, scale=0.3)
    slow = plain(query, *(x.repeat_interleave(2, 1) for x in inputs[1:]), scale=0.3)
    torch.testing.assert_close(fast, slow)
    used = inputs if own else inputs[:3]
    for a, b in zip(
        torch.autograd.grad(fast, used, weight), torch.autograd.grad(slow, used, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_equals_one_softmax() -> None:
    """Uncompiled, so that it runs on a CPU; the mask is what can be wrong."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8)] * 3 + [(2, 4, 9, 3, 8)] * 2
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
    torch.testing.assert_close(flex(*inputs, scale=0.3), plain(*inputs, scale=0.3))


@pytest.mark.gpu
def test_the_unroll_is_the_same_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    head, embed = tiny_head(), Embed()
    features, tokens = batch(2, 40)
    expected = Unroll(head, embed)(features, tokens, every(tokens))
    head.cuda()
    head._rope = None  # the tables are made once, on the first device
    embed.weight = embed.weight.cuda()
    found = Unroll(head, embed)(features.cuda(), tokens.cuda(), every(tokens.cuda()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.y.cpu(), b.y, rtol=1e-3, atol=1e-3)
