"""A prompt file answered many rows at once: more tokens per second in all, each answer the same as alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specdec.cli.prompts import Dialogue
from specdec.cli.talk import Row, Talk
from specdec.engine.request import Request
from specdec.errors import RequestError
from specdec.generate import SpecDecoder, answer_of
from specdec.sampling import Sampling


class Many:
    """Dialogues over the slots of an engine that nobody else uses.

    Args:
        raw: see `Talk`.
    """

    def __init__(
        self, decoder: SpecDecoder, dialogues: Sequence[Dialogue], sampling: Sampling, raw: bool
    ) -> None:
        self.decoder, self.engine, self.sampling, self.raw = decoder, decoder.engine, sampling, raw
        self.talks = [Talk(dialogue, raw) for dialogue in dialogues]
        self._waiting = deque(self.talks)
        self._running: dict[str, tuple[Request, Talk]] = {}
        self._bar = Progress(TextColumn("{task.description}"), *Progress.get_default_columns()[1:3],
                             MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True))  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """Rows in the order of the file, a dialogue's as soon as it and all before it have ended.

        Ctrl-C ends all answers: what came so far is kept, with "cancelled" as the reason of those that were running.
        """
        with self._bar:
            task = self._bar.add_task("answers", total=len(self.talks))
            for talk in self.talks:
                try:
                    while not talk.over:
                        self._step()
                        done = len(self.talks) - len(self._waiting) - len(self._running)
                        self._bar.update(task, completed=done)
                except KeyboardInterrupt:
                    self._stop()
                yield from talk.rows

    def _step(self) -> None:
        """Fill the slots, run one round, and ask the next turns of those whose answers it ended."""
        while self._waiting and len(self._running) < self.engine.limits.slots:
            self._ask(self._waiting.popleft())
        for talk in self._take():
            if not talk.over:
                self._ask(talk)

    def _ask(self, talk: Talk) -> None:
        try:
            request = self.decoder.request(talk.ask(), self.sampling, chat=not self.raw)
            self.engine.add(request)
        except RequestError as error:
            talk.refused(error)
            return
        self._running[request.id] = request, talk

    def _take(self) -> list[Talk]:
        """Run a round; the dialogues whose answers have ended."""
        ended = [piece for piece in self.engine.step() if piece.finish and piece.request in self._running]
        talks = []
        for piece in ended:
            request, talk = self._running.pop(piece.request)
            talk.answered(answer_of(request, piece.error))
            talks.append(talk)
        return talks

    def _stop(self) -> None:
        self._waiting.clear()
        for name in self._running:
            self.engine.cancel(name)
        while self._running and self.engine.busy:
            self._take()
        for talk in self.talks:
            talk.over = True
