"""What the trainer simulates is what the engine counts: the same prompts, head and tree, counter by counter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import engines
import numpy as np
import pytest
import torch

from specdec.drafting.protocol import Shape
from specdec.sampling import Sampling
from training.data import Sample
from training.evaluate import Growth, Text, simulate
from training.features import Capture
from training.trainer import padded

PROMPTS = [[3, 5, 7, 9, 11], [2, 4, 4, 2, 8, 1, 1], [30, 31, 32, 33, 34, 35, 36, 37]]
LENGTH = 40


@pytest.mark.parametrize("growth", [Growth(7, 10, 60), Growth(3, 1, 4)], ids=["tree", "chain"])
def test_simulated_counters_are_the_engines(target_of: Callable, growth: Growth) -> None:
    target = target_of("llama")
    sampling = Sampling(max_tokens=LENGTH, ignore_eos=True)
    plain = [engines.request(f"p{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    engines.run(engines.engine(target), plain)
    common = Counter(token for request in plain for token in request.output).most_common()
    head = engines.random_head(target, [token for token, _ in common[: 40 if growth.width > 1 else 5]])
    shape = Shape(growth.depth, growth.width, growth.nodes)
    machine = engines.engine(target, engines.eagle(target, head), shape)
    drafted = [engines.request(f"d{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    engines.run(machine, drafted)
    assert [r.output for r in drafted] == [r.output for r in plain]

    samples = [
        Sample(
            r.id,
            np.array([*r.prompt, *r.output], np.int32),
            np.arange(len(r.prompt) + LENGTH) >= len(r.prompt),
        )
        for r in plain
    ]
    longest = max(map(len, samples))
    captured = Capture(target, head.config.taps)(samples)
    text = Text(
        padded([one.features for one in captured], longest),
        padded([torch.from_numpy(s.ids).long()[:, None] for s in samples], longest)[..., 0],
        padded([torch.from_numpy(s.loss_mask)[:, None] for s in samples], longest)[..., 0],
        torch.tensor([len(s) for s in samples]),
    )
    simulated = simulate(head, target.embed, text, growth)
    engine = machine.counters
    assert engine.tau > 1.02, "nothing was accepted, so nothing was compared"
    for name in ("rounds", "emitted", "cut", "reached", "accepted"):
        assert getattr(simulated, name) == getattr(engine, name), name
    assert simulated.tau == engine.tau
