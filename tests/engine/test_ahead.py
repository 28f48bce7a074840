"""Start-up's trial of recorded rounds: what passes, what is refused and why, and what an engine is then made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engines
import pytest
from recordings import Broken, Forgetful, Replaying
from toy import ToyTarget

from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.protocol import Shape
from specdec.engine import build, costs
from specdec.engine.ahead import run_ahead
from specdec.engine.build import Options
from specdec.engine.engine import Limits
from specdec.engine.graphs import GraphedTarget, Recording
from specdec.sampling import Sampling
from specdec.target.protocol import Target

WIDE = Shape(2, 6, 12)
Targets = Callable[..., Target]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("plain", [True, False])
def test_recorded_rounds_that_say_what_the_target_says_are_used(
    target_of: Targets, arch: str, plain: bool
) -> None:
    target = target_of(arch)
    drafter = None if plain else engines.eagle(target, engines.random_head(target, range(20, 90)))
    machine = engines.engine(GraphedTarget(target, Replaying()), drafter, WIDE)
    recording = Replaying()
    assert run_ahead(machine, recording) is None
    assert machine.pipeline is not None
    assert machine.pipeline.target is target, "a recording inside a recording"
    assert recording.replayed > 8


@pytest.mark.parametrize(
    ("recording", "told"), [(Broken(), "not permitted when stream is capturing"), (Forgetful(), "off by")]
)
def test_recordings_that_fail_or_forget_are_refused(
    target_of: Targets, recording: Recording, told: str
) -> None:
    target = target_of("llama")
    machine = engines.engine(target, engines.eagle(target, engines.random_head(target, range(20, 90))), WIDE)
    refused = run_ahead(machine, recording)
    assert machine.pipeline is None
    assert refused is not None
    assert told in refused
    assert machine.refused == refused


def test_who_works_on_the_host_is_refused_by_name(target_of: Targets) -> None:
    machine = engines.engine(target_of("llama"), NgramDrafter(), WIDE)
    assert run_ahead(machine, Replaying()) == "the drafter ngram works on the host"
    machine = engines.engine(ToyTarget())
    assert run_ahead(machine, Replaying()) == "the target runs through transformers"


def test_an_engine_with_a_recording_measures_whole_sizes(
    target_of: Targets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From options to answers: the trial, the cost table of replayed drafting, trees of fixed sizes."""
    target, limits = target_of("llama"), Limits(2, 96)
    drafter = engines.eagle(target, engines.random_head(target, range(20, 90)), limits)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_load_head", lambda *_: None)
    monkeypatch.setattr(build, "make_drafter", lambda *_: drafter)
    monkeypatch.setattr(build, "CPU_LIMIT", Shape(3, 4, 8))
    monkeypatch.setattr(costs, "MOST", 1)
    recording = Replaying()
    machine = build.make_engine(target, "head", Options(slots=2, max_length=96), recording)
    assert machine.pipeline is not None
    assert machine.budget.fixed
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    request, alone = (engines.request(name, (5, 6, 7), sampling) for name in ("ahead", "plain"))
    before = recording.replayed
    engines.run(machine, [request])
    engines.run(engines.engine(target), [alone])
    assert request.output == alone.output
    assert recording.replayed > before
    with pytest.warns(UserWarning, match="step by step: the drafter ngram"):
        monkeypatch.setattr(build, "make_drafter", lambda *_: NgramDrafter())
        other = build.make_engine(target, "ngram", Options(slots=2, max_length=96), recording)
    assert other.pipeline is None
    assert not other.budget.fixed
