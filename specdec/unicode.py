"""Text that is none: half of a surrogate pair, which JSON may hold and no tokenizer, file or terminal takes."""

from __future__ import annotations


def lone_surrogate(*texts: str) -> int | None:
    """Where the first one stands in its text; None where there is none.

    >>> lone_surrogate("fine", "a\\ud83d")
    1
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return error.start
    return None
