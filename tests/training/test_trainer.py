"""The loop: it learns, resumes bit for bit, splits over processes, and says what went wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_head import HIDDEN
from tiny_training import alone, samples, task
from torch import Tensor

from specdec.errors import CheckpointError, MismatchError, SpecdecError, UnsupportedError
from training.checkpoint import BEST, LAST
from training.chunks import Position
from training.data import Sample
from training.objective import folded, position_weights, scaled
from training.optim import Optimizer, Rates, blocks, orthogonal
from training.schedule import Clock, rate
from training.sections import OptimizerSection
from training.trainer import PATIENCE, Task, Trainer

EVERY_STEP = "trainer.save_every_minutes=1e-9"


class Killed(Exception):
    pass


def train(
    work: Task, directory: Path, stop_after: int | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == stop_after:
            raise Killed

    trainer = Trainer(work, directory, report=report, accelerator=alone(), **arguments)
    trainer.resume()
    trainer.run()
    return rows


def weights(work: Task) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in work.objective.head.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tmp_path: Path, optimizer: str) -> None:
    rows = train(task(samples(), f"optimizer.name={optimizer}", "trainer.epochs=12"), tmp_path)
    assert rows[-1]["loss"][0] < 0.7 * rows[0]["loss"][0]
    assert rows[-1]["overlap"][0] > rows[0]["overlap"][0]
    assert len(rows[-1]["loss"]) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    texts, options = samples(), (f"optimizer.name={optimizer}", EVERY_STEP, "loss.prompt_weight=0.5")
    straight = task(texts, *options, noise=0.1)
    rows = train(straight, tmp_path / "straight")
    with pytest.raises(Killed):
        train(task(texts, *options, noise=0.1), tmp_path / "killed", stop_after=5)
    resumed = task(texts, *options, noise=0.1)
    later = train(resumed, tmp_path / "killed")
    assert [row["step"] for row in later] == list(range(5, len(rows) + 1))
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_more_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """One step over two micro-batches moves as one step whose gradient is the sum of theirs."""
    texts = samples()
    work = task(texts, "trainer.accumulation=2", "trainer.epochs=1")
    trainer = Trainer(work, tmp_path, accelerator=alone())
    plan = [(0, 1), (2, 3, 4)]
    trainer._step(plan, 0.5)
    other = task(texts, "trainer.epochs=1")
    twin = Trainer(other, tmp_path, accelerator=alone())
    total = sum(other.objective(twin._material(part), 2, 5)[0] for part in plan)
    assert isinstance(total, Tensor)
    total.backward()
    twin._clip()
    other.optimizer.step(rate(other.recipe.optimizer, 0.5))
    for name, value in weights(work).items():
        torch.testing.assert_close(value, weights(other)[name])


def test_sequences_count_equally_whatever_their_neighbours(tmp_path: Path) -> None:
    work = task(samples())
    trainer = Trainer(work, tmp_path, accelerator=alone())
    whole = work.objective(trainer._material([0, 1, 2]), 2, 3)[0]
    apart = [work.objective(trainer._material([i]), 2, 3)[0] for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(apart).sum())


def test_the_best_checkpoint_is_that_of_the_highest_tau(tmp_path: Path) -> None:
    taus = iter([1.5, 2.5, 2.0] + [1.0] * 99)
    work = task(samples(), "evaluation.every_minutes=1e-9", "trainer.epochs=2")
    train(work, tmp_path, evaluate=lambda: {"tau": next(taus)})
    best = torch.load(tmp_path / BEST, weights_only=True)
    assert best["measured"]["tau"] == 2.5
    assert best["head"].keys() == work.objective.head.state_dict().keys()


def test_the_time_limit_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    rows = train(task(samples(), "trainer.max_minutes=0.0001", "trainer.epochs=100000"), tmp_path)
    assert len(rows) < 1000
    assert (tmp_path / LAST).exists()


def test_another_target_or_recipe_is_refused(tmp_path: Path) -> None:
    texts = samples()
    train(task(texts, "trainer.epochs=1"), tmp_path)
    with pytest.raises(MismatchError, match="recipe"):
        train(task(texts, "trainer.epochs=2"), tmp_path)


def test_a_torn_checkpoint_is_told(tmp_path: Path) -> None:
    texts = samples()
    train(task(texts, "trainer.epochs=1"), tmp_path)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(task(texts, "trainer.epochs=1"), tmp_path)


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / f".1.{LAST}").write_bytes(b"half a checkpoint")
    train(task(samples(), "trainer.epochs=1"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = samples()
    train(task(texts, "trainer.epochs=1"), tmp_path)
    before = (tmp_path / LAST).read_bytes()

    def full(state: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="Free some space"):
        Trainer(task(texts, "trainer.epochs=1"), tmp_path, accelerator=alone()).save()
    assert (tmp_path / LAST).read_bytes() == before


def test_nan_moves_nothing_and_ends_the_run_when_it_stays(tmp_path: Path) -> None:
    work = task(samples(), "trainer.epochs=50")
    work.objective.scale.fill_(math.nan)
    before = weights(work)
    with pytest.raises(SpecdecError, match=f"{PATIENCE} optimizer steps"):
        train(work, tmp_path)
    assert all(torch.equal(value, weights(work)[name]) for name, value in before.items())


def test_a_batch_of_short_windows_is_no_obstacle(tmp_path: Path) -> None:
    """The rest of a split text may be too short for a late step, and alone in its batch."""
    rest = Sample("s", np.arange(3, dtype=np.int32), np.ones(3, dtype=np.bool_), window=1)
    whole = [sample for sample in samples() if len(sample) > 12][:4]
    work = task([*whole, rest], "unroll.steps=4", "trainer.batch_tokens=24", noise=0.1)
    rows = train(work, tmp_path)
    assert {row["kind"] for row in rows} == {"step"} and rows[-1]["step"] == 4 * 5


def test_only_the_main_process_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost steps, too: every process of a launch has the same ones, and they share one log."""
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    work = task(samples(), "trainer.epochs=50")
    work.objective.scale.fill_(math.nan)
    rows: list[dict[str, Any]] = []
    with pytest.raises(SpecdecError, match="in a row gave NaN"):
        Trainer(work, tmp_path, report=rows.append, accelerator=alone()).run()
    assert rows == []


@pytest.mark.parametrize(("part", "method"), [("objective", "forward"), ("features", "take")])
def test_running_out_of_memory_names_the_knobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, method: str
) -> None:
    work = task(samples())

    def full(*arguments: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(getattr(work, part), method, full)
    with pytest.raises(UnsupportedError, match=r"unroll\.checkpointing"):
        train(work, tmp_path)


def test_folding_the_scale_changes_no_output(tmp_path: Path) -> None:
    work, scale = task(samples()), torch.rand(3 * HIDDEN) + 0.5
    head, raw = work.objective.head, torch.randn(1, 4, 3 * HIDDEN)
    with torch.no_grad():
        expected = head.fuse(scaled(raw, scale, torch.float32))
        head.load_state_dict(folded(head.state_dict(), scale))
        torch.testing.assert_close(head.fuse(raw), expected, rtol=1e-4, atol=1e-5)


def test_prompts_weigh_what_the_recipe_says_but_the_template_nothing() -> None:
    mask = torch.tensor([[False, False, False, True, True, False]])
    found = position_weights(mask, torch.tensor([5]), 0.5, 1)
    assert found.tolist() == [[0.0, 0.5, 0.5, 1.0, 1.0, 0.0]]


def test_orthogonal_pulls_singular_values_to_one() -> None:
    for shape in ((8, 20), (20, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert 0.6 < values.min() < values.max() < 1.3


def test_muon_takes_packed_matrices_apart() -> None:
    work = task(samples())
    head = work.objective.head
    for name, (rows, columns) in blocks(head.config).items():
        assert (sum(rows), sum(columns)) == head.get_parameter(name).shape


def test_masters_keep_steps_too_small_for_bfloat16() -> None:
    head = task(samples()).objective.head
    optimizer = Optimizer(head, head.config, Rates(1e-6))
    head.to(torch.bfloat16)
    start = optimizer.masters["fc.weight"].clone()
    for _ in range(3):
        for parameter in head.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1.0)
    assert (start - optimizer.masters["fc.weight"]).mean() == pytest.approx(3e-6, rel=0.05)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    settings = OptimizerSection(warmup_fraction=0.1)
    course = [rate(settings, x / 100) for x in range(101)]
    assert course[0] == 0
    assert course[10] == pytest.approx(1)
    assert course[10:] == sorted(course[10:], reverse=True)
    assert course[100] == pytest.approx(0, abs=1e-6)


def test_the_clock_counts_earlier_sittings() -> None:
    clock = Clock(before=60.0, max_minutes=4.0, now=iter([0.0, 60.0]).__next__)
    assert clock.spent == 0.5


def test_a_resumed_run_keeps_the_scale_it_learned_with(tmp_path: Path) -> None:
    """Measured again, on another machine or with other threads, it may differ, and the weights are in its units."""
    work = task(samples(), "trainer.epochs=1")
    work.objective.scale.fill_(2.0)
    train(work, tmp_path)
    resumed = task(samples(), "trainer.epochs=1")
    assert Trainer(resumed, tmp_path, accelerator=alone()).resume()
    assert resumed.objective.scale.unique().tolist() == [2.0]


def test_a_checkpoint_of_an_earlier_layout_is_refused(tmp_path: Path) -> None:
    train(task(samples(), "trainer.epochs=1"), tmp_path)
    torch.save(torch.load(tmp_path / LAST, weights_only=True) | {"version": 1}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match="another version"):
        train(task(samples(), "trainer.epochs=1"), tmp_path)


@pytest.mark.parametrize("left", [1, 3])
def test_another_number_of_processes_goes_on_from_the_same_batch(tmp_path: Path, left: int) -> None:
    """Groups of batches counted by one process once sent two of them round an epoch for ever, or back in it."""
    texts = samples()
    with pytest.raises(Killed):
        batches = len(Trainer(task(texts), tmp_path, accelerator=alone()).plan(0))
        train(task(texts, EVERY_STEP), tmp_path, stop_after=batches - left + 1)
    trainer = Trainer(task(texts, EVERY_STEP), tmp_path, accelerator=alone())
    assert trainer.resume()
    assert trainer.progress.position == Position(0, batches - left)
    trainer.together = 2  # as two processes have it
    steps = trainer.progress.step
    progress = trainer.run()
    groups = [len(trainer.plan(epoch)) // 2 for epoch in range(4)]
    assert progress.step - steps == groups[0] - (batches - left) // 2 + sum(groups[1:])


def test_tokens_are_those_of_all_processes(tmp_path: Path) -> None:
    work = task(samples(), "trainer.epochs=1")
    assert train(work, tmp_path)[-1]["tokens"] == sum(len(sample) for sample in work.samples)
