from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.surplus.contract import Contexts
from specdec.surplus.control import Control, Ngram, cross_entropy
from specdec.surplus.labels import TableLabels
from specdec.surplus.probe import (
    Fitted,
    Probe,
    ProbeData,
    ProbeSettings,
    _Course,
    fit_probes,
    permuted,
    soft_cross_entropy,
    trusted,
    walk_text,
)

SMALL = ProbeSettings(width=64, rank=16, token_width=8, epochs=25, patience=5, batch=128, block=8, rate=1e-2)


@dataclass
class CountingLabels:
    """Labels that remember which rows were asked for."""

    table: Tensor
    asked: list[Tensor]

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def rows(self, index: Tensor) -> Tensor:
        self.asked.append(index)
        return self.table[index]


def interaction(documents: int = 80, length: int = 20) -> ProbeData:
    """x_{t+2} is the exclusive or of a hidden bit in h_t and the bit x_{t+1}: neither alone informs."""
    generator = torch.Generator().manual_seed(0)
    rows = documents * length
    bit = torch.randint(2, (rows,), generator=generator)
    ids = torch.randint(2, (rows,), generator=generator)
    law = torch.full((rows, 2), 0.05)
    law[torch.arange(rows), bit.roll(1) ^ ids] = 0.95  # row t + 1 predicts x_{t+2} from bit_t and x_{t+1}
    features = torch.stack([bit.float(), torch.randn(rows, generator=generator)], dim=1)
    doc = torch.arange(documents).repeat_interleave(length)
    return ProbeData(ids, doc, features, TableLabels(law.log()), torch.eye(2), torch.eye(2))


def masks(data: ProbeData) -> tuple[Tensor, Tensor, Tensor]:
    return data.doc < 50, (data.doc >= 50) & (data.doc < 65), data.doc >= 65


def flat(width: int) -> Control:
    return Ngram(torch.full((width,), 1 / width), (), ())


def fit(
    data: ProbeData, settings: ProbeSettings = SMALL, depths: tuple[int, ...] = (2,)
) -> Mapping[int, Fitted]:
    train, val, _ = ({k: data.contexts(k, mask) for k in depths} for mask in masks(data))
    return fit_probes(data, train, val, {k: flat(data.labels.width) for k in depths}, settings)


def surplus(fitted: Fitted, data: ProbeData, where: Contexts) -> float:
    p = data.labels.rows(where.label_row).exp()
    return float((p * (fitted.log_probs(data, where) - fitted.control.log_probs(where.z))).sum(-1).mean())


def test_probe_starts_exactly_at_its_control() -> None:
    data = interaction()
    where = data.contexts(2, masks(data)[0])
    probe = Probe(data, where, SMALL)
    assert torch.equal(probe(data.inputs(where), where.z), torch.zeros(where.at.shape[0], 2))


def test_probe_recovers_what_only_the_interaction_of_h_and_z_tells() -> None:
    data = interaction()
    full = float(torch.tensor(2.0).log() + 0.95 * torch.tensor(0.95).log() + 0.05 * torch.tensor(0.05).log())
    test = data.contexts(2, masks(data)[2])
    assert surplus(fit(data)[2], data, test) == pytest.approx(full, abs=0.03)


def test_permuting_h_within_equal_z_destroys_it() -> None:
    data = interaction()
    blind = permuted(data, masks(data), (2,), seed=1)
    test = blind.contexts(2, masks(blind)[2])
    assert abs(surplus(fit(blind)[2], blind, test)) < 0.03


def test_permutation_never_crosses_from_one_part_to_another() -> None:
    data = interaction()
    blind = permuted(data, masks(data), (2, 3), seed=1)
    for part in masks(data):
        for depth in (2, 3):
            where = blind.contexts(depth, part)
            donors = blind.donor[depth][where.at]
            assert part[donors].all()
            assert not (donors == where.at).any()


def test_a_donor_of_the_next_row_feeds_h_t_plus_one() -> None:
    data = interaction()
    shifted = replace(data, donor={2: (torch.arange(data.ids.shape[0]) + 1).clamp_max(data.ids.shape[0] - 1)})
    where = shifted.contexts(2, masks(data)[0])
    assert torch.equal(shifted.inputs(where), data.features[where.at + 1])


def test_scale_of_features_is_kept_as_information() -> None:
    data = interaction()
    only_scale = (1 + data.features[:, :1]) * torch.ones(1, 4)  # direction says nothing, length says the bit
    data = replace(data, features=only_scale)
    assert surplus(fit(data)[2], data, data.contexts(2, masks(data)[2])) > 0.4


def test_depths_share_label_rows_and_every_context_is_visited_once() -> None:
    data = interaction(documents=6, length=9)
    labels = CountingLabels(data.labels.rows(torch.arange(54)), [])
    data = replace(data, labels=labels)
    everywhere = torch.ones(54, dtype=torch.bool)
    plan = {k: data.contexts(k, everywhere) for k in (2, 3, 4)}
    seen: dict[int, list[Tensor]] = {k: [] for k in plan}
    for batch in walk_text(data, plan, replace(SMALL, batch=16), torch.Generator().manual_seed(0)):
        for depth, part in batch.items():
            seen[depth].append(part.where.at)
            torch.testing.assert_close(part.log_p, labels.table[part.where.label_row])
    for depth, where in plan.items():
        assert torch.equal(torch.cat(seen[depth]).sort().values, where.at)
    asked = sum(rows.numel() for rows in labels.asked)
    assert asked < 0.6 * sum(where.at.numel() for where in plan.values())
    assert all(rows.unique().numel() == rows.numel() for rows in labels.asked)


def test_depths_train_as_if_alone() -> None:
    data = interaction()
    quick = replace(SMALL, epochs=2, batch=4096, block=4096)
    alone, together = fit(data, quick, (3,))[3], fit(data, quick, (2, 3))
    assert set(together) == {2, 3}
    assert together[3].validation == pytest.approx(alone.validation, abs=0.02)


def test_seeded_fits_repeat_exactly_and_leave_the_global_generator_alone() -> None:
    data = interaction()
    quick = replace(SMALL, epochs=2)
    before = torch.random.get_rng_state()
    first, second = fit(data, quick)[2], fit(data, quick)[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.probe.parameters(), second.probe.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nan_features_and_empty_parts_are_refused() -> None:
    data = interaction()
    bad = data.features.clone()
    bad[7, 0] = float("nan")
    with pytest.raises(RequestError, match="NaN"):
        replace(data, features=bad)
    with pytest.raises(RequestError, match="no train contexts"):
        fit(data, SMALL, (30,))


def linear(shuffled: bool, documents: int = 80, length: int = 20) -> ProbeData:
    """x_{t+2} depends on h_t alone, through logits that are linear in it; or h of another row, which says nothing."""
    generator = torch.Generator().manual_seed(2)
    rows = documents * length
    features = torch.randn(rows, 6, generator=generator)
    logits = 2 * features @ torch.randn(6, 8, generator=generator)
    law = logits.roll(1, 0).log_softmax(-1)
    seen = features[torch.randperm(rows, generator=generator)] if shuffled else features
    doc = torch.arange(documents).repeat_interleave(length)
    ids = torch.randint(8, (rows,), generator=generator)
    return ProbeData(ids, doc, seen, TableLabels(law), torch.eye(8), torch.randn(8, 8, generator=generator))


def test_the_closed_form_finds_what_is_linear_before_any_step() -> None:
    data = linear(shuffled=False)
    still = replace(SMALL, epochs=0)
    test = data.contexts(2, masks(data)[2])
    found = fit(data, still)[2]
    assert found.probe.start.gate > 0
    assert surplus(found, data, test) > 0.5
    assert surplus(fit(data, replace(still, start=False))[2], data, test) == pytest.approx(0, abs=1e-6)


def test_the_closed_form_is_left_alone_where_h_says_nothing() -> None:
    data = linear(shuffled=True)
    train, val, test = (data.contexts(2, mask) for mask in masks(data))
    base = data.labels.rows(train.label_row).exp().mean(0)
    fitted = fit_probes(data, {2: train}, {2: val}, {2: Ngram(base, (), ())}, replace(SMALL, epochs=0))[2]
    assert abs(surplus(fitted, data, test)) < 0.03


def test_the_mean_of_weights_forgets_old_steps_and_leaves_the_weights_alone() -> None:
    data = interaction()
    probe = Probe(data, data.contexts(2, masks(data)[0]), SMALL)
    course = _Course(probe, flat(2), soft_cross_entropy)
    for value in range(1, 101):
        torch.nn.init.constant_(probe.last.weight, float(value))
        course.stepped()
        if value == 1:
            assert torch.equal(course.mean["last.weight"], probe.last.weight)
    # by hand: weights of step t in the mean of 100 go like t^8, whose mean is about 9 / 10 of 100
    assert course.mean["last.weight"].mean().item() == pytest.approx(90.4, abs=0.5)
    assert probe.last.weight.mean().item() == 100


def test_a_probe_that_learned_noise_is_not_followed() -> None:
    data = linear(shuffled=True)
    train, val, test = (data.contexts(2, mask) for mask in masks(data))
    control = Ngram(data.labels.rows(train.label_row).exp().mean(0), (), ())
    probe = Probe(data, train, SMALL)
    torch.nn.init.normal_(probe.last.weight, generator=torch.Generator().manual_seed(0))
    spoiled = Fitted(probe, control, cross_entropy(control, val, data.labels), 0)
    assert surplus(spoiled, data, test) < -0.3
    assert surplus(trusted(spoiled, data, val), data, test) > -0.02


@pytest.mark.parametrize("shuffled", [True, False])
def test_trust_never_raises_the_validation_value_it_reports(shuffled: bool) -> None:
    data = linear(shuffled=shuffled, documents=70)
    val = data.contexts(2, masks(data)[1])
    found = fit(data, replace(SMALL, epochs=3))[2]
    told, before = (
        cross_entropy(found.control, val, data.labels) - surplus(each, data, val)
        for each in (found, replace(found, trust=None))
    )
    assert told <= before
    assert found.validation == pytest.approx(told, abs=1e-4)
