"""Every row format in one shape, everything left out counted, and the dev split pinned."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specdec.errors import SpecdecError, UnsupportedError
from training.data import Conversation, Message, Skipped, read_conversations, split_dev

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello")
FORMATS: list[tuple[dict[str, Any], tuple[Message, ...], tuple[str, ...]]] = [
    ({"messages": [{"role": "user", "content": "Hi"}]}, (), ("Hi",)),
    (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        (USER, ANSWER),
        (),
    ),
    (
        {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]},
        (Message("system", "Be"),),
        ("Hi",),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
            ]
        },
        (),
        ("Hi",),
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        (USER, ANSWER),
        (),
    ),
    (
        {"conversations": [{"from": "gpt", "value": "tail of another"}, {"from": "human", "value": "Hi"}]},
        (),
        ("Hi",),
    ),
    ({"turns": ["Hi", "Bye"]}, (), ("Hi", "Bye")),
    ({"prompt": "Hi", "completion": "Hello"}, (USER, ANSWER), ()),
    ({"prompt": "Hi"}, (), ("Hi",)),
    ({"text": "Once"}, (Message("text", "Once"),), ()),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "messages", "pending"), FORMATS)
def test_every_format_has_one_shape(
    tmp_path: Path, row: dict[str, Any], messages: tuple[Message, ...], pending: tuple[str, ...]
) -> None:
    (read,) = read_conversations(write(tmp_path / "a.jsonl", [row | {"id": 7, "license": "MIT"}]))
    assert read == Conversation("7", "a.jsonl", "MIT", messages, pending)


def test_without_answers_asks_every_turn_anew() -> None:
    talk = Conversation("a", "", "", (Message("system", "Be"), USER, ANSWER), ("Bye",))
    assert talk.without_answers() == Conversation("a", "", "", (Message("system", "Be"),), ("Hi", "Bye"))


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "a", "turns": ["Hi"], "licence": "MIT"},
        {"id": "a", "turns": ["Hi again"], "licence": "mit"},
        {"id": "b", "turns": ["Hi"], "licence": "mixed"},
        {"id": "c", "turns": ["Hi"]},
        {"turns": "Hi"},
        {"id": "d"},
        {"turns": [" "]},
        {"messages": [{"role": "wizard", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user", "content": "1"}, {"role": "user", "content": "2"},
                      {"role": "assistant", "content": "3"}]},
        {"messages": [{"role": "system", "content": "1"}]},
        {"messages": [{"role": "user", "content": "1"}, {"role": "system", "content": "2"}]},
        {"messages": [{"role": "user", "content": "1"}, {"role": "tool", "content": "2"}]},
        {"messages": [{"role": "assistant", "content": "1"}]},
        {"conversations": ["Hi"]},
        ["Hi"],
        {"prompt": "half a \ud83d smile"},
        {"prompt": "Hi", "id": "\ud83d"},
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    path.write_bytes(path.read_bytes() + b'{"torn\n\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    skipped = Skipped()
    (kept,) = read_conversations(path, ["MIT"], skipped)
    assert kept.pending_turns == ("Hi",)
    assert dict(skipped.reasons) == {
        "duplicate id": 1, "licence not allowed: mixed": 1, "licence not allowed: none given": 1,
        "turns are not a list": 1, "none of messages, conversations, turns, prompt, text": 1, "empty turn": 1,
        "unknown role": 1, "content is not text": 1, "roles do not alternate": 1, "no user turn": 2,
        "system turn in the middle": 1, "ends with a tool result": 1,
        "a turn is not an object": 1, "not an object": 1, "not JSON": 3,
        "not valid Unicode (half a surrogate pair)": 2,
    }  # fmt: skip
    assert skipped.read == 21 and skipped.total == 20
    assert str(skipped).startswith("21 read, 20 skipped (")


def test_gzip_and_parquet_read_alike(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"Hi {i}"}]} for i in range(3)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    zipped = [c.pending_turns for c in read_conversations(tmp_path / "a.jsonl.gz")]
    assert zipped == [c.pending_turns for c in read_conversations(tmp_path / "a.parquet")]
    assert zipped == [("Hi 0",), ("Hi 1",), ("Hi 2",)]


def test_dataset_ids_stream_a_named_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((name, split, streaming))
        if name == "org/none":
            raise ValueError("no such dataset")
        return iter([{"prompt": "Hi"}])

    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [c.source for c in read_conversations("org/name:dev")] == ["name:dev"]
    assert len(list(read_conversations("org/name"))) == 1
    assert asked == [("org/name", "dev", True), ("org/name", "train", True)]
    with pytest.raises(SpecdecError, match="no such dataset"):
        list(read_conversations("org/none"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match="pip install datasets"):
        list(read_conversations("org/name"))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.jsonl", None, "no such file"),
        ("a.csv", b"a,b\n", "unknown kind of file"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "Hi"}\n' * 999)[:40], "damaged"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.jsonl", b"", "no usable row: 0 read"),
        ("b.jsonl", b'{"a": 1}\n', "no usable row: 1 read, 1 skipped"),
    ],
)
def test_bad_sources_are_refused(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecdecError, match=why):
        list(read_conversations(str(tmp_path / name)))


def test_the_dev_split_is_one_in_fifty_by_sha256() -> None:
    names = [f"row-{i}" for i in range(5000)]
    chosen = [name for name in names if split_dev(name)]
    assert 60 < len(chosen) < 140
    assert all(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 50 == 0 for name in chosen)
