"""Answers from our own engine: the target continues prompts plainly, many at a time.

Plain decoding on purpose: the head that would speed it up is what is about to be trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specdec.drafting.none import NoDrafter
from specdec.drafting.protocol import PLAIN
from specdec.engine.budget import Budget
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Request
from specdec.errors import SpecdecError
from specdec.sampling import Sampling
from specdec.target.protocol import Target
from training.responses import Answer


class EngineAnswerer:
    """`Answerer` over an engine of its own.

    Args:
        target: who answers.
        slots: prompts answered at once; memory for the cache grows with it.
        length: context, prompt and answer together.
    """

    def __init__(self, target: Target, slots: int, length: int) -> None:
        self.stop_ids = frozenset(target.info.stop_ids)
        self.engine = Engine(target, NoDrafter(), Budget(None, PLAIN, adaptive=False), Limits(slots, length))

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        seeds: Sequence[int],
        max_tokens: int,
    ) -> Iterator[Answer]:
        """Each prompt's answer as soon as it is there. Raises SpecdecError when a request fails."""
        places = {}
        for index, (prompt, temperature, seed) in enumerate(zip(prompts, temperatures, seeds, strict=True)):
            sampling = Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
            request = Request(f"answer-{index}", tuple(prompt), sampling, self.stop_ids)
            places[request.id] = (index, request)
            self.engine.add(request)
        while places:
            for piece in self.engine.step():
                if piece.finish is None:
                    continue
                index, request = places.pop(piece.request)
                if piece.finish == "error":
                    raise SpecdecError(f"the target failed: {piece.error}", field=f"prompt {index}")
                yield Answer(index, tuple(request.output), piece.finish)
