"""The answers of a run on disk: written by one process, read by all.

Knows files and the target's answerers; nothing of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import MismatchError
from specdec.target.load import LoadedTarget
from training.answers import EngineAnswerer
from training.data import Conversation, Skipped
from training.endpoint import Endpoint, EndpointAnswerer
from training.mask import ChatMasker
from training.material import Texts, from_store, write_answers
from training.recipe import Recipe
from training.responses import Answerer
from training.store import ResponseStore

LONGEST = 4  # windows that a prompt and its answer may fill; longer ones are skipped and counted
ANSWERS = "responses.jsonl"


@dataclass(frozen=True, slots=True)
class Answers:
    """What the target wrote for a run.

    Attributes:
        folder: of the run.
        loaded: the target; recipe: of the run.
        endpoint: base URL of a server that answers instead of our engine.
    """

    folder: Path
    loaded: LoadedTarget
    recipe: Recipe
    endpoint: str | None = None

    def write(self, conversations: Sequence[Conversation], chat: ChatMasker, skipped: Skipped) -> None:
        """Have the conversations answered that are not yet. For one process.

        Raises:
            SpecdecError: from the answerer or the disk. MismatchError: the folder holds another target's answers.
        """
        context = min(self.loaded.target.info.max_length, LONGEST * self.recipe.data.max_length)
        with self._open() as store:
            write_answers(conversations, self._answerer(context), store, chat, self.recipe, context, skipped)

    def read(self, skipped: Skipped) -> Texts:
        """What was written. Changes nothing, so many processes may.

        Raises:
            SpecdecError: there is nothing to train on.
        """
        with self._open(readonly=True) as store:
            return from_store(store, self.recipe, skipped)

    def _open(self, readonly: bool = False) -> ResponseStore:
        fingerprint = self.loaded.target.info.fingerprint
        try:
            return ResponseStore(self.folder / ANSWERS, fingerprint, readonly=readonly)
        except MismatchError as error:
            raise MismatchError(
                "the directory holds another target's answers", field="out", value=str(self.folder.parent),
                remedy="Choose another directory.",
            ) from error  # fmt: skip

    def _answerer(self, context: int) -> Answerer:
        target = self.loaded.target
        if self.endpoint is not None:
            endpoint = Endpoint(self.endpoint, target.info.name)
            return EndpointAnswerer(endpoint, _encoder(self.loaded), target.info.stop_ids[0])
        return EngineAnswerer(target, self.recipe.responses.batch, context)


def _encoder(loaded: LoadedTarget) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode
