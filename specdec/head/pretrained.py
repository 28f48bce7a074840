"""Heads that ship with the package, by the name of their target. Knows where they lie, not what is in
them."""

from __future__ import annotations

from pathlib import Path

from specdec.head.files import CONFIG

FOLDER = Path(__file__).parent / "pretrained"


def shipped_head(target_name: str) -> Path | None:
    """Directory of the head shipped for a target, None when there is none.

    >>> shipped_head("no-such-target") is None
    True
    """
    if not target_name or Path(target_name).name != target_name or target_name in (".", ".."):
        return None  # a path or a Hub id, not a name of ours
    folder = FOLDER / target_name
    return folder if (folder / CONFIG).is_file() else None
