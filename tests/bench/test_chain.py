"""The plain chain: all positions at once equal one by one, and rounds are read off the text right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.chain import drafts_everywhere, rounds_of
from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads

CONFIG = HeadConfig(
    hidden=16,
    target_hidden=16,
    taps=(1, 2),
    intermediate=24,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocab=32,
    draft_vocab=20,
    norm_output=True,
)


def random_head() -> DraftHead:
    generator = torch.Generator().manual_seed(0)
    head = DraftHead(CONFIG)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    head.ids.copy_(torch.arange(20) + 7)
    return head


def one_at_a_time(
    head: DraftHead, embedding: Tensor, features: Tensor, tokens: Tensor, depth: int
) -> list[int]:
    """The chain from the last position: the whole prefix is read again for every draft."""
    g, text, drafted = head.fuse(features[None]), tokens[None], []

    def causal(heads: Heads, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in heads.turned())
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    for _ in range(depth):
        y = head(embedding[text], g, head.angles(torch.arange(text.shape[1])[None]), causal)[:, -1:]
        token = head.ids[head.logits(y).argmax(-1)]
        drafted.append(int(token))
        g, text = torch.cat([g, head.feedback(y)], dim=1), torch.cat([text, token], dim=1)
    return drafted


@torch.inference_mode()
def test_all_positions_at_once_equal_one_at_a_time() -> None:
    head, generator = random_head(), torch.Generator().manual_seed(1)
    embedding, features = torch.randn(32, 16, generator=generator), torch.randn(9, 32, generator=generator)
    tokens = torch.randint(0, 32, (9,), generator=generator)
    together = drafts_everywhere(head, embedding, features, tokens, 4)
    for end in range(1, 10):
        assert together[end - 1].tolist() == one_at_a_time(head, embedding, features[:end], tokens[:end], 4)


def test_rounds_follow_the_text() -> None:
    # prompt 0 1 | emitted 2 .. 8; row r - 1 drafts for root r
    text = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    right = [[t + 2, t + 3] for t in range(10)]
    assert rounds_of(text, right, 2, 7) == [2, 2]
    half = [[t + 2, 0] for t in range(10)]
    assert rounds_of(text, half, 2, 7) == [1, 1, 1]
    late = [[0, t + 3] for t in range(10)]  # a right guess behind a wrong one is worth nothing
    assert rounds_of(text, late, 2, 7) == [0] * 6
    assert rounds_of(text, right, 2, 1) == []
