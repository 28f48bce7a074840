"""What can go wrong because of input: each error names the field, the value, what is allowed and the remedy.

Knows nothing of models or tensors. `assert` is for our own bugs; these are for the user's.
"""

from __future__ import annotations


class SpecdecError(Exception):
    """A user's mistake, told in one sentence.

    Args:
        message: what is wrong.
        field: the option, key, tensor or file that is wrong.
        value: what was given.
        allowed: what would have been accepted.
        remedy: what to do next.

    >>> print(SpecdecError("not a number", field="temperature", value="hot", allowed=">= 0"))
    temperature: not a number (got 'hot'; allowed: >= 0)
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        allowed: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message, self.field, self.value = message, field, value
        self.allowed, self.remedy = allowed, remedy
        super().__init__(message)

    def __str__(self) -> str:
        notes = []
        if self.value is not None:
            shown = repr(self.value)
            notes.append("got " + (shown if len(shown) <= 120 else shown[:117] + "..."))
        if self.allowed:
            notes.append(f"allowed: {self.allowed}")
        text = (f"{self.field}: " if self.field else "") + self.message
        text += f" ({'; '.join(notes)})" if notes else ""
        return text + (f". {self.remedy}" if self.remedy else "")


class RequestError(SpecdecError):
    """A request that cannot be served: bad sampling values, too long, empty."""


class CheckpointError(SpecdecError):
    """A file of weights that is missing, broken or not what its config says."""


class MismatchError(SpecdecError):
    """A head and a target (or a run and its inputs) that do not belong together."""


class UnsupportedError(SpecdecError):
    """Something this build, machine or architecture cannot do."""
