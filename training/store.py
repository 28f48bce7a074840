"""ResponseStore: answers of the target on disk, one JSON line each, appended and never rewritten.

A crash may tear the last line: opening cuts it off, what is before counts. Knows nothing of who answers.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from specdec.errors import CheckpointError, MismatchError, SpecdecError
from specdec.places import replacing
from training.data import Sample


@dataclass(frozen=True, slots=True)
class Response:
    """One answer of the target, with the very ids it read and wrote (nothing is tokenised twice).

    Attributes:
        id, source, licence: of the conversation.
        temperature: 0 is greedy.
        prompt_ids: everything before the answer, template included.
        response_ids: the answer with its end-of-turn token, if it came to one.
        finish_reason: stop or length.
        turn: number of the pending user turn it answers, from 0.
    """

    id: str
    source: str
    licence: str
    temperature: float
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: str
    turn: int


class ResponseStore:
    """An append-only file of responses with an index in memory: (id, turn) to its place in the file.

    Args:
        path: a .jsonl file, made when it is missing.
        fingerprint: of the target that answers; kept beside the file, another target is refused.
        readonly: touch nothing, so that other processes may read beside this one.

    Raises:
        MismatchError: the file holds another target's answers.
        CheckpointError: a line that is not the last one is broken, or there is no file to read.
    """

    def __init__(self, path: Path, fingerprint: str | None = None, *, readonly: bool = False) -> None:
        self.path = path
        self.tokens = 0
        self._places: dict[tuple[str, int], int] = {}
        if not readonly:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise CheckpointError("the answers are gone", field="responses", value=str(path),
                                  remedy="Choose another --out, or bring them back.")  # fmt: skip
        _check_fingerprint(path, fingerprint, write=not readonly)
        self._file: IO[bytes] = path.open("rb" if readonly else "r+b" if path.exists() else "w+b")
        try:
            self._end = self._scan()
        except BaseException:
            self._file.close()
            raise
        if not readonly:
            self._file.truncate(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._places

    def get(self, id: str, turn: int) -> Response:
        """The answer to one turn. Raises KeyError when there is none."""
        self._file.seek(self._places[id, turn])
        return _parse(self._file.readline())

    def __iter__(self) -> Iterator[Response]:
        """All answers: conversations in the order they were begun, each one's turns in order."""
        turns: dict[str, list[int]] = {}
        for id, turn in self._places:
            turns.setdefault(id, []).append(turn)
        for id, numbers in turns.items():
            for turn in sorted(numbers):
                yield self.get(id, turn)

    def restrict(self, keys: Iterable[tuple[str, int]]) -> None:
        """Hold no more than these answers from now on; the file keeps them all.

        Raises:
            CheckpointError: one of them is not there.
        """
        keys = set(keys)
        if gone := keys - self._places.keys():
            raise CheckpointError(f"{len(gone):,} of {len(keys):,} answers that training began with are gone",
                                  field="responses", value=str(self.path),
                                  remedy="Choose another --out, or bring them back.")  # fmt: skip
        self._places = {key: place for key, place in self._places.items() if key in keys}
        self.tokens = sum(len(response.response_ids) for response in self)

    def keys(self) -> list[tuple[str, int]]:
        """(id, turn) of every answer, in the order they were written."""
        return list(self._places)

    def append(self, response: Response) -> None:
        """Add one answer and hand it to the operating system; a killed process loses none.

        Raises:
            SpecdecError: the disk refuses (full); what was there stays readable.
        """
        line = json.dumps(asdict(response), separators=(",", ":")).encode() + b"\n"
        try:
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._undo()
            raise SpecdecError(
                f"cannot be written: {error.strerror or error}",
                field="responses",
                value=str(self.path),
                remedy=f"Free some space and run again: the {len(self):,} answers so far are kept.",
            ) from error
        self._note(response, self._end)
        self._end += len(line)

    def _undo(self) -> None:
        """Forget half a line."""
        with contextlib.suppress(OSError):  # closing flushes what just did not fit
            self._file.close()
        with contextlib.suppress(OSError):  # where even this fails the next opening cuts it off
            self._file = self.path.open("r+b")
            self._file.truncate(self._end)

    def _note(self, response: Response, place: int) -> None:
        self._places[response.id, response.turn] = place
        self.tokens += len(response.response_ids)

    def _scan(self) -> int:
        """Index every whole line; returns where the good part of the file ends."""
        place = 0
        for number, line in enumerate(self._file, start=1):
            try:
                if not line.endswith(b"\n"):
                    break
                self._note(_parse(line), place)
            except (ValueError, LookupError, TypeError, OverflowError) as error:
                if self._file.read(1):
                    raise CheckpointError(
                        f"line {number} is broken: {error}",
                        field="responses",
                        value=str(self.path),
                        remedy="Delete that line; it will be answered again.",
                    ) from error
                break
            place += len(line)
        return place


def response_samples(store: ResponseStore, keep: Callable[[str], bool] | None = None) -> Iterator[Sample]:
    """What the target wrote, as training samples: the loss mask is on its answers, known without a template.

    Turns of one conversation become one sample where each prompt continues the ids before it (all answers for
    the price of the last), else one sample each.

    Args:
        store: of answers.
        keep: which conversation ids to use, such as `lambda id: not split_dev(id)`; None takes all.
    """
    run: list[Response] = []
    for response in store:
        if keep is not None and not keep(response.id):
            continue
        if run and not _continues(run[-1], response):
            yield _sample(run)
            run = []
        run.append(response)
    if run:
        yield _sample(run)


def _continues(before: Response, after: Response) -> bool:
    length = len(before.prompt_ids) + len(before.response_ids)
    spoken = before.prompt_ids + before.response_ids
    return after.id == before.id and after.turn == before.turn + 1 and after.prompt_ids[:length] == spoken


def _sample(run: list[Response]) -> Sample:
    ids = np.array(run[-1].prompt_ids + run[-1].response_ids, dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for response in run:
        start = len(response.prompt_ids)
        mask[start : start + len(response.response_ids)] = True
    return Sample(run[0].id, ids, mask, run[0].turn)


def _parse(line: bytes) -> Response:
    row: dict[str, Any] = json.loads(line)
    for name in ("prompt_ids", "response_ids"):
        row[name] = tuple(array("i", row[name]))  # refuses what is not a list of whole numbers
    return Response(**row)


def _check_fingerprint(path: Path, fingerprint: str | None, *, write: bool) -> None:
    """Compare with, or write, the small file that says whose answers these are."""
    if fingerprint is None:
        return
    beside = path.with_name(path.name + ".target")
    if beside.exists():
        if (other := beside.read_text().strip()) != fingerprint:
            raise MismatchError(
                "holds the answers of another target",
                field="responses",
                value=other,
                allowed=fingerprint,
                remedy="Choose another --out, or delete the answers.",
            )
        return
    if not write:
        return
    with replacing(beside) as fresh:
        fresh.write_text(fingerprint + "\n")
