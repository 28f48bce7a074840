"""Draft trees: guessed continuations of a batch of requests as fixed-shape tensors.

Knows nothing of models, caches or sampling. Dimension legend: B requests, N nodes, D depth, K top-k.

A tree is drawn once here; everything else follows from `parents`:

    index      0     1     2     3     4        node 0 is the root, the newest emitted token
    token     the   cat   dog   sat   ran
    parent     0     0     0     1     2        a parent always has a smaller index
    depth      0     1     1     2     2        RoPE position = committed length + depth
    ancestors  1    1+2   1+4  1+2+8 1+4+16     bit j set: node j is an ancestor or the node itself
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 64  # ancestor sets are one 64-bit word


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Trees of at most N nodes for B requests; node 0 is the root of each.

    Attributes:
        tokens: int64 [B, N].
        parents: int64 [B, N], the root is its own parent, parents precede children.
        depths: int64 [B, N], 0 at the root.
        ancestors: int64 [B, N], 64-bit words of ancestors-or-self.
        sizes: int64 [B], nodes in use; nodes beyond are inert padding that nothing follows.
        scores: float32 [B, N] or None, the drafter's log-probability of the path to each node.
        probs: float32 [B, N - 1, V] or None; for chains whose tokens were drawn at random, the distribution each was
            drawn from. None says that the tree is a deterministic function of its context.
        levels: forwards of a draft head that growing the trees took.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    sizes: Tensor
    scores: Tensor | None = None
    probs: Tensor | None = None
    levels: int = 0

    @property
    def nodes(self) -> int:
        """N, padding included."""
        return self.tokens.shape[1]

    def promised(self) -> float:
        """Drafts the drafter expects to see accepted: the sum of its nodes' path probabilities, over all trees."""
        if self.scores is None or self.nodes == 1:
            return 0.0
        used = torch.arange(1, self.nodes, device=self.sizes.device) < self.sizes[:, None]
        return float((self.scores[:, 1:].exp() * used).sum())


def build(
    tokens: Tensor, parents: Tensor, sizes: Tensor | None = None, scores: Tensor | None = None
) -> DraftTree:
    """Derive depths and ancestor bits from parents.

    Args:
        tokens: int64 [B, N].
        parents: int64 [B, N]; parents[:, 0] is 0 and parents[:, i] < i.
        sizes: int64 [B] nodes in use, all of them when None.
        scores: float32 [B, N] path log-probabilities, kept as they are.

    >>> build(torch.tensor([[7, 8, 9]]), torch.tensor([[0, 0, 1]])).ancestors
    tensor([[1, 3, 7]])
    """
    b, n = tokens.shape
    assert 1 <= n <= MAX_NODES, n
    if sizes is None:
        sizes = torch.full((b,), n, dtype=torch.int64, device=tokens.device)
    own = torch.ones((), dtype=torch.int64, device=tokens.device) << torch.arange(n, device=tokens.device)
    ancestors, above = own.expand(b, n), parents
    for _ in range((n - 1).bit_length()):  # pointer doubling: each turn doubles how far up a node sees
        ancestors = ancestors | ancestors.gather(1, above)
        above = above.gather(1, above)
    depths = mask(ancestors, n).sum(dim=2) - 1
    return DraftTree(tokens, parents, depths, ancestors, sizes, scores)


def root_only(tokens: Tensor) -> DraftTree:
    """Trees of one node: a round over them is plain decoding. tokens: int64 [B]."""
    column = tokens[:, None]
    zero = torch.zeros_like(column)
    one = torch.ones_like(column)
    return DraftTree(column, zero, zero, one, one[:, 0])


def chain(tokens: Tensor, sizes: Tensor | None = None) -> DraftTree:
    """Trees without branches: node i + 1 hangs on node i. tokens: int64 [B, D + 1], root first."""
    b, n = tokens.shape
    parents = (torch.arange(n, device=tokens.device) - 1).clamp(min=0).expand(b, n)
    return build(tokens, parents, sizes)


def expand(scores: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """One level of EAGLE-2 growth: every frontier node has its likeliest children, and the likeliest of all grow on.

    Args:
        scores: float32 [B, K] path log-probability of each frontier node.
        log_probs: float32 [B, K, W] of each one's children.

    Returns:
        (path scores float32 [B, K * W], frontier int64 [B, W]): of the children in parent-major order, and the indices
        among them that grow on.
    """
    paths = (scores[..., None] + log_probs).flatten(1)
    frontier = torch.sort(paths, dim=1, descending=True, stable=True).indices[:, : log_probs.shape[-1]]
    return paths, frontier


def rerank(root: Tensor, tokens: Tensor, parents: Tensor, scores: Tensor, nodes: int) -> DraftTree:
    """Keep the root and the `nodes - 1` candidates of highest path score (EAGLE-2 re-ranking).

    Args:
        root: int64 [B].
        tokens: int64 [B, C] candidates; a parent candidate precedes its children.
        parents: int64 [B, C], candidate index of the parent, -1 for children of the root.
        scores: float32 [B, C] path log-probabilities, never rising along a path.
        nodes: N, the root included.

    Ties are broken by index, so a parent is never dropped while its child is kept.
    """
    b, count = tokens.shape
    keep = min(nodes - 1, count)
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :keep]
    chosen = best.sort(dim=1).values
    place = torch.zeros(b, count + 1, dtype=torch.int64, device=tokens.device)
    place.scatter_(1, chosen + 1, torch.arange(1, keep + 1, device=tokens.device).expand(b, keep))
    kept_parents = place.gather(1, parents.gather(1, chosen) + 1)
    zero = torch.zeros(b, 1, dtype=torch.int64, device=tokens.device)
    return build(
        torch.cat([root[:, None], tokens.gather(1, chosen)], dim=1),
        torch.cat([zero, kept_parents], dim=1),
        scores=torch.cat([zero.to(scores.dtype), scores.gather(1, chosen)], dim=1),
    )


def trim(tree: DraftTree, sizes: Tensor) -> DraftTree:
    """Use fewer nodes: the first `sizes[b]` of each tree; the tensor shrinks to the largest.

    Nodes are index-ordered with parents first, so every prefix of a tree is a tree.
    """
    n = int(sizes.max())
    scores = None if tree.scores is None else tree.scores[:, :n]
    return DraftTree(
        tree.tokens[:, :n], tree.parents[:, :n], tree.depths[:, :n], tree.ancestors[:, :n],
        torch.minimum(sizes, tree.sizes), scores, levels=tree.levels,
    )  # fmt: skip


def pad(tree: DraftTree, nodes: int) -> DraftTree:
    """Append inert nodes up to `nodes`: children of the root that lie beyond `sizes`."""
    extra = nodes - tree.nodes
    if extra <= 0:
        return tree
    b = tree.tokens.shape[0]
    zeros = tree.tokens.new_zeros(b, extra)
    bits = torch.ones((), dtype=torch.int64, device=zeros.device) << torch.arange(
        tree.nodes, nodes, device=zeros.device
    )
    scores = None
    if tree.scores is not None:
        scores = torch.cat([tree.scores, tree.scores.new_full((b, extra), -torch.inf)], dim=1)
    return DraftTree(
        torch.cat([tree.tokens, zeros], dim=1), torch.cat([tree.parents, zeros], dim=1),
        torch.cat([tree.depths, zeros + 1], dim=1),
        torch.cat([tree.ancestors, (bits | 1).expand(b, extra)], dim=1),
        tree.sizes, scores, levels=tree.levels,
    )  # fmt: skip


def stack(trees: list[DraftTree]) -> DraftTree:
    """One batch out of many trees, padded to the largest; scores are dropped unless all have them."""
    n = max(tree.nodes for tree in trees)
    padded = [pad(tree, n) for tree in trees]
    scores = [tree.scores for tree in padded if tree.scores is not None]
    return DraftTree(
        torch.cat([t.tokens for t in padded]), torch.cat([t.parents for t in padded]),
        torch.cat([t.depths for t in padded]), torch.cat([t.ancestors for t in padded]),
        torch.cat([t.sizes for t in padded]), torch.cat(scores) if len(scores) == len(padded) else None,
        levels=max(t.levels for t in padded),
    )  # fmt: skip


def mask(ancestors: Tensor, width: int) -> Tensor:
    """Ancestor words [B, N] as booleans [B, N, width]: may row i see tree row j?"""
    return (ancestors[..., None] >> torch.arange(width, device=ancestors.device)) & 1 == 1
