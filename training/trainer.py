"""The loop: batches in a resumable order, one optimizer step after another, checkpoints, evaluations.

Knows the objective and the clock; not where samples or targets come from. One process, or several under
`accelerate launch`; each optimizer step consumes `processes * accumulation` consecutive batches of the epoch's plan,
so many processes walk the same path as one with more accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from specdec.errors import SpecdecError, UnsupportedError
from training.checkpoint import BEST, LAST, load_state, save_state
from training.chunks import BatchRule, Position, collate, plan_epoch
from training.data import Sample
from training.features import Features
from training.objective import Material, Objective, position_weights
from training.optim import Optimizer
from training.recipe import Recipe
from training.schedule import Clock, rate

PATIENCE = 20  # optimizer steps in a row that may be lost to NaN
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What one run trains.

    Attributes:
        recipe: every choice.
        objective: head and grading, on the accelerator's device.
        optimizer: over the head's parameters.
        samples: windows to train on; features: of the same samples, by index.
        skip: first tokens of every sample that a template put there.
        identity: what a resumed run must share.
    """

    recipe: Recipe
    objective: Objective
    optimizer: Optimizer
    samples: Sequence[Sample]
    features: Features
    skip: int
    identity: dict[str, str]


@dataclass(slots=True)
class Progress:
    """Where a run stands; saved in every checkpoint. `tokens` are those that all processes have visited."""

    position: Position = field(default_factory=Position)
    step: int = 0
    tokens: int = 0
    lost: int = 0
    best: float = -math.inf
    measured: float = 0.0
    saved: float = 0.0


class Trainer:
    """Runs a task.

    Args:
        task: what to train.
        directory: of the checkpoints.
        evaluate: measures the head; its "tau", where it has one, decides which checkpoint is best. None: no
            evaluation.
        report: hears of every optimizer step and evaluation as a row of numbers (main process only).
        accelerator: of this process.
    """

    def __init__(self, task: Task, directory: Path, evaluate: Callable[[], Row] | None = None,
                 report: Callable[[Row], None] = lambda row: None,
                 accelerator: Accelerator | None = None) -> None:  # fmt: skip
        self.task, self.directory, self.evaluate = task, directory, evaluate
        self.accelerator = accelerator or Accelerator()
        self.report = report if self.accelerator.is_main_process else lambda row: None
        self.module = self.accelerator.prepare(task.objective)
        trainer = task.recipe.trainer
        self.clock = Clock(max_minutes=trainer.max_minutes)
        self.progress = Progress()
        self.rule = BatchRule(trainer.batch_tokens, trainer.seed)
        self.lengths = np.array([len(sample) for sample in task.samples])
        self.together = self.accelerator.num_processes * trainer.accumulation

    def resume(self) -> bool:
        """Continue from the last checkpoint, if there is one; the scale of the features is the one it learned with.

        Raises:
            MismatchError: it is another run's. CheckpointError: it cannot be read.
        """
        state = load_state(self.directory / LAST, self.task.identity)
        if state is None:
            return False
        self.task.optimizer.load_state_dict(state["optimizer"])
        self.task.objective.scale.copy_(state["scale"])
        saved = state["progress"]
        self.progress = Progress(**saved | {"position": Position(*saved["position"])})
        self.clock.before = state["seconds"]
        torch.set_rng_state(state["rng"])
        return True

    def run(self) -> Progress:
        """Train to the end of the last epoch or of the time; ends with an evaluation and a checkpoint.

        Raises:
            SpecdecError: losses stay NaN. UnsupportedError: out of memory, naming what to lower.
        """
        while self.progress.position.epoch < self.task.recipe.trainer.epochs:
            epoch = self.progress.position.epoch
            plan = self.plan(epoch)
            groups = len(plan) // self.together
            # the place is a batch, so that another number of processes finds it, too
            for group in range(self.progress.position.batch // self.together, groups):
                done = self._done(epoch + group / groups)
                if done >= 1:
                    return self._finish()
                after = (group + 1) * self.together
                self._step(plan[group * self.together : after], done)
                last = group + 1 == groups
                self.progress.position = Position(epoch + 1, 0) if last else Position(epoch, after)
                self._look_up()
            self.progress.position = Position(epoch + 1, 0)  # where what is left of an epoch makes no group
        return self._finish()

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of one epoch. Raises SpecdecError where they are too few for an optimizer step."""
        plan = plan_epoch(self.lengths, self.rule, epoch)
        if len(plan) < self.together:
            raise SpecdecError("is too little data for one optimizer step", field="data",
                               value=f"{len(plan)} batches", allowed=f">= {self.together}",
                               remedy="Lower trainer.batch_tokens or trainer.accumulation.")  # fmt: skip
        return plan

    def _done(self, epochs: float) -> float:
        """Fraction of the run: by epochs, tokens or time, whichever is furthest; one answer for all processes."""
        trainer, processes = self.task.recipe.trainer, self.accelerator.num_processes
        visited = self.progress.tokens / trainer.max_tokens if trainer.max_tokens else 0.0
        done = torch.tensor(max(epochs / trainer.epochs, visited, self.clock.spent), dtype=torch.float64)
        if processes > 1 and trainer.max_minutes:
            from accelerate.utils import broadcast

            done = broadcast(done.to(self.accelerator.device))
        return float(done)

    def _step(self, group: Sequence[tuple[int, ...]], done: float) -> None:
        """One optimizer step over the batches of `group`, of which this process takes its share."""
        recipe, progress = self.task.recipe, self.progress
        steps = recipe.unroll.steps_at(done)
        sequences = sum(len(batch) for batch in group)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        sums = torch.zeros(steps, 4, device=self.accelerator.device)
        for number in range(rank, len(group), processes):
            seed = 1 + progress.step * self.together + number + (recipe.trainer.seed << 32)
            try:
                material = self._material(group[number])
                with self._syncing(number + processes >= len(group)):
                    loss, marks = self.module(material, steps, sequences, seed)
                    self.accelerator.backward(loss * processes)  # data parallelism takes the mean
            except RuntimeError as error:
                raise _out_of_memory(error) from error
            sums += marks
        progress.tokens += sum(int(self.lengths[index]) for batch in group for index in batch)
        sums = self.accelerator.reduce(sums, "sum")
        norm = self._clip()
        if not (math.isfinite(norm) and bool(sums.isfinite().all())):
            self._lose()
            return
        progress.lost = 0
        self.task.optimizer.step(rate(recipe.optimizer, done))
        progress.step += 1
        self._tell(sums, {"done": round(done, 5), "unroll": steps, "grad_norm": norm,
                          "lr": rate(recipe.optimizer, done) * recipe.optimizer.lr})  # fmt: skip

    def _syncing(self, last: bool) -> Any:
        """Gradients meet at the last micro-batch of a step."""
        from contextlib import nullcontext

        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def _clip(self) -> float:
        parameters = list(self.task.objective.head.parameters())
        limit = self.task.recipe.optimizer.clip
        return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))

    def _lose(self) -> None:
        """A step whose numbers are not finite moves nothing; too many in a row end the run."""
        self.task.objective.zero_grad(set_to_none=True)
        self.progress.lost += 1
        self.report({"kind": "lost", "step": self.progress.step})
        if self.progress.lost >= PATIENCE:
            raise SpecdecError(f"{PATIENCE} optimizer steps in a row gave NaN", field="optimizer.lr",
                               value=self.task.recipe.optimizer.lr,
                               remedy="Lower it; the last checkpoint is from before.")  # fmt: skip

    def _material(self, indices: Sequence[int]) -> Material:
        batch = collate(self.task.samples, indices)
        captured = self.task.features.take(indices)
        device = self.accelerator.device
        mask, lengths = batch.loss_mask.to(device), batch.lengths.to(device)
        weights = position_weights(mask, lengths, self.task.recipe.loss.prompt_weight, self.task.skip)
        return Material(
            padded([one.features for one in captured], batch.ids.shape[1]).to(device),
            padded([one.final for one in captured], batch.ids.shape[1]).to(device),
            batch.ids.to(device), weights, mask, lengths,
        )  # fmt: skip

    def _tell(self, sums: Tensor, extra: Row) -> None:
        if not self.accelerator.is_main_process:
            return
        mean = (sums[:, :3] / sums[:, 3:].clamp(min=1)).tolist()
        loss, overlap, hit = (list(column) for column in zip(*mean, strict=True))
        progress = self.progress
        self.report({"kind": "step", "step": progress.step, "seconds": self.clock.seconds,
                     "tokens": progress.tokens, "loss": loss, "overlap": overlap, "hit": hit} | extra)  # fmt: skip

    def _look_up(self) -> None:
        """Evaluate and save when it is time to."""
        recipe, progress = self.task.recipe, self.progress
        if self.clock.seconds - progress.measured > 60 * recipe.evaluation.every_minutes:
            self._measure()
        if self.clock.seconds - progress.saved > 60 * recipe.trainer.save_every_minutes:
            self.save()

    def _measure(self) -> None:
        if self.evaluate is not None and self.accelerator.is_main_process:
            row = self.evaluate()
            self.report(
                {"kind": "evaluation", "step": self.progress.step, "seconds": self.clock.seconds} | row
            )
            if "tau" in row and row["tau"] > self.progress.best:  # unmeasured, the last head is delivered
                self.progress.best = row["tau"]
                self._write(BEST, {"measured": row})
        self.progress.measured = self.clock.seconds

    def save(self) -> None:
        """Write the last checkpoint."""
        self.progress.saved = self.clock.seconds
        progress = {name: getattr(self.progress, name) for name in Progress.__slots__}
        progress["position"] = [self.progress.position.epoch, self.progress.position.batch]
        self._write(LAST, {
            "progress": progress, "seconds": self.clock.seconds, "rng": torch.get_rng_state(),
            "optimizer": self.task.optimizer.state_dict(),
        })  # fmt: skip

    def _write(self, name: str, state: Row) -> None:
        if self.accelerator.is_main_process:
            objective = self.task.objective
            head = self.task.optimizer.masters | {"ids": objective.head.ids}
            common = {"identity": self.task.identity, "head": head, "scale": objective.scale}
            save_state(self.directory / name, common | state)

    def _finish(self) -> Progress:
        self._measure()
        self.save()
        self.accelerator.wait_for_everyone()
        # The process group must outlive DDP: its reducer, last to hold the group, would join gloo's thread with the
        # interpreter locked, while that thread may need the interpreter to let go of the barrier's tensors.
        self.module = self.task.objective
        self.accelerator.free_memory()
        return self.progress


def padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """[T_i, W] each -> [B, length, W], zeros at the end."""
    out = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out


def _out_of_memory(error: RuntimeError) -> RuntimeError | UnsupportedError:
    """The same error, or one that says which knobs help."""
    text = str(error).lower()
    if "out of memory" not in text and "can't allocate memory" not in text:
        return error
    return UnsupportedError(
        "out of memory", field="trainer.batch_tokens",
        remedy="Lower trainer.batch_tokens (raise trainer.accumulation to match), unroll.steps or vocab.size, "
        "or set unroll.checkpointing: true.",
    )  # fmt: skip
