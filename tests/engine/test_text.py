"""Text as it arrives: whole characters, stop strings across tokens, nothing shown that a stop might take back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.engine.request import Request
from specdec.engine.text import TextStream
from specdec.sampling import Sampling


def _bytes(ids: Sequence[int]) -> str:
    """Each token one byte, as byte-level tokenizers may split characters."""
    return bytes(ids).decode("utf-8", errors="replace")


def _feed(stream: TextStream, data: bytes) -> tuple[list[str], bool]:
    pieces = []
    for token in data:
        stopped = stream.push(token)
        pieces.append(stream.release(final=stopped))
        if stopped:
            return pieces, True
    return [*pieces, stream.release(final=True)], False


def test_characters_come_whole() -> None:
    pieces, stopped = _feed(TextStream(_bytes), "aé世🎉z".encode())
    assert [p for p in pieces if p] == ["a", "é", "世", "🎉", "z"]
    assert not stopped


def test_bytes_that_never_become_a_character_are_shown_in_the_end() -> None:
    stream = TextStream(_bytes)
    assert "".join(_feed(stream, b"ab\xf0\x9f")[0]) == stream.text == "ab\ufffd"
    stream = TextStream(_bytes)
    assert "".join(_feed(stream, b"\xff" * 12 + b"ok")[0]).endswith("ok")


def test_a_word_behind_a_special_token_keeps_its_space() -> None:
    """Decoders in the manner of SentencePiece strip the space of the first word they are given."""
    words = ["", "\u2581Hello", "\u2581world", "."]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    stream, ids = TextStream(decode), [1, 0, 2, 3, 0, 0, 2]
    shown = ""
    for token in ids:
        stream.push(token)
        shown += stream.release()
    assert shown == decode(ids) == "Hello world. world"


def test_tokens_without_text_are_not_decoded_again_and_again() -> None:
    """As they come where the end of an answer is ignored: thousands of them."""
    widest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal widest
        widest = max(widest, len(ids))
        return "".join("Hi " if i else "" for i in ids).removesuffix(" ")

    stream = TextStream(decode)
    for token in [1, *[0] * 1000, 1, *[0] * 1000, 1, 1]:
        stream.push(token)
    assert stream.release(final=True) == "Hi Hi Hi Hi"
    assert widest < 100


def test_a_stop_string_is_found_across_tokens_and_cut() -> None:
    stream = TextStream(_bytes, ("END", "\n\n"))
    pieces, stopped = _feed(stream, b"one\ntwo ENtail END more")
    assert stopped
    assert stream.text == "".join(pieces) == "one\ntwo ENtail "


@pytest.mark.parametrize("by", ["length", "end of sequence"])
def test_a_stop_string_beside_half_a_character_is_cut_when_the_answer_ends_there(by: str) -> None:
    """Byte-level tokenizers have tokens of a space and the first bytes of a character."""
    vocabulary = [b"a", b" \xe2\x80", b""]
    text = TextStream(lambda ids: b"".join(vocabulary[i] for i in ids).decode(errors="replace"), (" ",))
    tokens = (0, 1, 2) if by == "end of sequence" else (0, 1)
    request = Request("r", (1,), Sampling(max_tokens=len(tokens)), frozenset({2}), text=text)
    assert "".join(request.emit(tokens)) == text.text == "a"
    assert request.finish == "stop"


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(_bytes, ("stop!", "toad"))
    shown = []
    for token in b"a stop toa":
        stream.push(token)
        shown.append(stream.release())
    assert shown == ["a", " ", "", "", "", "", "stop ", "", "", ""]
    assert stream.release(final=True) == "toa"


def test_the_earliest_of_several_stops_wins() -> None:
    stream = TextStream(lambda ids: "".join("ab cd ef"[i] for i in ids), ("ef", "cd ef", "b"))
    for token in range(8):
        if stream.push(token):
            break
    assert stream.text == "a"
    two_at_once = TextStream(lambda ids: "x ab y" * len(ids), ("b", "ab"))
    assert two_at_once.push(0)
    assert two_at_once.text == "x "


def test_a_special_token_without_text_changes_nothing() -> None:
    stream = TextStream(lambda ids: "".join("ab"[i] for i in ids if i < 2))
    assert [stream.push(t) for t in (0, 9, 1)] == [False] * 3
    assert stream.release(final=True) == "ab"


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    data = text.encode()
    stream = TextStream(_bytes, tuple(stops))
    pieces, stopped = _feed(stream, data)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    assert "".join(pieces) == stream.text
    if ends:
        assert text.startswith(stream.text)
        assert not any(stop in stream.text for stop in stops)
    else:
        assert stream.text == text


@pytest.mark.parametrize("final", [True, False])
def test_release_says_nothing_twice(final: bool) -> None:
    stream = TextStream(_bytes, ("zz",))
    stream.push(ord("a"))
    assert stream.release() == "a"
    assert stream.release(final=final) == ""
