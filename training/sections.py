"""The sections of a recipe: what can be chosen about a training run, with its defaults and its limits.

Values only: where they come from (YAML, command line) is `training.recipe`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specdec.errors import SpecdecError


def _check(good: bool, field: str, value: object, allowed: str) -> None:
    if not good:
        raise SpecdecError("is not usable", field=field, value=value, allowed=allowed)


def _at_least(low: float, **fields: float | None) -> None:
    """Each field, written `section__name`, is None or at least `low`; NaN is not."""
    for name, value in fields.items():
        _check(value is None or value >= low, name.replace("__", "."), value, f">= {low:g}")


def _fraction(field: str, value: float) -> None:
    _check(0 <= value <= 1, field, value, "a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class DataSection:
    """What to train on.

    Attributes:
        prompts: file or dataset id; what the command line names counts more. None where it does.
        max_length: tokens of one window; longer samples are split.
        licences: rows to use, None for all.
        limit: use at most so many conversations, None for all.
        answers: "target" lets the target answer every user turn, "given" trains on the answers in the data.
    """

    prompts: str | None = None
    max_length: int = 2048
    licences: tuple[str, ...] | None = None
    limit: int | None = None
    answers: Literal["target", "given"] = "target"

    def __post_init__(self) -> None:
        _at_least(8, data__max_length=self.max_length)
        _at_least(1, data__limit=self.limit)
        _check(self.licences != (), "data.licences", self.licences, "names of licences, or null for all")


@dataclass(frozen=True, slots=True)
class ResponsesSection:
    """How the target writes the answers.

    Attributes:
        max_tokens: of one answer.
        sampled_fraction: share of conversations answered at `temperature`; the others greedily.
        batch: prompts answered at once.
        max_minutes: stop asking after this long and train on what is there; None answers everything.
    """

    max_tokens: int = 512
    sampled_fraction: float = 0.5
    temperature: float = 1.0
    batch: int = 64
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        _at_least(1, responses__max_tokens=self.max_tokens, responses__batch=self.batch)
        _fraction("responses.sampled_fraction", self.sampled_fraction)
        _check(0 < self.temperature <= 100, "responses.temperature", self.temperature, "> 0 and <= 100")
        _at_least(0, responses__max_minutes=self.max_minutes)


@dataclass(frozen=True, slots=True)
class VocabSection:
    """The draft vocabulary: its size by frequency over answers, None for the target's full one."""

    size: int | None = 32000

    def __post_init__(self) -> None:
        _at_least(2, vocab__size=self.size)


@dataclass(frozen=True, slots=True)
class HeadSection:
    """The draft head's shape; None means as in the target. Switches as in `specdec.head.HeadConfig`.

    Attributes:
        taps: layer-input ids, or "default" for EAGLE-3's choice.
        start: "closed-form" (see `training.warmstart`), "random", "shipped" or a directory. The last two go on from
            a head that is there: its taps and shape are then the run's; the draft vocabulary is chosen anew.
    """

    taps: tuple[int, ...] | Literal["default"] = "default"
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    start: str = "closed-form"

    def __post_init__(self) -> None:
        _check(
            self.start != "", "head.start", self.start, '"closed-form", "random", "shipped" or a directory'
        )
        rising = self.taps == "default" or (
            len(self.taps) > 0 and list(self.taps) == sorted(set(self.taps)) and min(self.taps) >= 0
        )
        _check(rising, "head.taps", self.taps, '"default" or distinct layer-input ids in rising order')
        _at_least(1, head__intermediate_size=self.intermediate_size, head__num_heads=self.num_heads,
                  head__num_key_value_heads=self.num_key_value_heads)  # fmt: skip
        if self.num_heads and self.num_key_value_heads:
            _check(self.num_heads % self.num_key_value_heads == 0, "head.num_key_value_heads",
                   self.num_key_value_heads, f"a divisor of {self.num_heads}")  # fmt: skip
        _check(
            not (self.fc_norm and self.norm_before_fc),
            "head.fc_norm",
            True,
            "one of fc_norm and norm_before_fc",
        )


@dataclass(frozen=True, slots=True)
class UnrollSection:
    """Training-time test (EAGLE-3, Li et al. 2503.01840, section 3.2).

    Attributes:
        steps: of the head on its own outputs; step 0 reads true features.
        decay: weight of step k's loss is decay ** k.
        curriculum: (fraction, steps) pairs: from this fraction of the run on, unroll so many steps.
            Empty: `steps` throughout.
        checkpointing: recompute activations in the backward pass.
        noise: of Gaussian noise on the true features, in units of their own spread; small data needs some.
    """

    steps: int = 7
    decay: float = 0.8
    curriculum: tuple[tuple[float, int], ...] = ()
    checkpointing: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, unroll__noise=self.noise)
        _check(1 <= self.steps <= 16, "unroll.steps", self.steps, "1 to 16")
        _check(0 < self.decay <= 1, "unroll.decay", self.decay, "> 0 and <= 1")
        if self.curriculum:
            starts = [fraction for fraction, _ in self.curriculum]
            rising = starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1
            _check(
                rising, "unroll.curriculum", self.curriculum, "fractions that rise from 0 and stay below 1"
            )
            within = all(1 <= steps <= self.steps for _, steps in self.curriculum)
            _check(
                within, "unroll.curriculum", self.curriculum, f"steps from 1 to unroll.steps = {self.steps}"
            )

    def steps_at(self, progress: float) -> int:
        """Steps to unroll at a fraction of the run.

        >>> UnrollSection(steps=3, curriculum=((0.0, 1), (0.5, 3))).steps_at(0.7)
        3
        """
        steps = self.steps
        for number, (start, unrolled) in enumerate(self.curriculum):
            if number == 0 or progress >= start:
                steps = unrolled
        return steps


@dataclass(frozen=True, slots=True)
class LossSection:
    """What one step's logits are compared by (LK losses: 2602.23881).

    Attributes:
        kind: kl (soft cross-entropy), tv, or lk, the hybrid lambda * KL + (1 - lambda) * TV with
            lambda = exp(-lk_rate * acceptance), the acceptance taken without gradient.
        lk_rate: of the hybrid.
        gradient: "through" lets step k's loss reach earlier steps through the state, "stopped" cuts it.
        prompt_weight: of tokens the target did not write; its distribution after them is a lesson too.
    """

    kind: Literal["kl", "tv", "lk"] = "kl"
    lk_rate: float = 3.0
    gradient: Literal["through", "stopped"] = "through"
    prompt_weight: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, loss__lk_rate=self.lk_rate)
        _fraction("loss.prompt_weight", self.prompt_weight)


@dataclass(frozen=True, slots=True)
class OptimizerSection:
    """How weights move.

    Attributes:
        name: adamw, or muon (matrices by Muon, everything else by AdamW).
        lr: at the peak, of AdamW.
        matrix_lr: at the peak, of Muon.
        warmup_fraction: of the run, rising from 0.
        schedule: cosine to 0, or constant after the warm-up.
        clip: global gradient norm, None for no clipping.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    matrix_lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_fraction: float = 0.015
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 0.5

    def __post_init__(self) -> None:
        _check(0 < self.lr <= 1, "optimizer.lr", self.lr, "> 0 and <= 1")
        _check(0 < self.matrix_lr <= 1, "optimizer.matrix_lr", self.matrix_lr, "> 0 and <= 1")
        _check(
            all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            self.betas,
            "two numbers from 0 to 1",
        )
        _at_least(0, optimizer__weight_decay=self.weight_decay)
        _fraction("optimizer.warmup_fraction", self.warmup_fraction)
        _check(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "> 0, or null for none")


@dataclass(frozen=True, slots=True)
class TrainerSection:
    """How the run goes.

    Attributes:
        batch_tokens: padded tokens of one micro-batch on one process.
        accumulation: micro-batches to one optimizer step.
        max_minutes: of training, over all its sittings, without writing answers and capturing features; it then stops
            cleanly with a usable head. None: after `epochs`.
        max_tokens: visited in the whole run, padding left out; None: after `epochs`. For comparisons at equal data.
    """

    batch_tokens: int = 8192
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    epochs: int = 10
    max_minutes: float | None = None
    max_tokens: int | None = None
    seed: int = 0
    save_every_minutes: float = 10.0
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"

    def __post_init__(self) -> None:
        _at_least(1, trainer__batch_tokens=self.batch_tokens, trainer__accumulation=self.accumulation,
                  trainer__epochs=self.epochs, trainer__max_tokens=self.max_tokens)  # fmt: skip
        _check(0 <= self.seed < 2**63, "trainer.seed", self.seed, "0 to 2**63 - 1")
        for field, value in (
            ("max_minutes", self.max_minutes),
            ("save_every_minutes", self.save_every_minutes),
        ):
            _check(value is None or value > 0, f"trainer.{field}", value, "> 0")


@dataclass(frozen=True, slots=True)
class CacheSection:
    """Features kept on disk between epochs, at most so many gigabytes; 0 recomputes them."""

    gigabytes: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, cache__gigabytes=self.gigabytes)


@dataclass(frozen=True, slots=True)
class EvaluationSection:
    """What is measured on the dev split while training: how often, on how many prompts, how far."""

    every_minutes: float = 10.0
    prompts: int = 64
    max_tokens: int = 128

    def __post_init__(self) -> None:
        _check(self.every_minutes > 0, "evaluation.every_minutes", self.every_minutes, "> 0")
        _at_least(1, evaluation__prompts=self.prompts, evaluation__max_tokens=self.max_tokens)
