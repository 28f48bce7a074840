import pytest
import torch

from specdec.errors import RequestError
from specdec.surplus.dose import DoseCurve, noise_response, window_response
from specdec.surplus.interval import Interval


def near(value: float, half: float = 0.01) -> Interval:
    return Interval(value, value - half, value + half, 100, 10)


def test_windows_are_passed_on_and_a_rising_curve_holds() -> None:
    curve = window_response(
        lambda w: torch.full((3, 2), float(w)), [1, 2, 8], lambda h: near(float(h.mean()) / 10)
    )
    assert curve.doses == (1.0, 2.0, 8.0)
    assert [round(s.value, 3) for s in curve.surplus] == [0.1, 0.2, 0.8]
    assert curve.holds


def test_noise_is_scaled_by_feature_and_shared_between_doses() -> None:
    features = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0])
    seen: list[torch.Tensor] = []

    def estimate(h: torch.Tensor) -> Interval:
        seen.append(h)
        return near(1 / len(seen))

    curve = noise_response(features, [0.0, 0.5, 1.0], estimate)
    assert torch.equal(seen[0], features)
    torch.testing.assert_close(seen[2] - features, 2 * (seen[1] - features), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        (seen[2] - features).std(0) / features.std(0), torch.ones(2), atol=0.05, rtol=0
    )
    assert curve.holds


def test_a_step_the_wrong_way_is_found_unless_intervals_excuse_it() -> None:
    values = (0.1, 0.3, 0.25, 0.4)
    tight = DoseCurve("window", (1, 2, 3, 4), tuple(near(v) for v in values), rising=True)
    wide = DoseCurve("window", (1, 2, 3, 4), tuple(near(v, 0.1) for v in values), rising=True)
    assert tight.violations == (1,)
    assert not tight.holds
    assert wide.holds


@pytest.mark.parametrize("doses", [[4], [4, 2], [0, 1]])
def test_unordered_windows_are_refused(doses: list[int]) -> None:
    with pytest.raises(RequestError, match="windows"):
        window_response(lambda w: torch.zeros(1, 1), doses, lambda h: near(0))
