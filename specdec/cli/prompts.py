"""Prompt files: jsonl rows with `turns`, `messages` or `prompt`, read and checked before anything runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import RequestError
from specdec.unicode import lone_surrogate


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages to start from, and user turns that are answered one after another."""

    id: str
    messages: tuple[dict[str, str], ...]
    turns: tuple[str, ...]
    category: str = ""


def read_dialogues(path: Path) -> list[Dialogue]:
    """All rows of a jsonl file. Raises RequestError naming the line that is not one."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except FileNotFoundError:
        raise RequestError("does not exist", field="prompts", value=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot be read: {error}", field="prompts", value=str(path)) from None
    lines = text.split("\n")  # not splitlines: JSON has U+0085 and U+2028 inside of strings
    rows = [_row(line, f"{path.name}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise RequestError("holds no prompts", field="prompts", value=str(path))
    return rows


def _row(line: str, where: str) -> Dialogue:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"is not JSON ({error.msg})", field=where, value=line) from None
    except (ValueError, RecursionError):
        raise RequestError(
            "holds a number too long or lists too deep to read", field=where, value=line
        ) from None
    if not isinstance(row, dict):
        raise RequestError("is not an object", field=where, value=line)
    name, category = str(row.get("id", where)), str(row.get("category", ""))
    if lone_surrogate(name) is not None:  # it could not be printed with the answer
        raise RequestError("has an id that is not valid Unicode", field=where, value=name)
    if "turns" in row:
        return Dialogue(name, (), tuple(_texts(row["turns"], where, "turns")), category)
    if "messages" in row:
        return _from_messages(name, row["messages"], where, category)
    if "prompt" in row:
        return Dialogue(name, (), tuple(_texts([row["prompt"]], where, "prompt")), category)
    raise RequestError("has none of turns, messages, prompt", field=where, value=sorted(row))


def _texts(value: Any, where: str, key: str) -> Iterator[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise RequestError("wants non-empty text", field=f"{where} {key}", value=value)
    yield from value


def _from_messages(name: str, messages: Any, where: str, category: str) -> Dialogue:
    good = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not good or messages[-1]["role"] != "user":
        raise RequestError(
            "wants role and content, a user message last", field=f"{where} messages", value=messages
        )
    return Dialogue(name, tuple(messages[:-1]), (messages[-1]["content"],), category)


def read_stdin() -> str:
    """The prompt on standard input. Raises RequestError for bytes that are not UTF-8."""
    if sys.stdin.isatty():
        sys.stderr.write("write the prompt; Ctrl-D on a line of its own ends it\n")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"is not UTF-8 (byte {error.start})", field="standard input") from None
