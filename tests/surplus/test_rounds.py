"""Rounds along written text, against a walk that counts them one by one."""

import pytest
import torch
from torch import Tensor

from specdec.surplus.draft import RANKS, DraftRows
from specdec.surplus.estimate import TOPS, Scores
from specdec.surplus.recorder import TreeShape
from specdec.surplus.rounds import rounds_of, starts

DOCS, LENGTH, DEPTHS = 6, 80, 3
BUSH = TreeShape((0, 0, 0, 1, 1, 3), (0, 0, 1, 0, 1, 0))


def written(seed: int = 0) -> list[DraftRows]:
    """Ranks that come in stretches, so that failures cluster; a context's mass is 1 on the token that came."""
    generator = torch.Generator().manual_seed(seed)
    n = DOCS * LENGTH
    hard = (torch.rand(n // 8, generator=generator) < 0.5).repeat_interleave(8)
    made = []
    for k in range(2, 2 + DEPTHS):
        chance = torch.where(hard, 0.25, 0.9)
        wrong = torch.rand(n, generator=generator) >= chance
        rank = torch.where(wrong, torch.randint(1, 4, (n,), generator=generator), 0)
        masses = torch.nn.functional.one_hot(rank, RANKS).float()
        flat = torch.zeros(n)
        at = torch.arange(n)
        top = torch.zeros(n, len(TOPS))
        scores = Scores(at, at // LENGTH, flat, flat, flat, flat, flat, flat, top, top)
        law = (torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
        made.append(DraftRows(k, scores, flat, flat, flat, rank, masses, law, law))
    return made


def counted(ranks: Tensor, tree: dict[tuple[int, ...], bool]) -> tuple[float, list[float]]:
    """tau and alpha of an engine that walks each document with one tree; paths -> does it draft below?"""
    rounds, tokens, offered, won = 0, 0, [0] * DEPTHS, [0] * DEPTHS
    for doc in range(DOCS):
        at = 0
        while at < LENGTH:
            path = tuple(ranks[doc * LENGTH + at].tolist())
            kept = 0
            while kept < DEPTHS and tree.get(path[:kept], False):
                offered[kept] += 1
                if path[: kept + 1] not in tree:
                    break
                won[kept] += 1
                kept += 1
            rounds, tokens, at = rounds + 1, tokens + kept + 1, at + kept + 1
    return tokens / rounds, [w / o for w, o in zip(won, offered, strict=True)]


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_counters_follow_from_the_text(shape: str) -> None:
    depths = written()
    ranks = torch.stack([rows.rank for rows in depths], dim=1)
    chain = {(0,) * j: j < DEPTHS for j in range(DEPTHS + 1)}
    bush = {(): True, (0,): True, (1,): False, (0, 0): True, (0, 1): False, (0, 0, 0): False}
    tau, alpha = counted(ranks, chain if shape == "chain" else bush)
    found = rounds_of(depths, shape, [BUSH])
    assert found.tau == pytest.approx(tau, abs=1e-9)
    assert found.alpha.tolist() == pytest.approx(alpha, abs=1e-9)


def test_engines_meet_failures_more_often_than_the_text_holds_them() -> None:
    depths = written(1)
    found = rounds_of(depths, "chain", ())
    everywhere = float((depths[0].rank == 0).double().mean())
    assert float(found.alpha[0]) < everywhere - 0.05
    assert 0 < float(found.start.sum()) < len(found.start)


def test_half_kept_rounds_spread_over_their_ends() -> None:
    survival = torch.tensor([[0.5, 0.25], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    doc = torch.tensor([0, 0, 0, 0, 1])
    assert starts(doc, survival).tolist() == pytest.approx([1.0, 0.5, 0.75, 1.0, 1.0])
