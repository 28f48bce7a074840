"""Does a target see a tree as it sees each of its paths? Asked once at load, answered in well under a second.

A tree forward after a short prefix is compared with plain causal forwards of every root-to-leaf path. A wrong
mask, position or cache row shows at once; whether the weights are right it cannot know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.attention.protocol import chunk_rows, tree_rows
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.target.protocol import Target
from specdec.tree import DraftTree, build

PREFIX = 12
PARENTS = (0, 0, 0, 1, 1, 2, 4)  # leaves 3, 5 and 6, of depth 2, 2 and 3
LEAVES = (3, 5, 6)
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference allowed, relative to the largest logit; float64 keeps float32 rotary angles."""


def self_test(target: Target) -> None:
    """Compare a tree forward with path-by-path forwards.

    Raises:
        UnsupportedError: naming the architecture and the largest difference.
    """
    difference = tree_difference(target)
    allowed = TOLERANCE.get(target.info.dtype, TOLERANCE[torch.float32])
    if not difference <= allowed:  # so written, NaN fails
        raise UnsupportedError(
            "sees a tree differently from its paths one by one, so speculation would not be lossless",
            field=target.info.architecture, value=f"relative difference {difference:.2g}",
            allowed=f"at most {allowed:g}", remedy="This architecture cannot be used with speculation.",
        )  # fmt: skip


@torch.inference_mode()
def tree_difference(target: Target, prefix: int = PREFIX) -> float:
    """Largest difference between logits of tree nodes and of paths, over the largest logit.

    Args:
        prefix: tokens before the tree; longer than a sliding window, it tests that too.
    """
    device = target.info.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.info.vocab, (1, prefix + len(PARENTS)), generator=generator).to(device)
    tree = build(tokens[:, prefix:], torch.tensor([PARENTS], device=device))
    cache = KVCache(target.info.cache, 1 + len(LEAVES), prefix + len(PARENTS))
    seen = _tree_logits(target, cache, tokens[:, :prefix], tree)
    alone = _path_logits(target, cache, tokens[0, :prefix], tree)
    differences = [(seen[node] - logits).abs().max() for node, logits in alone]
    return float(torch.stack(differences).max() / seen.abs().max().clamp(min=1e-6))


def _tree_logits(target: Target, cache: KVCache, prefix: Tensor, tree: DraftTree) -> Tensor:
    """[N, V] float32, through slot 0."""
    slot = torch.zeros(1, dtype=torch.int64, device=prefix.device)
    length = slot + prefix.shape[1]
    target.forward(prefix, chunk_rows(slot, slot, prefix.shape[1]), cache, ())
    states = target.forward(tree.tokens, tree_rows(slot, length, tree), cache, ())
    return target.logits(states.final)[0].float()


def _path_logits(target: Target, cache: KVCache, prefix: Tensor, tree: DraftTree) -> list[tuple[int, Tensor]]:
    """(node, logits [V]) of every node on every path, each path a plain sequence in a slot of its own."""
    paths = [_path(leaf) for leaf in LEAVES]
    longest = max(map(len, paths))
    padded = torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths], device=prefix.device)
    tokens = torch.cat([prefix.expand(len(paths), -1), tree.tokens[0, padded]], dim=1)
    slots = torch.arange(1, len(paths) + 1, device=prefix.device)
    states = target.forward(tokens, chunk_rows(slots, torch.zeros_like(slots), tokens.shape[1]), cache, ())
    logits = target.logits(states.final[:, prefix.shape[0] :]).float()
    return [(node, logits[i, depth]) for i, path in enumerate(paths) for depth, node in enumerate(path)]


def _path(leaf: int) -> list[int]:
    nodes = [leaf]
    while nodes[0] != 0:
        nodes.insert(0, PARENTS[nodes[0]])
    return nodes
