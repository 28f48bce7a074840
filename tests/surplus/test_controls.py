from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specdec.surplus import controls, probe
from specdec.surplus.controls import Check


@pytest.mark.parametrize(
    "check",
    [
        controls.check_permuted,
        controls.check_markov,
        controls.check_lag_copy,
        controls.check_hmm,
        controls.check_next_state,
        controls.check_agreement,
        controls.check_geometry,
    ],
)
def test_closed_form_control(check: Callable[[], Check]) -> None:
    found = check()
    assert found.passed, found


def test_a_permutation_that_leaks_h_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With donors equal to the rows themselves the permuted control sees h, and the check must say so."""
    monkeypatch.setattr(probe, "permute_within", lambda z, doc, generator: torch.arange(z.shape[0]))
    assert not controls.check_permuted(documents=80).passed


def test_features_late_by_one_position_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """h_{t-1} holds x_{t-2}, which x_t copies only four times in five: the closed form is missed."""
    honest = controls.probe_data

    def shifted(toy: object) -> probe.ProbeData:
        data = honest(toy)  # type: ignore[arg-type]  # the toy is passed through
        return replace(data, features=data.features.roll(1, dims=0))

    monkeypatch.setattr(controls, "probe_data", shifted)
    assert not controls.check_lag_copy(documents=60).passed


def test_self_check_lists_every_control(monkeypatch: pytest.MonkeyPatch) -> None:
    def stub() -> Check:
        return controls.near("stub", 1.0, 1.2, 0.1)

    for name in ("permuted", "markov", "lag_copy", "hmm", "next_state", "agreement", "geometry"):
        monkeypatch.setattr(controls, f"check_{name}", stub)
    found = controls.self_check()
    assert len(found) == 7
    assert not any(check.passed for check in found)
