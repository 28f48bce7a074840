"""One micro-batch's loss: the head unrolled, each step graded against the target, rows weighed.

Knows the head, the target's embedding and LM-head rows; nothing of optimizers, files or time.
Dimension legend: B sequences, T positions, F feature width, H hidden size, Vd draft vocabulary, S steps.

    row weight = decay^step * weight(token) / (length of its sequence * sequences of the optimizer step)

so sequences count equally whatever their length or their batch (a mean over all tokens lets long answers rule, and
acceptance then falls while the loss does; methods of EAGLE-3 and DeepSpec).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from specdec.head.model import DraftHead
from training.losses import Loss, fused_loss, target_probs
from training.unroll import Unroll, graded_rows


@dataclass(frozen=True, slots=True)
class Material:
    """One micro-batch.

    Attributes:
        features: [B, T, F] taps as the target gives them.
        final: [B, T, H] input of the target's LM head.
        tokens: int64 [B, T].
        weights: float32 [B, T], how much each token counts; 0 is context only.
        answered: bool [B, T], tokens the target wrote; only these are reported.
        lengths: int64 [B].
    """

    features: Tensor
    final: Tensor
    tokens: Tensor
    weights: Tensor
    answered: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Settings:
    """How steps are weighed and run; see the recipe's `unroll` and `loss` sections."""

    loss: Loss = field(default_factory=Loss)
    decay: float = 0.8
    checkpointing: bool = False
    stopped: bool = False
    noise: float = 0.0


class Objective(nn.Module):
    """Head and grading in one module, so that data parallelism sees one forward.

    Args:
        head: in the dtype it computes in; its `fc` is in units of `scale`.
        embed: the target's input embedding.
        rows: [Vd, H] of the target's LM head.
        scale: [F] what features are divided by; see `folded`.
        finish: see `target_probs`.
    """

    scale: Tensor
    rows: Tensor

    def __init__(self, head: DraftHead, embed: Callable[[Tensor], Tensor], rows: Tensor, scale: Tensor,
                 settings: Settings, finish: Callable[[Tensor], Tensor] | None = None) -> None:  # fmt: skip
        super().__init__()
        self.head, self.settings = head, settings
        self.embed, self.finish = embed, finish
        self.register_buffer("rows", rows.to(head.dtype), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.unroll = Unroll(head, embed, checkpointing=settings.checkpointing, stopped=settings.stopped)

    def forward(self, material: Material, steps: int, sequences: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch.

        Args:
            steps: to unroll.
            sequences: in the whole optimizer step, over all processes and micro-batches.
            seed: of the feature noise; no noise at 0.

        Returns:
            (scalar, float32 [S, 4]: per step the sums over answered rows of loss, overlap, hit, and their count).
        """
        graded = [graded_rows(material.weights > 0, material.lengths, step) for step in range(steps)]
        probs, where = self._labels(material, graded)
        share = material.weights / (material.lengths[:, None] * sequences)
        features = scaled(material.features, self.scale, self.head.dtype)
        if seed and self.settings.noise:
            features = features + self._noise(features, seed)
        loss = features.new_zeros((), dtype=torch.float32)
        sums = []
        for step, done in enumerate(self.unroll(features, material.tokens, graded)):
            token = done.rows + 2 + step
            weight = share.flatten()[token] * self.settings.decay**step
            hidden = self.head.norm(done.y)
            index = where[token - 1]
            value, marks = fused_loss(
                hidden, self.head.lm_head.weight, probs, index, weight, self.settings.loss
            )
            loss = loss + value
            mine = material.answered.flatten()[token].float()
            columns = (marks.loss, marks.overlap, marks.hit.float(), torch.ones_like(mine))
            sums.append(torch.stack([(column * mine).sum() for column in columns]))
        return loss, torch.stack(sums)

    def _labels(self, material: Material, graded: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Target distributions [M, Vd], each computed once, and the row of each position in it."""
        needed = torch.zeros_like(graded[0])
        for step, rows in enumerate(graded):
            # row t of this step is graded by the target's state at t + 1 + step
            needed[:, 1 + step :] |= rows[:, : max(0, rows.shape[1] - 1 - step)]
        flat = needed.flatten().nonzero()[:, 0]
        where = torch.full((needed.numel(),), -1, device=flat.device)
        where[flat] = torch.arange(len(flat), device=flat.device)
        with torch.no_grad():
            final = material.final.flatten(0, 1)[flat].to(self.rows.dtype)
            return target_probs(final, self.rows, self.finish), where

    def _noise(self, features: Tensor, seed: int) -> Tensor:
        """Gaussian noise, in units of each tap's own spread over the batch; the same for the same seed."""
        generator = torch.Generator(features.device).manual_seed(seed)
        spread = features.detach().float().flatten(0, 1).std(0)
        noise = torch.randn(features.shape, generator=generator, device=features.device)
        return (noise * (self.settings.noise * spread)).to(features.dtype)


def scaled(features: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Features divided by `scale`: a few of a target's dimensions are hundreds of times the others."""
    return (features.float() / scale).to(dtype)


@torch.no_grad()
def folded(state: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """The head's state with the scale folded into `fc`, so that it reads features as the target gives them."""
    return state | {"fc.weight": state["fc.weight"].float() / scale.to(state["fc.weight"].device)}


def position_weights(loss_mask: Tensor, lengths: Tensor, prompt_weight: float, skip: int) -> Tensor:
    """float32 [B, T]: 1 on answers, `prompt_weight` on the rest of the text but its first `skip` tokens.

    What the target would say after a prompt's tokens is as true a lesson as after its own; it costs nothing more to
    capture, and small data needs it. The first tokens are a template's, the same in every sample.
    """
    column = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    inside = (column < lengths[:, None]) & (column >= skip)
    return torch.where(loss_mask, 1.0, prompt_weight * inside)
