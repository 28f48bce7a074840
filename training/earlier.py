"""The head that a run goes on from, when its recipe names one: found, held against recipe and target, taken over.

Knows heads and recipes; nothing of texts. Everything that is refused is refused before any text is written. The draft
vocabulary follows the new texts: tokens that the earlier head did not propose start from the target's own rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from specdec.errors import MismatchError, SpecdecError, UnsupportedError
from specdec.head.checkpoint import load_head
from specdec.head.config import HeadConfig
from specdec.head.match import check_match
from specdec.head.model import DraftHead
from specdec.head.pretrained import shipped_head
from specdec.target.protocol import TargetInfo
from training.recipe import Recipe

STARTS = ("closed-form", "random")  # of a new head; see `training.warmstart`
ALLOWED = '"closed-form", "random", "shipped" or a directory with a head'


def earlier_head(recipe: Recipe, target: TargetInfo) -> DraftHead | None:
    """The head named by `head.start`, float32 on the CPU; None when the run makes a new one.

    Raises:
        SpecdecError: nothing is there, or the recipe asks for another shape than it has.
        MismatchError: it belongs to another target. CheckpointError: it is damaged.
        UnsupportedError: the unroll cannot train it.
    """
    start = recipe.head.start
    if start in STARTS:
        return None
    taps = None if recipe.head.taps == "default" else recipe.head.taps
    head = load_head(
        _directory(start, target.name), taps=taps, target_layers=target.layers, dtype=torch.float32
    )
    check_match(head.config, target)
    if head.config.window is not None:
        raise UnsupportedError("the unroll trains full attention only", field="head.start", value=start)
    _check_shape(recipe, head.config)
    head.config = replace(head.config, fingerprint=target.fingerprint)
    return head


@torch.no_grad()
def take_over(head: DraftHead, earlier: DraftHead, ids: Tensor, rows: Tensor) -> None:
    """Fill `head` with an earlier head's weights.

    Args:
        ids: int64 [Vd], rising, of the new draft vocabulary; rows: [Vd, H], the target's LM-head rows of these.
    """
    place = torch.searchsorted(earlier.ids, ids).clamp(max=len(earlier.ids) - 1)
    known = earlier.ids[place] == ids
    weight = torch.where(known[:, None], earlier.lm_head.weight[place], rows.float())
    head.load_state_dict(earlier.state_dict() | {"ids": ids, "lm_head.weight": weight})


def _directory(start: str, target: str) -> Path:
    if start == "shipped":
        path = shipped_head(target)
        if path is None:
            raise SpecdecError(
                f"no head ships for {target}", field="head.start", value=start, allowed=ALLOWED
            )
        return path
    path = Path(start)
    if not path.is_dir():
        raise SpecdecError("there is no such directory", field="head.start", value=start, allowed=ALLOWED)
    return path


def _check_shape(recipe: Recipe, config: HeadConfig) -> None:
    """What the recipe says of the head's shape must be what the head has; what it leaves open is the head's."""
    want = recipe.head
    asked = {
        "intermediate_size": (want.intermediate_size, config.intermediate),
        "num_heads": (want.num_heads, config.heads),
        "num_key_value_heads": (want.num_key_value_heads, config.kv_heads),
        "fc_norm": (want.fc_norm or None, config.fc_norm),
        "norm_output": (want.norm_output or None, config.norm_output),
        "norm_before_residual": (want.norm_before_residual or None, config.norm_before_residual),
        "norm_before_fc": (want.norm_before_fc or None, config.norm_before_fc),
    }
    for name, (ours, theirs) in asked.items():
        if ours is not None and ours != theirs:
            raise MismatchError("the head to go on from has another", field=f"head.{name}", value=ours,
                                allowed=str(theirs), remedy="Leave it out, or start a new head.")  # fmt: skip
