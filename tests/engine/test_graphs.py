"""Captured forwards with a recording that works on the CPU: padding, replaying, refusing; tokens stay plain ones."""

from __future__ import annotations

from collections.abc import Callable

import engines
import pytest
import torch
from recordings import Broken, Forgetful, Replaying

from specdec.drafting.ngram import NgramDrafter
from specdec.drafting.protocol import Shape
from specdec.engine.graphs import NODES, GraphedTarget, graphed
from specdec.sampling import Sampling

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [40, 41, 42, 40, 41], [9] * 6]


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_replayed_rounds_emit_plain_tokens(target_of: Callable, arch: str) -> None:
    target, recording = target_of(arch), Replaying()
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    plain = [engines.request(f"p{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    engines.run(engines.engine(target), plain)
    machine = engines.engine(GraphedTarget(target, recording), NgramDrafter(), Shape(6, 4, 20))
    fast = [engines.request(f"f{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    engines.run(machine, fast, apart=2)
    assert [r.output for r in fast] == [r.output for r in plain]
    assert machine.counters.tau > 1.05
    assert recording.replayed > recording.recorded > 0
    assert recording.recorded <= 2 * 3 * len(NODES), "a forward and its logits by batch and nodes"


def test_a_head_reads_replayed_features(target_of: Callable) -> None:
    target = target_of("llama")
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    plain = [engines.request(f"p{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    engines.run(engines.engine(target), plain)
    ids = {token for request in plain for token in request.output}
    outputs = []
    for one in (target, GraphedTarget(target, Replaying())):
        machine = engines.engine(
            one, engines.eagle(target, engines.random_head(target, ids)), Shape(4, 6, 30)
        )
        requests = [engines.request(f"r{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
        engines.run(machine, requests)
        outputs.append(([r.output for r in requests], machine.counters.accepted))
    assert outputs[0] == outputs[1], "the head drafted from other features"
    assert outputs[0][0] == [r.output for r in plain]


def test_what_cannot_be_captured_runs_plainly(target_of: Callable) -> None:
    target = target_of("llama")
    fast, refused = graphed(target, Replaying())
    assert isinstance(fast, GraphedTarget) and refused is None
    same, refused = graphed(target, Broken())
    assert same is target
    assert refused == "operation not permitted when stream is capturing"


def test_a_replay_that_does_nothing_is_found_out(target_of: Callable) -> None:
    target = target_of("llama")
    fast = GraphedTarget(target, Forgetful())
    first, second = (torch.full((1, 1, target.info.hidden), x) for x in (1.0, -1.0))
    with torch.inference_mode():
        assert torch.equal(fast.logits(first), target.logits(first))
        assert not torch.equal(fast.logits(second), target.logits(second)), "the other tests would not notice"
