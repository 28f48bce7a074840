"""The memory planner: how many requests of which length an engine holds, from the memory that is free.

What the user set is kept or refused, never changed; what was left open is made to fit. Knows bytes, not devices.

    free = spare + slots x (length + MAX_NODES) x token + slots x round
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec.engine.engine import Limits
from specdec.errors import SpecdecError, UnsupportedError
from specdec.head.config import HeadConfig
from specdec.head.layout import shapes
from specdec.memory import gib, tensor_bytes
from specdec.target.protocol import TargetInfo
from specdec.tree import MAX_NODES

LONGEST = 4096  # context length where nobody asks for one
SHORTEST = 256  # a context below is not offered unasked
STEP = 64  # planned lengths are multiples of it
SHARE = 0.05  # of the free memory that is left alone: activations, captured graphs, fragments
WIDE = 2 * 4  # bytes of one logit beside the target's own: float32 copies that sampling makes


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for.

    Attributes:
        slots: requests at once; None leaves it to the planner.
        length: context length; None leaves it to the planner.
        most_slots: what the planner may give unasked.
    """

    slots: int | None = None
    length: int | None = None
    most_slots: int = 4


@dataclass(frozen=True, slots=True)
class Needs:
    """What an engine takes, in bytes.

    Attributes:
        weights: already loaded; only told.
        token: of one token of a slot: keys and values of target and head, and features waiting for the head.
        round: of one slot's share of a round: the logits of its tree.
        longest: positions the target was made for.
    """

    weights: int
    token: int
    round: int
    longest: int

    @staticmethod
    def of(info: TargetInfo, head: HeadConfig | None) -> Needs:
        """Of a target and, with one, a head of the same dtype."""
        size = info.dtype.itemsize
        token, weights = info.cache.row_bytes(), info.weight_bytes
        if head is not None:
            token += 2 * head.kv_heads * head.head_dim * size + len(head.taps) * head.target_hidden * size
            weights += tensor_bytes(shapes(head).values(), info.dtype)
        logits = MAX_NODES * info.vocab * (size + WIDE)
        return Needs(weights, token, logits, info.max_length)

    def slot(self, length: int) -> int:
        """Bytes of one slot of so many tokens."""
        return (length + MAX_NODES) * self.token + self.round


def plan(needs: Needs, wish: Wish, free: int | None) -> Limits:
    """The largest engine within the wish that fits; slots give way first, then length.

    Args:
        free: bytes; None, where nobody knows, plans as if there were enough.

    Raises:
        SpecdecError: a wish that no memory could grant; UnsupportedError: what was asked for, or one slot of the
            shortest context, does not fit.
    """
    _check(needs, wish)
    length = min(needs.longest, LONGEST) if wish.length is None else wish.length
    slots = wish.most_slots if wish.slots is None else wish.slots
    if free is None:
        return Limits(slots=slots, length=length)
    room = int(free * (1 - SHARE))
    if wish.slots is None:
        slots = min(slots, max(1, room // needs.slot(length)))
    if wish.length is None:
        length = min(length, max(_longest(needs, slots, room), min(SHORTEST, length)))
    if slots * needs.slot(length) > room:
        raise _refusal(needs, slots, length, room, free)
    return Limits(slots=slots, length=length)


def _check(needs: Needs, wish: Wish) -> None:
    if wish.length is not None and wish.length > needs.longest:
        raise SpecdecError("is longer than the target was made for", field="max_length", value=wish.length,
                           allowed=f"at most {needs.longest}")  # fmt: skip
    if (wish.length is not None and wish.length < 2) or (wish.slots is not None and wish.slots < 1):
        raise SpecdecError("leave no room for a request", field="max_length, slots",
                           value=(wish.length, wish.slots), allowed="at least 2 tokens and 1 slot")  # fmt: skip


def _longest(needs: Needs, slots: int, room: int) -> int:
    """The longest context that so many slots can have, in steps; 0 or less when there is none."""
    tokens = (room // slots - needs.round) // needs.token - MAX_NODES
    return tokens // STEP * STEP


def _refusal(needs: Needs, slots: int, length: int, room: int, free: int) -> UnsupportedError:
    """What it takes, what there is, and the nearest thing that would do."""
    fewer, shorter = room // needs.slot(length), _longest(needs, slots, room)
    ways = [f"lower slots to {fewer}"] if 1 <= fewer < slots else []
    ways += [f"lower max_length to {shorter}"] if STEP <= shorter < length else []
    remedy = " or ".join(ways) or "take a smaller target or dtype, or a device with more memory"
    return UnsupportedError(
        f"do not fit: {gib(needs.weights)} of weights are loaded, a slot of {length} tokens needs "
        f"{gib(needs.slot(length))}, {gib(free)} are free",
        field="slots x max_length", value=f"{slots} x {length}", remedy=remedy[0].upper() + remedy[1:] + ".",
    )  # fmt: skip
