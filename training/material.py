"""From prompts to samples: conversations read, answered by the target, split into windows, dev split set apart.

Knows files, templates and stores; nothing of heads. The dev split is decided by conversation id alone (see `held_out`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from specdec.errors import SpecdecError
from training.chunks import split_windows
from training.data import Conversation, Sample, Skipped, read_conversations, split_dev
from training.mask import ChatMasker, TemplateRefusal, mask_conversations
from training.recipe import Recipe
from training.responses import Answerer, AnswerPlan, write_responses
from training.store import Response, ResponseStore, response_samples

FIRST = 2  # the first token of a text that a head can draft: it reads feature 0 and token 1
HANDFULS = 4  # batches handed to the answerer at once, so that its slots stay full while long answers end


@dataclass(frozen=True, slots=True)
class Texts:
    """What a run trains on and is measured by.

    Attributes:
        train: windows.
        greedy, sampled: dev texts the target wrote at temperature 0 and above, cut within their first answer.
        skip: first tokens that all samples share (a template's preamble).
        sources, licences: conversations used, by name.
        note: what was left out and why, one line.
        answers: (id, turn) of the target's answers behind all this; none where the data gave them.
    """

    train: list[Sample]
    greedy: list[Sample]
    sampled: list[Sample]
    skip: int
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    note: str = ""
    answers: tuple[tuple[str, int], ...] = ()


def select(prompts: str | Path, recipe: Recipe, skipped: Skipped) -> list[Conversation]:
    """The conversations of a run, dev split included, as the recipe limits them."""
    rows = read_conversations(prompts, recipe.data.licences, skipped)
    limit = recipe.data.limit
    return list(rows if limit is None else islice(rows, limit))


def held_out(ids: Iterable[str]) -> Callable[[str], bool]:
    """`split_dev`, or none held out where these, the conversations of a run, would leave nothing to train on."""
    return split_dev if not all(map(split_dev, ids)) else lambda id: False


def write_answers(
    conversations: Sequence[Conversation], answerer: Answerer, store: ResponseStore, chat: ChatMasker,
    recipe: Recipe, context: int, skipped: Skipped,
) -> None:  # fmt: skip
    """Let the target answer into a store; `from_store` makes samples of it.

    Args:
        store: keeps the answers; what it holds is not asked again.
        context: longest prompt and answer the answerer takes; what is longer is skipped and counted.

    Raises:
        SpecdecError: from the answerer or the disk.
    """
    wanted = recipe.responses
    plan = AnswerPlan(wanted.max_tokens, context, HANDFULS * wanted.batch, wanted.sampled_fraction, wanted.temperature,
                      recipe.trainer.seed, wanted.max_minutes)  # fmt: skip
    held = held_out(c.id for c in conversations)
    dev = [c for c in conversations if held(c.id)][: recipe.evaluation.prompts]
    train = [c for c in conversations if not held(c.id)]
    # the dev split first: a run that is cut short can still be measured
    written = write_responses([c.without_answers() for c in [*dev, *train]], answerer, store, chat, plan)
    for reason, count in written.skipped.reasons.items():
        skipped.add(reason, count)


def from_store(store: ResponseStore, recipe: Recipe, skipped: Skipped,
               held: Callable[[str], bool] = split_dev) -> Texts:  # fmt: skip
    """Samples of the answers that a store holds.

    Args:
        held: which conversations are measured on and never trained on.
    """
    cold = {response.id for response in store if response.temperature == 0}
    dev = [_cut(sample, recipe.evaluation.max_tokens) for sample in response_samples(store, held)]
    greedy = [sample for sample in dev if sample.id in cold]
    sampled = [sample for sample in dev if sample.id not in cold]
    train = response_samples(store, lambda id: not held(id))
    windows = split_windows(train, recipe.data.max_length, skipped=skipped)
    used = [r for r in store if r.turn == 0 and not held(r.id)]
    return replace(_texts(windows, greedy, sampled, skipped, used), answers=tuple(store.keys()))


def given(conversations: Sequence[Conversation], chat: ChatMasker, recipe: Recipe, context: int, skipped: Skipped
          ) -> Texts:  # fmt: skip
    """Samples of the answers in the data, which the target did not write: tau on them is a lower bound.

    Args:
        context: positions the target has; longer texts are split there at the latest, and none is measured on.

    Raises:
        SpecdecError: no assistant turns, or a template that cannot be masked.
    """
    held = held_out(c.id for c in conversations)
    train = mask_conversations([c for c in conversations if not held(c.id)], chat, skipped)
    dev = [c for c in conversations if held(c.id) and c.messages][: recipe.evaluation.prompts]
    # one by one: a refused conversation among them is as little an error as among the others
    samples = [sample for c in dev for sample in _samples(c, chat, skipped)]
    cut = [_cut(sample, recipe.evaluation.max_tokens) for sample in samples if sample.loss_mask.any()]
    texts = [sample for sample in cut if len(sample) <= context]
    used = [Response(c.id, c.source, c.licence, 0.0, (), (), "stop", 0) for c in conversations]
    windows = split_windows(train, min(recipe.data.max_length, context), skipped=skipped)
    return _texts(windows, texts, [], skipped, used)


def _samples(conversation: Conversation, chat: ChatMasker, skipped: Skipped) -> list[Sample]:
    try:
        return chat.samples(conversation)
    except TemplateRefusal as refusal:
        skipped.add(f"refused by the chat template: {refusal}")
        return []


def _texts(cut: Iterable[Sample], greedy: list[Sample], sampled: list[Sample], skipped: Skipped,
           used: Iterable[Response]) -> Texts:  # fmt: skip
    windows = []
    for window in cut:
        if window.loss_mask[FIRST:].any():
            windows.append(window)
        else:
            skipped.add("window too short to draft in")
    if not windows:
        raise SpecdecError(f"left nothing to train on: {skipped}", field="data.prompts",
                           remedy="Check the prompts, data.licences and responses.max_minutes.")  # fmt: skip
    used = list(used)
    return Texts(
        windows, greedy, sampled, shared_prefix(windows), Counter(r.source or "unnamed" for r in used),
        Counter(r.licence or "none given" for r in used), str(skipped),
    )  # fmt: skip


def _cut(sample: Sample, answer_tokens: int) -> Sample:
    """The sample up to so many tokens of its first answer, and not beyond it: what follows are the user's words.

    mask   . . x x . . x     with 5 answer tokens: . . x x
    """
    first = int(sample.loss_mask.argmax())
    after = np.flatnonzero(~sample.loss_mask[first:])
    end = first + min(answer_tokens, int(after[0]) if after.size else len(sample) - first)
    return replace(sample, ids=sample.ids[:end], loss_mask=sample.loss_mask[:end])


def shared_prefix(samples: Sequence[Sample]) -> int:
    """How many first tokens all samples have in common; 0 for a single one. Later windows begin in the middle."""
    begun = [sample for sample in samples if not sample.window]
    if len(begun) < 2:
        return 0
    first = begun[0].ids
    length = len(first)
    for sample in begun[1:]:
        shorter = min(length, len(sample))
        differs = np.flatnonzero(first[:shorter] != sample.ids[:shorter])
        length = int(differs[0]) if differs.size else shorter
    return length
