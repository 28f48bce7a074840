"""Prompts to token ids. Text that no context of this length can hold is refused unread: reading it takes minutes.

Knows tokenizer and template, nothing of sampling or answers.
"""

from __future__ import annotations

from functools import cached_property

from specdec.errors import RequestError
from specdec.generate import SpecDecoder
from specdec.server.schema import Message
from specdec.target.vocabulary import Vocabulary

WIDEST = 4  # bytes of a character in UTF-8
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
        self._check_size(text, "prompt")
        return tuple(self.decoder.tokenizer.encode(text, add_special_tokens=special))

    def messages(self, messages: list[Message]) -> tuple[int, ...]:
        """Ids of a conversation. Raises RequestError when it is too long or the template does not take it."""
        if not self.decoder.tokenizer.chat_template:
            raise RequestError("need a chat template, which this model lacks", field="messages",
                               remedy="Use /v1/completions.")  # fmt: skip
        plain = [message.plain() for message in messages]
        if sum(len(one["content"]) for one in plain) > self.most_bytes // WIDEST:
            self._check_size(self._rendered(plain), "messages")
        return self.decoder.encode(plain)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """The text itself: a template may leave out much of long messages, such as thoughts of earlier turns."""
        try:
            return str(
                self.decoder.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            )
        except Exception as error:  # templates raise what they like about roles they do not know
            raise RequestError(f"do not fit the chat template: {error}", field="messages") from None

    def _check_size(self, text: str, field: str) -> None:
        size = len(text.encode())
        if size > self.most_bytes:
            raise RequestError("is longer than the context", field=field, value=f"{size} bytes",
                               allowed=f"at most {self.length - 1} tokens")  # fmt: skip
