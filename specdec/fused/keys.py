"""Lets kernels have the same key in every process, so that what one has compiled the next one finds.

Triton before 3.9 makes a kernel's key from what the functions it calls had theirs made of, if they had one yet: another
order of launches gives another key, and everything is compiled again.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# those that use others come after them
MODULES = ("overlap", "growth", "settle", "layer", "largest", "pairs", "product", "walk")


def settle_all() -> None:
    """Make the keys of this package's kernels."""
    for name in MODULES:
        settle(import_module(f"specdec.fused.{name}_kernels"))


def settle(module: ModuleType) -> None:
    """Make the keys of a module's kernels, after those of what every module calls: whether these had theirs before must
    not matter."""
    shared = import_module(f"specdec.fused.{MODULES[0]}_kernels")
    if module is not shared:
        settle(shared)
    for one in reversed(list(vars(module).values())):
        if getattr(one, "__module__", "") == module.__name__ and hasattr(one, "cache_key"):
            _ = one.cache_key  # made when it is first asked for
