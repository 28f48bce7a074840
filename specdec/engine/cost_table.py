"""What one forward and one drafting level cost, in milliseconds: measured cells, and interpolation between them.

`costs` measures it, `budget` asks it. Knows neither targets nor clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class CostTable:
    """Milliseconds of one forward, measured.

    Attributes:
        verify: {B: {N: ms}} of a target forward over B trees of N nodes, LM head included.
        level: {B: ms} of one drafting level, growth included.
        extend: {B: ms} of reading the newly accepted tokens and making the first level.
    """

    verify: Mapping[int, Mapping[int, float]]
    level: Mapping[int, float]
    extend: Mapping[int, float]
    _known: dict[tuple[int, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def verify_ms(self, batch: int, nodes: int) -> float:
        """Interpolated milliseconds for `batch` trees of `nodes` nodes; a round asks for dozens, so they are kept."""
        ms = self._known.get((batch, nodes))
        if ms is None:
            ms = _between(self.verify, batch, lambda row: _between(row, nodes, float))
            self._known[batch, nodes] = ms
        return ms

    def draft_ms(self, batch: int, levels: int) -> float:
        """Milliseconds of growing trees of `levels` levels."""
        if levels == 0 or not self.level:
            return 0.0
        return _between(self.extend, batch, float) + (levels - 1) * _between(self.level, batch, float)

    def as_dict(self) -> dict[str, Any]:
        return {
            "verify": {b: dict(row) for b, row in self.verify.items()},
            "level": dict(self.level),
            "extend": dict(self.extend),
        }

    @staticmethod
    def from_dict(data: Any) -> CostTable:
        """Inverse of `as_dict`, also through JSON. Raises ValueError for anything that is not a table."""
        try:
            verify = {int(b): _milliseconds(row) for b, row in data["verify"].items()}
            table = CostTable(verify, _milliseconds(data["level"]), _milliseconds(data["extend"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a cost table: {error!r}") from error
        if not verify or any(1 not in row for row in verify.values()):
            raise ValueError("the cost table lacks cells")
        if table.level.keys() != table.extend.keys():
            raise ValueError("the cost table knows levels and extensions of different batches")
        return table


def _milliseconds(row: Mapping[str, Any]) -> dict[int, float]:
    out = {int(k): float(v) for k, v in row.items()}
    if not all(0 < ms < math.inf for ms in out.values()):
        raise ValueError("milliseconds must be positive numbers")
    return out


def _between(table: Mapping[int, Any], at: int, value: Callable[[Any], float]) -> float:
    """Linear interpolation in a table with whole-number keys; beyond its ends, in proportion to the last."""
    known = sorted(table)
    if at in table:
        return value(table[at])
    if at > known[-1]:
        return value(table[known[-1]]) * at / known[-1]
    high = next(k for k in known if k > at)
    below = [k for k in known if k < at]
    if not below:
        return value(table[high])
    low = below[-1]
    share = (at - low) / (high - low)
    return value(table[low]) * (1 - share) + value(table[high]) * share
