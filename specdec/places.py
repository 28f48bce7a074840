"""Where specdec keeps what it can make again: dequantised weights, cost tables, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$SPECDEC_CACHE, else specdec under $XDG_CACHE_HOME or ~/.cache. Not created here."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specdec"
