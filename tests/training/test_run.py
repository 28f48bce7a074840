"""From prompts to a head that loads and drafts, on a tiny target; and again where it stopped."""

from __future__ import annotations

import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock
from rich.console import Console

from specdec.errors import MismatchError, RequestError, SpecdecError
from specdec.head.checkpoint import load_head
from training.checkpoint import BEST, LAST
from training.data import split_dev
from training.run import RUN, Order, train
from training.store import ResponseStore
from training.texts import SETTLED
from training.trainer import Trainer
from training.watch import read_log

SMALL = [
    "data.max_length=64", "responses.max_tokens=12", "responses.batch=16", "vocab.size=40", "head.taps=[2, 4, 6]",
    "unroll.steps=2", "unroll.curriculum=[]", "trainer.batch_tokens=256", "trainer.precision=fp32", "trainer.epochs=2",
    "trainer.max_minutes=null", "evaluation.prompts=4", "cache.gigabytes=0.1", "trainer.tracker=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("target"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"row-{n}", "source": "made up", "licence": "MIT", "prompt": f"Say {n} words"}
        for n in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def order(
    target: Path, prompts: Path, out: Path, *more: str, dry_run: bool = False, resume: bool = True
) -> Order:
    return Order(str(target), str(prompts), out, "cpu", [*SMALL, *more], dry_run=dry_run, resume=resume)


def quiet() -> Console:
    return Console(quiet=True)


def test_a_name_and_prompts_become_a_head_that_loads(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    assert train(order(target, prompts, out), quiet()) == out
    head = load_head(out, target_layers=tiny.LAYERS)
    assert head.config.taps == (2, 4, 6)
    assert len(head.ids) == 40
    assert all(torch.isfinite(parameter).all() for parameter in head.parameters())
    card = (out / "README.md").read_text()
    assert "| made up | " in card
    assert "| MIT | " in card
    assert (out / "training.png").stat().st_size > 1000
    assert "matrix_lr" in (out / "recipe.yaml").read_text()
    measured = read_log(out / "train_log.jsonl", "evaluation")
    assert measured
    assert measured[-1]["tau"] >= 1.0

    steps = len(read_log(out / "train_log.jsonl", "step"))
    train(order(target, prompts, out), quiet())  # nothing is left to do
    assert len(read_log(out / "train_log.jsonl", "step")) == steps
    with pytest.raises(MismatchError, match=r"recipe: .*optimizer\.lr: 0\.\d+ -> 0\.001"):
        train(order(target, prompts, out, "optimizer.lr=1e-3"), quiet())
    with pytest.raises(SpecdecError, match="holds a run"):
        train(order(target, prompts, out, resume=False), quiet())


def test_a_prompt_longer_than_the_context_is_counted_and_harms_no_other(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "word " * 300}) + "\n")
    console = Console(record=True, width=200)
    train(order(target, prompts, tmp_path / "head", "trainer.epochs=1", "data.max_length=32"), console)
    text = console.export_text()
    assert "longer than the context" in text
    assert load_head(tmp_path / "head", target_layers=tiny.LAYERS).config.taps == (2, 4, 6)


@pytest.mark.parametrize("norm", ["fc_norm", "norm_before_fc"])
def test_the_closed_form_start_knows_the_norms_before_fc(
    target: Path, prompts: Path, tmp_path: Path, norm: str
) -> None:
    losses = []
    for start in ("closed-form", "random"):
        out = tmp_path / start
        train(
            order(target, prompts, out, f"head.{norm}=true", f"head.start={start}", "trainer.epochs=1"),
            quiet(),
        )
        losses.append(read_log(out / "train_log.jsonl", "step")[0]["loss"][0])
    assert losses[0] < 0.95 * losses[1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(target: Path, prompts: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=100)
    plan = order(target, prompts, tmp_path / "head", "trainer.tracker=tensorboard", dry_run=True)
    assert train(plan, console) is None
    text = console.export_text()
    assert "draft" not in text.lower() or "head" in text
    for words in ("conversations", "120", "memory", "GFLOP/s"):
        assert words in text
    assert not (tmp_path / "head").exists()


def test_prompts_without_answers_are_refused_where_answers_must_be_given(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecdecError, match="assistant"):
        train(order(target, prompts, tmp_path / "head", "data.answers=given"), quiet())


def test_the_card_says_whose_answers_a_head_was_trained_and_measured_on(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = [
        json.loads(row) | {"completion": f"word {n}"}
        for n, row in enumerate(prompts.read_text().splitlines())
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(order(target, prompts, tmp_path, "data.answers=given", "trainer.epochs=1"), quiet())
    card = (tmp_path / "README.md").read_text()
    for words in (
        "held-out text that came with the data",
        "answered by the data",
        "| given | ",
        "no draft can match",
    ):
        assert words in card
    assert "the target wrote" not in card and "greedy" not in card


def test_two_runs_do_not_share_a_directory(target: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    (out / RUN).mkdir(parents=True)
    with FileLock(out / RUN / "lock"), pytest.raises(RequestError, match="another process"):
        train(order(target, prompts, out), quiet())
    assert [path.name for path in (out / RUN).iterdir()] == ["lock"]


def test_the_recipe_may_name_the_prompts(target: Path, prompts: Path, tmp_path: Path) -> None:
    named = order(target, prompts, tmp_path / "head", f"data.prompts={prompts}", dry_run=True)
    told = io.StringIO()
    assert train(replace(named, prompts=None), Console(file=told, width=120)) is None
    assert "120, " in told.getvalue()
    with pytest.raises(SpecdecError, match=r"--prompts.*data\.prompts"):
        train(replace(order(target, prompts, tmp_path / "head"), prompts=None), quiet())


@pytest.mark.parametrize(("wrong", "told"), [("taps=[2, 4, 9]", r"head\.taps"), ("num_heads=5", "kv_heads")])
def test_a_shape_that_cannot_be_is_refused_before_any_text_is_written(
    target: Path, prompts: Path, tmp_path: Path, wrong: str, told: str
) -> None:
    with pytest.raises(SpecdecError, match=told):
        train(order(target, prompts, tmp_path / "head", f"head.{wrong}"), quiet())
    assert not (tmp_path / "head").exists()


def test_a_run_goes_on_from_an_earlier_head(target: Path, prompts: Path, tmp_path: Path) -> None:
    """Without a step worth the name it ends as it began."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(order(target, prompts, first), quiet())
    still = ("trainer.epochs=1", "optimizer.name=adamw", "optimizer.lr=1e-12")
    train(
        order(target, prompts, second, f"head.start={first}", "head.taps=default", *still),
        quiet(),
    )
    before, after = load_head(first), load_head(second)
    assert after.config == before.config
    for name, value in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name].double(), value.double(), rtol=2**-7, atol=1e-6), name
    assert f"start: {first}" in (second / "README.md").read_text()


def test_a_later_sitting_trains_on_the_texts_of_the_first(
    target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More answers would be another draft vocabulary, and the weights of the first under it."""
    train(order(target, prompts, tmp_path / "straight"), quiet())
    out, look_up = tmp_path / "killed", Trainer._look_up

    def die(trainer: Trainer) -> None:
        look_up(trainer)
        if trainer.progress.step == 3:
            trainer.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_look_up", die)
        train(order(target, prompts, out), quiet())
    answers = (out / RUN / "responses.jsonl").read_bytes()
    with prompts.open("a") as file:
        file.writelines(json.dumps({"id": f"late-{n}", "prompt": f"Write of {n}"}) + "\n" for n in range(20))
    console = Console(record=True, width=200)
    train(order(target, prompts, out), console)
    assert "its 120 answers are kept" in console.export_text()
    assert (out / RUN / "responses.jsonl").read_bytes() == answers
    straight, resumed = load_head(tmp_path / "straight"), load_head(out)
    assert all(
        torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items()
    )

    (out / RUN / SETTLED).unlink()
    with ResponseStore(out / RUN / "responses.jsonl") as store:
        first = next(iter(store))
        store.append(replace(first, id="stranger"))
    with pytest.raises(MismatchError, match="texts"):
        train(order(target, prompts, out), quiet())


def test_a_disk_that_fills_up_late_is_told_and_costs_nothing(
    target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = order(target, prompts, tmp_path / "head", "trainer.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr("training.run.write_card", full)
        with pytest.raises(SpecdecError, match="No space left on device"):
            train(asked, quiet())
    assert train(asked, quiet()) == tmp_path / "head"
    steps = [row["step"] for row in read_log(tmp_path / "head" / "train_log.jsonl", "step")]
    assert steps == list(range(1, len(steps) + 1))


def test_without_dev_text_the_last_head_is_delivered(target: Path, prompts: Path, tmp_path: Path) -> None:
    """Nothing measured is no measure: the first evaluation's head used to be the best one."""
    rows = [row for row in prompts.read_text().splitlines() if not split_dev(json.loads(row)["id"])]
    prompts.write_text("\n".join(rows[:40]) + "\n")
    out = tmp_path / "head"
    train(order(target, prompts, out, "evaluation.every_minutes=1e-9"), quiet())
    assert not (out / RUN / BEST).exists()
    last = torch.load(out / RUN / LAST, weights_only=True)["head"]["lm_head.weight"]
    assert torch.equal(load_head(out, dtype=torch.float32).lm_head.weight, last.bfloat16().float())
    assert "there was no dev text" in (out / "README.md").read_text()


def test_a_place_that_cannot_be_written_is_refused_before_a_target_is_looked_for(
    prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecdecError, match="is no directory to write into"):
        train(order(tmp_path / "no-such-model", prompts, prompts / "head"), quiet())
