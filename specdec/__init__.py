"""specdec: lossless speculative decoding with a draft head, its training, and the reasons for its acceptance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Answer", "Options", "Sampling", "SpecDecoder", "SpecdecError", "__version__"]

if TYPE_CHECKING:
    from specdec.engine.build import Options
    from specdec.errors import SpecdecError
    from specdec.generate import Answer, SpecDecoder
    from specdec.sampling import Sampling

_HOME = {
    "Answer": "generate",
    "Options": "engine.build",
    "SpecDecoder": "generate",
    "Sampling": "sampling",
    "SpecdecError": "errors",
}


def __getattr__(name: str) -> Any:
    """Public names are loaded when first asked for, so that `--help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"specdec.{_HOME[name]}"), name)
