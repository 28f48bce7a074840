"""The data contract: what capture hands to every estimator, and how contexts at depth k are cut from it.

Knows tensors only: no model, no tokenizer, no file. Alignment, drawn once (final[i] predicts ids[i+1]):

    position          t        t+1      ...   t+k-1        t+k
    ids               x_t      x_{t+1}  ...   x_{t+k-1}    x_{t+k}
    the probe reads   taps[t]  z_k = (x_{t+1} ... x_{t+k-1})
    its label p_k                             final[t+k-1] (no need of x_{t+k})

Dimension legend: T captured positions, A taps, d hidden width, V vocabulary, n contexts, k depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import MismatchError, RequestError


@dataclass(frozen=True, slots=True)
class TargetHead:
    """The target's map from final state to next-token law, frozen.

    Attributes:
        unembedding: [V, d], row w is the output vector of token w.
        norm_weight: [d] of the final RMSNorm, or None where the final state is already normed (toys).
        eps: of that norm.
        temperature: serving temperature; logits are divided by it.
    """

    unembedding: Tensor
    norm_weight: Tensor | None = None
    eps: float = 1e-6
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RequestError(
                "soft labels need a positive temperature",
                field="temperature",
                value=self.temperature,
                allowed="> 0",
                remedy="Capture at the serving temperature, or at 1",
            )

    def normed(self, final: Tensor) -> Tensor:
        """final [..., d] -> the float32 vector that multiplies the unembedding."""
        wide = final.float()
        if self.norm_weight is None:
            return wide
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * scale * self.norm_weight.float()

    def log_probs(self, final: Tensor) -> Tensor:
        """final [n, d] -> float32 log p [n, V]; the full softmax, so call it in chunks."""
        # bfloat16 log-softmax biases the tails, hence float32 throughout.
        logits = self.normed(final) @ self.unembedding.float().T
        return torch.log_softmax(logits / self.temperature, dim=-1)


@dataclass(frozen=True, slots=True)
class Captured:
    """Text of the target's own law, teacher-forced once. Documents are contiguous runs of rows.

    Attributes:
        ids: int64 [T] token at each position.
        doc: int64 [T] document of each position, non-decreasing.
        position: int64 [T] index within its document.
        domain: int64 [T] index into `domains`.
        taps: [T, A, d] residual stream entering the tapped layers.
        final: [T, d] input of the final norm; `head.log_probs(final[i])` is the law of ids[i + 1].
        head: unembedding, final norm, serving temperature.
        domains: a name per domain index.
        layers: the tapped layer of each column of `taps`.

    Raises:
        MismatchError: lengths that disagree, documents out of order, a NaN or infinity in the states.
    """

    ids: Tensor
    doc: Tensor
    position: Tensor
    domain: Tensor
    taps: Tensor
    final: Tensor
    head: TargetHead
    domains: tuple[str, ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        self._check_lengths()
        if bool((self.doc.diff() < 0).any()):
            raise MismatchError("documents are not contiguous", field="doc", remedy="Sort rows by document")
        for name, states in (("taps", self.taps), ("final", self.final)):
            bad = ~torch.isfinite(states).flatten(1).all(dim=1)
            if bool(bad.any()):
                raise MismatchError(
                    f"{int(bad.sum())} positions hold NaN or infinity",
                    field=name,
                    value=f"first at row {int(bad.nonzero()[0])}",
                    remedy="Capture again in float32; drop the document if it persists",
                )

    def _check_lengths(self) -> None:
        rows = self.ids.shape[0]
        for name in ("doc", "position", "domain", "taps", "final"):
            found = getattr(self, name).shape[0]
            if found != rows:
                raise MismatchError(
                    "length disagrees with ids", field=name, value=found, allowed=f"{rows} rows"
                )
        if self.taps.ndim != 3 or self.taps.shape[1] != len(self.layers):
            raise MismatchError(
                "shape is not [T, A, d]",
                field="taps",
                value=tuple(self.taps.shape),
                allowed=f"A = {len(self.layers)} layers",
            )
        if self.domain.numel() and int(self.domain.max()) >= len(self.domains):
            raise MismatchError(
                "a domain has no name",
                field="domain",
                value=int(self.domain.max()),
                allowed=f"0 to {len(self.domains) - 1}",
            )

    def features(self, layers: tuple[int, ...]) -> Tensor:
        """Concatenate the taps of `layers`: [T, len(layers) * d].

        Raises:
            RequestError: a layer that was not captured.
        """
        for layer in layers:
            if layer not in self.layers:
                raise RequestError(
                    "this layer was not captured",
                    field="layers",
                    value=layer,
                    allowed=", ".join(map(str, self.layers)),
                    remedy="Capture again with this tap",
                )
        columns = [self.layers.index(layer) for layer in layers]
        return self.taps[:, columns].flatten(1)


@dataclass(frozen=True, slots=True)
class Contexts:
    """The contexts of one depth: rows t whose documents still hold position t + k - 1.

    Attributes:
        depth: k >= 2, the draft token is x_{t+k}.
        at: int64 [n], t.
        z: int64 [n, k - 1], the tokens the drafter already has.
    """

    depth: int
    at: Tensor
    z: Tensor

    @property
    def label_row(self) -> Tensor:
        """int64 [n]: the row whose final state gives p_k."""
        return self.at + self.depth - 1

    def take(self, keep: Tensor) -> Contexts:
        """The contexts picked by a mask or an index [m]."""
        return Contexts(self.depth, self.at[keep], self.z[keep])


def contexts(ids: Tensor, doc: Tensor, depth: int, among: Tensor | None = None) -> Contexts:
    """Every context of `depth` that stays within one document.

    Args:
        ids: int64 [T].
        doc: int64 [T].
        depth: k >= 2.
        among: optional bool [T], rows t to keep.

    >>> c = contexts(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 0, 0, 1]), depth=2)
    >>> c.at.tolist(), c.z.tolist(), c.label_row.tolist()
    ([0, 1], [[6], [7]], [1, 2])

    Raises:
        RequestError: depth below 2 (depth 1 is the target's own next token, nothing to draft).
    """
    if depth < 2:
        raise RequestError("no draft token at this depth", field="depth", value=depth, allowed=">= 2")
    reach = max(ids.shape[0] - (depth - 1), 0)
    start = torch.arange(reach, device=ids.device)
    valid = doc[:reach] == doc[depth - 1 : depth - 1 + reach]
    if among is not None:
        valid = valid & among[:reach]
    at = start[valid]
    z = ids[at[:, None] + torch.arange(1, depth, device=ids.device)]
    return Contexts(depth, at, z)
