"""Training-time test: the head unrolled on its own outputs (EAGLE-3, Li et al. 2503.01840, section 3.2).

Knows rows and steps; knows nothing of losses, files or where features come from.
Dimension legend: B sequences, T positions, R chosen rows, H head size, F feature width.

    position      t                                      row t of step k predicts token t + 2 + k
    step 0   feature(t), token(t+1)  -> token t+2        keys: rows 0 .. t of step 0
    step 1   y0(t),      token(t+2)  -> token t+3        and y-row t of step 1, at rotary position t + 1
    step 2   y1(t),      token(t+3)  -> token t+4        and y-row t of steps 1 and 2

Tokens are the text's own, features the head's. A later step adds one key per position that only the same position
sees, so its rows never meet each other: steps after the first run only the rows that somebody will grade.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specdec.errors import UnsupportedError
from specdec.head.model import DraftHead
from specdec.layers.heads import Heads
from training.diagonal import causal_with_diagonals


@dataclass(frozen=True, slots=True)
class Unrolled:
    """One step's output.

    Attributes:
        y: [R, H] the head's output before its norm, at the rows asked for.
        rows: int64 [R], flat indices b * T + t of those rows.
    """

    y: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """The head's reading of true features: keys and values [B, T, G, D], outputs y [B, T, H]."""

    key: Tensor
    value: Tensor
    y: Tensor


def shifted(values: Tensor, by: int) -> Tensor:
    """values [B, T, ...] moved `by` places to the left; the end repeats the last column.

    >>> shifted(torch.tensor([[1, 2, 3]]), 1)
    tensor([[2, 3, 3]])
    """
    index = (torch.arange(values.shape[1], device=values.device) + by).clamp(max=values.shape[1] - 1)
    return values.index_select(1, index)


def graded_rows(loss_mask: Tensor, lengths: Tensor, step: int) -> Tensor:
    """bool [B, T]: rows of `step` whose predicted token t + 2 + step is one to learn.

    Args:
        loss_mask: bool [B, T], token t is one the target would have written.
        lengths: int64 [B], tokens of each sequence.
    """
    ahead = 2 + step
    column = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    return shifted(loss_mask, ahead) & (column + ahead < lengths[:, None])


class Unroll:
    """Runs a head for several steps over a padded batch of sequences.

    Args:
        head: its weights may be any float type; features are cast to it.
        embed: the target's input embedding, int64 [...] -> [..., H].
        checkpointing: recompute each step in the backward pass instead of keeping its activations.
        stopped: cut the gradient where an output is fed back.

    Raises:
        UnsupportedError: for a head with a sliding window.
    """

    def __init__(self, head: DraftHead, embed: Callable[[Tensor], Tensor], *, checkpointing: bool = False,
                 stopped: bool = False) -> None:  # fmt: skip
        if head.config.window is not None:
            raise UnsupportedError(
                "the unroll trains full attention only", field="window", value=head.config.window
            )
        self.head, self.embed, self.checkpointing, self.stopped = head, embed, checkpointing, stopped

    def __call__(self, features: Tensor, tokens: Tensor, rows: list[Tensor]) -> list[Unrolled]:
        """Unroll `len(rows)` steps.

        Args:
            features: [B, T, F] taps of positions 0 .. T - 1 (padding at the end is never seen by real rows).
            tokens: int64 [B, T].
            rows: for each step, bool [B, T], the rows whose output is wanted; see `graded_rows`.
        """
        b, t = tokens.shape
        needed = _needed(rows)
        at = torch.arange(b * t, device=tokens.device)
        y = self.head.fuse(features.to(self.head.dtype)).flatten(0, 1)
        seen: _Seen | None = None
        out = []
        for step, wanted in enumerate(rows):
            if step:
                assert seen is not None
                keep = needed[step][at]
                at, y, seen = at[keep], self.head.feedback(y[keep]), seen.at(keep)
                y = y.detach() if self.stopped else y
            if len(at):  # short texts have no rows in late steps
                y, seen = self._step(step, at, tokens, y, seen)
            mine = wanted.flatten()[at]
            out.append(Unrolled(y[mine], at[mine]))
        return out

    def read(self, features: Tensor, tokens: Tensor) -> Reading:
        """Step 0 alone, over all positions, with the keys and values that any later step would see."""
        at = torch.arange(tokens.numel(), device=tokens.device)
        g = self.head.fuse(features.to(self.head.dtype)).flatten(0, 1)
        y, seen = self._step(0, at, tokens, g, None)
        return Reading(seen.key, seen.value, y.view(*tokens.shape, -1))

    def _step(
        self, step: int, at: Tensor, tokens: Tensor, g: Tensor, seen: _Seen | None
    ) -> tuple[Tensor, _Seen]:
        """Rows `at` of one step. g: [R, H] -> y [R, H] and the keys that the next step sees."""
        shape = (tokens.shape[0], tokens.shape[1])
        embedded = self.embed(shifted(tokens, 1 + step).flatten()[at]).to(g.dtype)
        positions = at % tokens.shape[1] + step

        def run(embedded: Tensor, g: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
            attend = _Attend(shape, at, _Seen(*keys) if keys else None)
            y = self.head(embedded[None], g[None], self.head.angles(positions[None]), attend)
            return y[0], *attend.after()

        before = () if seen is None else (seen.key, seen.value, seen.own_key, seen.own_value)
        if self.checkpointing and torch.is_grad_enabled():
            y, *after = checkpoint(run, embedded, g, *before, use_reentrant=False)
        else:
            y, *after = run(embedded, g, *before)
        return y, _Seen(*after)


def _needed(rows: list[Tensor]) -> list[Tensor]:
    """Rows that each step must run, flat: its own and those of every later step."""
    needed = [rows[-1].flatten()]
    for wanted in reversed(rows[:-1]):
        needed.append(needed[-1] | wanted.flatten())
    return needed[::-1]


@dataclass(frozen=True, slots=True)
class _Seen:
    """Keys and values of earlier steps: causal [B, T, G, D], and each row's own [R, S, G, D]."""

    key: Tensor
    value: Tensor
    own_key: Tensor
    own_value: Tensor

    def at(self, keep: Tensor) -> _Seen:
        return _Seen(self.key, self.value, self.own_key[keep], self.own_value[keep])


class _Attend:
    """The head's `attend` for the rows `at` of one step; remembers the keys it was given."""

    def __init__(self, shape: tuple[int, int], at: Tensor, seen: _Seen | None) -> None:
        self.shape, self.rows, self.seen = shape, at, seen

    def __call__(self, new: Heads, scale: float) -> Tensor:
        """Heads of [1, R] rows -> [1, R, H, D]."""
        query, key, value = new.turned()
        if self.seen is None:
            none = key[0, :, None][:, :0]
            self.seen = _Seen(self._grid(key[0]), self._grid(value[0]), none, value[0, :, None][:, :0])
        else:
            own_key = torch.cat([self.seen.own_key, key[0, :, None]], dim=1)
            own_value = torch.cat([self.seen.own_value, value[0, :, None]], dim=1)
            self.seen = _Seen(self.seen.key, self.seen.value, own_key, own_value)
        seen = self.seen
        out = causal_with_diagonals(
            self._grid(query[0]).transpose(1, 2), seen.key.transpose(1, 2), seen.value.transpose(1, 2),
            self._grid(seen.own_key).permute(0, 3, 1, 2, 4), self._grid(seen.own_value).permute(0, 3, 1, 2, 4), scale,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)[self.rows][None]

    def after(self) -> tuple[Tensor, ...]:
        assert self.seen is not None, "the head attends exactly once"
        return self.seen.key, self.seen.value, self.seen.own_key, self.seen.own_value

    def _grid(self, values: Tensor) -> Tensor:
        """[R, ...] at the rows -> [B, T, ...], zero elsewhere."""
        b, t = self.shape
        if values.shape[0] != b * t:
            values = values.new_zeros(b * t, *values.shape[1:]).index_copy(0, self.rows, values)
        return values.view(b, t, *values.shape[1:])
