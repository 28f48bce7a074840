"""What rounds did: acceptance length, acceptance rates by depth, seconds by phase.

Definitions (one place for the engine, the trainer, the bench and the report):
    tau                     tokens emitted per target forward, bonus included; prefills and rounds cut short by a
                            stop are left out
    alpha(d)                accepted at depth d / rounds that reached depth d - 1 and offered depth d (conditional)
    accepted_per_position   accepted at depth d / all rounds (unconditional; what vLLM reports)
A round offers depth d when its deepest node is at least that deep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from specdec.accept import Verdict
from specdec.tree import MAX_NODES, DraftTree

PHASES = ("prefill", "draft", "verify", "accept")


@dataclass(frozen=True, slots=True)
class Round:
    """What a recorder sees of one round; tensors are the engine's own and must be copied to be kept.

    Attributes:
        requests: ids of the B requests.
        tree: the drafted trees.
        chosen: int64 [B, N], the target's own tokens.
        verdict: what was accepted.
        logits: [B, N, V] of the target.
        features: [B, N, F] taps.
    """

    requests: tuple[str, ...]
    tree: DraftTree
    chosen: Tensor
    verdict: Verdict
    logits: Tensor
    features: Tensor


class Recorder(Protocol):
    """Hears of every round, with its tensors: rounds then run step by step. With none attached the engine does no
    extra work."""

    def record(self, round: Round) -> None: ...


class Watcher(Protocol):
    """Hears what each request was offered in a round, before it gets its tokens; captured rounds stay captured."""

    def saw(self, request: str, nodes: int, offered: int) -> None:
        """A round verified so many nodes for this request, the root included, the deepest at depth `offered`."""
        ...


@dataclass(slots=True)
class Counters:
    """Running sums of one request, or of many.

    Attributes:
        rounds, emitted: target forwards and their tokens, cut rounds left out.
        drafted: draft nodes verified.
        reached[d], accepted[d]: rounds that reached depth d - 1 and offered d; rounds that accepted at depth d.
        seconds: by phase; shared rounds count in full for each request in them.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    cut: int = 0
    reached: list[int] = field(default_factory=lambda: [0] * (MAX_NODES + 1))
    accepted: list[int] = field(default_factory=lambda: [0] * (MAX_NODES + 1))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def add_round(self, emitted: int, offered: int, nodes: int, *, cut: bool) -> None:
        """Count one round of one request: tokens it gave, deepest node on offer, nodes verified."""
        if cut:
            self.cut += 1
            return
        self.rounds += 1
        self.emitted += emitted
        self.drafted += nodes - 1
        for depth in range(1, min(offered, emitted) + 1):
            self.reached[depth] += 1
        for depth in range(1, emitted):
            self.accepted[depth] += 1

    def add(self, other: Counters) -> None:
        """Sum two sets of counters in place."""
        self.rounds += other.rounds
        self.emitted += other.emitted
        self.drafted += other.drafted
        self.cut += other.cut
        for depth in range(MAX_NODES + 1):
            self.reached[depth] += other.reached[depth]
            self.accepted[depth] += other.accepted[depth]
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def tau(self) -> float:
        return self.emitted / self.rounds if self.rounds else float("nan")

    def alpha(self) -> list[float]:
        """alpha(1), alpha(2), ... up to the deepest depth ever offered."""
        deepest = max((d for d, count in enumerate(self.reached) if count), default=0)
        return [self.accepted[d] / self.reached[d] if self.reached[d] else 0.0 for d in range(1, deepest + 1)]

    def accepted_per_position(self) -> list[float]:
        """Unconditional acceptance by depth."""
        deepest = max((d for d, count in enumerate(self.reached) if count), default=0)
        return [self.accepted[d] / self.rounds if self.rounds else 0.0 for d in range(1, deepest + 1)]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for `--json`."""
        return {
            "tau": round(self.tau, 4) if self.rounds else None,
            "alpha": [round(a, 4) for a in self.alpha()],
            "accepted_per_position": [round(a, 4) for a in self.accepted_per_position()],
            "rounds": self.rounds,
            "emitted": self.emitted,
            "drafted": self.drafted,
            "seconds": {phase: round(value, 4) for phase, value in self.seconds.items()},
        }


def total(counters: Iterable[Counters]) -> Counters:
    """One set of counters out of many."""
    out = Counters()
    for one in counters:
        out.add(one)
    return out
