import pytest
import torch

from specdec.errors import MismatchError, RequestError
from specdec.surplus.contract import Captured, TargetHead, contexts


def captured(**changes: object) -> Captured:
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, object] = {
        "ids": torch.arange(6),
        "doc": torch.tensor([0, 0, 0, 0, 1, 1]),
        "position": torch.tensor([0, 1, 2, 3, 0, 1]),
        "domain": torch.zeros(6, dtype=torch.int64),
        "taps": torch.randn(6, 2, 3, generator=generator),
        "final": torch.randn(6, 3, generator=generator),
        "head": TargetHead(torch.randn(7, 3, generator=generator)),
        "domains": ("chat",),
        "layers": (1, 4),
    }
    return Captured(**(fields | changes))  # type: ignore[arg-type]  # the mapping is heterogeneous


def test_contexts_stay_within_their_document() -> None:
    base = captured()
    found = contexts(base.ids, base.doc, depth=3)
    assert found.at.tolist() == [0, 1]
    assert found.z.tolist() == [[1, 2], [2, 3]]
    assert found.label_row.tolist() == [2, 3]


def test_contexts_of_a_text_shorter_than_the_depth_are_none() -> None:
    assert contexts(torch.arange(2), torch.zeros(2, dtype=torch.int64), 6).at.numel() == 0


def test_depth_one_is_refused() -> None:
    with pytest.raises(RequestError, match="depth"):
        contexts(torch.arange(4), torch.zeros(4, dtype=torch.int64), 1)


def test_features_concatenate_the_layers_asked_for() -> None:
    base = captured()
    assert torch.equal(base.features((4,)), base.taps[:, 1])
    assert torch.equal(base.features((4, 1)), torch.cat([base.taps[:, 1], base.taps[:, 0]], dim=1))


def test_a_layer_not_captured_is_named_with_those_that_were() -> None:
    with pytest.raises(RequestError, match=r"9.*1, 4"):
        captured().features((9,))


@pytest.mark.parametrize("name", ["taps", "final"])
def test_nan_in_hidden_states_is_refused_with_its_row(name: str) -> None:
    states = getattr(captured(), name).clone()
    states[3] = float("nan")
    with pytest.raises(MismatchError, match=rf"{name}.*row 3"):
        captured(**{name: states})


@pytest.mark.parametrize(
    "changes",
    [
        {"doc": torch.tensor([0, 1, 0, 0, 1, 1])},
        {"domain": torch.ones(6, dtype=torch.int64)},
        {"layers": (1, 2, 3)},
        {"position": torch.arange(5)},
    ],
)
def test_disagreeing_fields_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(MismatchError):
        captured(**changes)


def test_log_probs_apply_norm_and_temperature() -> None:
    weight, gain = torch.randn(5, 3), torch.rand(3) + 0.5
    head = TargetHead(weight, gain, eps=1e-5, temperature=2.0)
    final = torch.randn(4, 3)
    normed = final / (final.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    expected = torch.log_softmax(normed @ weight.T / 2, dim=-1)
    torch.testing.assert_close(head.log_probs(final), expected)


def test_temperature_zero_has_no_soft_labels() -> None:
    with pytest.raises(RequestError, match="temperature"):
        TargetHead(torch.randn(5, 3), temperature=0.0)
