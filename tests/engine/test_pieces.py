"""Pieces of an answer: texts of single tokens, cut anywhere and joined again."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from specdec.engine.request import Piece, Request
from specdec.engine.text import TextStream
from specdec.sampling import Sampling


def _bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def _emitted(data: bytes, *stops: str) -> tuple[Request, list[str]]:
    """A request whose round was `data`, a token a byte, and the texts it handed out."""
    sampling = Sampling(max_tokens=64, stop=stops)
    request = Request("r", (1,), sampling, frozenset({0}), text=TextStream(_bytes, stops))
    return request, request.emit(list(data))


def test_every_token_brings_what_became_certain_with_it() -> None:
    request, texts = _emitted("aé.".encode(), ".\n")
    assert texts == ["a", "", "é", ""]
    assert request.release() == ""
    request.finish = "cancelled"
    assert request.release() == "."


def test_the_last_token_brings_what_was_held_back() -> None:
    request, texts = _emitted(b"ab!\0cd", "!!")
    assert (request.finish, texts) == ("stop", ["a", "b", "", "!"])
    request, texts = _emitted(b"ab!!cd", "!!")
    assert (request.finish, texts) == ("stop", ["a", "b", "", ""])


def test_runs_tell_drafted_text_from_the_targets_own() -> None:
    drafted = (True, True, False, True)
    assert Piece("r", (1, 2, 3, 4), drafted, ("a", "b", "c", "")).runs() == [("ab", True), ("c", False)]
    assert Piece("r", (1, 2, 3), (True, False, True), ("a", "", "b")).runs() == [("ab", True)]
    assert Piece("r", (), (), ("held",), "cancelled").runs() == [("held", False)]


@given(st.text("aé!\n", min_size=1, max_size=12), st.integers(0, 30))
def test_a_piece_cut_and_joined_is_the_piece(text: str, at: int) -> None:
    data = text.encode()
    request, texts = _emitted(data, "!\n")
    kept = tuple(data[: len(texts)])
    whole = Piece("r", kept, tuple(token % 2 == 0 for token in kept), tuple(texts), request.finish)
    first, rest = whole.split(at % (len(kept) + 1))
    assert first.finish is None
    assert len(first.tokens) == len(first.texts) == at % (len(kept) + 1)
    assert first + rest == whole
