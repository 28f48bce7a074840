"""A dialogue of a prompt file on its way: what to ask next, and the rows of JSON that its answers become."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from specdec.cli.prompts import Dialogue
from specdec.errors import RequestError

if TYPE_CHECKING:
    from specdec.generate import Answer, Prompt

Row = dict[str, Any]


class Talk:
    """Turns answered one after another, each with the history before it.

    Args:
        raw: turns are no user's messages but texts, each continued by itself.

    Attributes:
        rows: of the turns answered so far, as `specdec generate --json` prints them.
        over: no turn is left to ask.
    """

    def __init__(self, dialogue: Dialogue, raw: bool) -> None:
        self.dialogue, self.raw = dialogue, raw
        self.messages = [dict(message) for message in dialogue.messages]
        self.rows: list[Row] = []
        self.over = False

    def ask(self) -> Prompt:
        """The next turn, once the last one was answered."""
        text = self.dialogue.turns[len(self.rows)]
        self.messages.append({"role": "user", "content": text})
        return text if self.raw or len(self.messages) == 1 else self.messages

    def answered(self, answer: Answer) -> Row:
        """Keep an answer, and tell of what failed."""
        if answer.error:
            self._tell(answer.error)
        self.messages.append({"role": "assistant", "content": answer.text})
        return self._keep({
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "stats": answer.stats(),
        }, answer.finish_reason == "cancelled")  # fmt: skip

    def refused(self, error: RequestError) -> Row:
        """The turn cannot be asked: later ones are left out, other dialogues go on."""
        self._tell(error)
        return self._keep(
            {"text": "", "token_ids": [], "finish_reason": "error", "prompt_tokens": None, "stats": None},
            True,
        )

    def _keep(self, row: Row, last: bool) -> Row:
        self.rows.append({"id": self.dialogue.id, "turn": len(self.rows), **row})
        self.over = last or len(self.rows) == len(self.dialogue.turns)
        return self.rows[-1]

    def _tell(self, error: object) -> None:
        sys.stderr.write(f"specdec generate: {self.dialogue.id}: {error}\n")
