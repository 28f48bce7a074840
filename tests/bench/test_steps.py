"""The step bench on a tiny random target: rows for every point, weights counted once."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import torch

from bench.steps import EIGHT_B, measure, random_target, round_table, table, weight_bytes, whole_rounds
from bench.whole_round import head_bytes, random_head

TINY = replace(
    EIGHT_B,
    vocab=50,
    hidden=32,
    intermediate=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    windows=(None,) * 2,
)


def test_every_point_is_measured() -> None:
    target = random_target(TINY, torch.device("cpu"), torch.float32)
    args = Namespace(batches=[1, 2], nodes=[1, 8], prefix=16)
    rows = list(measure(target, args, bandwidth=1e9))
    assert [(row["batch"], row["nodes"]) for row in rows] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    assert all(row["plain_ms"] > 0 and row["floor_ms"] > 0 for row in rows)
    assert table(rows).row_count == 4


def test_whole_rounds_are_measured_against_the_sum_of_their_floors() -> None:
    target = random_target(TINY, torch.device("cpu"), torch.float32)
    args = Namespace(batches=[1, 2], prefix=16, tree="3/4/8")
    rows = list(whole_rounds(target, args, bandwidth=1e9))
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["plain_round_ms"] > 0
        assert row["plain_draft_ms"] > 0
        assert row["floor_ms"] > row["draft_floor_ms"] > 0
    assert round_table(rows).row_count == 2
    head = random_head(target, 50)
    assert head_bytes(head, 3) == head_bytes(head, 1) + 2 * (head_bytes(head, 2) - head_bytes(head, 1))
    assert head_bytes(head, 0) == 4 * 3 * 32 * 32, "fc is read once a round"


def test_the_embedding_is_read_only_where_it_is_the_head() -> None:
    config = replace(TINY, tied=True)
    apart, tied = (random_target(c, torch.device("cpu"), torch.float64) for c in (TINY, config))
    assert weight_bytes(apart) < sum(p.numel() * p.element_size() for p in apart.decoder.parameters())
    assert weight_bytes(tied) == sum(p.numel() * p.element_size() for p in tied.decoder.parameters())
