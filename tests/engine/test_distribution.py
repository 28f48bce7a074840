"""What the engine samples is the target's law, over whole sequences; the same test rejects wrong acceptance rules.

An order-2 Markov target over eight tokens, trees of a drafter that is right now and then. Every request has a seed of
its own; sequences of three tokens are counted and compared with their enumerated probabilities.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import engines
import pytest
import torch
from toy import VOCAB, FakeDrafter, ToyTarget, neighbours

from specdec import accept
from specdec.accept import Verdict
from specdec.drafting.protocol import Shape
from specdec.engine import request as requests
from specdec.engine import round as rounds
from specdec.engine.engine import Limits
from specdec.sampling import Sampling
from specdec.tree import DraftTree

PROMPT, LENGTH, SAMPLES = (3, 4), 3, 1200
PLAINLY = Sampling(temperature=1.0, max_tokens=LENGTH)
PENALISED = Sampling(temperature=1.3, top_k=4, frequency_penalty=1.5, max_tokens=LENGTH)


def _sampled(settings: Sampling, seed: int) -> Sampling:
    names = ("temperature", "top_k", "frequency_penalty", "max_tokens")
    return Sampling(**{name: getattr(settings, name) for name in names}, seed=seed)


def _sample(settings: Sampling) -> tuple[Counter[tuple[int, ...]], float]:
    """Counts of sequences, and tau."""
    machine = engines.engine(ToyTarget(), FakeDrafter(neighbours), Shape(2, 3, 10), Limits(8, 64))
    requests = [engines.request(str(i), PROMPT, _sampled(settings, i)) for i in range(SAMPLES)]
    engines.run(machine, requests)
    return Counter(tuple(request.output) for request in requests), machine.counters.tau


def _law(settings: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every sequence, by the definition of each setting."""
    logits, law = ToyTarget().table, {}
    for sequence in itertools.product(range(VOCAB), repeat=LENGTH):
        probability = 1.0
        for i, token in enumerate(sequence):
            before = (*PROMPT, *sequence[:i])[-2:]
            row = logits[before].clone()
            for earlier in sequence[:i]:
                row[earlier] -= settings.frequency_penalty
            row /= settings.temperature
            if settings.top_k:
                row[row < row.topk(settings.top_k).values[-1]] = -torch.inf
            probability *= float(row.softmax(-1)[token])
        law[sequence] = probability
    return law


def _p_value(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square; sequences expected fewer than five times are pooled."""
    total = sum(counts.values())
    cells = [(counts[s], p * total) for s, p in law.items() if p * total >= 5]
    rest = (total - sum(o for o, _ in cells), total - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("settings", [PLAINLY, PENALISED], ids=["temperature", "penalty and top-k"])
def test_samples_follow_the_targets_law(settings: Sampling) -> None:
    counts, tau = _sample(settings)
    assert tau > 1.1, "nothing was accepted, so nothing was tested"
    assert _p_value(counts, _law(settings)) > 1e-3


def _first_child(tree: DraftTree, chosen: torch.Tensor) -> Verdict:
    """Wrong: take the first drafted child without asking the target."""
    believed = chosen.clone()
    for row in range(len(chosen)):
        for node in range(int(tree.sizes[row]) - 1, 0, -1):
            believed[row, tree.parents[row, node]] = tree.tokens[row, node]
    return accept.walk(tree, believed)


def _any_child(tree: DraftTree, chosen: torch.Tensor) -> Verdict:
    """Wrong: where the draw of a node misses the tree, accept a child whose own neighbour was drawn."""
    believed = chosen.clone()
    for row in range(len(chosen)):
        for node in range(1, int(tree.sizes[row])):
            parent = tree.parents[row, node]
            if (chosen[row, parent] - tree.tokens[row, node]) % VOCAB == 1:
                believed[row, parent] = tree.tokens[row, node]
    return accept.walk(tree, believed)


@pytest.mark.parametrize("wrong", [_first_child, _any_child])
def test_a_wrong_rule_is_rejected(wrong: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "walk", wrong)
    counts, _ = _sample(PLAINLY)
    assert _p_value(counts, _law(PLAINLY)) < 1e-9


def test_draws_that_restart_every_round_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the same random number for every position of an answer."""
    own = requests.uniforms
    monkeypatch.setattr(requests, "uniforms", lambda seed, count: own(seed, 1).expand(count))
    counts, _ = _sample(PLAINLY)
    assert _p_value(counts, _law(PLAINLY)) < 1e-9
