"""Recipe: everything that is chosen about a training run, from YAML and `section.field=value` overrides.

Knows how to read, check, write and compare recipes; the meaning of each field stands in `training.sections`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from specdec.errors import SpecdecError
from training.sections import (
    CacheSection,
    DataSection,
    EvaluationSection,
    HeadSection,
    LossSection,
    OptimizerSection,
    ResponsesSection,
    TrainerSection,
    UnrollSection,
    VocabSection,
)

RECIPES = Path(__file__).parent / "recipes"
# beside its own errors, YAML's reader raises those of Python: for dates that are none, for brackets without end
BROKEN = (yaml.YAMLError, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run. Frozen; `to_yaml` and `load_recipe` are inverse to each other."""

    data: DataSection = field(default_factory=DataSection)
    responses: ResponsesSection = field(default_factory=ResponsesSection)
    vocab: VocabSection = field(default_factory=VocabSection)
    head: HeadSection = field(default_factory=HeadSection)
    unroll: UnrollSection = field(default_factory=UnrollSection)
    loss: LossSection = field(default_factory=LossSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    cache: CacheSection = field(default_factory=CacheSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        if self.trainer.batch_tokens < self.data.max_length:
            raise SpecdecError(
                "cannot hold one window",
                field="trainer.batch_tokens",
                value=self.trainer.batch_tokens,
                allowed=f">= data.max_length = {self.data.max_length}",
                remedy="Raise trainer.batch_tokens or lower data.max_length.",
            )

    def to_yaml(self) -> str:
        """The recipe as YAML, every field spelled out."""
        text: str = yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True)
        return text

    def hash(self) -> str:
        """16 hex digits of everything in it; the same on every machine and Python."""
        text = json.dumps(_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Recipe) -> list[str]:
        """Fields in which two recipes differ, as `section.field: mine -> theirs`."""
        mine, theirs = _plain(self), _plain(other)
        return [
            f"{section}.{name}: {value} -> {theirs[section][name]}"
            for section, values in mine.items()
            for name, value in values.items()
            if value != theirs[section][name]
        ]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name (`cpu`, `gpu`, `large`) or from a YAML file, changed by `section.field=value` texts.

    Raises:
        SpecdecError: no such recipe, broken YAML, an unknown section or field (told with the nearest one),
            a value of the wrong type or out of range.
    """
    return parse_recipe(_recipe_file(name).read_bytes(), overrides, str(name))


def parse_recipe(text: str | bytes, overrides: Iterable[str] = (), origin: str = "recipe") -> Recipe:
    """A recipe from YAML text; raises as `load_recipe` does."""
    try:
        given = yaml.safe_load(text) or {}
    except BROKEN as error:
        raise SpecdecError(f"is not YAML: {error}", field="recipe", value=origin) from error
    values: dict[str, dict[str, Any]] = {section: {} for section in _sections()}
    for section, entries in _mapping(given, "recipe").items():
        _known(section, values, "section")
        for name, value in _mapping(entries or {}, section).items():
            values[section][name] = value
    for override in overrides:
        section, name, value = _override(override)
        values[section][name] = value
    return Recipe(**{section: _build(section, entries) for section, entries in values.items()})


def _recipe_file(name: str | Path) -> Path:
    shipped = RECIPES / f"{name}.yaml"
    path = shipped if isinstance(name, str) and name in recipe_names() else Path(name)
    if not path.is_file():
        raise SpecdecError("no such recipe", field="recipe", value=str(name),
                           allowed=f"{', '.join(recipe_names())}, or a YAML file",
                           remedy=_nearest(str(name), recipe_names()))  # fmt: skip
    return path


def _sections() -> dict[str, type[Any]]:
    return get_type_hints(Recipe)


def _plain(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """As JSON and YAML see it: tuples become lists."""
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(asdict(recipe)))
    return plain


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecdecError("wants fields and values", field=where, value=value, allowed="a YAML mapping")
    return value


def _override(text: str) -> tuple[str, str, Any]:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise SpecdecError("is not an override", field="recipe override", value=text,
                           allowed="section.field=value, such as optimizer.lr=3e-4")  # fmt: skip
    _known(section, _sections(), "section")
    return section, name, _value(value)


def _value(text: str) -> Any:
    """What YAML makes of a value; one that it cannot read is text, and told by what it was meant for."""
    try:
        return yaml.safe_load(text)
    except BROKEN:
        return text


def _known(name: str, names: Iterable[str], kind: str, section: str = "") -> None:
    names = list(names)
    if name not in names:
        where = f"{section}.{name}" if section else str(name)
        raise SpecdecError(f"is no {kind} of a recipe", field=where, allowed=", ".join(names),
                           remedy=_nearest(str(name), names))  # fmt: skip


def _nearest(name: str, names: list[str]) -> str | None:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"Did you mean {close[0]}?" if close else None


def _build(section: str, entries: Mapping[str, Any]) -> Any:
    kind = _sections()[section]
    hints = get_type_hints(kind)
    for name in entries:
        _known(name, [f.name for f in fields(kind)], "field", section)
    return kind(**{name: _typed(value, hints[name], f"{section}.{name}") for name, value in entries.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` says, or SpecdecError. YAML 1.1 reads 1e-4 as text, so numbers may come as text."""
    found = _fit(value, hint)
    if found is _MISFIT:
        raise SpecdecError("is of the wrong type", field=where, value=value, allowed=_spell(hint))
    return found


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return next((fit for one in inner if (fit := _fit(value, one)) is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if value in inner else _MISFIT
    if origin is tuple:
        return _fit_tuple(value, inner)
    if hint is type(None):
        return None if value is None or value in ("none", "None") else _MISFIT
    return _fit_scalar(value, hint)


def _fit_scalar(value: Any, hint: Any) -> Any:
    if hint in (bool, str):
        return value if type(value) is hint else _MISFIT
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _MISFIT
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _MISFIT
    if hint is float:
        return number if math.isfinite(number) else _MISFIT  # neither NaN nor infinity is a setting
    if isinstance(value, int):
        return value
    return int(number) if number.is_integer() and abs(number) < 2**53 else _MISFIT


def _fit_tuple(value: Any, inner: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return _MISFIT  # a list without its end: perhaps a shell took its spaces for ends of words
        value = [_value(part) for part in value.split(",")]
    if not isinstance(value, list | tuple):
        return _MISFIT
    hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(hints) != len(value):
        return _MISFIT
    fitted = tuple(_fit(one, hint) for one, hint in zip(value, hints, strict=True))
    return _MISFIT if any(one is _MISFIT for one in fitted) else fitted


def _spell(hint: Any) -> str:
    """A type as a person would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return " or ".join(_spell(one) for one in inner)
    if origin is Literal:
        return ", ".join(str(one) for one in inner)
    if origin is tuple:
        names = [_spell(one) for one in inner if one is not Ellipsis]
        return f"a list of {names[0]}" if inner[-1] is Ellipsis else f"[{', '.join(names)}]"
    words = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return words[hint]
