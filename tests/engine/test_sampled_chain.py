"""Sampled chains through the whole engine: the emitted law is the target's, and a wrong q is noticed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from specdec.accept import Verdict, verify_block
from specdec.attention.protocol import chunk_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.drafting.eagle import EagleDrafter
from specdec.drafting.protocol import Shape
from specdec.engine import round as rounds
from specdec.engine.budget import Budget
from specdec.engine.build import parse_tree
from specdec.engine.engine import Engine, Limits
from specdec.engine.request import Request
from specdec.errors import SpecdecError
from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead
from specdec.sampling import Sampling
from specdec.target.lean import LeanConfig, LeanDecoder
from specdec.target.load import LeanTarget
from specdec.target.protocol import TargetInfo

VOCAB, WRITTEN, SLOTS = 6, 3, 64
PROMPT = (1, 2, 3)


def _randomise(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = (
            torch.randn_like(parameter) * 0.3 if parameter.dim() > 1 else torch.ones_like(parameter)
        )


@pytest.fixture(scope="module")
def target() -> LeanTarget:
    config = LeanConfig(
        VOCAB, 32, 48, 8, 2, 1, 16, 1e-5, 1e4, None, 64, False, False, False, False, (None,) * 8
    )  # fmt: skip
    decoder = LeanDecoder(config, ReferenceAttention())
    _randomise(decoder, 5)
    decoder.freeze()
    shape = decoder.cache_shape()
    info = TargetInfo("toy", "Llama", VOCAB, 32, 8, 64, (), torch.float32, torch.device("cpu"), "toy", shape)
    return LeanTarget(decoder, info)


def _drafter(target: LeanTarget) -> EagleDrafter:
    """A random head over four of the six tokens: a poor guesser with a reduced vocabulary."""
    head = DraftHead(HeadConfig(32, 32, (2, 4, 5), 48, 2, 1, 16, VOCAB, 4))
    _randomise(head, 7)
    head.ids = torch.tensor([0, 2, 3, 5])
    head.freeze()
    return EagleDrafter(head, target.embed, ReferenceAttention(), SLOTS, 64)


@torch.inference_mode()
def _law(target: LeanTarget) -> dict[tuple[int, ...], float]:
    """Exact probability of every answer of WRITTEN tokens, by plain forwards."""
    cache = KVCache(target.info.cache, 1, 64)
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(WRITTEN):
        longer = {}
        for answer, mass in law.items():
            tokens = torch.tensor([[*PROMPT, *answer]])
            rows = chunk_rows(torch.tensor([0]), torch.tensor([0]), tokens.shape[1])
            final = target.forward(tokens, rows, cache, ()).final[:, -1]
            for token, p in enumerate(target.logits(final)[0].softmax(-1).tolist()):
                longer[(*answer, token)] = mass * p
        law = longer
    return law


def _z(target: LeanTarget, answers: int) -> tuple[float, float]:
    """How far so many answers of the engine are from the law, in standard deviations of chi-square; and tau."""
    engine = Engine(
        target, _drafter(target), Budget(None, Shape(2, 1, 3, sampled=True), False), Limits(16, 64, 32)
    )
    requests = [
        Request(f"{i}", PROMPT, Sampling(max_tokens=WRITTEN, temperature=1.0, seed=i), frozenset())
        for i in range(answers)
    ]
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    seen = Counter(tuple(request.output) for request in requests)
    cells = {answer: p * answers for answer, p in _law(target).items() if p * answers >= 5}
    rest = answers - sum(cells.values())
    chi = sum((seen[answer] - e) ** 2 / e for answer, e in cells.items())
    chi += (answers - sum(seen[answer] for answer in cells) - rest) ** 2 / rest
    return (chi - len(cells)) / (2 * len(cells)) ** 0.5, engine.counters.tau


def test_answers_follow_the_target(target: LeanTarget) -> None:
    z, tau = _z(target, 1000)
    assert abs(z) < 3.5
    assert tau > 1.03  # drafts are accepted at all, or the test would say nothing


def test_a_wrong_q_is_noticed(target: LeanTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    def gullible(tokens: torch.Tensor, q: torch.Tensor, p: torch.Tensor, u: torch.Tensor) -> Verdict:
        return verify_block(tokens, p[:, :-1], p, u)  # believes that drafts were drawn from the target

    monkeypatch.setattr(rounds, "verify_block", gullible)
    assert _z(target, 200)[0] > 10


def test_greedy_chains_are_plain_decoding(target: LeanTarget) -> None:
    outputs = []
    for shape in (Shape(3, 1, 4, sampled=True), Shape(1, 1, 1)):
        engine = Engine(target, _drafter(target), Budget(None, shape, False), Limits(1, 64, 32))
        request = Request("0", PROMPT, Sampling(max_tokens=20), frozenset())
        engine.add(request)
        while engine.busy:
            engine.step()
        outputs.append(request.output)
    assert outputs[0] == outputs[1]


def test_the_option() -> None:
    assert parse_tree("sampled/5") == Shape(5, 1, 6, sampled=True)
    with pytest.raises(SpecdecError, match="sampled/depth"):
        parse_tree("sampled/deep")
