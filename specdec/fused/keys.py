"""Lets kernels have the same key in every process, so that what one has compiled the next one finds.

Triton before 3.9 makes a kernel's key from what the functions it calls had theirs made of, if they had one yet: another
order of launches gives another key, and everything is compiled again.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType

# those that use others come after them
MODULES = ("overlap", "turns", "growth", "settle", "layer", "largest", "pairs", "product", "walk")


@functools.cache
def settle_all() -> None:
    """Make the keys of this package's kernels."""
    for name in MODULES:
        settle(import_module(f"specdec.fused.{name}_kernels"))


def settle(module: ModuleType) -> None:
    """Make the keys of a module's kernels, called functions first: they stand below those that call them. Modules that
    it uses must have theirs."""
    for one in reversed(list(vars(module).values())):
        if getattr(one, "__module__", "") == module.__name__ and hasattr(one, "cache_key"):
            _ = one.cache_key  # made when it is first asked for
