"""How many drafts would be accepted: alpha by depth and simulated tau, by the decoder's own tree and acceptance.

Works on text the target wrote greedily, where the target's choice after each token is the next token of the text:
a draft tree grown at a position is walked against what the text says, exactly as the engine would. Knows the head;
runs no target. Dimension legend: B sequences, T positions, P drafting positions, K frontier nodes, S own keys,
H hidden size, G kv heads, D head size.

    text        ... a  b | c  d  e  f        root b: the last token whose feature is not known yet
    tree           b -> {c, x} -> {d, y}     walk: c, d accepted, e is the bonus token, next root e
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import tree as trees
from specdec.accept import walk
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from specdec.sampling import top_log_probs
from specdec.stats import Counters
from specdec.tree import DraftTree
from training.unroll import Reading, Unroll, graded_rows

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Growth:
    """Size of the simulated trees: longest path, children per node, nodes with the root. Width 1 is a chain."""

    depth: int = 7
    width: int = 10
    nodes: int = 60


@dataclass(frozen=True, slots=True)
class Text:
    """Sequences to draft on.

    Attributes:
        features: [B, T, F] taps, scaled as the head expects them.
        tokens: int64 [B, T]; after a position of `loss_mask` the text holds the target's greedy choice.
        loss_mask: bool [B, T] tokens the target wrote.
        lengths: int64 [B].
    """

    features: Tensor
    tokens: Tensor
    loss_mask: Tensor
    lengths: Tensor


@torch.inference_mode()
def simulate(head: DraftHead, embed: Embed, text: Text, growth: Growth) -> Counters:
    """Decode the text round by round with trees of the head.

    A round whose bonus token lies beyond the end of the text counts as cut.

    All sequences advance together, each at its own pace; a round costs one batched tree.
    """
    read = Unroll(head, embed).read(text.features, text.tokens)
    counters = Counters()
    # the first token comes from the prefill: the first root is the first token the target wrote
    roots = text.loss_mask.to(torch.int64).argmax(dim=1)
    alive = (text.loss_mask.any(dim=1) & (roots > 0)).nonzero()[:, 0]
    while len(alive):
        at = roots[alive]
        grown = _grow(head, embed, _at(read, alive, at - 1), text.tokens[alive, at], growth)
        said = _spoken(text, alive, at, grown)
        verdict = walk(grown, said)
        roots[alive] = at + verdict.counts
        past = roots[alive] - text.lengths[alive]
        columns = (verdict.counts.tolist(), verdict.offered.tolist(), (past >= 0).tolist())
        for count, offered, cut in zip(*columns, strict=True):
            counters.add_round(count, offered, grown.nodes, cut=cut)
        alive = alive[past < -1]
    return counters


def _spoken(text: Text, rows: Tensor, at: Tensor, grown: DraftTree) -> Tensor:
    """The text's token after each node, were the path to the node the text's: [P, N], -1 past the end."""
    where = at[:, None] + grown.depths + 1
    said = text.tokens[rows[:, None], where.clamp(max=text.tokens.shape[1] - 1)]
    return torch.where(where < text.lengths[rows][:, None], said, -1)


@dataclass(frozen=True, slots=True)
class _Prefix:
    """What a drafting position starts from: keys, values [P, T, G, D], outputs [P, H], positions [P]."""

    key: Tensor
    value: Tensor
    y: Tensor
    position: Tensor


def _at(read: Reading, rows: Tensor, position: Tensor) -> _Prefix:
    longest = int(position.max()) + 1
    return _Prefix(read.key[rows, :longest], read.value[rows, :longest], read.y[rows, position], position)


def _grow(head: DraftHead, embed: Embed, prefix: _Prefix, roots: Tensor, growth: Growth) -> DraftTree:
    """EAGLE-2 growth from each position: the drafter's arithmetic, with each node's path of keys carried along."""
    p = len(roots)
    width = min(growth.width, len(head.ids))
    y = prefix.y[:, None]
    scores = torch.zeros(p, 1, device=roots.device)
    own_key = own_value = prefix.key[:, :1, None, :, :][:, :, :0]  # [P, 1, 0, G, D]
    above = torch.full((p, 1), -1, device=roots.device)
    tokens: list[Tensor] = []
    parents: list[Tensor] = []
    paths: list[Tensor] = []
    for level in range(growth.depth):
        log_probs, drafts = top_log_probs(head.logits(y), width)
        path, frontier = trees.expand(scores, log_probs)
        parent = torch.arange(y.shape[1], device=roots.device).repeat_interleave(width).expand(p, -1)
        first = sum(part.shape[1] for part in tokens)
        tokens.append(head.ids[drafts.flatten(1)])
        parents.append(above.gather(1, parent))
        paths.append(path)
        if level + 1 == growth.depth:
            break
        scores, above, parent = path.gather(1, frontier), frontier + first, parent.gather(1, frontier)
        row = torch.arange(p, device=roots.device)[:, None]
        attend = _TreeAttend(prefix, own_key[row, parent], own_value[row, parent])
        positions = (prefix.position + 1 + level)[:, None].expand(-1, width)
        embedded = embed(tokens[-1].gather(1, frontier)).to(y.dtype)
        y = head(embedded, head.feedback(y[row, parent]), head.angles(positions), attend)
        own_key, own_value = attend.own_key, attend.own_value
    return trees.rerank(roots, torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(paths, 1), growth.nodes)


class _TreeAttend:
    """Attention of frontier nodes over the prefix [P, T, G, D] and each node's own path [P, K, S, G, D]."""

    def __init__(self, prefix: _Prefix, own_key: Tensor, own_value: Tensor) -> None:
        self.prefix, self.own_key, self.own_value = prefix, own_key, own_value

    def __call__(self, new: Heads, scale: float) -> Tensor:
        """Heads of [P, K] rows -> [P, K, heads, D]."""
        query, key, value = new.turned()
        self.own_key = torch.cat([self.own_key, key[:, :, None]], dim=2)
        self.own_value = torch.cat([self.own_value, value[:, :, None]], dim=2)
        p, k, heads, d = query.shape
        g, t = key.shape[2], self.prefix.key.shape[1]
        q = query.view(p, k, g, heads // g, d).permute(0, 2, 1, 3, 4)  # [P, G, K, r, D]
        far = (q.flatten(2, 3) @ self.prefix.key.permute(0, 2, 3, 1)).view(p, g, k, -1, t).float() * scale
        hidden = torch.arange(t, device=query.device) > self.prefix.position[:, None]
        far = far.masked_fill(hidden[:, None, None, None], -torch.inf)
        near = (q @ self.own_key.permute(0, 3, 1, 4, 2)).float() * scale  # [P, G, K, r, S]
        weights = torch.cat([far, near], dim=-1).softmax(-1).to(query.dtype)
        out = (weights[..., :t].flatten(2, 3) @ self.prefix.value.transpose(1, 2)).view(p, g, k, -1, d)
        out = out + weights[..., t:] @ self.own_value.permute(0, 3, 1, 2, 4)
        return out.permute(0, 2, 1, 3, 4).reshape(p, k, heads, d)


@torch.inference_mode()
def teacher_forced(head: DraftHead, embed: Embed, text: Text, depth: int) -> list[float]:
    """Conditional alpha(1 .. depth) where the head is given the text's own tokens at every step.

    alpha(d): of the rows whose likeliest tokens were right up to depth d - 1, those right at d. On text that the
    target sampled this is a rate of matching the sample; on greedy text it is the chain's acceptance.
    """
    rows = [graded_rows(text.loss_mask, text.lengths, step) for step in range(depth)]
    right = torch.ones_like(text.loss_mask).flatten()
    rates = []
    for step, done in enumerate(Unroll(head, embed)(text.features, text.tokens, rows)):
        said = text.tokens.flatten()[done.rows + 2 + step]
        guess = head.ids[head.logits(done.y).argmax(-1)]
        before = right[done.rows]
        hit = before & (guess == said)
        rates.append(float(hit.sum()) / max(1, int(before.sum())))
        right = torch.zeros_like(right).index_put((done.rows,), hit)
    return rates
