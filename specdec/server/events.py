"""What reaches the event loop of a sequence: pieces, each with its log-probabilities, and what speculation did."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Piece


@dataclass(frozen=True, slots=True)
class Step:
    """Speculation in one round of one request: accepted draft tokens, and the depth on offer."""

    accepted: int
    offered: int


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of one of a call's sequences.

    Attributes:
        index: of the sequence.
        piece: tokens, text, how it ended.
        logprobs: of the piece's tokens, when asked for.
    """

    index: int
    piece: Piece
    logprobs: tuple[TokenLogprob, ...] = ()

    def __add__(self, later: Event) -> Event:
        """This event and the one after it, as one."""
        return Event(self.index, self.piece + later.piece, self.logprobs + later.logprobs)

    def split(self, count: int) -> tuple[Event, Event]:
        """The first `count` tokens, and the rest with how it ended."""
        first, rest = self.piece.split(count)
        return Event(self.index, first, self.logprobs[:count]), Event(self.index, rest, self.logprobs[count:])
