from collections.abc import Callable

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


def test_a_label_off_by_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feeding h_{t-1} in place of h_{t+1} is not sufficient for p_2 of the lag source."""
    honest = controls.probe_data

    def shifted(toy: object) -> probe.ProbeData:
        data = honest(toy)  # type: ignore[arg-type]  # the toy is passed through
        return probe.replace(data, features=data.features.roll(1, dims=0).roll(2, dims=0))

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
