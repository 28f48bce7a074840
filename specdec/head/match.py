"""Does a head belong to a target? Compared by numbers only; loads nothing.

A head that does not match still drafts, uselessly: outputs stay right and acceptance is near zero. So it is
refused.
"""

from __future__ import annotations

from typing import Protocol

from specdec.errors import MismatchError
from specdec.head.config import HeadConfig


class Sizes(Protocol):
    """What of a target is known without its weights."""

    @property
    def name(self) -> str: ...
    @property
    def vocab(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...


class Owner(Sizes, Protocol):
    """What of a target a head is compared with; `TargetInfo` is one."""

    @property
    def fingerprint(self) -> str: ...


def check_match(config: HeadConfig, target: Owner) -> None:
    """Compare a head with a target.

    Raises:
        MismatchError: naming the first field that differs. A head without a fingerprint is compared by sizes
            alone.
    """
    check_sizes(config, target)
    if config.fingerprint is not None and config.fingerprint != target.fingerprint:
        raise MismatchError(
            "the head was trained on another target of the same sizes",
            field="fingerprint",
            value=config.fingerprint,
            allowed=target.fingerprint,
            remedy=_remedy(target),
        )


def check_sizes(config: HeadConfig, target: Sizes) -> None:
    """The part of it that needs no weights. Raises MismatchError."""
    remedy = _remedy(target)
    sizes = (("vocab", config.vocab, target.vocab), ("hidden", config.target_hidden, target.hidden))
    for field, ours, theirs in sizes:
        if ours != theirs:
            raise MismatchError(
                "head and target differ", field=field, value=ours, allowed=str(theirs), remedy=remedy
            )
    if config.taps[-1] > target.layers:
        raise MismatchError(
            "a tap lies beyond the target's last layer",
            field="taps",
            value=list(config.taps),
            allowed=f"0..{target.layers}",
            remedy=remedy,
        )


def _remedy(target: Sizes) -> str:
    return f"This head was not made for {target.name}: name the target it was trained on, or another head."
