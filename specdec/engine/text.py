"""Token ids to text as they arrive: whole characters only, cut at stop strings, across any token boundary.

Knows a tokenizer's `decode` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BROKEN = "\ufffd"  # a decoder's mark for bytes that are not yet a character
WAIT = 8  # tokens after which a broken character is taken for what it is
SILENT = 64  # tokens without text, as behind an end that is ignored, that are decoded with what follows


@dataclass(slots=True)
class TextStream:
    """Text of one answer.

    Args:
        decode: ids -> text, special tokens skipped.
        stops: strings that end the answer and are cut from it.

    `text` is final as far as it was released; what might begin a stop string is held back. `ids` are those of the text,
    without some that have none.
    """

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    text: str = ""
    ids: list[int] = field(default_factory=list)
    _start: int = 0
    _read: int = 0
    _released: int = 0

    def push(self, token: int, *, last: bool = False) -> bool:
        """Add a token, after which no other comes if it is the `last`; True when a stop string is complete, and then
        `text` ends before it."""
        self.ids.append(token)
        now = self.decode(self.ids[self._start :])
        if now.endswith(BROKEN) and len(self.ids) - self._read < WAIT and not last:
            return False
        return self._take(now)

    def _take(self, now: str) -> bool:
        """Add what the tokens since `_start` say beyond what was read of them; True when a stop string is complete."""
        known = self.decode(self.ids[self._start : self._read])
        searched = len(self.text)
        self.text += now[len(known) :]
        if len(now) > len(known):
            # else a special token: a window that began with it would lose the space of the next word
            self._start = self._read
        elif len(self.ids) - self._start > SILENT:
            del self.ids[self._read :]
        self._read = len(self.ids)
        return self._stop(searched)

    def _stop(self, searched: int) -> bool:
        cuts = [
            at for stop in self.stops if (at := self.text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if cuts:
            self.text = self.text[: min(cuts)]
        return bool(cuts)

    def release(self, *, final: bool = False) -> str:
        """Text that became certain since the last call; everything when `final`."""
        if final and self._read < len(self.ids):
            self._take(self.decode(self.ids[self._start :]))
        end = len(self.text) if final else len(self.text) - self._held()
        piece = self.text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _held(self) -> int:
        """Length of the longest tail that could begin a stop string."""
        return max(
            (
                n
                for stop in self.stops
                for n in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:n])
            ),
            default=0,
        )
