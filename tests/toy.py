"""A toy target with a law one can write down, and drafters that propose what a test wants.

The target is an order-2 Markov chain over eight tokens: it reads the token before from the KV cache, so that a row in
the wrong place or a wrong ancestor changes its law. Knows nothing of real models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from specdec.accept import Verdict
from specdec.attention.protocol import Rows
from specdec.cache import CacheShape, KVCache
from specdec.drafting.protocol import Context, Shape
from specdec.target.protocol import States, TargetInfo
from specdec.tree import DraftTree, build, mask, root_only, stack

VOCAB = 8
RULED_OUT = -30.0


def table(seed: int = 0, probs: Sequence[float] = (0.5, 0.3, 0.2)) -> Tensor:
    """Logits [8, 8, 8] of the next token by the two before: `probs` over as many tokens, the rest ruled out."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((VOCAB, VOCAB, VOCAB), RULED_OUT)
    for a in range(VOCAB):
        for b in range(VOCAB):
            tokens = torch.randperm(VOCAB, generator=generator)[: len(probs)]
            logits[a, b, tokens] = torch.tensor(probs).log()
    return logits


class ToyTarget:
    """`logits[a, b]` are the logits after ... a b; NaN there is a target that breaks, and so is `broken`."""

    def __init__(self, logits: Tensor | None = None, stop_ids: tuple[int, ...] = ()) -> None:
        cpu = torch.device("cpu")
        self.table = table() if logits is None else logits
        self.broken: tuple[int, int] | None = None  # slot and committed length from which its logits are NaN
        self.info = TargetInfo("toy", "Toy", VOCAB, 2, 1, 512, stop_ids, torch.float32, cpu, "toy",
                               CacheShape(1, 1, 1, torch.float32, cpu))  # fmt: skip

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        values = tokens[..., None, None].float()
        cache.write(0, rows.index, values, values)
        n = tokens.shape[1]
        if rows.ancestors is None:
            parent = torch.arange(n) - 1
        else:
            above = mask(rows.ancestors, n) & ~torch.eye(n, dtype=torch.bool)
            parent = torch.where(above, torch.arange(n), -1).amax(dim=-1)
        row = rows.lengths[:, None] + parent
        before = cache.kv[0, 0, rows.slots[:, None], 0, row.clamp(min=0), 0]
        if self.broken is not None:
            bad = (rows.slots == self.broken[0]) & (rows.lengths >= self.broken[1])
            before = torch.where(bad[:, None], -1.0, before)
        final = torch.stack([torch.where(row < 0, 0.0, before), tokens.float()], dim=-1)
        return States(final, final[..., :0])

    def logits(self, final: Tensor) -> Tensor:
        a, b = final.long().unbind(-1)
        return self.table[a, b].masked_fill((a < 0)[..., None], torch.nan)

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens[..., None].float().expand(*tokens.shape, 2)

    def output_embedding(self) -> Tensor:
        return torch.zeros(VOCAB, 2)

    def final_norm(self) -> tuple[Tensor, float]:
        return torch.ones(2), 1e-5


class FakeDrafter:
    """Proposes `grow(tokens so far, shape)` = (tokens, parents) for each request; remembers what it heard."""

    name = "fake"
    taps: tuple[int, ...] = ()

    def __init__(self, grow: Callable[[Sequence[int], Shape], tuple[list[int], list[int]]]) -> None:
        self.grow = grow
        self.texts: dict[int, list[int]] = {}
        self.sizes: list[int] = []

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        self.texts[slot] = [*tokens.tolist(), root]

    def reuse(self, source: int, slot: int, rows: int) -> int:
        return rows

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        if shape.depth == 0:
            return root_only(context.roots)
        grown = [self.grow(self.texts[slot], shape) for slot in context.slots.tolist()]
        trees = [build(torch.tensor([tokens]), torch.tensor([parents])) for tokens, parents in grown]
        return stack(trees)

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        for slot, count, tokens in zip(
            context.slots.tolist(), verdict.counts.tolist(), verdict.tokens.tolist(), strict=True
        ):
            self.texts[slot] += tokens[:count]

    def release(self, slot: int) -> None:
        self.texts.pop(slot, None)


def neighbours(text: Sequence[int], shape: Shape) -> tuple[list[int], list[int]]:
    """A tree of depth two that depends on the root alone: some of what may follow, and some of what cannot."""
    root = text[-1]
    tokens, parents = [root], [0]
    for step in (1, 2, 5)[: 2 + root % 2]:
        tokens.append((root + step) % VOCAB)
        parents.append(0)
    for parent in range(1, len(tokens)):
        for step in (3, 6):
            tokens.append((tokens[parent] + step) % VOCAB)
            parents.append(parent)
    return tokens, parents


def around(answers: Mapping[tuple[int, ...], Sequence[int]], vocab: int, seed: int = 0
           ) -> Callable[[Sequence[int], Shape], tuple[list[int], list[int]]]:  # fmt: skip
    """Growth that knows the answers: random trees which often hold the next tokens, always amid wrong ones."""
    chance = random.Random(seed)

    def grow(text: Sequence[int], shape: Shape) -> tuple[list[int], list[int]]:
        whole = next(
            (*prompt, *answer) for prompt, answer in answers.items() if tuple(text[: len(prompt)]) == prompt
        )
        ahead = list(whole[len(text) :])[: chance.randint(0, shape.depth)]
        tokens, parents, depths, tip = [text[-1]], [0], [0], 0
        for _ in range(4 * shape.nodes):
            if len(tokens) == shape.nodes:
                break
            right = bool(ahead) and chance.random() < 0.4
            parent = tip if right else chance.randrange(len(tokens))
            token = ahead[0] if right else chance.randrange(vocab)
            siblings = [t for t, p in zip(tokens[1:], parents[1:], strict=True) if p == parent]
            spoken_for = not right and parent == tip and bool(ahead) and token == ahead[0]
            if token in siblings or spoken_for or depths[parent] >= shape.depth:
                continue
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            if right:
                tip, ahead = len(tokens) - 1, ahead[1:]
        return tokens, parents

    return grow
