"""Does a head belong to a target? Compared by numbers only; loads nothing.

A head that does not match still drafts, uselessly: outputs stay right and acceptance is near zero. So it is
refused.
"""

from __future__ import annotations

from specdec.errors import MismatchError
from specdec.head.config import HeadConfig


def check_match(
    config: HeadConfig, *, vocab: int, hidden: int, layers: int, fingerprint: str, name: str
) -> None:
    """Compare a head with a target.

    Args:
        config: of the head.
        vocab, hidden, layers, fingerprint, name: of the target (`TargetInfo`).

    Raises:
        MismatchError: naming the first field that differs. A head without a fingerprint is compared by sizes
            alone.
    """
    remedy = f"This head was not made for {name}: name the target it was trained on, or another head."
    sizes = (("vocab", config.vocab, vocab), ("hidden", config.target_hidden, hidden))
    for field, ours, theirs in sizes:
        if ours != theirs:
            raise MismatchError(
                "head and target differ", field=field, value=ours, allowed=str(theirs), remedy=remedy
            )
    if config.taps[-1] > layers:
        raise MismatchError(
            "a tap lies beyond the target's last layer",
            field="taps",
            value=list(config.taps),
            allowed=f"0..{layers}",
            remedy=remedy,
        )
    if config.fingerprint is not None and config.fingerprint != fingerprint:
        raise MismatchError(
            "the head was trained on another target of the same sizes",
            field="fingerprint",
            value=config.fingerprint,
            allowed=fingerprint,
            remedy=remedy,
        )
