"""Imports run downward, and heavy or optional packages are met only where the design says."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors", "unicode"),
    ("places",),
    ("tree", "sampling", "accept", "cache", "stats", "native", "fused", "memory"),
    ("layers", "attention"),
    ("target", "head"),
    ("drafting",),
    ("engine",),
    ("generate", "surplus"),
    ("server",),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: level for level, parts in enumerate(FLOORS) for part in parts}
VALUES = 2  # the floor whose parts may know each other, as long as no circle arises
TRAINING_MAY = FLOOR["engine"]  # the highest floor that training imports: the target answers through it
OPTIONAL = {"flash_attn", "flash_attn_interface", "triton"}
KERNELS = "_kernels"  # ends the names of modules of triton source; others import them only inside functions
TRANSFORMERS = ("specdec.target", "training.data")


@dataclass(frozen=True)
class Import:
    """One imported module: by whom, and whether at import time."""

    by: str
    name: str
    eager: bool


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _walk(node: ast.AST, eager: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement; `eager` is False inside functions and under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, eager
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        else:
            yield from _walk(child, eager)


def _targets(node: ast.Import | ast.ImportFrom, by: str, package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        here = by.split(".")
        up = here[: len(here) - node.level + package]
        base = ".".join([*up, *([node.module] if node.module else [])])
    # `from specdec import cache` imports specdec.cache
    return [f"{base}.{alias.name}" for alias in node.names] if "." not in base else [base]


def imports(source: str, by: str, package: bool = False) -> list[Import]:
    """What a module imports."""
    tree = ast.parse(source)
    return [
        Import(by, name, eager) for node, eager in _walk(tree, True) for name in _targets(node, by, package)
    ]


def _all() -> list[Import]:
    found = []
    for top in ("specdec", "training", "bench"):
        for path in sorted((ROOT / top).rglob("*.py")):
            found += imports(path.read_text(), _name(path, ROOT), path.name == "__init__.py")
    return found


def _part(module: str) -> str | None:
    """The room of a module: specdec.target.lean -> target; None for specdec itself and for others."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "specdec" and rest else None


def _upward(found: list[Import]) -> list[str]:
    """Imports between rooms that do not go down."""
    wrong = []
    for i in found:
        here, there = _part(i.by), _part(i.name)
        if here is None or there is None or here == there or there not in FLOOR:
            continue
        beside = FLOOR[here] == FLOOR[there] == VALUES
        if FLOOR[there] >= FLOOR[here] and not beside:
            wrong.append(f"{i.by} imports {i.name}")
    return wrong


def _elsewhere(found: list[Import]) -> list[str]:
    """Outside packages met where they should not be."""
    wrong = []
    for i in found:
        top = i.name.split(".")[0]
        lazy_cli = i.by.startswith("specdec.cli") and not i.eager
        misplaced = (
            (top == "transformers" and i.by.split(".")[0] != "bench"
             and not i.by.startswith(TRANSFORMERS) and not lazy_cli)
            or (top in OPTIONAL and i.eager and not i.by.endswith(KERNELS))
            or (i.name.endswith(KERNELS) and i.eager and not i.by.endswith(KERNELS))
            or (top in {"training", "bench"} and i.by.startswith("specdec") and i.eager)
        )  # fmt: skip
        if misplaced:
            wrong.append(f"{i.by} imports {i.name}" + ("" if i.eager else " (inside a function)"))
    return wrong


def _circles(found: list[Import]) -> None:
    """Raises CycleError when rooms of the values' floor form a circle."""
    graph: dict[str, set[str]] = {}
    for i in found:
        here, there = _part(i.by), _part(i.name)
        if here and there and here != there and FLOOR.get(here) == FLOOR.get(there) == VALUES:
            graph.setdefault(here, set()).add(there)
    TopologicalSorter(graph).prepare()


def test_rooms_import_downward_only() -> None:
    assert _upward(_all()) == []
    _circles(_all())


def test_every_room_has_a_floor() -> None:
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "specdec").iterdir()
             if p.suffix == ".py" or (p.is_dir() and any(p.rglob("*.py")))}  # fmt: skip
    assert rooms - {"__init__"} <= FLOOR.keys()


def test_training_imports_no_higher_than_the_engine() -> None:
    high = [f"{i.by} imports {i.name}" for i in _all() if i.by.startswith("training") and i.eager
            and FLOOR.get(_part(i.name) or "", 0) > TRAINING_MAY]  # fmt: skip
    assert high == []


def test_packages_are_met_only_in_their_room() -> None:
    assert _elsewhere(_all()) == []


@pytest.mark.parametrize(
    ("by", "line"),
    [
        ("specdec.accept", "from specdec.engine import round"),
        ("specdec.head.model", "import specdec.target.lean"),
        ("specdec.layers.linear", "def f():\n    from specdec.attention import reference"),
        ("specdec.cache", "from .generate import SpecDecoder"),
        ("specdec.tree", "from specdec import engine"),
    ],
)
def test_an_upward_import_is_seen(by: str, line: str) -> None:
    assert len(_upward(imports(line, by))) == 1


@pytest.mark.parametrize(
    ("by", "line"),
    [
        ("specdec.engine.rounds", "import transformers"),
        ("specdec.engine.rounds", "def f():\n    import transformers"),
        ("specdec.cli.main", "from transformers import AutoTokenizer"),
        ("specdec.attention.flash", "import flash_attn"),
        ("specdec.attention.triton", "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("specdec.attention.triton", "from specdec.attention.triton_kernels import combine"),
        ("specdec.cli.train", "from training.trainer import Trainer"),
    ],
)
def test_a_misplaced_package_is_seen(by: str, line: str) -> None:
    assert len(_elsewhere(imports(line, by))) == 1


@pytest.mark.parametrize(
    ("by", "line"),
    [
        ("specdec.target.load", "from transformers import PreTrainedTokenizerBase"),
        ("specdec.cli.main", "def f():\n    from transformers import logging"),
        ("specdec.attention.flash", "def f():\n    import flash_attn"),
        ("specdec.cli.train", "def f():\n    from training.trainer import Trainer"),
        (
            "specdec.engine.rounds",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
        ),
    ],
)
def test_a_proper_import_passes(by: str, line: str) -> None:
    found = imports(line, by)
    assert _elsewhere(found) == _upward(found) == []


def test_users_get_the_types() -> None:
    """Without the marker of PEP 561 type checkers take all of an installed package for Any."""
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / "specdec" / "py.typed").exists()
    assert "py.typed" in shipped["specdec"]
