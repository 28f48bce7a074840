"""Rows of prompt files as the token ids a report captures; a row that cannot be asked is named, counted and left out.

Knows templates and tokenizers; nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specdec.errors import RequestError

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
    from jinja2.exceptions import TemplateError

    tokenizer = loaded.tokenizer
    _check_text(*(message["content"] for message in messages))
    if not tokenizer.chat_template:
        return tuple(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise RequestError(f"does not fit the chat template: {error}") from error
    return tuple(rendered)


def _check_text(*texts: str) -> None:
    """JSON may hold half a surrogate pair, which no tokenizer and no file takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"is not valid Unicode (character {error.start})") from None


def _tell(console: Console, refused: Sequence[RequestError]) -> None:
    for error in refused[:NAMED]:
        told = str(error).encode(errors="backslashreplace").decode()
        console.print(f"left out: {told}", highlight=False, markup=False)
    if len(refused) > NAMED:
        console.print(f"left out: {len(refused) - NAMED} more rows like these", highlight=False)
