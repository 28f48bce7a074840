"""NoDrafter: proposes nothing, so that every round is plain decoding. The baseline of every speedup."""

from __future__ import annotations

from torch import Tensor

from specdec.accept import Verdict
from specdec.drafting.protocol import Context, Shape
from specdec.tree import DraftTree, root_only


class NoDrafter:
    """A drafter without state; its trees are roots alone."""

    name = "none"
    taps: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    def admit(self, slot: int, tokens: Tensor, features: Tensor, root: int) -> None:
        """Nothing to remember."""

    def reuse(self, source: int, slot: int, rows: int) -> int:
        """All rows: there is no state to take over."""
        return rows

    def propose(self, context: Context, shape: Shape) -> DraftTree:
        """Roots alone, whatever the shape allows."""
        return root_only(context.roots)

    def observe(self, context: Context, features: Tensor, verdict: Verdict) -> None:
        """Nothing to learn."""

    def release(self, slot: int) -> None:
        """Nothing to forget."""
