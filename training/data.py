"""Conversations to train on, read from jsonl, parquet or a `datasets` id, whatever their rows are called.

Knows rows and roles; knows nothing of tokens, templates or models.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.errors import SpecdecError
from specdec.unicode import lone_surrogate
from training.rows import read_rows

DEV_EVERY = 50  # one conversation in fifty is never trained on
TEXT = "text"  # the role of a plain document: no template, every token counts
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool, or `text` for a plain document."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one row says, in one shape for every row format.

    Attributes:
        id: unique within what was read; decides the dev split.
        source, licence: as the row says, empty where it does not.
        messages: the turns that have been spoken; the last is the assistant's, or a lone system or text one.
        pending_turns: user turns that nobody has answered yet, in order.
    """

    id: str
    source: str
    licence: str
    messages: tuple[Message, ...]
    pending_turns: tuple[str, ...] = ()

    def without_answers(self) -> Conversation:
        """The same user turns, all waiting for the target's own answers (a head learns the target's law).

        >>> talk = Conversation("a", "", "", (Message("user", "Hi"), Message("assistant", "Yo")), ("Bye",))
        >>> talk.without_answers().pending_turns
        ('Hi', 'Bye')
        """
        system = tuple(m for m in self.messages[:1] if m.role == "system")
        asked = tuple(m.content for m in self.messages if m.role == "user")
        return Conversation(self.id, self.source, self.licence, system, asked + self.pending_turns)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Token ids of a text and which of them the assistant wrote.

    Attributes:
        id: of the conversation, as it is there (ids may hold any character, so nothing is written into them).
        ids: int32 [T].
        loss_mask: bool [T]; True where token t is one that the target would have had to produce itself.
        turn: the first answer in it, where one conversation gives several samples.
        window: number of the window that was cut from a longer text; later ones begin in the middle of it.
    """

    id: str
    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    turn: int = 0
    window: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Skipped:
    """How many rows were read and, by reason, how many were left out. Prints as one line.

    >>> skipped = Skipped(); skipped.read = 3; skipped.add("empty")
    >>> print(skipped)
    3 read, 1 skipped (empty: 1)
    """

    def __init__(self) -> None:
        self.read = 0
        self.reasons: Counter[str] = Counter()

    def add(self, reason: str, count: int = 1) -> None:
        if count:
            self.reasons[reason] += count

    def reject(self, reason: str) -> None:
        """Read one row and leave it out."""
        self.read += 1
        self.add(reason)

    @property
    def total(self) -> int:
        return self.reasons.total()

    def __str__(self) -> str:
        notes = "; ".join(f"{reason}: {count:,}" for reason, count in self.reasons.most_common())
        return f"{self.read:,} read, {self.total:,} skipped" + (f" ({notes})" if notes else "")


class RowError(ValueError):
    """Why one row cannot be used; it is counted, not fatal."""


def split_dev(id: str) -> bool:
    """Whether this conversation belongs to the dev split: by its id alone, everywhere the same fiftieth."""
    return int(hashlib.sha256(id.encode()).hexdigest(), 16) % DEV_EVERY == 0


def read_conversations(
    source: str | Path, licences: Collection[str] | None = None, skipped: Skipped | None = None
) -> Iterator[Conversation]:
    """The usable rows of a file or dataset, in its order.

    Args:
        source: a .jsonl, .jsonl.gz or .parquet file, or a `datasets` id: `org/name` or `org/name:split`.
        licences: keep rows with one of these licences (case does not matter); None keeps all.
        skipped: counts what is read and, by reason, what is left out.

    Rows carry `messages` (role, content), ShareGPT `conversations` (from, value), `turns` (user turns alone),
    `prompt` with or without `completion`, or `text`.

    Raises:
        SpecdecError: nothing there, not readable, or not one usable row (told with the reasons).
    """
    skipped = Skipped() if skipped is None else skipped
    allowed = None if licences is None else {name.lower() for name in licences}
    seen: set[str] = set()
    for row in read_rows(source, skipped.reject):
        skipped.read += 1
        try:
            conversation = _conversation(row, Path(str(source)).name)
            _check_licence(conversation.licence, allowed)
        except RowError as error:
            skipped.add(str(error))
            continue
        if conversation.id in seen:
            skipped.add("duplicate id")
            continue
        seen.add(conversation.id)
        yield conversation
    if not seen:
        raise SpecdecError(
            f"holds no usable row: {skipped}",
            field="data.prompts",
            value=str(source),
            allowed="rows with messages, conversations, turns, prompt or text",
            remedy="Check the row format and data.licences.",
        )


def _check_licence(licence: str, allowed: Collection[str] | None) -> None:
    if allowed is not None and licence.lower() not in allowed:
        raise RowError(f"licence not allowed: {licence or 'none given'}")


def _conversation(row: Mapping[str, Any], origin: str) -> Conversation:
    """One row in our shape. Raises RowError with the reason to count."""
    messages = _messages(row)
    if messages[0].role == TEXT:
        spoken, pending = messages, tuple[str, ...]()
    else:
        _check_order(messages)
        spoken, pending = _split_pending(messages)
    licence = str(row.get("licence") or row.get("license") or "")
    source = str(row.get("source") or row.get("category") or origin)
    id = _identity(row, messages)
    _check_unicode(id, source, licence, *(message.content for message in messages))
    return Conversation(id, source, licence, spoken, pending)


def _check_unicode(*texts: str) -> None:
    if lone_surrogate(*texts) is not None:
        raise RowError("not valid Unicode (half a surrogate pair)")


def _identity(row: Mapping[str, Any], messages: tuple[Message, ...]) -> str:
    for key in ("id", "conversation_id", "prompt_id", "uuid"):
        if row.get(key) not in (None, ""):
            return str(row[key])
    text = "\x1e".join(f"{m.role}\x1f{m.content}" for m in messages)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if row.get("messages"):
        return _chat(row["messages"], "role", "content")
    if row.get("conversations"):
        turns = _list(row["conversations"])
        sharegpt = isinstance(turns[0], Mapping) and "from" in turns[0]
        return _chat(turns, *(("from", "value") if sharegpt else ("role", "content")))
    if row.get("turns"):
        return tuple(Message("user", _text(turn)) for turn in _list(row["turns"]))
    if row.get("prompt"):
        asked = _prompt(row["prompt"])
        answer = row.get("completion") or row.get("response")
        return (*asked, *_completion(answer)) if answer else asked
    if row.get("text"):
        return (Message(TEXT, _text(row["text"])),)
    raise RowError("none of messages, conversations, turns, prompt, text")


def _prompt(prompt: Any) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else _chat(prompt, "role", "content")


def _completion(answer: Any) -> tuple[Message, ...]:
    return (Message("assistant", answer),) if isinstance(answer, str) else _chat(answer, "role", "content")


def _list(value: Any) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RowError("turns are not a list")
    return list(value)


def _chat(turns: Any, role_key: str, content_key: str) -> tuple[Message, ...]:
    messages = []
    for turn in _list(turns):
        if not isinstance(turn, Mapping):
            raise RowError("a turn is not an object")
        role = ROLES.get(str(turn.get(role_key, "")).lower())
        if role is None:
            raise RowError("unknown role")
        messages.append(Message(role, _text(turn.get(content_key))))
    # ShareGPT dumps often open with the end of an earlier answer; there is nothing it could answer to.
    while messages and messages[0].role in ("assistant", "tool"):
        messages.pop(0)
    if not messages:
        raise RowError("no user turn")
    return tuple(messages)


def _text(content: Any) -> str:
    """The text of a turn; content parts are joined where all are text."""
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        content = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(content, str):
        raise RowError("content is not text")
    if not content.strip():
        raise RowError("empty turn")
    return content


def _check_order(messages: tuple[Message, ...]) -> None:
    """Chat templates want system, then user and assistant in turn (tool results may follow a call)."""
    turns = messages[1:] if messages[0].role == "system" else messages
    if not any(m.role == "user" for m in turns):
        raise RowError("no user turn")
    if any(m.role == "system" for m in turns):
        raise RowError("system turn in the middle")


def _split_pending(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Trailing user turns wait for an answer; every earlier user turn must have one."""
    end = len(messages)
    while end and messages[end - 1].role == "user":
        end -= 1
    spoken = messages[:end]
    for before, after in pairwise(spoken):
        if before.role == after.role and before.role in ("user", "assistant"):
            raise RowError("roles do not alternate")
    if spoken and spoken[-1].role == "tool":
        raise RowError("ends with a tool result")
    return spoken, tuple(m.content for m in messages[end:])
