"""A loaded target, a drafter and a budget become an engine: what a user's options mean.

Knows every part and decides nothing about a round.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from specdec.attention.choose import choose_attention
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.mixed import MixedDrafter
from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN, Drafter, Shape
from specdec.engine.ahead import run_ahead
from specdec.engine.budget import Budget
from specdec.engine.costs import remembered
from specdec.engine.engine import Engine, Limits
from specdec.engine.graphs import CudaRecording, Recording, graphed
from specdec.engine.memory import Needs, Wish, plan
from specdec.errors import SpecdecError
from specdec.head.checkpoint import load_head
from specdec.head.match import check_match
from specdec.head.model import DraftHead
from specdec.head.pretrained import shipped_head
from specdec.memory import current, free_bytes
from specdec.places import cache_root
from specdec.target.load import DeviceMap, LeanTarget
from specdec.target.protocol import Target
from specdec.tree import MAX_NODES

DEFAULT_TREE = Shape(depth=7, width=10, nodes=60)
"""EAGLE-2's growth, top-k and nodes, one level short of its released code: what heads are compared on, and the default
on a GPU. The rows that an eighth level takes do not fit one word."""

CPU_LIMIT = Shape(depth=16, width=6, nodes=32)
"""The largest tree the measured budget may choose on a CPU, where nodes cost arithmetic. So deep only lookups go."""

LOOKUPS = "+ngram"


@dataclass(frozen=True, slots=True)
class Options:
    """How to load and run.

    Attributes:
        dtype: of the weights; None takes what a short measurement finds fastest on a CPU, the config's on a GPU.
        device: where to run; None takes CUDA when there is one.
        slots: requests at once; None takes as many as fit, at most `most_slots`.
        max_length: context length; None takes what the target was made for and what fits, at most 4096.
        tree: a fixed tree shape; None lets the measured budget choose.
        backend: "lean", "adapter" or "auto".
        taps: of a head whose checkpoint does not name them.
        most_slots: see `slots`.
        memory: bytes that the engine may count on; None asks the device what is free once weights are loaded.
        device_map: accelerate's placement of a target over several devices ("auto" or module -> device), instead of
            `device`; the adapter then does the work, and the head lives with the last layer.
    """

    dtype: torch.dtype | None = None
    device: str | None = None
    slots: int | None = None
    max_length: int | None = None
    tree: Shape | None = None
    backend: Literal["auto", "lean", "adapter"] = "auto"
    taps: tuple[int, ...] | None = None
    most_slots: int = 4
    memory: int | None = None
    device_map: DeviceMap | None = None


def make_engine(
    target: Target, head: str | Path | None, options: Options, recording: Recording | None = None
) -> Engine:
    """An engine over a loaded target: drafter, sizes that fit, cost table, budget.

    Args:
        recording: of rounds as device programs; None takes CUDA graphs on a GPU and none on a CPU.
    """
    with current(target.info.device):
        return _made(target, head, options, recording)


def _made(target: Target, head: str | Path | None, options: Options, recording: Recording | None) -> Engine:
    words = drafter_words(target, head)
    weights = _load_head(target, words, options)
    free = free_bytes(target.info.device) if options.memory is None else options.memory
    wish = Wish(options.slots, options.max_length, options.most_slots)
    limits = plan(Needs.of(target.info, None if weights is None else weights.config), wish, free)
    if target.info.device.type == "cuda" and isinstance(target, LeanTarget):
        target, refused = graphed(target)
        if refused is not None:
            warnings.warn(f"forwards are not captured in CUDA graphs: {refused}", stacklevel=2)
    if recording is None and target.info.device.type == "cuda":
        recording = CudaRecording()
    drafter = make_drafter(target, words, weights, limits)
    engine = Engine(target, drafter, Budget(None, _largest(target, drafter, options), adaptive=False), limits)
    if recording is not None and (refused := run_ahead(engine, recording)) is not None:
        warnings.warn(f"rounds run step by step: {refused}", stacklevel=2)
        recording = None
    if options.tree is None and not isinstance(drafter, NoDrafter):
        engine.budget = _measured(engine, recording)
    return engine


def drafter_words(target: Target, head: str | Path | None) -> str:
    """What "auto" and nothing stand for: the shipped head with lookups on a CPU, alone on a GPU (lookups work on the
    host), and lookups alone where none ships; "none" for nothing. Others stay as they are."""
    words = str(head or "none")
    if words != "auto":
        return words
    lookups = target.info.device.type == "cpu"
    return ("head+ngram" if lookups else "head") if shipped_head(target.info.name) else "ngram"


def make_drafter(target: Target, words: str, weights: DraftHead | None, limits: Limits) -> Drafter:
    """Who drafts.

    Args:
        words: "none"; "ngram"; else a head drafts, and with "+ngram" behind, its trees are merged with lookups.
        weights: of that head, on the target's device.
    """
    if weights is None:
        return NoDrafter() if words == "none" else NgramDrafter()
    config = weights.config
    choice = choose_attention(weights.cache_shape(), config.heads, (config.window,))
    drafter = EagleDrafter(weights, target.embed, choice.attention, limits.slots, limits.length)
    return MixedDrafter(drafter) if words.endswith(LOOKUPS) else drafter


def _shipped(target: Target) -> Path:
    path = shipped_head(target.info.name)
    if path is None:
        raise SpecdecError("none ships for this target", field="head", value=target.info.name,
                           remedy="Train one with `specdec train`, or draft with ngram.")  # fmt: skip
    return path


def _load_head(target: Target, words: str, options: Options) -> DraftHead | None:
    """The draft head that the words name, checked against the target and ready; None where none drafts.

    Args:
        words: "none" or "ngram" for none; "head" for the shipped one, or a directory; "+ngram" may stand behind.

    Raises:
        SpecdecError: no such head; MismatchError: a head of another target.
    """
    if words in ("none", "ngram"):
        return None
    name, info = words.removesuffix(LOOKUPS), target.info
    path = _shipped(target) if name == "head" else Path(name)
    weights = load_head(
        path, taps=options.taps, target_layers=info.layers, dtype=info.dtype, device=info.device
    )
    check_match(weights.config, info)
    weights.freeze()
    return weights


def _largest(target: Target, drafter: Drafter, options: Options) -> Shape:
    """The fixed tree, or the largest that the measured budget may choose."""
    if isinstance(drafter, NoDrafter):
        return PLAIN
    if options.tree is None:
        return CPU_LIMIT if target.info.device.type == "cpu" else DEFAULT_TREE
    if options.tree.sampled and not isinstance(drafter, EagleDrafter | MixedDrafter):
        raise SpecdecError(
            "needs a draft head to draw from", field="tree", value="sampled", remedy="Give a head."
        )
    return options.tree


def _measured(engine: Engine, recording: Recording | None) -> Budget:
    """A budget that knows what rounds cost here."""
    target, drafter, limits = engine.target, engine.drafter, engine.limits
    scratch = KVCache(target.info.cache, limits.slots, min(limits.length, 512) + MAX_NODES)
    costs = remembered(target, drafter, scratch, cache_root() / "costs", recording)
    return Budget(costs, engine.budget.limit, fixed=recording is not None)


def parse_tree(text: str) -> Shape | None:
    """ "auto", "depth/top-k/nodes" such as 7/10/60, or "sampled/depth" for chains drawn from the draft distribution
    and block-verified (a seeded answer is then not the one of plain decoding, but a draw of the same law). Raises
    SpecdecError otherwise."""
    if text == "auto":
        return None
    kind, _, length = text.partition("/")
    try:
        depth, width, nodes = (
            (int(length), 1, int(length) + 1)
            if kind == "sampled"
            else (int(part) for part in text.split("/"))
        )
    except ValueError:
        raise SpecdecError(
            "is not a tree", field="tree", value=text, allowed="auto, depth/top-k/nodes or sampled/depth"
        ) from None
    if depth < 1 or width < 1 or not 2 <= nodes <= MAX_NODES:
        raise SpecdecError(
            "is out of range",
            field="tree",
            value=text,
            allowed=f"depth and top-k of at least 1, 2 to {MAX_NODES} nodes",
        )
    # so many nodes reach no deeper, and rooms on a device are as deep as the tree
    return Shape(min(depth, nodes - 1), width, nodes, sampled=kind == "sampled")
