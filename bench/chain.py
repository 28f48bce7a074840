"""What a chain of K greedy drafts does on known text: the counters an engine must show, by a plain forward.

Greedy text does not depend on the drafts, so it is made first; then every position drafts its chain at once,
as in training-time test, and the rounds are read off. No cache, no tree, no engine: the twin those are held
against.
Dimension legend: B = 1, T positions, H hidden, K drafts, V vocabulary.

    text   x0 x1 ... xr | root xr: row r-1 reads feature(r-1) and xr, and drafts x(r+1) ... x(r+K)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from specdec.head.checkpoint import load_head
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from specdec.target.bridge import cache_argument


@dataclass(frozen=True, slots=True)
class Counters:
    """Text and acceptance of a set of prompts.

    Attributes:
        token_ids: emitted tokens of each prompt.
        drafts: rounds that verified a chain.
        accepted: draft tokens accepted, those beyond the last emitted token included (as vLLM counts).
        per_position: accepted at depth 1 .. K.
    """

    token_ids: tuple[tuple[int, ...], ...]
    drafts: int
    accepted: int
    per_position: tuple[int, ...]


class _Chain:
    """Attention of step j: true rows causally, then each position's own drafts."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, heads: Heads, scale: float) -> Tensor:
        query, key, value = heads.turned()
        self.keys.append(key)
        self.values.append(value)
        step, length = len(self.keys) - 1, key.shape[1]
        age = torch.arange(length)[:, None] - torch.arange(length)[None]
        seen = age >= 0 if self.window is None else (age >= 0) & (age + step < self.window)
        mask = torch.cat([seen] + [torch.eye(length, dtype=torch.bool)] * step, dim=1)
        q, k, v = (
            x.transpose(1, 2) for x in (query, torch.cat(self.keys, dim=1), torch.cat(self.values, dim=1))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)


def drafts_everywhere(
    head: DraftHead, embedding: Tensor, features: Tensor, tokens: Tensor, depth: int
) -> Tensor:
    """Greedy chains from every position.

    Args:
        head: in float32.
        embedding: [V, H] of the target.
        features: [T, A * H] at positions 0 .. T - 1.
        tokens: int64 [T] the token after each position.
        depth: K.

    Returns:
        int64 [T, K]: row t holds the guesses for tokens t + 2 .. t + 1 + K.
    """
    chain, guesses = _Chain(head.config.window), []
    g, token = head.fuse(features[None]), tokens[None]
    positions = torch.arange(tokens.shape[0])[None]
    for step in range(depth):
        y = head(embedding[token], g, head.angles(positions + step), chain)
        token = head.ids[head.logits(y).argmax(-1)]
        guesses.append(token[0])
        g = head.feedback(y)
    return torch.stack(guesses, dim=1)


@torch.inference_mode()
def chain_counters(
    target: Path, head: Path, prompts: Sequence[Sequence[int]], *, draft_tokens: int, max_tokens: int
) -> Counters:
    """Decode `prompts` greedily in float32 and count a chain drafter's rounds.

    Args:
        target, head: directories; the head raw or speculators.
        prompts: token ids.
        draft_tokens: K.
        max_tokens: tokens emitted per prompt; end-of-sequence tokens are ignored.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.eval()
    weights = load_head(head, target_layers=model.config.num_hidden_layers, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    texts, depths = [], [0] * draft_tokens
    drafts = 0
    for prompt in prompts:
        text = _greedy(model, prompt, max_tokens + draft_tokens)
        features = features_of(model, text[None], weights.config.taps)[0]
        guesses = drafts_everywhere(weights, embedding, features[:-1], text[1:], draft_tokens)
        for count in rounds_of(text.tolist(), guesses.tolist(), len(prompt), max_tokens):
            drafts += 1
            for depth in range(count):
                depths[depth] += 1
        texts.append(tuple(text[len(prompt) : len(prompt) + max_tokens].tolist()))
    return Counters(tuple(texts), drafts, sum(depths), tuple(depths))


def rounds_of(text: list[int], guesses: list[list[int]], prompt: int, max_tokens: int) -> list[int]:
    """Accepted drafts of every round; `text` reaches K tokens past the last one emitted."""
    accepted, root = [], prompt  # the prefill emits the first token
    while root - prompt + 1 < max_tokens:
        chain = guesses[root - 1]
        count = next((i for i, guess in enumerate(chain) if guess != text[root + 1 + i]), len(chain))
        accepted.append(count)
        root += count + 1
    return accepted


def _greedy(model: Any, prompt: Sequence[int], tokens: int) -> Tensor:
    """Prompt and continuation int64 [T], by a cached loop: the model's own stop tokens do not end it."""
    text, step = list(prompt), torch.tensor([list(prompt)])
    cache = {cache_argument(model): DynamicCache()}  # grows in place
    for _ in range(tokens):
        out = model(input_ids=step, use_cache=True, **cache)
        text.append(int(out.logits[0, -1].argmax()))
        step = torch.tensor([text[-1:]])
    return torch.tensor(text)


def features_of(model: Any, text: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Inputs of the tapped layers [B, T, A * H] for text int64 [B, T], by hooks on the layers themselves."""
    found: dict[int, Tensor] = {}
    layers = model.model.layers
    last = len(layers)

    def entering(tap: int) -> Callable[..., None]:
        def keep(_: object, inputs: tuple[Tensor, ...]) -> None:
            found[tap] = inputs[0]

        return keep

    def leaving(_: object, inputs: object, output: Tensor) -> None:
        found[last] = output

    handles = [layers[tap].register_forward_pre_hook(entering(tap)) for tap in taps if tap < last]
    handles += [layers[-1].register_forward_hook(leaving)] if last in taps else []
    try:
        model(input_ids=text, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([found[tap] for tap in taps], dim=-1)
