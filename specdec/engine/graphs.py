"""GraphedTarget: tree forwards captured once per shape and replayed, one launch instead of hundreds.

At batch 1 a small target spends most of a step launching kernels. Trees are padded to a few sizes, so that a handful of
programs serves every round; prompts run as they are. Knows tensors and their shapes, nothing of requests.
Dimension legend: B requests, N rows, H hidden, A taps, V vocabulary.

    tokens, rows  --copy-->  static inputs  --replay-->  static outputs  --view-->  states of the first B x N
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.attention.protocol import Rows, chunk_rows, tree_rows
from specdec.cache import KVCache, RowIndex
from specdec.target.protocol import States, Target
from specdec.tree import MAX_NODES, build

NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, MAX_NODES)  # sizes that trees are padded to
BATCHES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP = 3  # runs before capturing: lazy set-up must not be recorded
TOLERANCE = 2e-2  # of logits, relative to their spread, between captured and plain

Work = Callable[[], None]


def nothing() -> None:
    """Of work that may be done again as it is."""


class Recording(Protocol):
    """Makes a program out of work on tensors that stay where they are."""

    def record(self, work: Work, restore: Work = nothing) -> Work:
        """Do the work, perhaps several times, and return what does it again.

        `restore` puts back what the work has moved on: it runs between two times, never after the last.
        """
        ...


class CudaRecording:
    """CUDA graphs, all in one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        # a pool whose last graph is gone cannot be captured into
        self._first: torch.cuda.CUDAGraph | None = None

    def record(self, work: Work, restore: Work = nothing) -> Work:
        """Warm up on a side stream, then capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    work()
                    restore()
        finally:  # also of work that failed half-way, something may still run
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool, self._first = graph.pool(), self._first or graph
        graph.replay()  # capturing computes nothing

        def again(work: Work = work) -> None:  # holds the work, whose tensors the graph reads
            graph.replay()

        return again


@dataclass(frozen=True, slots=True)
class _Program:
    """Captured work; what it returns is overwritten by the next run."""

    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]
    replay: Work

    def run(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        for static, new in zip(self.inputs, given, strict=True):
            static.copy_(new)
        self.replay()
        return self.outputs


class GraphedTarget:
    """A target that replays tree forwards.

    Args:
        inner: whose forwards are captured; they must not wait for the device.
        recording: how.

    States are valid until the next forward of the same shape.
    """

    def __init__(self, inner: Target, recording: Recording) -> None:
        self.inner, self.recording, self.info = inner, recording, inner.info
        self._programs: dict[Hashable, _Program] = {}

    def forward(self, tokens: Tensor, rows: Rows, cache: KVCache, taps: tuple[int, ...]) -> States:
        """See `Target.forward`. Prompt chunks and batches beyond the sizes above are not captured."""
        b, n = tokens.shape
        if rows.ancestors is None or rows.offset or n > NODES[-1] or b > BATCHES[-1]:
            return self.inner.forward(tokens, rows, cache, taps)
        given = _padded(tokens, rows, bucket(b, BATCHES), bucket(n, NODES))

        def work(tokens: Tensor, slots: Tensor, index: Tensor, lengths: Tensor, positions: Tensor,
                 ancestors: Tensor) -> list[Tensor]:  # fmt: skip
            rows = Rows(RowIndex(slots, index), lengths, positions, ancestors, 0, positions)
            states = self.inner.forward(tokens, rows, cache, taps)
            return [states.final, states.features]

        place = (cache.kv.data_ptr(), cache.kv.shape)
        final, features = self._run(("forward", given[0].shape, taps, place), work, given)
        return States(final[:b, :n], features[:b, :n])

    def logits(self, final: Tensor) -> Tensor:
        """See `Target.logits`."""
        if final.dim() != 3 or final.shape[0] > BATCHES[-1] or final.shape[1] > NODES[-1]:
            return self.inner.logits(final)
        b, n = final.shape[:2]
        wide = final.new_zeros(bucket(b, BATCHES), bucket(n, NODES), final.shape[2])
        wide[:b, :n] = final
        return self._run(("logits", wide.shape), lambda x: [self.inner.logits(x)], (wide,))[0][:b, :n]

    def _run(
        self, key: Hashable, work: Callable[..., list[Tensor]], given: tuple[Tensor, ...]
    ) -> list[Tensor]:
        program = self._programs.get(key)
        if program is None:
            inputs, outputs = tuple(x.clone() for x in given), list[Tensor]()

            def once() -> None:
                outputs[:] = work(*inputs)

            program = self._programs[key] = _Program(inputs, outputs, self.recording.record(once))
            return outputs
        return program.run(given)

    def embed(self, tokens: Tensor) -> Tensor:
        """See `Target.embed`."""
        return self.inner.embed(tokens)

    def output_embedding(self) -> Tensor:
        """See `Target.output_embedding`."""
        return self.inner.output_embedding()

    def final_norm(self) -> tuple[Tensor, float]:
        """See `Target.final_norm`."""
        return self.inner.final_norm()


def bucket(size: int, sizes: tuple[int, ...]) -> int:
    return next(one for one in sizes if one >= size)


def _padded(tokens: Tensor, rows: Rows, b: int, n: int) -> tuple[Tensor, ...]:
    """tokens, slots, cache rows, lengths, positions, ancestors of B x N rows.

    Nodes beyond the tree are children of its root that nobody sees and the next round overwrites; requests beyond the
    batch are its last one again, which writes the same values to the same rows.
    """
    assert rows.ancestors is not None
    have, nodes = tokens.shape
    extra = n - nodes
    column = torch.arange(n, device=tokens.device)
    inert = ((torch.ones_like(column) << column) | 1)[nodes:].expand(have, extra)
    tokens = torch.cat([tokens, tokens.new_zeros(have, extra)], dim=1)
    positions = torch.cat([rows.positions, rows.positions[:, :1].expand(have, extra)], dim=1)
    ancestors = torch.cat([rows.ancestors, inert], dim=1)
    pick = torch.arange(b, device=tokens.device).clamp(max=have - 1)
    lengths = rows.lengths[pick]
    return (
        tokens[pick],
        rows.slots[pick],
        lengths[:, None] + column,
        lengths,
        positions[pick],
        ancestors[pick],
    )


@torch.inference_mode()
def graphed(target: Target, recording: Recording | None = None) -> tuple[Target, str | None]:
    """The target with captured forwards if they give what plain ones give, else itself and the reason.

    Args:
        recording: None takes CUDA graphs.
    """
    device = target.info.device
    generator = torch.Generator().manual_seed(0)
    tree = build(
        torch.randint(target.info.vocab, (2, 5), generator=generator), torch.tensor([[0, 0, 0, 1, 1]] * 2)
    )
    columns = {
        name: getattr(tree, name).to(device) for name in ("tokens", "parents", "depths", "ancestors", "sizes")
    }
    tree = replace(tree, **columns)
    prefix = torch.randint(target.info.vocab, (2, 16), generator=generator).to(device)
    cache = KVCache(target.info.cache, 2, 16 + 2 * MAX_NODES)
    slots = torch.arange(2, device=device)
    try:
        target.forward(prefix, chunk_rows(slots, torch.zeros_like(slots), 16), cache, ())
        rows = tree_rows(slots, torch.full_like(slots, 16), tree)
        wanted = target.logits(target.forward(tree.tokens, rows, cache, ()).final).float()
        fast = GraphedTarget(target, recording or CudaRecording())
        for _ in range(2):  # captured, then replayed
            got = fast.logits(fast.forward(tree.tokens, rows, cache, ()).final).float()
            off = float((got - wanted).abs().max() / wanted.std())
            if not off <= TOLERANCE:
                return target, f"captured logits differ by {off:.1e}"
    except Exception as error:  # whatever a driver or a backend refuses, plain forwards still run
        return target, str(error).splitlines()[0] if str(error) else type(error).__name__
    return GraphedTarget(target, recording or CudaRecording()), None
