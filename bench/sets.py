"""The prompt sets of `bench/prompts`: where they lie, the order of their names in tables, and what they ask first."""

from __future__ import annotations

from pathlib import Path

from specdec.cli.prompts import read_dialogues

SETS = ("chat", "code", "math", "instruct", "summarize", "qa")

Messages = list[dict[str, str]]


def file_of(name: str) -> Path:
    """Of one set."""
    return Path(__file__).parent / "prompts" / f"{name}.jsonl"


def first_turns(path: Path, limit: int | None = None) -> list[Messages]:
    """The first `limit` conversations of a file, up to the answer to their first turn: later turns would depend on
    each system's own answers."""
    return [
        [*row.messages, {"role": "user", "content": row.turns[0]}] for row in read_dialogues(path)[:limit]
    ]
