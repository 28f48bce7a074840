import pytest
import torch
from tiny_report import make_passages

from specdec import tree as trees
from specdec.accept import walk
from specdec.drafting.protocol import Shape
from specdec.head.model import DraftHead
from specdec.stats import Round
from specdec.surplus.capture import CaptureSettings
from specdec.surplus.outcome import cell_outcomes, decode
from specdec.surplus.recorder import TREES, EngineRecorder, expected_length, node_probs
from specdec.target.protocol import Target


def one_round(logits: torch.Tensor) -> Round:
    """root 5 -> {1, 2}, 1 -> 3; the target says 1 then 0."""
    tree = trees.build(
        torch.tensor([[5, 1, 2, 3]]),
        torch.tensor([[0, 0, 0, 1]]),
        scores=torch.tensor([[0.0, -0.5, -1.5, -0.75]]),
    )
    chosen = torch.tensor([[1, 0, 0, 0]])
    return Round(("a",), tree, chosen, walk(tree, chosen), logits, torch.zeros(1, 4, 0))


def laws() -> torch.Tensor:
    """After the root: 1 at 0.5, 2 at 0.25; after token 1: 3 at 0.125; the rest on token 0."""
    probs = torch.full((1, 4, 6), 1e-9)
    probs[0, 0, [1, 2, 0]] = torch.tensor([0.5, 0.25, 0.25])
    probs[0, 1, [3, 0]] = torch.tensor([0.125, 0.875])
    probs[0, 2:, 0] = 1.0
    return probs.log()


def test_masses_confidence_and_events_of_a_round() -> None:
    recorder = EngineRecorder({"a": 7})
    recorder.record(one_round(laws()))
    events = recorder.events()
    assert events.doc.tolist() == [7, 7]
    assert events.depth.tolist() == [1, 2]
    assert events.accepted.tolist() == [True, False]
    torch.testing.assert_close(events.mass, torch.tensor([0.75, 0.125]), atol=1e-5, rtol=0)
    torch.testing.assert_close(events.confidence, torch.tensor([-0.5, -0.25]).exp())
    assert recorder.emitted == {7: 2}
    assert recorder.expected[7] == pytest.approx(1 + 0.5 + 0.25 + 0.5 * 0.125, abs=1e-4)
    assert recorder.shapes[0].parents == (0, 0, 0, 1)
    assert recorder.shapes[0].ranks == (0, 0, 1, 0)


def test_padding_is_worth_nothing_and_greedy_is_all_or_nothing() -> None:
    round = one_round(laws())
    cut = trees.trim(round.tree, torch.tensor([2]))
    cut = trees.pad(cut, 4)
    chance = node_probs(cut, laws(), 1.0)
    torch.testing.assert_close(chance, torch.tensor([[1.0, 0.5, 0.0, 0.0]]), atol=1e-5, rtol=0)
    assert float(expected_length(cut, chance)) == pytest.approx(1.5, abs=1e-5)
    assert node_probs(round.tree, laws(), 0.0).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_memory_is_bounded() -> None:
    recorder = EngineRecorder({"a": 0}, limit=5)
    for _ in range(TREES + 20):
        recorder.record(one_round(laws()))
    assert recorder.events().doc.shape[0] == 5
    assert recorder.dropped == 2 * (TREES + 20) - 5
    assert recorder.rounds == {0: TREES + 20}
    assert len(recorder.shapes) == TREES


def test_other_requests_are_ignored() -> None:
    recorder = EngineRecorder({"b": 0})
    recorder.record(one_round(laws()))
    assert not recorder.rounds
    assert recorder.events().doc.numel() == 0


def test_the_engine_is_heard_and_expected_length_is_near_what_it_emits(
    target: Target, head: DraftHead
) -> None:
    numbered = [(100 + i, i % 2, p) for i, p in enumerate(make_passages(16))]
    settings = CaptureSettings(layers=(1,), max_tokens=30)
    measured, recorder = decode(target, head, numbered, Shape(2, 12, 60), settings)
    assert measured.doc.tolist() == list(range(100, 116))
    assert float(measured.accepted[:, 0].sum()) > 0
    assert (measured.accepted <= measured.reached).all()
    tau = measured.tau()
    assert tau.value == pytest.approx(float(measured.expected.mean()), rel=0.12)
    events = recorder.events()
    first = events.depth == 1
    assert float(events.mass[first].mean()) == pytest.approx(
        float(events.accepted[first].float().mean()), abs=0.08
    )
    keys, outcomes = cell_outcomes({"tree": measured}, 1)
    assert {key.domain for key in keys} == {0, 1}
    assert float(outcomes.acceptance.sum()) == float(measured.accepted.sum())
