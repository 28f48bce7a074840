"""From a target and its texts to a head ready to train: config, draft vocabulary, start, objective, optimizer.

Knows every part once and joins them; the loop is the trainer's. Legend: F feature width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import SpecdecError, UnsupportedError
from specdec.head.config import HeadConfig, default_taps
from specdec.head.model import SPARE, DraftHead
from specdec.layers.linear import Projection
from specdec.layers.rope import SCALINGS
from specdec.target.adapter import HFTarget
from specdec.target.lean import Block
from specdec.target.load import LeanTarget
from specdec.target.protocol import Target
from training.data import Sample
from training.earlier import take_over
from training.features import Features
from training.losses import Loss
from training.objective import Objective, Settings
from training.optim import Optimizer, Rates
from training.recipe import Recipe
from training.vocab import OutsideMass, count_tokens, coverage, draft_vocab, outside_mass
from training.warmstart import Moments, Sources, cold_start, unit, warm_start

OUTSIDE_TEXTS = 48  # that the mass outside the draft vocabulary is taken over
OUTSIDE_ROWS = 256  # whose logits are held at once
MOMENT_ROWS = 40_000  # that the closed-form start is solved from; more change little
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The draft vocabulary, the share of the written tokens that it holds, and what the target gives to others
    (None: not measured, or nothing is outside)."""

    ids: Tensor
    coverage: float
    outside: OutsideMass | None = None


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What the head computes in. Raises UnsupportedError for fp16, which needs loss scaling."""
    precision = recipe.trainer.precision
    if precision not in DTYPES:
        raise UnsupportedError("the trainer does not scale losses", field="trainer.precision", value=precision,
                               allowed=", ".join(DTYPES), remedy="Use bf16.")  # fmt: skip
    return DTYPES[precision]


def choose_vocabulary(samples: Sequence[Sample], target: Target, recipe: Recipe) -> Vocabulary:
    """The most frequent tokens of the answers; prompts break ties (a summary copies from its text)."""
    info = target.info
    counts = count_tokens(samples, info.vocab)
    everywhere = np.zeros(info.vocab, dtype=np.int64)
    for sample in samples:
        everywhere += np.bincount(sample.ids, minlength=info.vocab)
    rank = counts * 10 + torch.from_numpy(everywhere)
    ids = draft_vocab(rank, recipe.vocab.size, info.stop_ids)
    return Vocabulary(ids, coverage(counts, ids))


def weighed(vocabulary: Vocabulary, features: Features) -> Vocabulary:
    """The vocabulary with what the target gives to tokens outside: where the answers of some texts stand, spread over
    all."""
    samples, target = features.samples, features.capture.target
    some = range(0, len(samples), max(1, len(samples) // OUTSIDE_TEXTS))[:OUTSIDE_TEXTS]
    before = [torch.from_numpy(samples[i].loss_mask[1:]) for i in some]
    if len(vocabulary.ids) == target.info.vocab or not any(bool(mask.any()) for mask in before):
        return vocabulary
    final = zip(features.take(some), before, strict=True)
    rows = torch.cat([one.final[:-1][mask.to(one.final.device)] for one, mask in final]).to(target.info.dtype)
    logits = map(target.logits, torch.split(rows, OUTSIDE_ROWS))
    return replace(vocabulary, outside=outside_mass(logits, vocabulary.ids))


def head_config(target: Target, config: Mapping[str, Any], recipe: Recipe, draft: int,
                earlier: DraftHead | None = None) -> HeadConfig:  # fmt: skip
    """The head's numbers: the earlier head's if there is one; else the recipe's where it says, else the target's.

    What a family calls by names of its own (GPT-2's `n_head`) is taken from what its cache looks like. A head has
    positions of its own: where the target's are scaled in a way that heads do not know, the head's are not scaled.

    Args:
        config: the target's config.json.
        draft: size of the draft vocabulary.

    Raises:
        SpecdecError: too few layers for the taps, or numbers that do not go together.
    """
    if earlier is not None:
        return replace(earlier.config, draft_vocab=draft)
    text: Mapping[str, Any] = config.get("text_config") or config
    want, info = recipe.head, target.info
    taps = default_taps(info.layers) if want.taps == "default" else want.taps
    if max(taps) > info.layers:
        raise SpecdecError("the target has no such layer", field="head.taps", value=taps,
                           allowed=f"ids up to {info.layers}")  # fmt: skip
    heads = want.num_heads or int(text.get("num_attention_heads") or info.hidden // info.cache.head_dim)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return HeadConfig(
        hidden=info.hidden, target_hidden=info.hidden, taps=taps,
        intermediate=want.intermediate_size or int(text.get("intermediate_size") or 4 * info.hidden), heads=heads,
        kv_heads=want.num_key_value_heads or int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or info.hidden // heads), vocab=info.vocab, draft_vocab=draft,
        eps=target.final_norm()[1], theta=float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        scaling=rope if kind in SCALINGS and kind != "default" else None, max_length=info.max_length,
        norm_before_residual=want.norm_before_residual, norm_before_fc=want.norm_before_fc,
        fc_norm=want.fc_norm, norm_output=want.norm_output, fingerprint=info.fingerprint,
    )  # fmt: skip


def build(target: Target, config: HeadConfig, vocabulary: Vocabulary, features: Features, recipe: Recipe,
          earlier: DraftHead | None = None) -> tuple[Objective, Optimizer]:  # fmt: skip
    """The objective around a started head, and its optimizer, on the target's device.

    Args:
        earlier: the head to go on from; None starts as the recipe says.
    """
    generator = torch.Generator().manual_seed(recipe.trainer.seed)
    head = DraftHead(config)
    head.reserve(recipe.data.max_length + SPARE)
    matrix = target.output_embedding()
    rows = matrix[vocabulary.ids.to(matrix.device)].cpu()
    parts = len(config.taps) if config.fc_norm else int(config.norm_before_fc)
    moments = measure(target, features, generator, parts)
    scale = moments.scale(len(config.taps) * config.target_hidden)
    if parts:
        scale = torch.ones_like(scale)  # its own norms see to it
    if earlier is not None:
        take_over(head, earlier, vocabulary.ids, rows)
    elif recipe.head.start == "closed-form":
        warm_start(head, vocabulary.ids, moments, _sources(target, config, rows), generator)
    else:
        cold_start(head, vocabulary.ids, generator)
    if recipe.head.start != "random":
        with torch.no_grad():
            head.fc.weight.mul_(scale)  # solved or learned on features as the target gives them
    head.to(target.info.device)
    optimizer = Optimizer(head, config, _rates(recipe))
    head.to(compute_dtype(recipe))
    settings = Settings(
        Loss(recipe.loss.kind, recipe.loss.lk_rate), recipe.unroll.decay, recipe.unroll.checkpointing,
        recipe.loss.gradient == "stopped", recipe.unroll.noise,
    )  # fmt: skip
    finish = target.finishing(vocabulary.ids) if isinstance(target, HFTarget) else None
    objective = Objective(head, target.embed, rows, scale, settings, finish).to(target.info.device)
    return objective, optimizer


def _rates(recipe: Recipe) -> Rates:
    wanted = recipe.optimizer
    matrix_lr = wanted.matrix_lr if wanted.name == "muon" else None
    return Rates(wanted.lr, matrix_lr, wanted.betas, wanted.weight_decay)


def measure(target: Target, features: Features, generator: torch.Generator, parts: int = 0) -> Moments:
    """Second moments of random samples: what the start is solved from and features are scaled by.

    Args:
        parts: equal parts of the features that the head norms before `fc` (EAGLE-3.1); 0 takes them as they are.
    """
    hidden = target.info.hidden
    weight = target.final_norm()[0].float().cpu()
    weight = torch.where(weight.abs() < 1e-3, 1e-3, weight)
    width = len(features.capture.taps) * hidden
    moments = Moments(width + hidden, hidden)
    for index in torch.randperm(len(features.samples), generator=generator).tolist():
        sample = features.samples[index]
        captured = features.take([index])[0]
        tokens = torch.from_numpy(sample.ids).long()
        # row t reads taps(t) and token t + 1; its y should be the state at t + 1
        at = torch.from_numpy(sample.loss_mask[2:]).nonzero()[:, 0]
        embedded = target.embed(tokens[at + 1].to(target.info.device)).cpu()
        taps = captured.features.cpu()[at].float()
        if parts:
            taps = unit(taps.unflatten(-1, (parts, width // parts))).flatten(-2)  # type: ignore[no-untyped-call]
        moments.add(taps, embedded, captured.final.cpu()[at + 1].float() / weight)
        if moments.rows >= MOMENT_ROWS:
            break
    return moments


def _sources(target: Target, config: HeadConfig, rows: Tensor) -> Sources:
    """Of the last layer only a lean target lends: the adapter's layers have names of their own."""
    norm = target.final_norm()[0].float().cpu()
    if not isinstance(target, LeanTarget):
        return Sources(norm, rows.float())
    block = target.decoder.blocks[-1]
    assert isinstance(block, Block)
    gate_up = _weight(block.gate_up)
    if gate_up.shape[0] != 2 * config.intermediate:
        return Sources(norm, rows.float())
    return Sources(norm, rows.float(), block.mlp_norm.weight.detach().float().cpu(), gate_up)


def _weight(projection: Projection) -> Tensor:
    return projection.plain_weight().float().cpu()
