"""The answers of a run on disk: written by one process, read by all, settled once training begins.

What a head trains on decides its draft vocabulary, its windows and their order, so a later sitting must find the very
texts that the first one had, even where more prompts or more minutes would give more; and the same recipe. Knows files
and the target's answerers; nothing of heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import CheckpointError, MismatchError, SpecdecError
from specdec.places import replacing
from specdec.target.load import LoadedTarget
from training.answers import EngineAnswerer
from training.checkpoint import LAST
from training.data import Conversation, Sample, Skipped
from training.endpoint import Endpoint, EndpointAnswerer, api_key
from training.mask import ChatMasker
from training.material import Texts, from_store, held_out, write_answers
from training.recipe import Recipe, load_recipe
from training.responses import Answerer
from training.store import ResponseStore

LONGEST = 4  # windows that a prompt and its answer may fill; longer ones are skipped and counted
ANSWERS, SETTLED, RECIPE = "responses.jsonl", "texts.json", "recipe.yaml"
Key = tuple[str, int]  # conversation and turn


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

    @property
    def settled(self) -> bool:
        """Whether training has begun: no answer is added then."""
        return (self.folder / SETTLED).exists() or (self.folder / LAST).exists()

    def write(self, conversations: Sequence[Conversation], chat: ChatMasker, skipped: Skipped) -> None:
        """Have the conversations answered that are not yet, unless the texts are settled. For one process.

        Raises:
            SpecdecError: from the answerer or the disk. MismatchError: the folder holds another target's answers.
        """
        if self.settled:
            return
        context = min(self.loaded.target.info.max_length, LONGEST * self.recipe.data.max_length)
        with self._open() as store:
            write_answers(conversations, self._answerer(context), store, chat, self.recipe, context, skipped)

    def read(self, conversations: Sequence[Conversation], skipped: Skipped) -> Texts:
        """What was written, or of it what training began with. Changes nothing, so many processes may.

        Raises:
            SpecdecError: there is nothing to train on. CheckpointError: settled answers are missing.
        """
        with self._open(readonly=True) as store:
            if (keys := settled_answers(self.folder)) is not None:
                store.restrict(keys)
            return from_store(store, self.recipe, skipped, held_out(c.id for c in conversations))

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
            endpoint = Endpoint(self.endpoint, target.info.name, api_key())
            return EndpointAnswerer(endpoint, _encoder(self.loaded), next(iter(target.info.stop_ids), None))
        return EngineAnswerer(target, self.recipe.responses.batch, context)


def digest_of(samples: Iterable[Sample]) -> str:
    """16 hex digits of what samples are and in which order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample)} {sample.turn} {sample.window} {sample.id}\0".encode())
        digest.update(sample.ids.tobytes() + sample.loss_mask.tobytes())
    return digest.hexdigest()[:16]


def settle(folder: Path, keys: Sequence[Key], recipe: Recipe) -> None:
    """Write down what training begins with: the recipe, and which answers (none where the data gave them).

    Raises:
        SpecdecError: the disk refuses.
    """
    _put(folder / RECIPE, recipe.to_yaml())
    if keys:
        _put(folder / SETTLED, json.dumps([list(key) for key in keys]))


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """See that a run is continued with the recipe it was begun with.

    Raises:
        MismatchError: it is not, naming what differs.
    """
    path = folder / RECIPE
    if not (path.exists() and (folder / LAST).exists()):
        return
    if differences := load_recipe(path).differences(recipe):
        raise MismatchError(f"the run was begun with other settings: {'; '.join(differences)}", field="recipe",
                            remedy="Take these back, or choose another --out.")  # fmt: skip


def _put(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    try:
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecdecError(f"cannot be written: {error.strerror or error}", field="out", value=str(path),
                           remedy="Free some space and run again.") from error  # fmt: skip


def settled_answers(folder: Path) -> list[Key] | None:
    """The answers that training began with; None before it has.

    Raises:
        CheckpointError: the list cannot be read.
    """
    path = folder / SETTLED
    if not path.exists():
        return None
    try:
        return [(str(id), int(turn)) for id, turn in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot be read: {error}", field="out", value=str(path),
                              remedy="Start a new run in another directory.") from error  # fmt: skip


def _encoder(loaded: LoadedTarget) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode
