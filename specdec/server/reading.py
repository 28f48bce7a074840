"""Prompts to token ids. Text that no context of this length can hold is refused unread: reading it takes minutes.

Knows tokenizer and template, nothing of sampling or answers.
"""

from __future__ import annotations

from functools import cached_property

from specdec.errors import RequestError
from specdec.generate import SpecDecoder, rendered
from specdec.server.schema import Message
from specdec.target.vocabulary import Vocabulary

SLACK = 4  # for tokenizers that rewrite text first: composing Unicode shortens it by three at most


class Reader:
    """Reads for one target; not to be shared by threads.

    Args:
        decoder: has the tokenizer and the length of the context.
        vocabulary: of its target.
    """

    def __init__(self, decoder: SpecDecoder, vocabulary: Vocabulary) -> None:
        self.decoder, self.vocabulary = decoder, vocabulary
        self.length = decoder.engine.limits.length

    @cached_property
    def most_bytes(self) -> int:
        """What a whole context of the longest token stands for."""
        longest = max(len(self.vocabulary.bytes(token)) for token in range(self.vocabulary.size))
        tokenizer = self.decoder.tokenizer
        rewrites = not tokenizer.is_fast or tokenizer.backend_tokenizer.normalizer is not None
        return longest * self.length * (SLACK if rewrites else 1)

    def text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Ids of a text; `special`: with what the tokenizer puts before or behind it. Raises RequestError."""
        return self._ids(text, "prompt", special=special)

    def messages(self, messages: list[Message]) -> tuple[int, ...]:
        """Ids of a conversation. Raises RequestError when it is too long or the template does not take it."""
        if not self.decoder.tokenizer.chat_template:
            raise RequestError("need a chat template, which this model lacks", field="messages",
                               remedy="Use /v1/completions.")  # fmt: skip
        # the text's size counts, not the messages': a template may leave out thoughts of earlier turns
        text = rendered(self.decoder.loaded, [message.plain() for message in messages])
        return self._ids(text, "messages", special=False)

    def _ids(self, text: str, field: str, *, special: bool) -> tuple[int, ...]:
        size = len(text.encode())
        if size > self.most_bytes:
            raise RequestError("is longer than the context", field=field, value=f"{size} bytes",
                               allowed=f"at most {self.length - 1} tokens")  # fmt: skip
        return tuple(self.decoder.tokenizer.encode(text, add_special_tokens=special))
