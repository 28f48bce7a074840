"""The memory planner: wishes are kept or refused, what is left open fits, refusals say what would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec import memory
from specdec.cache import CacheShape
from specdec.engine.memory import LONGEST, SHARE, SHORTEST, Needs, Wish, plan
from specdec.errors import SpecdecError, UnsupportedError
from specdec.head.config import HeadConfig
from specdec.target.protocol import TargetInfo

GIB = 2**30
CPU = torch.device("cpu")
EIGHT_B = TargetInfo(
    "8b", "LlamaForCausalLM", 128256, 4096, 32, 131072, (), torch.bfloat16, CPU, "", weight_bytes=16 * 10**9,
    cache=CacheShape(32, 8, 128, torch.bfloat16, CPU),
)  # fmt: skip
HEAD = HeadConfig(4096, 4096, (2, 16, 29), 14336, 32, 8, 128, 128256, 32000)
NEEDS = Needs.of(EIGHT_B, HEAD)


def test_an_8b_llama_takes_what_it_takes() -> None:
    """128 KiB of its own a token, 4 of the head and 24 of features; 0.8 GB of head weights."""
    assert NEEDS.token == (128 + 4 + 24) * 1024
    assert NEEDS.weights == pytest.approx(16e9 + 0.8e9, rel=0.02)
    assert NEEDS.slot(4096) == pytest.approx(0.695 * GIB, rel=0.01)
    assert Needs.of(EIGHT_B, None).token == 128 * 1024


def test_with_room_enough_the_defaults_stand() -> None:
    limits = plan(NEEDS, Wish(), 60 * GIB)
    assert (limits.slots, limits.length) == (4, LONGEST)
    assert plan(NEEDS, Wish(), None) == limits
    assert plan(NEEDS, Wish(most_slots=64), 60 * GIB).slots == 64
    assert plan(NEEDS, Wish(most_slots=64), 20 * GIB).slots == 27


def test_slots_give_way_first_then_length() -> None:
    assert plan(NEEDS, Wish(), 2 * GIB).slots == 2
    tight = plan(NEEDS, Wish(), GIB // 2)
    assert tight.slots == 1 and SHORTEST < tight.length < LONGEST
    assert tight.length % 64 == 0


def test_what_was_set_is_kept() -> None:
    assert plan(NEEDS, Wish(slots=3), 2 * GIB).slots == 3
    assert plan(NEEDS, Wish(slots=3), 2 * GIB).length < LONGEST
    assert plan(NEEDS, Wish(length=8192), 2 * GIB).length == 8192
    assert plan(NEEDS, Wish(length=100), 40 * GIB).length == 100
    assert plan(NEEDS, Wish(64, 4096), 60 * GIB).slots == 64


@pytest.mark.parametrize(
    ("wish", "free", "told"),
    [
        (Wish(8, 4096), 4 * GIB, r"8 x 4096.*0\.70 GiB, 4\.00 GiB are free.*Lower slots to 5 or lower max_length"),
        (Wish(1, 8192), GIB, r"1 x 8192.*Lower max_length to \d+\."),
        (Wish(length=8192), GIB, r"Lower max_length to \d+\."),
        (Wish(slots=40), 2 * GIB, r"40 x 256.*Lower slots to \d+"),
        (Wish(), 10**8, r"15\.\d GiB of weights.*1 x 256.*Take a smaller target or dtype"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(wish: Wish, free: int, told: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan(NEEDS, wish, free)
    parts = told.split(".*")
    assert all(re.search(part, str(caught.value)) for part in parts), str(caught.value)


@pytest.mark.parametrize("wish", [Wish(length=131073), Wish(length=1), Wish(slots=0), Wish(slots=-1)])
def test_what_no_memory_could_grant_is_refused(wish: Wish) -> None:
    with pytest.raises(SpecdecError):
        plan(NEEDS, wish, None)


@given(
    free=st.integers(10**6, 10**11),
    slots=st.none() | st.integers(1, 64),
    length=st.none() | st.integers(2, 131072),
    most=st.integers(1, 64),
)
def test_a_plan_fits_and_its_remedy_does_too(
    free: int, slots: int | None, length: int | None, most: int
) -> None:
    wish = Wish(slots, length, most)
    try:
        limits = plan(NEEDS, wish, free)
    except UnsupportedError as error:
        for option, value in re.findall(r"(slots|max_length) to (\d+)", error.remedy or ""):
            shown_slots, shown_length = map(int, str(error.value).split(" x "))
            better = Wish(int(value), shown_length) if option == "slots" else Wish(shown_slots, int(value))
            plan(NEEDS, better, free)
        return
    assert limits.slots * NEEDS.slot(limits.length) <= free * (1 - SHARE)
    assert limits.slots == slots if slots else 1 <= limits.slots <= most
    assert limits.length == length if length else SHORTEST <= limits.length <= LONGEST


def test_a_target_made_for_less_than_the_shortest_is_planned_too() -> None:
    small = Needs(0, 100, 100, 64)
    assert plan(small, Wish(), 10**9).length == 64


def test_free_memory_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal: 10 kB\nMemAvailable:       2048 kB\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.free_bytes(CPU) == 2048 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert memory.free_bytes(CPU) == 2048 * 1024
    (tmp_path / "memory.max").write_text("6000\n")
    assert memory.free_bytes(CPU) == 1000
    (tmp_path / "memory.stat").write_text(
        "anon 1000\nfile 4000\nshmem 100\nfile_mapped 300\ninactive_file 3000\nactive_file 900\n"
    )
    assert memory.free_bytes(CPU) == 1000 + 3900 - 300
    (tmp_path / "memory.stat").write_text("anon 1000\n")
    assert memory.free_bytes(CPU) == 1000
    proc.unlink()
    (tmp_path / "memory.max").unlink()
    assert memory.free_bytes(CPU) is None
    assert memory.free_bytes(torch.device("meta")) is None
