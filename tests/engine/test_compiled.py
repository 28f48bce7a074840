"""Compiled layers: kept where they are right and faster, else the plain ones are back and the reason is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from recordings import Forgetful, Replaying

from specdec.engine.compiled import compile_layers
from specdec.sampling import Sampling
from specdec.target.load import LeanTarget


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LeanTarget:
    """One of our own, its layers will be changed; projections, norms and gates as on a GPU."""
    monkeypatch.setattr("specdec.layers.linear.packing_of", lambda _: None)
    monkeypatch.setattr("specdec.native.elementwise.library", lambda: None)
    loaded = engines.load(tmp_path, "qwen3", "lean")
    assert isinstance(loaded, LeanTarget)
    return loaded


def _slower(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        time.sleep(0.002)
        return function(*args)

    return wrapped


def _wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        out = function(*args)
        return out * 1.5 if isinstance(out, torch.Tensor) else out

    return wrapped


def _broken(function: Callable[..., Any]) -> Callable[..., Any]:
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize(
    ("compiler", "told"), [(_slower, "ms compiled"), (_wrong, "differ by"), (_broken, "no compiler here")]
)
def test_what_does_not_pay_is_undone(target: LeanTarget, compiler: Any, told: str) -> None:
    sampling = Sampling(max_tokens=8)
    before, after = (engines.request(name, (5, 6, 7), sampling) for name in ("before", "after"))
    engines.run(engines.engine(target), [before])
    found = compile_layers(target, Replaying(), compiler)
    assert found.startswith("plain (")
    assert told in found
    assert not any({"enter", "leave"} & block.__dict__.keys() for block in target.decoder.blocks)
    engines.run(engines.engine(target), [after])
    assert after.output == before.output


def test_one_graph_serves_all_layers(target: LeanTarget) -> None:
    """torch.compile without code generation: the layers are traced once and give what they gave."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = compile_layers(target, Forgetful(), lambda f: torch.compile(f, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    assert "differ" not in found
    assert "ms compiled" in found
    assert len(graphs) == 2, "a graph for what stands before attention, one for what stands after"
