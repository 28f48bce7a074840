"""One command's worth: from the name of a target and a file of prompts to a directory with a head that serves.

    prompts -> answers -> windows -> draft vocabulary -> features -> start -> training -> checkpoint, card, plot

Knows the order of things; each thing is done elsewhere. A run that was cut short goes on when it is given again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from filelock import FileLock, Timeout
from rich.console import Console

from specdec.errors import RequestError, SpecdecError
from specdec.head.config import HeadConfig
from specdec.head.export import TargetNames, save_raw
from specdec.head.model import DraftHead
from specdec.places import check_writable
from specdec.target.files import load_config
from specdec.target.load import LoadedTarget, load_target
from training.build import Vocabulary, build, choose_vocabulary, compute_dtype, head_config, weighed
from training.card import Story, describe, draw, write_card
from training.checkpoint import BEST, LAST, load_state
from training.data import Conversation, Skipped
from training.earlier import earlier_head
from training.features import Capture, Features
from training.mask import ChatMasker
from training.material import Texts, given, select
from training.measuring import DevSplit, Evaluator, dev_texts
from training.objective import folded
from training.plan import print_plan
from training.recipe import Recipe, load_recipe
from training.texts import Answers, check_recipe, digest_of, settle
from training.trainer import Progress, Task, Trainer
from training.watch import Watch

PATIENCE = timedelta(days=7)  # of the other processes while the main one writes answers and captures features
RUN = "run"  # the folder of what only the run needs: answers, features, checkpoints


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for.

    Attributes:
        target: name, directory, GGUF file or Hub id.
        prompts: file or `datasets` id; None: the recipe's.
        out: directory of the head; the run keeps its own things in `out/run`.
        recipe: name or YAML file; overrides: `section.field=value`.
        endpoint: base URL of an OpenAI-compatible server that answers instead of our engine.
        resume: continue a run that `out` holds; False refuses it.
        dry_run: print the plan and do nothing.
        device: where target and head live; None lets accelerate decide.
    """

    target: str
    prompts: str | None
    out: Path
    recipe: str | Path = "cpu"
    overrides: tuple[str, ...] | list[str] = ()
    endpoint: str | None = None
    resume: bool = True
    dry_run: bool = False
    device: str | None = None


def train(order: Order, console: Console | None = None) -> Path | None:
    """Train a head; returns its directory, None after a dry run.

    Raises:
        SpecdecError: what is wrong and what to do, before anything costly where possible.
    """
    console = console or Console(stderr=True)
    recipe = load_recipe(order.recipe, order.overrides)
    dtype = compute_dtype(recipe)
    check_recipe(order.out / RUN, recipe)
    if not order.resume and (order.out / RUN / LAST).exists():
        raise SpecdecError("holds a run already", field="out", value=str(order.out),
                           remedy="Drop --no-resume to continue it, or choose another directory.")  # fmt: skip
    prompts = order.prompts or recipe.data.prompts
    if prompts is None:
        raise SpecdecError(
            "are missing", field="prompts", remedy="Pass --prompts, or set data.prompts in the recipe."
        )
    skipped = Skipped()
    conversations = select(prompts, recipe, skipped)
    accelerator = _accelerator(recipe, order)
    if accelerator.is_main_process:
        check_writable(order.out)
    else:
        console = Console(quiet=True)  # one process of a launch tells
    loaded = load_target(
        order.target, device=accelerator.device, dtype=torch.float32 if dtype == torch.float32 else None
    )
    earlier = earlier_head(recipe, loaded.target.info)
    config = _head_config(loaded, recipe, recipe.vocab.size, earlier)  # a shape that cannot be is told now
    if order.dry_run:
        print_plan(console, recipe, loaded.target.info, len(conversations), config)
        return None
    with _alone(order.out / RUN) if accelerator.is_main_process else nullcontext():
        texts = _texts(order, recipe, loaded, conversations, skipped, console, accelerator)
        console.print(f"data: {texts.note}; {len(texts.train):,} windows, "
                      f"{sum(map(len, texts.train)):,} tokens", highlight=False)  # fmt: skip
        return train_on(texts, loaded, recipe, order.out, console, accelerator, earlier)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Hold the run's folder: two trainings would write into one another's answers, features and checkpoints. The system
    lets go of it when the process dies.

    Raises:
        RequestError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError("is being trained into by another process", field="out", value=str(run.parent),
                           remedy="Wait for it, or choose another directory.") from None  # fmt: skip
    try:
        yield
    finally:
        lock.release()


def _texts(order: Order, recipe: Recipe, loaded: LoadedTarget, conversations: list[Conversation],
           skipped: Skipped, console: Console, accelerator: Accelerator) -> Texts:  # fmt: skip
    """What is trained on: texts that came with the prompts, or answers, written by the main process first."""
    chat = ChatMasker(loaded.tokenizer, loaded.target.info.stop_ids)
    if recipe.data.answers == "given":
        return given(conversations, chat, recipe, loaded.target.info.max_length, skipped)
    answers = Answers(order.out / RUN, loaded, recipe, order.endpoint)
    if accelerator.is_main_process:
        answers.write(conversations, chat, skipped)
    accelerator.wait_for_everyone()
    texts = answers.read(conversations, skipped)
    if answers.settled:
        console.print(f"training has begun: its {len(texts.answers):,} answers are kept and none added")
    return texts


def train_on(texts: Texts, loaded: LoadedTarget, recipe: Recipe, out: Path, console: Console,
             accelerator: Accelerator, earlier: DraftHead | None = None) -> Path:  # fmt: skip
    """The second half of `train`, for texts that are already there; `earlier` is the head to go on from."""
    target = loaded.target
    vocabulary = choose_vocabulary(texts.train, target, recipe)
    draft = len(vocabulary.ids)
    config = _head_config(loaded, recipe, draft, earlier)
    capture = Capture(target, config.taps, recipe.trainer.batch_tokens)
    features = Features(texts.train, capture, out / RUN / "features", recipe.cache.gigabytes)
    if accelerator.is_main_process:
        _fill(features, console)
        vocabulary = weighed(vocabulary, features)
        console.print(f"draft vocabulary: {draft:,} tokens hold {describe(vocabulary)}", highlight=False)
    accelerator.wait_for_everyone()
    objective, optimizer = build(target, config, vocabulary, features, recipe, earlier)
    identity = {"target": target.info.fingerprint, "recipe": recipe.hash(), "taps": str(config.taps),
                "texts": digest_of(texts.train), "draft vocabulary": _digest(vocabulary.ids)}  # fmt: skip
    task = Task(recipe, objective, optimizer, texts.train, features, texts.skip, identity)
    accelerator.init_trackers(
        "specdec", config={"recipe": recipe.hash(), "precision": recipe.trainer.precision}
    )
    with _on_disk(out), Watch(out, console, accelerator) as watch:
        trainer = Trainer(task, out / RUN, report=watch, accelerator=accelerator)
        if trainer.resume():
            console.print(f"resuming at step {trainer.progress.step:,}")
        # only now: resuming brings the features' scale
        trainer.evaluate = _evaluator(texts, capture, task)
        trainer.plan(0)  # too little text is told before it is settled
        if accelerator.is_main_process:
            watch.rewind(trainer.progress.step)
            settle(out / RUN, texts.answers, recipe)
        progress = trainer.run()
    accelerator.end_training()
    if accelerator.is_main_process:
        with _on_disk(out):
            _deliver(out, loaded, task, config, progress, texts, vocabulary, trainer.clock.seconds / 60)
    return out


@contextmanager
def _on_disk(out: Path) -> Iterator[None]:
    """Say where the disk refused: log, trackers, card, plot. Raises SpecdecError for an OSError."""
    try:
        yield
    except OSError as error:
        raise SpecdecError(
            f"the disk refuses: {error.strerror or error}", field="out", value=str(error.filename or out),
            remedy="Free some space and run again: it goes on from the last checkpoint.",
        ) from error  # fmt: skip


def _head_config(
    loaded: LoadedTarget, recipe: Recipe, draft: int | None, earlier: DraftHead | None
) -> HeadConfig:
    """The head's numbers with a draft vocabulary of this size, None or too many for the target's full one."""
    info = loaded.target.info
    most = min(draft or info.vocab, info.vocab)
    return head_config(loaded.target, load_config(loaded.files.directory), recipe, most, earlier)


def _fill(features: Features, console: Console) -> None:
    """Capture what the cache has room for."""
    with console.status("capturing features") as status:
        done = [0]

        def advance(tokens: int) -> None:
            done[0] += tokens
            status.update(f"capturing features: {done[0]:,} tokens")

        features.fill(advance)


def _evaluator(texts: Texts, capture: Capture, task: Task) -> Evaluator:
    """What measures the head on the dev texts."""
    objective, most = task.objective, task.recipe.evaluation.prompts
    splits = [
        DevSplit(Features(dev_texts(part, most), capture), objective.scale)
        for part in (texts.greedy, texts.sampled)
    ]
    return Evaluator(objective.head, capture.target.embed, *splits)


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def _deliver(out: Path, loaded: LoadedTarget, task: Task, config: HeadConfig, progress: Progress, texts: Texts,
             vocabulary: Vocabulary, minutes: float) -> None:  # fmt: skip
    """The best head as a raw EAGLE-3 checkpoint, its card, plot and recipe."""
    directory = out / RUN
    state = load_state(directory / BEST, task.identity) or load_state(directory / LAST, task.identity)
    assert state is not None, "the trainer ends with a checkpoint"
    export(state, config, out, loaded)
    (out / "recipe.yaml").write_text(task.recipe.to_yaml(), encoding="utf-8")
    story = Story(
        loaded.target.info.name, config, task.recipe, texts.sources, texts.licences, sum(map(len, texts.train)),
        progress.tokens, vocabulary, minutes, str(task.objective.head.device), state.get("measured", {}),
    )  # fmt: skip
    write_card(out, story)
    draw(out)


def export(state: dict[str, Any], config: HeadConfig, out: Path, loaded: LoadedTarget) -> Path:
    """Write a checkpoint's head, scale folded in, as a raw EAGLE-3 directory."""
    head = DraftHead(config)
    head.load_state_dict({name: value.cpu() for name, value in folded(state["head"], state["scale"]).items()})
    about = load_config(loaded.files.directory)
    stops = loaded.target.info.stop_ids
    names = TargetNames(
        loaded.target.info.name, (loaded.target.info.architecture,), about.get("bos_token_id"),
        stops[0] if len(stops) == 1 else tuple(stops) or None, loaded.target.info.max_length,
    )  # fmt: skip
    return save_raw(head, out, target=names)


def _accelerator(recipe: Recipe, order: Order) -> Accelerator:
    """Of this process; its trackers start, and write, only when training does. Precision is the recipe's business: what
    `accelerate config` and `launch` say of it would cast the head's products a second time."""
    tracker = recipe.trainer.tracker
    cpu = order.device == "cpu" or not torch.cuda.is_available()
    return Accelerator(
        cpu=cpu, mixed_precision="no", dynamo_backend="no", log_with=None if tracker == "none" else tracker,
        project_dir=str(order.out / RUN), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip
