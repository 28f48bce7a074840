import pytest
import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.spectral import (
    add_moments,
    bhattacharyya,
    dirichlet_energy,
    hellinger,
    no_moments,
    partial_correlations,
    predictive_alignment,
)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [bhattacharyya, hellinger])
def test_kernels_are_similarities_and_positive(kernel: object) -> None:
    log_p = torch.log_softmax(2 * normal(30, 7, seed=0), dim=-1)
    matrix: Tensor = kernel(log_p)  # type: ignore[operator]  # parametrised function
    torch.testing.assert_close(matrix.diagonal(), torch.ones(30))
    torch.testing.assert_close(matrix, matrix.T)
    assert (matrix <= 1 + 1e-5).all()
    assert torch.linalg.eigvalsh(matrix.double()).min() > -1e-6


def test_laws_apart_have_no_similarity() -> None:
    log_p = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).clamp_min(1e-30).log()
    assert float(bhattacharyya(log_p)[0, 1]) == pytest.approx(0.0, abs=1e-6)
    assert float(hellinger(log_p, beta=4.0)[0, 1]) == pytest.approx(torch.tensor(-4.0).exp().item(), rel=1e-4)


def test_energy_is_low_for_features_that_follow_the_law_and_scale_free() -> None:
    logits = normal(150, 5, seed=1)
    kernel = hellinger(torch.log_softmax(2 * logits, dim=-1))
    follows, ignores = dirichlet_energy(logits, kernel), dirichlet_energy(normal(150, 5, seed=2), kernel)
    assert follows < 0.85
    assert ignores == pytest.approx(1.0, abs=0.05)
    assert dirichlet_energy(1000 * logits + 7, kernel) == pytest.approx(follows)


def moments(features: Tensor, prototypes: Tensor, given: Tensor, chunk: int = 500) -> Tensor:
    state = no_moments(features.shape[1], prototypes.shape[1], given.shape[1])
    for start in range(0, features.shape[0], chunk):
        rows = slice(start, start + chunk)
        state = add_moments(state, features[rows], prototypes[rows], given[rows])
    return partial_correlations(state, ridge=1e-6)


def test_a_known_correlation_is_found_and_what_the_next_token_explains_is_removed() -> None:
    shared, given = normal(20000, 1, seed=3), normal(20000, 2, seed=4)
    features = torch.cat([shared + normal(20000, 1, seed=5), given], dim=1)
    prototypes = torch.cat([shared + normal(20000, 1, seed=6), given @ torch.ones(2, 1)], dim=1)
    prototypes[:, 1:] += 0.1 * normal(20000, 1, seed=7)
    found = moments(features, prototypes, given)
    assert found.tolist() == pytest.approx([0.5, 0.0], abs=0.03)
    assert predictive_alignment(found) == pytest.approx(0.25, abs=0.03)


def test_correlations_ignore_linear_maps_and_chunking() -> None:
    features, given = normal(3000, 4, seed=8), normal(3000, 1, seed=9)
    prototypes = features[:, :2] + normal(3000, 2, seed=10)
    base = moments(features, prototypes, given)
    torch.testing.assert_close(
        moments(features @ normal(4, 4, seed=11), prototypes, given, 77), base, atol=1e-3, rtol=0
    )


def test_fewer_rows_than_dimensions_is_refused_with_the_number_needed() -> None:
    with pytest.raises(RequestError, match="more than 9 are needed"):
        moments(normal(5, 4, seed=0), normal(5, 4, seed=1), normal(5, 1, seed=2))
