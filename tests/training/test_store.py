"""The store loses nothing to torn lines and full disks; its rows become correctly masked samples."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from specdec.errors import CheckpointError, MismatchError, SpecdecError
from training.store import Response, ResponseStore, response_samples


def response(
    id: str, turn: int = 0, prompt: tuple[int, ...] = (1, 2), answer: tuple[int, ...] = (3, 4)
) -> Response:
    return Response(id, "test", "MIT", 0.0, prompt, answer, "stop", turn)


def test_what_is_appended_is_found_again(tmp_path: Path) -> None:
    with ResponseStore(tmp_path / "deep" / "r.jsonl") as store:
        store.append(response("a"))
        store.append(response("b"))
        store.append(response("a", turn=1))
        assert ("a", 1) in store and ("b", 1) not in store and store.tokens == 6
    with ResponseStore(tmp_path / "deep" / "r.jsonl") as again:
        assert [(r.id, r.turn) for r in again] == [("a", 0), ("a", 1), ("b", 0)]
        assert again.get("b", 0) == response("b") and len(again) == 3 and again.tokens == 6


@pytest.mark.parametrize("torn", [b'{"id": "c", "sour', b"\x00\x00\x00", b"{}\n", b"\xff\n", b'{"id": 1\n'])
def test_a_torn_last_line_is_cut_off_and_answering_goes_on(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "r.jsonl"
    with ResponseStore(path) as store:
        store.append(response("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with ResponseStore(path) as store:
        assert len(store) == 1 and path.read_bytes() == whole
        store.append(response("b"))
    with ResponseStore(path) as store:
        assert [r.id for r in store] == ["a", "b"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResponseStore(path) as store:
        store.append(response("a"))
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(CheckpointError, match="line 1"):
        ResponseStore(path)


class _FullDisk(io.BytesIO):
    """Takes some of a line and then no more."""

    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_and_costs_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.jsonl"
    with ResponseStore(path) as store:
        store.append(response("a"))
        real = store._file
        monkeypatch.setattr(store, "_file", _FullDisk())
        with pytest.raises(SpecdecError, match="No space left on device") as caught:
            store.append(response("b"))
        real.close()
        assert caught.value.remedy is not None and "1 answers so far are kept" in caught.value.remedy
        assert ("b", 0) not in store and store.get("a", 0) == response("a")
        store.append(response("c"))
    with ResponseStore(path) as store:
        assert [r.id for r in store] == ["a", "c"]


def test_another_targets_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ResponseStore(path, "target-1").close()
    ResponseStore(path, "target-1").close()
    with pytest.raises(MismatchError, match="another target"):
        ResponseStore(path, "target-2")


def test_turns_that_continue_each_other_become_one_sample(tmp_path: Path) -> None:
    """prompt 1 2, answer 3 4, prompt 1 2 3 4 5, answer 6:

    ids    1 2 3 4 5 6
    mask   . . x x . x
    """
    with ResponseStore(tmp_path / "r.jsonl") as store:
        store.append(response("a"))
        store.append(response("b", prompt=(9,), answer=(8,)))
        store.append(response("a", 1, (1, 2, 3, 4, 5), (6,)))
        store.append(response("a", 2, (1, 7), (6,)))  # the template rewrote history
        samples = list(response_samples(store))
        only = list(response_samples(store, keep=lambda id: id == "b"))
    assert [(s.id, s.turn, s.ids.tolist(), s.loss_mask.astype(int).tolist()) for s in samples] == [
        ("a", 0, [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1]),
        ("a", 2, [1, 7, 6], [0, 0, 1]),
        ("b", 0, [9, 8], [0, 1]),
    ]
    assert [s.id for s in only] == ["b"]


def test_a_reader_touches_nothing_beside_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(CheckpointError, match="gone"):
        ResponseStore(path, "target", readonly=True)
    with ResponseStore(path, "target") as store:
        store.append(response("a"))
        store.append(response("b"))
    torn = path.read_bytes() + b'{"id": "c'  # as a writer leaves it between two calls
    path.write_bytes(torn)
    with ResponseStore(path, "target", readonly=True) as reader:
        assert reader.keys() == [("a", 0), ("b", 0)]
        reader.restrict([("b", 0)])
        assert [r.id for r in reader] == ["b"] and reader.tokens == 2
        with pytest.raises(CheckpointError, match="1 of 1 answers that training began with"):
            reader.restrict([("a", 0)])
    assert path.read_bytes() == torn
