"""Rounds as device programs, recorded on the CPU: plain tokens in every batch, no word from the host, one round late."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import engines
import pytest
import torch
from host_reads import HostReads

from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Shape
from specdec.engine.engine import Engine, Limits
from specdec.engine.graphs import Work
from specdec.engine.pipeline import Pipeline
from specdec.engine.request import Request
from specdec.sampling import Sampling
from specdec.target.protocol import Target

WIDE, FULL = Shape(2, 8, 24), Shape(7, 10, 60)
SHAPES = (Shape(1, 4, 5), WIDE, Shape(8, 1, 9), FULL)
PROMPTS = [[5, 6, 7, 8] * 6, [40, 41, 42, 40, 41], [9, 30, 31] * 7, [60, 3, 60, 4, 60, 5]]
LENGTHS = (22, 9, 16, 30)
Targets = Callable[..., Target]


class Replaying:
    """Does the work again. Recording does it, too, as warming up does; the first replays are watched."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.reads = 0, 0, list[str]()

    def record(self, work: Work) -> Work:
        self.recorded += 1
        work()
        watched = iter(range(2))

        def again() -> None:
            self.replayed += 1
            if next(watched, None) is None:
                return work()
            with HostReads() as found:
                work()
            self.reads += found

        return again


def _ahead(machine: Engine, recording: Replaying | None = None) -> Engine:
    depth = machine.budget.limit.depth
    machine.pipeline = Pipeline(
        machine.target, machine.drafter, machine.cache, depth, recording or Replaying()
    )
    return machine


def _requests(sampled: bool = False, wanted: Sequence[int] = LENGTHS) -> list[Request]:
    heats = (0.8, 0.0, 1.3, 0.5) if sampled else (0.0,) * 4
    return [
        engines.request(f"r{i}", prompt, Sampling(temperature=heat, seed=i, max_tokens=length, ignore_eos=True))
        for i, (prompt, heat, length) in enumerate(zip(PROMPTS, heats, wanted, strict=True))
    ]  # fmt: skip


def _alone(target: Target, requests: Sequence[Request]) -> list[list[int]]:
    for request in requests:
        engines.run(engines.engine(target), [request])
    return [r.output for r in requests]


def _head(target: Target, answers: Sequence[Sequence[int]], limits: Limits = engines.LIMITS) -> EagleDrafter:
    ids = {token for answer in answers for token in answer}
    return engines.eagle(target, engines.random_head(target, ids | set(range(40, 60))), limits)


@pytest.fixture(scope="module")
def plain(target_of: Targets) -> Callable[[str, bool], list[list[int]]]:
    """Plain answers by architecture, greedy or sampled, computed once."""
    known: dict[tuple[str, bool], list[list[int]]] = {}

    def get(arch: str, sampled: bool = False) -> list[list[int]]:
        if (arch, sampled) not in known:
            known[arch, sampled] = _alone(target_of(arch), _requests(sampled))
        return known[arch, sampled]

    return get


CASES = [("llama", shape, False, 0) for shape in SHAPES] + [
    ("llama", WIDE, True, 0), ("llama", FULL, False, 3), ("llama", WIDE, True, 2),
    ("qwen3", WIDE, False, 0), ("qwen3", FULL, True, 1), ("mistral", WIDE, True, 1),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "shape", "sampled", "apart"), CASES)
def test_tokens_are_plain_ones_and_nothing_is_read(
    target_of: Targets, plain: Callable, arch: str, shape: Shape, sampled: bool, apart: int
) -> None:
    """Four requests over three slots, all at once or joining one by one; the counters are the eager round's."""
    target, wanted, recording = target_of(arch), plain(arch, sampled), Replaying()
    machine = _ahead(engines.engine(target, _head(target, wanted), shape), recording)
    requests = _requests(sampled)
    engines.run(machine, requests, apart)
    assert [r.output for r in requests] == wanted
    assert machine.pipeline is not None
    assert recording.reads == []
    assert recording.replayed > 8
    eager = engines.engine(target, _head(target, wanted), shape)
    stepwise = _requests(sampled)
    engines.run(eager, stepwise, apart)
    for ours, theirs in zip(requests, stepwise, strict=True):
        assert ours.counters.accepted == theirs.counters.accepted
        assert ours.counters.reached == theirs.counters.reached
        assert (ours.counters.drafted, ours.counters.cut) == (theirs.counters.drafted, theirs.counters.cut)
    assert machine.counters.tau > 1.02


def test_the_twin_sees_every_way_of_asking() -> None:
    numbers = torch.tensor([1, 0, 3])
    ways: list[Callable[[], object]] = [
        numbers.tolist, lambda: int(numbers[0]), lambda: bool(numbers[1]), lambda: numbers.nonzero(),
        lambda: numbers[numbers > 0], lambda: torch.tensor([2]), lambda: numbers.max().item(),
    ]  # fmt: skip
    for way in ways:
        with HostReads() as found:
            way()
        assert found
    with HostReads() as found:
        numbers.sort(stable=True).values[torch.where(numbers > 0, 1, 0)].sum()
    assert found == []
