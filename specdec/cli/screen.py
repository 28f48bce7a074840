"""Standard output for tables: who stops reading ends the program as in every other verb (see main.py)."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console


class Screen(Console):
    """rich's console, which by itself ends with code 1 when the reader has gone."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError
