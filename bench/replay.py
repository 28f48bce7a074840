"""ReplayDrafter: trees whose acceptance follows a stated profile, because the drafter knows the target's own text.

For the mechanics of a round at sizes for which no trained head is at hand; what it shows is never a model's result.
The target's greedy continuation is made beforehand by plain decoding. Which drafts are right is a fixed function of
prompt, position and depth. Everything per round happens on the device, without waiting for it.
Dimension legend: B requests, P prompts, T tokens of a text, N nodes, D depth.

    text     ... root  t1  t2  t3  t4 | right at depth 1 and 2 (drawn with alpha(1), alpha(2)), wrong from depth 3 on
    main     root -> t1 -> t2 -> x -> x      siblings hang on the main path and are wrong everywhere
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.accept import Verdict
from specdec.attention.protocol import TreeAttention
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Context, Shape
from specdec.head.model import DraftHead
from specdec.tree import DraftTree, build, root_only

DECAY = 0.5  # of the probability of each further sibling: only ranks nodes
TURN = 0.618034  # golden ratio: multiples of it fill the circle evenly


@dataclass(frozen=True, slots=True)
class Profile:
    """Conditional acceptance alpha(1), alpha(2), ... by depth; beyond the last it stays.

    >>> round(Profile((0.8, 0.5)).tau(3), 3)
    2.4
    """

    alpha: tuple[float, ...]

    def at(self, depth: int) -> float:
        return self.alpha[min(depth, len(self.alpha)) - 1]

    def tau(self, depth: int) -> float:
        """Tokens a round emits on average with trees of that depth: 1 + sum of products."""
        reached, total = 1.0, 1.0
        for d in range(1, depth + 1):
            reached *= self.at(d)
            total += reached
        return total


@dataclass(frozen=True, slots=True)
class Layout:
    """The nodes of the largest tree of a shape, likeliest first: every beginning of them is a tree, too.

    Attributes:
        probs: float32 [1, C] on the host, path probability of each node but the root as the profile has it.
        parents, depths: int64 [C + 1].
        apart: int64 [C + 1], 0 at the root and on the main path, else how far a sibling is from the right token.
        scores: float32 [C + 1], log-probability of the path.
        alpha: float32 [D].
    """

    probs: Tensor
    parents: Tensor
    depths: Tensor
    apart: Tensor
    scores: Tensor
    alpha: Tensor


class ReplayDrafter:
    """A drafter that replays.

    Args:
        texts: greedy continuation of each prompt, longer than any answer by the depth of a tree.
        profile: how often it is right.
        slots, vocab, device: of the engine and the target.
    """

    name = "replay"

    def __init__(
        self,
        texts: Mapping[tuple[int, ...], Sequence[int]],
        profile: Profile,
        slots: int,
        vocab: int,
        device: torch.device,
    ) -> None:
        self.profile, self.vocab = profile, vocab
        self.taps: tuple[int, ...] = ()
        self.numbers = {prompt: number for number, prompt in enumerate(texts)}
        longest = max(map(len, texts.values()))
        rows = [[*text, *[0] * (longest - len(text))] for text in texts.values()]
        self.texts = torch.tensor(rows, device=device)  # [P, T]
        draws = torch.rand(self.texts.shape, generator=torch.Generator().manual_seed(0))
        self.draws = draws.to(device)
        # of each slot: the number of its prompt, and that prompt's length
        self.prompt, self.start = torch.zeros(2, slots, dtype=torch.int64, device=device).unbind()
        self._layouts: dict[tuple[int, int, int], Layout] = {}

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Recognise the prompt."""
        prompt = tuple(tokens.tolist())
        self.prompt[slot], self.start[slot] = self.numbers[prompt], len(prompt)

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """Nothing of its own to take over."""
        return rows

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """Nothing to learn."""

    def release(self, slot: int) -> None:
        """Nothing to forget."""

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """The tree of the shape, right as deep as the draws of this position say."""
        if shape.depth == 0 or shape.nodes == 1:
            return root_only(context.roots)
        layout = self._layout(shape)
        nodes = shape.worth(layout.probs)
        if nodes == 1:
            return root_only(context.roots)
        parents, depths, apart = layout.parents[:nodes], layout.depths[:nodes], layout.apart[:nodes]
        right, hit = self._ahead(context, layout.alpha)
        known = torch.cat([context.roots[:, None], right], dim=1)[:, depths]
        # a wrong draft is the right token plus something
        off = torch.where(apart == 0, ~hit[:, depths], apart)
        return build((known + off) % self.vocab, parents.expand(len(known), -1),
                     scores=layout.scores[:nodes].expand(len(known), -1))  # fmt: skip

    def _ahead(self, context: Context, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(t1 ... tD int64 [B, D], is the main path right at depth 0 ... D, bool [B, D + 1])."""
        last = self.texts.shape[1] - 1
        prompt, at = self.prompt[context.slots], context.lengths - self.start[context.slots]
        depth = torch.arange(1, len(alpha) + 1, device=at.device)
        places = (at[:, None] + depth).clamp(max=last)
        # one number per place, turned by depth: draws of one round, and of one place in two rounds, differ
        draws = (self.draws[prompt[:, None], places] + depth * TURN) % 1
        # where they differ, rounding led the target elsewhere
        same = self.texts[prompt, at.clamp(max=last)] == context.roots
        hit = torch.cat([torch.ones_like(same)[:, None], (draws < alpha) & same[:, None]], dim=1)
        return self.texts[prompt[:, None], places], hit.cumprod(dim=1).bool()

    def _layout(self, shape: Shape) -> Layout:
        """Made once per size."""
        size = (shape.depth, shape.width, shape.nodes)
        if size not in self._layouts:
            self._layouts[size] = _layout(size, self.profile, self.texts.device)
        return self._layouts[size]


class ReplayHead(EagleDrafter):
    """A head that drafts as ever, for its time, while the trees are replayed: rounds cost what a head's rounds cost.

    Args:
        replay: whose trees; the rest as EagleDrafter.
    """

    name = "replay"

    def __init__(self, head: DraftHead, embed: Callable[[Tensor], Tensor], attention: TreeAttention, slots: int,
                 length: int, replay: ReplayDrafter) -> None:  # fmt: skip
        super().__init__(head, embed, attention, slots, length)
        self.replay = replay

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Both learn of the prompt."""
        super().admit(slot, tokens, features, root)
        self.replay.admit(slot, tokens, features, root)

    def grow(self, context: Context, shape: Shape, y: Tensor) -> DraftTree:
        """The head's tree is thrown away."""
        levels = super().grow(context, shape, y).levels
        return replace(self.replay.propose(context, shape), levels=levels)


def _layout(size: tuple[int, int, int], profile: Profile, device: torch.device) -> Layout:
    """A main path with `width - 1` siblings at every depth, cut to the likeliest."""
    longest, width, nodes = size
    path, found = 1.0, list[tuple[float, int, int]]()  # (probability, depth, apart)
    for depth in range(1, longest + 1):
        alpha = profile.at(depth)
        found += [(path * (1 - alpha) * DECAY ** (j + 1), depth, j + 2) for j in range(width - 1)]
        path *= alpha
        found.append((path, depth, 0))
    found = sorted(found, key=lambda node: (-node[0], node[1], node[2]))[: nodes - 1]
    parents, main = [0], {0: 0}
    for index, (_, depth, apart) in enumerate(found, start=1):
        parents.append(main[depth - 1])
        if apart == 0:
            main[depth] = index
    probs = torch.tensor([[node[0] for node in found]])
    columns = [torch.tensor(column, device=device) for column in
               (parents, [0, *(n[1] for n in found)], [0, *(n[2] for n in found)])]  # fmt: skip
    scores = torch.cat([torch.zeros(1), probs[0].log()]).to(device)
    alpha_of = torch.tensor([profile.at(d) for d in range(1, longest + 1)], device=device)
    return Layout(probs, *columns, scores, alpha_of)
