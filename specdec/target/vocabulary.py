"""What single tokens are as bytes and text: for log-probabilities, grammars and /tokenize.

Knows the three ways tokenizers spell tokens: byte-level symbols, <0xAB> bytes, and words with a mark for space.
"""

from __future__ import annotations

import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # SentencePiece's mark


class Vocabulary:
    """Bytes of every token id.

    Args:
        tokenizer: of the target.
        size: ids the target's logits have; ids that the tokenizer does not know are empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text: control tokens, and ids beyond the tokenizer."""
        known = len(self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset({i for i, token in added if token.special} | set(range(known, self.size)))

    @cached_property
    def _spelled(self) -> list[bytes]:
        known = min(len(self.tokenizer), self.size)
        pieces = [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(list(range(known)))]
        added = self.tokenizer.added_tokens_decoder
        symbols = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
        byte_level = "ByteLevel" in _decoder(self.tokenizer)
        out = []
        for token, piece in enumerate(pieces):
            if token in added:
                out.append(piece.encode())
            elif byte_level and all(symbol in symbols for symbol in piece):
                out.append(bytes(symbols[symbol] for symbol in piece))
            else:
                byte = BYTE.fullmatch(piece)
                out.append(bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode())
        return out + [b""] * (self.size - len(out))

    def bytes(self, token: int) -> bytes:
        """Exact bytes of a token; a control token's are its name."""
        return self._spelled[token] if 0 <= token < self.size else b""

    def text(self, token: int) -> str:
        """The token as text; parts of characters become replacement marks."""
        return self.bytes(token).decode("utf-8", "replace")


def _decoder(tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoder of a fast tokenizer, spelled out; empty for others."""
    if not tokenizer.is_fast:
        return ""
    return repr(tokenizer.backend_tokenizer.decoder)
