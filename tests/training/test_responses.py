"""Answers turn by turn: resumed without repeating, the same in any batch, mixed by id, all counted."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from specdec.errors import SpecdecError
from training.data import Conversation, Message
from training.mask import TemplateRefusal
from training.responses import Answer, AnswerPlan, Written, write_responses
from training.store import ResponseStore

QUIET = Console(file=io.StringIO())
PLAN = AnswerPlan(max_tokens=4, max_length=1000, batch=3)


class Letters:
    """A chat whose tokens are characters."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        if any("refuse" in m.content for m in messages):
            raise TemplateRefusal("no")
        return [ord(c) for m in messages for c in f"{m.role[0]}:{m.content}\n"]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Echo:
    """Answers with the sum of the prompt and, sampling, the seed; backwards, so order shows; may die."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.left = dies_after
        self.batches: list[int] = []

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        seeds: Sequence[int],
        max_tokens: int,
    ) -> Iterator[Answer]:
        self.batches.append(len(prompts))
        for index in reversed(range(len(prompts))):
            if self.left is not None:
                if self.left == 0:
                    raise SpecdecError("the engine is gone")
                self.left -= 1
            noise = seeds[index] % 7 if temperatures[index] else 0
            yield Answer(index, [97 + (sum(prompts[index]) + noise) % 26] * max_tokens, "length")


def talks(count: int, turns: int = 1) -> list[Conversation]:
    return [
        Conversation(f"c{i}", "s", "MIT", (), tuple(f"q{i}.{t}" for t in range(turns))) for i in range(count)
    ]


def run(path: Path, conversations: list[Conversation], echo: Echo, plan: AnswerPlan = PLAN) -> Written:
    with ResponseStore(path) as store:
        return write_responses(conversations, echo, store, Letters(), plan, QUIET)


def rows(path: Path) -> dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...], float]]:
    with ResponseStore(path) as store:
        return {(r.id, r.turn): (r.prompt_ids, r.response_ids, r.temperature) for r in store}


def test_each_turn_sees_the_answers_before_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    written = run(path, talks(4, turns=3), Echo())
    assert (written.answers, written.tokens, written.complete) == (12, 48, True)
    found = rows(path)
    first = "".join(map(chr, found["c2", 0][1]))
    assert "".join(map(chr, found["c2", 1][0])) == f"u:q2.0\na:{first}\nu:q2.1\n"


def test_begun_talks_go_first_and_the_shape_of_batches_changes_nothing(tmp_path: Path) -> None:
    echo = Echo()
    run(tmp_path / "a", talks(5, turns=2), echo)
    assert echo.batches == [3, 3, 2, 2]
    run(tmp_path / "b", talks(5, turns=2)[::-1], Echo(), AnswerPlan(max_tokens=4, max_length=1000, batch=64))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize("died", [0, 1, 4, 7])
def test_a_run_that_dies_goes_on_where_it_was(tmp_path: Path, died: int) -> None:
    run(tmp_path / "whole", talks(5, turns=2), Echo())
    with pytest.raises(SpecdecError, match="gone"):
        run(tmp_path / "r", talks(5, turns=2), Echo(dies_after=died))
    assert len(rows(tmp_path / "r")) == died
    written = run(tmp_path / "r", talks(5, turns=2), Echo())
    assert written.answers == 10 - died
    assert rows(tmp_path / "r") == rows(tmp_path / "whole")
    assert run(tmp_path / "r", talks(5, turns=2), Echo(dies_after=0)).answers == 0


def test_greedy_and_sampled_are_mixed_by_id_alone() -> None:
    plan = AnswerPlan(max_tokens=1, max_length=9, sampled_fraction=0.3, temperature=0.8)
    drawn = [plan.temperature_of(f"c{i}") for i in range(2000)]
    assert set(drawn) == {0.0, 0.8} and 0.26 < drawn.count(0.8) / 2000 < 0.34
    assert drawn == [plan.temperature_of(f"c{i}") for i in range(2000)]
    none, every = (AnswerPlan(max_tokens=1, max_length=9, sampled_fraction=f) for f in (0.0, 1.0))
    assert {none.temperature_of(f"c{i}") for i in range(50)} == {0.0}
    assert {every.temperature_of(f"c{i}") for i in range(50)} == {1.0}
    assert len({plan.seed_of("a", 0), plan.seed_of("a", 1), plan.seed_of("b", 0)}) == 3
    assert all(0 <= plan.seed_of("a", turn) < 2**63 for turn in range(50))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    conversations = [
        *talks(1),
        Conversation("long", "", "", (), ("x" * 99,)),
        Conversation("odd", "", "", (), ("refuse",)),
        Conversation("done", "", "", (Message("user", "a"), Message("assistant", "b"))),
    ]
    written = run(tmp_path / "r", conversations, Echo(), AnswerPlan(max_tokens=4, max_length=50))
    assert written.answers == 1
    assert written.skipped.reasons == {
        "longer than the context": 1, "refused by the chat template: no": 1, "nothing to answer": 1,
    }  # fmt: skip


def test_time_running_out_leaves_a_usable_store(tmp_path: Path) -> None:
    plan = AnswerPlan(max_tokens=4, max_length=1000, max_minutes=0)
    assert not run(tmp_path / "r", talks(2), Echo(), plan).complete
    assert run(tmp_path / "r", talks(2), Echo()).complete


def test_the_progress_bar_shows_count_speed_and_time(tmp_path: Path) -> None:
    shown = io.StringIO()
    with ResponseStore(tmp_path / "r") as store:
        console = Console(file=shown, force_terminal=True, width=120)
        write_responses(talks(3), Echo(), store, Letters(), PLAN, console)
    assert "3/3" in shown.getvalue() and "12 tokens" in shown.getvalue()


def test_plans_out_of_range_are_refused() -> None:
    with pytest.raises(SpecdecError, match=r"responses\.batch"):
        AnswerPlan(max_tokens=1, max_length=9, batch=0)
    with pytest.raises(SpecdecError, match="sampled_fraction"):
        AnswerPlan(max_tokens=1, max_length=9, sampled_fraction=1.5)
