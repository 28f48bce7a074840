"""Acceptance: which drafted tokens survive the target's word, and what is emitted.

Two rules, one result. `walk` serves deterministic trees: the target draws its own token at every node and we
follow those draws while the tree contains them, which is exactly the target's law whatever the tree.
`verify_block` serves chains whose tokens were *sampled* from the draft distribution and needs the true q (block
verification, arXiv 2403.10444). Neither knows models or caches.
Dimension legend: B requests, N nodes, D longest path in edges, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.fused import available
from specdec.sampling import draw
from specdec.tree import DraftTree

FEW = 128  # nodes of all trees that a CPU walks one by one


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one round decided.

    Attributes:
        kept: int64 [B, D + 1] indices of accepted nodes, root first; columns from `counts` repeat the last.
        counts: int64 [B], accepted nodes, root included = tokens emitted, between 1 and D + 1.
        tokens: int64 [B, D + 1] emitted tokens: the accepted drafts, then the bonus token; padded with -1.
        offered: int64 [B], depth of the deepest node that was on offer.
    """

    kept: Tensor
    counts: Tensor
    tokens: Tensor
    offered: Tensor


def walk(tree: DraftTree, chosen: Tensor, width: int | None = None) -> Verdict:
    """Follow the target's own tokens from the root while the tree contains them.

    Args:
        tree: B trees of N nodes.
        chosen: int64 [B, N], the target's token *after* each node.
        width: D + 1 of the verdict where it is known; None asks the trees on a CPU, where few nodes are
            walked on the host, and takes N elsewhere.

    >>> from specdec.tree import build
    >>> tree = build(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 0, 2]]))
    >>> walk(tree, torch.tensor([[7, 1, 8, 9]])).tokens      # root -> 7 -> 8, bonus 9
    tensor([[7, 8, 9]])

    No host synchronisation beyond a CPU: a node stands if no ancestor-or-self disagrees with its parent's choice.
    """
    n = tree.nodes
    if width is None and chosen.device.type == "cpu":
        if chosen.numel() <= FEW:
            return _walk_on_host(tree, chosen)
        width = int(tree.depths.max()) + 1
    width = n if width is None else width
    if available.runs(chosen.device):
        from specdec.fused.walk import walk as fused_walk

        return Verdict(
            *fused_walk(tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.sizes, chosen, width)
        )
    index = torch.arange(n, device=chosen.device)
    agrees = chosen.gather(1, tree.parents) == tree.tokens
    agrees &= index < tree.sizes[:, None]
    agrees[:, 0] = True
    blocked = ((~agrees).to(torch.int64) << index).sum(dim=1, keepdim=True)
    stands = (tree.ancestors & blocked) == 0
    last = torch.where(stands, tree.depths, -1).argmax(dim=1, keepdim=True)
    counts = tree.depths.gather(1, last)[:, 0] + 1
    path = (tree.ancestors.gather(1, last) >> index) & 1 == 1
    order = torch.where(path, index, n).sort(dim=1).values[:, :width]
    kept = torch.where(order < n, order, last)
    inside = torch.arange(width, device=chosen.device) < counts[:, None]
    offered = torch.where(index < tree.sizes[:, None], tree.depths, 0).amax(dim=1)
    return Verdict(kept, counts, torch.where(inside, chosen.gather(1, kept), -1), offered)


def _walk_on_host(tree: DraftTree, chosen: Tensor) -> Verdict:
    """`walk` node by node: a handful of small numbers is sooner compared than twenty operations are launched."""
    depths, sizes, picks = tree.depths.tolist(), tree.sizes.tolist(), chosen.tolist()
    width = max(map(max, depths)) + 1
    parts = zip(tree.parents.tolist(), tree.tokens.tolist(), depths, sizes, picks, strict=True)
    paths = [_path(*part) for part in parts]
    kept = [path + path[-1:] * (width - len(path)) for path in paths]
    emitted = [[own[node] for node in path] for own, path in zip(picks, paths, strict=True)]
    offered = [max(own[:size]) for own, size in zip(depths, sizes, strict=True)]
    return Verdict(
        torch.tensor(kept),
        torch.tensor([len(path) for path in paths]),
        torch.tensor([tokens + [-1] * (width - len(tokens)) for tokens in emitted]),
        torch.tensor(offered),
    )


def _path(parents: list[int], tokens: list[int], depths: list[int], size: int, picks: list[int]) -> list[int]:
    """The nodes that stand, from the root to the deepest."""
    stands, last = {0}, 0
    for node in range(1, size):
        above = parents[node]
        if above in stands and picks[above] == tokens[node]:
            stands.add(node)
            last = node if depths[node] > depths[last] else last
    path = [last]
    while path[-1]:
        path.append(parents[path[-1]])
    return path[::-1]


def verify_block(tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Block verification of one sampled chain per request (Sun et al. 2403.10444, algorithm 2).

    Args:
        tokens: int64 [B, G] sampled drafts, drawn from `draft_probs`.
        draft_probs: float [B, G, V], the true q each draft was drawn from.
        target_probs: float [B, G + 1, V], the target's processed distribution after the root and each draft.
        uniforms: float [B, G + 1] in [0, 1): G tests and one draw of the bonus token.

    Returns:
        A Verdict over the chain tree root -> draft 1 -> ... -> draft G.

    The accepted length is the last i whose test u_i < h_i passes (strictly: u may be 0, and h = 0 must fail);
    at length i < G the bonus is drawn from max(w_i p_{i+1} - q_{i+1}, 0) normalised, at G from p_{G+1}.
    Losslessness: theorem 1 there.
    """
    b, g, _ = draft_probs.shape
    weight = torch.ones(b, dtype=draft_probs.dtype, device=tokens.device)
    weights, tests = [weight], []
    for i in range(g):
        p = target_probs[:, i].gather(1, tokens[:, i : i + 1])[:, 0]
        q = draft_probs[:, i].gather(1, tokens[:, i : i + 1])[:, 0]
        weight = torch.minimum(weight * p / q.clamp(min=torch.finfo(q.dtype).tiny), torch.ones_like(weight))
        weights.append(weight)
        if i + 1 < g:
            left = _leftover(weight, target_probs[:, i + 1], draft_probs[:, i + 1])
            mass = left.sum(dim=-1)
            tests.append(mass / (mass + 1 - weight).clamp(min=torch.finfo(q.dtype).tiny))
        else:
            tests.append(weight)
    passed = uniforms[:, :g] < torch.stack(tests, dim=1)
    place = torch.arange(1, g + 1, device=tokens.device)
    accepted = torch.where(passed, place, 0).amax(dim=1)
    bonus = draw(_residual(torch.stack(weights, 1), draft_probs, target_probs, accepted), uniforms[:, g])
    columns = torch.arange(g + 1, device=tokens.device)
    drafts = torch.cat([tokens, tokens[:, -1:]], dim=1)
    emitted = torch.where(
        columns < accepted[:, None], drafts, torch.where(columns == accepted[:, None], bonus[:, None], -1)
    )
    kept = torch.minimum(columns.expand(b, g + 1), accepted[:, None])
    return Verdict(kept, accepted + 1, emitted, torch.full_like(accepted, g))


def _leftover(weight: Tensor, target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    return (weight[:, None] * target_probs - draft_probs).clamp(min=0)


def _residual(weights: Tensor, draft_probs: Tensor, target_probs: Tensor, accepted: Tensor) -> Tensor:
    """The law of the bonus token after `accepted` drafts, unnormalised. [B, V]"""
    g, v = draft_probs.shape[1:]
    p = target_probs.gather(1, accepted[:, None, None].expand(-1, 1, v))[:, 0]
    q = draft_probs.gather(1, accepted.clamp(max=g - 1)[:, None, None].expand(-1, 1, v))[:, 0]
    left = _leftover(weights.gather(1, accepted[:, None])[:, 0], p, q)
    # no mass left can only be rounding (p equals q there): then p itself is the law
    whole = (accepted == g) | (left.sum(dim=-1) <= 0)
    return torch.where(whole[:, None], p, left)
