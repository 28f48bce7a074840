"""Rounds as device programs, recorded on the CPU: plain tokens, no word from the host, one round late."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import engines
import pytest
import torch
from host_reads import HostReads
from recordings import Replaying

from bench.replay import Profile, ReplayDrafter, ReplayHead
from specdec.attention.reference import ReferenceAttention
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN, Drafter, Shape
from specdec.engine.engine import Engine, Limits
from specdec.engine.graphs import CudaRecording, Work, nothing
from specdec.engine.pipeline import Pipeline
from specdec.engine.request import Request
from specdec.sampling import Sampling
from specdec.target.protocol import Target

WIDE, FULL = Shape(2, 8, 24), Shape(7, 10, 60)
SHAPES = (Shape(1, 4, 5), WIDE, Shape(8, 1, 9), FULL)
PROMPTS = [[5, 6, 7, 8] * 6, [40, 41, 42, 40, 41], [9, 30, 31] * 7, [60, 3, 60, 4, 60, 5]]
LENGTHS = (22, 9, 16, 30)
Targets = Callable[..., Target]


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


def test_a_watcher_hears_of_captured_rounds(target_of: Targets, plain: Callable) -> None:
    """A server's metrics must not cost it the device programs."""
    heard: list[tuple[str, int, int]] = []

    class Listener:
        def saw(self, request: str, nodes: int, offered: int) -> None:
            heard.append((request, nodes, offered))

    target, recording = target_of("llama"), Replaying()
    machine = _ahead(engines.engine(target, _head(target, plain("llama", False)), WIDE), recording)
    machine.watcher = Listener()
    requests = _requests()
    engines.run(machine, requests)
    assert recording.replayed > 8
    rounds = {r.id: r.counters.rounds + r.counters.cut for r in requests}
    assert {name: sum(one == name for one, _, _ in heard) for name in rounds} == rounds
    assert all(1 <= nodes <= WIDE.nodes and offered <= WIDE.depth for _, nodes, offered in heard)


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


def _speculating(target: Target, answers: Sequence[Sequence[int]], shape: Shape = WIDE) -> Engine:
    return _ahead(engines.engine(target, _head(target, answers), shape))


def test_plain_decoding_is_the_same_program_over_roots(target_of: Targets, plain: Callable) -> None:
    for sampled in (False, True):
        machine, requests = _ahead(engines.engine(target_of("llama"), NoDrafter())), _requests(sampled)
        engines.run(machine, requests, apart=1)
        assert [r.output for r in requests] == plain("llama", sampled)
        assert machine.counters.tau == 1


def test_a_stop_in_the_middle_ends_one_answer_and_spoils_nobody(target_of: Targets, plain: Callable) -> None:
    """The round that was launched meanwhile is discarded for whoever stopped."""
    target, wanted = target_of("llama"), plain("llama")
    stops = [answer[len(answer) // 2] for answer in wanted]
    machine, requests = _speculating(target, wanted), _requests()
    for request, stop in zip(requests, stops, strict=True):
        request.stop_ids = frozenset({stop})
    pieces = engines.run(machine, requests)
    for request, answer, stop in zip(requests, wanted, stops, strict=True):
        assert request.output == answer[: answer.index(stop) + 1]
        assert request.finish == "stop"
        mine = [p for p in pieces if p.request == request.id]
        assert [t for p in mine for t in p.tokens] == request.output
        assert [p.finish for p in mine if p.finish] == ["stop"]
    assert machine.active == {}


def test_the_context_can_be_filled_to_its_end(target_of: Targets) -> None:
    target, limits = target_of("llama"), Limits(slots=2, length=40, chunk=16)
    asked = [(PROMPTS[0][:12], 28), (PROMPTS[1], 35), (PROMPTS[2][:20], 20)]

    def requests() -> list[Request]:
        return [engines.request(f"r{i}", p, Sampling(max_tokens=n)) for i, (p, n) in enumerate(asked)]

    wanted = _alone(target, requests())
    for shape in (Shape(7, 10, 60), Shape(12, 1, 13), PLAIN):
        drafter: Drafter = _head(target, wanted, limits) if shape.depth else NoDrafter()
        machine, ours = _ahead(engines.engine(target, drafter, shape, limits)), requests()
        engines.run(machine, ours)
        assert [r.output for r in ours] == wanted


def test_recording_near_the_end_of_the_context_stays_in_the_slot(target_of: Targets) -> None:
    """A second request joins one that has all but filled its slot, whose drafts are always right: the rounds that warm
    up must not add to one another."""
    target, limits, shape = target_of("llama"), Limits(slots=2, length=64, chunk=16), FULL
    asked = [(tuple([5, 6, 7, 8] * 4), 48), (tuple([9, 30, 31] * 5), 8)]
    ours = [engines.request(f"r{i}", p, Sampling(max_tokens=n)) for i, (p, n) in enumerate(asked)]
    known = [engines.request(f"k{i}", p, Sampling(max_tokens=60)) for i, (p, _) in enumerate(asked)]
    long = _alone(target, known)
    texts = {prompt: tuple(answer) for (prompt, _), answer in zip(asked, long, strict=True)}
    right = ReplayDrafter(texts, Profile((1.0,)), 2, target.info.vocab, torch.device("cpu"))
    head = engines.random_head(target, range(3, 90))
    head.freeze()
    drafter = ReplayHead(head, target.embed, ReferenceAttention(), 2, limits.length, right)
    machine = _ahead(engines.engine(target, drafter, shape, limits))
    machine.add(ours[0])
    while len(ours[0].output) < 30:
        machine.step()
    assert ours[0].finish is None
    engines.run(machine, ours[1:])
    assert machine.pipeline is not None, "a row past the slot ended it"
    assert [r.output for r in ours] == [answer[:n] for answer, (_, n) in zip(long, asked, strict=True)]
    assert ours[0].counters.tau > 4


def test_what_does_not_fit_runs_step_by_step_and_comes_back(target_of: Targets, plain: Callable) -> None:
    """A penalised request joins in the middle: the batch leaves the device, and returns to it afterwards."""
    target, wanted, recording = target_of("llama"), plain("llama"), Replaying()
    odd = Sampling(max_tokens=6, repetition_penalty=1.3, presence_penalty=0.5)
    alone = engines.request("alone", PROMPTS[1], odd)
    engines.run(engines.engine(target), [alone])
    machine = _ahead(engines.engine(target, _head(target, wanted), WIDE), recording)
    requests, guest = _requests(), engines.request("guest", PROMPTS[1], odd)
    for request in (requests[0], requests[3]):
        machine.add(request)
    for _ in range(5):
        machine.step()
    before = recording.replayed
    machine.add(guest)
    while guest.finish is None:
        machine.step()
        assert recording.replayed == before, "a round with penalties was replayed"
    assert guest.output == alone.output
    engines.run(machine, [])
    assert recording.replayed > before
    assert [requests[0].output, requests[3].output] == [wanted[0], wanted[3]]
    eager = engines.engine(target, _head(target, wanted), WIDE)
    stepwise = [_requests()[i] for i in (0, 3)]
    engines.run(eager, stepwise)
    assert requests[3].counters.emitted == stepwise[1].counters.emitted, "pairs were lost on the way"


class _Paused:
    """A budget that drafts, pauses long enough for pairs to pile up, and drafts again."""

    adaptive, costs, limit = False, None, WIDE

    def __init__(self, plain_rounds: range) -> None:
        self.turn, self.plain_rounds = 0, plain_rounds

    def shape(self, batch: int) -> Shape:
        self.turn += 1
        return PLAIN if self.turn in self.plain_rounds else WIDE

    def welcome(self, running: int) -> None: ...

    def note(self, *_: object) -> None: ...

    def earned(self, *_: object) -> None: ...


@pytest.mark.parametrize("pause", [range(5, 30), range(3, 75)])
def test_pairs_of_a_long_pause_are_read_before_the_next_tree(target_of: Targets, pause: range) -> None:
    target, limits = target_of("llama"), Limits(slots=2, length=160, chunk=64)

    def requests() -> list[Request]:
        return [engines.request(f"r{i}", PROMPTS[i], Sampling(max_tokens=100)) for i in (0, 1)]

    machines, outputs = [], []
    ids = _alone_long(target, requests(), limits)
    for ahead in (False, True):
        machine = engines.engine(target, _head(target, ids, limits), WIDE, limits)
        machine.budget = _Paused(pause)  # type: ignore[assignment]
        machines.append(_ahead(machine) if ahead else machine)
        asked = requests()
        engines.run(machine, asked)
        outputs.append([r.output for r in asked])
    assert outputs[0] == outputs[1] == ids
    drafted = [m.counters.drafted for m in machines]
    assert machines[1].counters.tau > 1.02
    assert abs(drafted[0] - drafted[1]) <= 2 * 23, "the head was not asked again after the pause"


def _alone_long(target: Target, requests: Sequence[Request], limits: Limits) -> list[list[int]]:
    for request in requests:
        engines.run(engines.engine(target, limits=limits), [request])
    return [r.output for r in requests]


def test_a_plain_request_among_speculating_ones_stays_plain(target_of: Targets, plain: Callable) -> None:
    machine, requests = _speculating(target_of("llama"), plain("llama"), FULL), _requests()
    requests[0].speculate = False
    engines.run(machine, requests)
    assert [r.output for r in requests] == plain("llama")
    assert requests[0].counters.drafted == 0
    assert requests[3].counters.drafted > 0


def test_cancelling_lands_what_is_in_flight_first(target_of: Targets, plain: Callable) -> None:
    target, wanted = target_of("llama"), plain("llama")
    machine, requests = _speculating(target, wanted), _requests()
    for request in requests[:3]:
        machine.add(request)
    for _ in range(6):
        machine.step()
    assert machine.pipeline is not None
    assert len(machine.pipeline.flights) == 1
    known = len(requests[0].output)
    machine.cancel(requests[0].id)
    pieces = machine.step()
    ours = [p for p in pieces if p.request == requests[0].id]
    assert [p.finish for p in ours] == [None, "cancelled"]
    assert known < len(requests[0].output) < len(wanted[0])
    assert requests[0].output == wanted[0][: len(requests[0].output)]
    engines.run(machine, requests[3:])
    assert [r.output for r in requests[1:]] == wanted[1:]


def test_equal_prompts_that_come_together_share_what_the_first_has_run(target_of: Targets) -> None:
    """The first is in flight when the others look again; each then goes its own way."""
    target, prompt = target_of("llama"), PROMPTS[0]

    def requests() -> list[Request]:
        samplings = [Sampling(temperature=0.9, seed=i, max_tokens=12, ignore_eos=True) for i in range(3)]
        return [engines.request(f"r{i}", prompt, sampling) for i, sampling in enumerate(samplings)]

    wanted = _alone(target, requests())
    machine, ours = _speculating(target, wanted), requests()
    engines.run(machine, ours)
    assert machine.pipeline is not None
    assert [r.output for r in ours] == wanted
    assert [r.reused for r in ours] == [0, len(prompt) - 2, len(prompt) - 2]
    eager, theirs = engines.engine(target, _head(target, wanted), WIDE), requests()
    engines.run(eager, theirs)
    assert [r.counters.accepted for r in ours] == [r.counters.accepted for r in theirs]


def test_a_prefix_is_taken_over_from_a_request_that_ran_on_the_device(target_of: Targets) -> None:
    target, sampling = target_of("llama"), Sampling(max_tokens=14)
    first = engines.request("first", PROMPTS[0], sampling)
    engines.run(engines.engine(target), [first])
    longer = [*PROMPTS[0], *first.output, 7, 8, 9]
    second = engines.request("second", longer, sampling)
    engines.run(engines.engine(target), [second])
    answers = [first.output, second.output]
    taus = []
    for ahead in (False, True):
        machine = engines.engine(target, _head(target, answers), WIDE)
        machine = _ahead(machine) if ahead else machine
        ours = [engines.request("first", PROMPTS[0], sampling), engines.request("second", longer, sampling)]
        for request in ours:
            engines.run(machine, [request])
        assert [r.output for r in ours] == answers
        assert ours[1].reused >= len(PROMPTS[0])
        taus.append(ours[1].counters.emitted)
    assert taus[0] == taus[1], "the head took over other rows"


def test_logits_that_are_not_numbers_fail_one_request_alone(target_of: Targets, plain: Callable) -> None:
    target, wanted = target_of("llama"), plain("llama")
    machine, requests = _speculating(target, wanted), _requests()
    for request in requests[:3]:
        machine.add(request)
    while not all(r.running for r in requests[:3]):
        machine.step()
    machine.cache.kv[:, :, requests[2].slot] = torch.nan
    engines.run(machine, requests[3:])
    assert [r.finish for r in requests] == ["length", "length", "error", "length"]
    assert [requests[i].output for i in (0, 1, 3)] == [wanted[i] for i in (0, 1, 3)]
    assert requests[2].output == wanted[2][: len(requests[2].output)]


def test_a_failed_request_leaves_the_head_nothing(target_of: Targets, plain: Callable) -> None:
    """The round in flight when its logits are found to be no numbers reads its features."""
    target, wanted = target_of("llama"), plain("llama")
    machine, eager = _speculating(target, wanted), engines.engine(target, _head(target, wanted), WIDE)
    failing = _requests()[2]
    machine.add(failing)
    while len(failing.output) < 3:
        machine.step()
    machine.cache.kv[:, :, failing.slot] = torch.nan
    engines.run(machine, [])
    assert failing.finish == "error"
    accepted = []
    for one in (machine, eager):
        engines.run(one, ours := _requests()[:3])
        assert [r.output for r in ours] == wanted[:3]
        accepted.append([r.counters.accepted for r in ours])
    assert accepted[0] == accepted[1], "the head saw something else"


class _Refusing(Replaying):
    """Like a driver that gives up at the second program, having run the work once."""

    def record(self, work: Work, restore: Work = nothing) -> Work:
        if self.recorded:
            work()
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().record(work, restore)


def test_a_recording_that_fails_leaves_rounds_step_by_step(target_of: Targets, plain: Callable) -> None:
    machine = engines.engine(target_of("llama"), _head(target_of("llama"), plain("llama")), WIDE)
    _ahead(machine, _Refusing())
    requests = _requests()
    with pytest.warns(UserWarning, match="no longer captured: operation not permitted"):
        engines.run(machine, requests, apart=2)
    assert machine.pipeline is None
    assert [r.output for r in requests] == plain("llama")


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_captured_rounds_ask_nothing_and_give_plain_tokens(
    tmp_path_factory: pytest.TempPathFactory, sampled: bool
) -> None:
    """On a device, with waiting forbidden from the launch of a recorded round to its end."""
    home = tmp_path_factory.mktemp("device")
    target = engines.load(home, "llama", "lean", device="cuda")
    wanted = _alone(target, _requests(sampled))
    shape, recording = WIDE, _Forbidding()
    machine = engines.engine(target, _head(target, wanted), shape)
    machine.pipeline = Pipeline(target, machine.drafter, machine.cache, shape.depth, recording)
    requests = _requests(sampled)
    engines.run(machine, requests, apart=2)
    assert machine.pipeline is not None
    assert recording.replayed > 8
    assert [r.output for r in requests] == wanted
    assert machine.counters.tau > 1.02


class _Forbidding:
    """CUDA graphs; the work is first done once as it is, and replays are launched, with waiting forbidden."""

    def __init__(self) -> None:
        self.inner, self.replayed = CudaRecording(), 0

    def record(self, work: Work, restore: Work = nothing) -> Work:
        work()  # builds tables and kernels, which may wait
        restore()
        with _no_waiting():
            work()
        restore()
        replay = self.inner.record(work, restore)

        def again() -> None:
            self.replayed += 1
            with _no_waiting():
                replay()

        return again


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
