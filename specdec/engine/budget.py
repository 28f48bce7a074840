"""How much to draft: a cost table measured on this machine, and what a node or a level must promise to pay.

Everything is expressed in milliseconds and tokens: a node is verified when the tokens it is expected to add are worth
more than the time it takes at the rate already achieved; a level is grown on the same terms; and where whole rounds
of speculation earn less than plain ones, it is switched off and tried again later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec.drafting.protocol import PLAIN, Shape

DECAY = 0.95  # of the running rate of speculation: about the last twenty rounds
TRIAL = 12  # rounds before speculation may be judged
SHORTEST_PAUSE, LONGEST_PAUSE = 32, 512  # plain rounds between trials
CARRY = 0.6  # share of a frontier's mass that the next level is expected to win


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

    def verify_ms(self, batch: int, nodes: int) -> float:
        """Interpolated milliseconds for `batch` trees of `nodes` nodes."""
        return _between(self.verify, batch, lambda row: _between(row, nodes, float))

    def draft_ms(self, batch: int, levels: int) -> float:
        """Milliseconds of growing trees of `levels` levels."""
        if levels == 0 or not self.level:
            return 0.0
        return _between(self.extend, batch, float) + (levels - 1) * _between(self.level, batch, float)

    def node_ms(self, batch: int) -> float:
        """Milliseconds one more node in each of `batch` trees costs, the average over the measured range."""
        row = self.verify[min(self.verify, key=lambda b: abs(b - batch))]
        most = max(row)
        return max((row[most] - row[1]) / max(most - 1, 1), 1e-6)

    def as_dict(self) -> dict[str, Any]:
        return {
            "verify": {b: dict(row) for b, row in self.verify.items()},
            "level": dict(self.level),
            "extend": dict(self.extend),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CostTable:
        def keys(row: Mapping[str, Any]) -> dict[int, float]:
            return {int(k): float(v) for k, v in row.items()}

        return CostTable(
            {int(b): keys(row) for b, row in data["verify"].items()},
            keys(data["level"]),
            keys(data["extend"]),
        )


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


@dataclass(slots=True)
class _Trial:
    """The running rate of speculation at one batch size, and whether it is paused."""

    tokens: float = 0.0
    ms: float = 0.0
    rounds: int = 0
    paused: int = 0
    pause: int = SHORTEST_PAUSE

    def note(self, tokens: float, ms: float) -> None:
        self.tokens = self.tokens * DECAY + tokens
        self.ms = self.ms * DECAY + ms
        self.rounds += 1


@dataclass(slots=True)
class Budget:
    """Chooses the shape of the next round's trees.

    Args:
        costs: the measured table; None fixes the shape.
        limit: the largest tree ever used, or the fixed one.
        adaptive: False always answers `limit`.
    """

    costs: CostTable | None
    limit: Shape
    adaptive: bool = True
    trials: dict[int, _Trial] = field(default_factory=dict)

    def shape(self, batch: int) -> Shape:
        """The shape for a round of `batch` requests."""
        if not self.adaptive or self.costs is None or self.limit.depth == 0:
            return self.limit
        trial = self.trials.setdefault(_bucket(batch), _Trial())
        if trial.paused > 0:
            trial.paused -= 1
            return PLAIN
        rate = self._rate(batch, trial)
        node = rate * self.costs.node_ms(batch) / batch
        level = self.costs.draft_ms(batch, 2) - self.costs.draft_ms(batch, 1)
        return Shape(self.limit.depth, self.limit.width, self.limit.nodes, node, rate * level / batch / CARRY)

    def _rate(self, batch: int, trial: _Trial) -> float:
        """Tokens per millisecond that time is worth now: at least what plain decoding earns."""
        assert self.costs is not None
        plain = batch / self.costs.verify_ms(batch, 1)
        return max(plain, trial.tokens / trial.ms) if trial.ms and trial.rounds >= TRIAL // 2 else plain

    def note(self, shape: Shape, batch: int, nodes: int, levels: int, emitted: int) -> None:
        """A round ended: `batch` trees of `nodes` nodes and `levels` levels gave `emitted` tokens in all."""
        if shape.depth == 0 or not self.adaptive or self.costs is None:
            return
        trial = self.trials.setdefault(_bucket(batch), _Trial())
        spent = self.costs.verify_ms(batch, nodes) + self.costs.draft_ms(batch, levels)
        trial.note(emitted, spent)
        if trial.rounds < TRIAL:
            return
        if trial.tokens / trial.ms < batch / self.costs.verify_ms(batch, 1):
            self.trials[_bucket(batch)] = _Trial(
                paused=trial.pause, pause=min(2 * trial.pause, LONGEST_PAUSE)
            )
        elif trial.rounds > 4 * TRIAL:
            trial.pause = SHORTEST_PAUSE


def _bucket(batch: int) -> int:
    """Batch sizes that share a verdict: powers of two."""
    return 1 << (batch - 1).bit_length()
