"""Rows of prompt files as the token ids a report captures; a row that cannot be asked is named, counted and left out.

Knows templates and tokenizers; nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specdec.errors import RequestError
from specdec.unicode import lone_surrogate

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.cli.prompts import Dialogue
    from specdec.surplus.capture import Passage
    from specdec.target.load import LoadedTarget

NAMED = 3  # rows left out that are told one by one; the others are only counted


def passages_of(
    console: Console, loaded: LoadedTarget, dialogues: Sequence[tuple[str, Dialogue]], max_tokens: int
) -> tuple[Passage, ...]:
    """First turns as token ids; prompts that leave no room for an answer of `max_tokens` are left out, too."""
    from specdec.surplus.capture import Passage

    room = loaded.target.info.max_length - max_tokens - 1
    made: list[Passage] = []
    refused: list[RequestError] = []
    long = 0
    for domain, row in dialogues:
        try:
            _check_text(row.id, domain)
            ids = encode(loaded, [*row.messages, {"role": "user", "content": row.turns[0]}])
        except RequestError as error:
            error.field = f"row {row.id}"
            refused.append(error)
            continue
        if len(ids) > room:
            long += 1
            continue
        made.append(Passage(row.id, domain, ids))
    if long:
        console.print(f"{long} prompts are longer than {room} tokens and were left out", highlight=False)
    _tell(console, refused)
    return tuple(made)


def encode(loaded: LoadedTarget, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """A dialogue as the target's template renders it, or its plain text where there is no template.

    Raises:
        RequestError: the text is none, or the template refuses it.
    """
    from specdec.generate import render

    tokenizer = loaded.tokenizer
    if tokenizer.chat_template:
        return render(loaded, list(messages))
    text = "\n".join(m["content"] for m in messages)
    _check_text(text)
    return tuple(tokenizer(text)["input_ids"])


def _check_text(*texts: str) -> None:
    if (at := lone_surrogate(*texts)) is not None:
        raise RequestError(f"is not UTF-8 (character {at})")


def _tell(console: Console, refused: Sequence[RequestError]) -> None:
    for error in refused[:NAMED]:
        told = str(error).encode(errors="backslashreplace").decode()
        console.print(f"left out: {told}", highlight=False, markup=False)
    if len(refused) > NAMED:
        console.print(f"left out: {len(refused) - NAMED} more rows like these", highlight=False)
