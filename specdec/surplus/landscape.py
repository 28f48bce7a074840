"""The landscape of captured states: Fisher-Rao geometry, entropies of the kernel, and spectral alignment of tap sets.

None of it needs a trained probe. Knows captured text, labels and a head's rows. Dimension legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specdec.surplus.cells import ENTROPY_EDGES, bin_names
from specdec.surplus.contract import TargetHead
from specdec.surplus.draft import DraftRows
from specdec.surplus.entropy import gini_simpson, renyi, shannon
from specdec.surplus.geometry import fisher_factor, forecast, spectrum
from specdec.surplus.interval import resamples
from specdec.surplus.material import Material
from specdec.surplus.plan import Plan, TapSet
from specdec.surplus.spectral import (
    add_moments,
    dirichlet_energy,
    hellinger,
    no_moments,
    partial_correlations,
    predictive_alignment,
)
from specdec.surplus.values import Value, clean, number

PROJECTION = 96
"""Random directions that features, prototypes and embeddings are projected on for canonical correlations."""


def alignment(material: Material, taps: TapSet) -> Value:
    """Spectral ranking of a tap set: canonical correlations given the next token, and Dirichlet energy.

    Dimensionless, never nats.
    """
    c = material.captured
    rows = material.sample()
    rows = rows[rows + 1 < c.ids.shape[0]]
    generator = torch.Generator().manual_seed(0)
    features = _projected(c.features(taps)[rows].float(), generator)
    law = material.labels.rows(rows + 1)
    unembedding = (
        c.head.unembedding if material.lumping is None else material.lumping.unembedding(c.head.unembedding)
    )
    prototypes = _projected(law.exp() @ unembedding.float(), generator)
    given = _projected(material.tokens[c.ids[rows + 1]].float(), generator)
    few = rows.shape[0] <= features.shape[1] + prototypes.shape[1] + given.shape[1]
    some = torch.arange(0, rows.shape[0], max(1, rows.shape[0] // 512))
    energy = dirichlet_energy(features[some], hellinger(law[some]))
    if few:
        return {"alignment": None, "energy": clean(energy)}
    moments = no_moments(features.shape[1], prototypes.shape[1], given.shape[1])
    found = partial_correlations(add_moments(moments, features, prototypes, given))
    return {"alignment": clean(predictive_alignment(found)), "energy": clean(energy)}


def _projected(values: Tensor, generator: torch.Generator) -> Tensor:
    """Standardised, then on at most PROJECTION random directions."""
    wide = (values - values.mean(0)) / values.std(0).clamp_min(1e-6)
    if wide.shape[1] <= PROJECTION:
        return wide
    directions = torch.randn(wide.shape[1], PROJECTION, generator=generator) / wide.shape[1] ** 0.5
    projected: Tensor = wide @ directions
    return projected


def geometry(material: Material, plan: Plan) -> Value:
    """Fisher-Rao spectrum by entropy bin, and the quadratic forecast against exact KL on small noise."""
    c = material.captured
    rows = material.sample(384)
    final, doc = c.final[rows].float(), c.doc[rows]
    parts = [spectrum(fisher_factor(c.head, chunk, top=512)) for chunk in torch.split(final, 32)]
    values = torch.cat([part.values for part in parts])
    shape = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("effective_rank", "participation", "anisotropy")
    }
    entropy = torch.cat([shannon(c.head.log_probs(chunk)) for chunk in torch.split(final, 256)])
    names = bin_names(entropy, ENTROPY_EDGES, "nats")
    bins = []
    for name in dict.fromkeys(sorted(names)):
        keep = torch.tensor([each == name for each in names])
        row: Value = {"entropy": name, "spectrum": [clean(float(v)) for v in values[keep].mean(0)[:64]]}
        row |= {what: _mean(doc[keep], each[keep], plan) for what, each in shape.items()}
        bins.append(row)
    noise = torch.randn(final.shape, generator=torch.Generator().manual_seed(0))
    told = forecast(c.head, final, 0.02 * final.std(dim=-1, keepdim=True) * noise)
    ratio = float(told.kl.sum() / told.exact_kl.sum()), float(told.tv.sum() / told.exact_tv.sum())
    return {"bins": bins, "kl_forecast_ratio": clean(ratio[0]), "tv_forecast_ratio": clean(ratio[1])}


def _mean(doc: Tensor, values: Tensor, plan: Plan) -> Value:
    return number(resamples(doc, draws=plan.draws, minimum=1).mean(values))


def entropies(material: Material, plan: Plan) -> Value:
    """Categorical entropies of the target's kernel on the full vocabulary, and what lumping costs."""
    c = material.captured
    rows = material.sample(1024)
    parts, full, lumped = list[Tensor](), list[Tensor](), list[Tensor]()
    mean = torch.zeros(c.head.unembedding.shape[0])
    for chunk in torch.split(rows, 256):
        mean += c.head.log_probs(c.final[chunk]).exp().sum(0)
    law = (mean / rows.shape[0]).clamp_min(1e-12).log()[None]
    for chunk in torch.split(rows, 256):
        log_p = c.head.log_probs(c.final[chunk])
        parts.append(torch.stack([shannon(log_p), gini_simpson(log_p), renyi(log_p, 2.0)], dim=1))
        full.append((log_p.exp() * (log_p - law)).sum(-1))
        if material.lumping is not None:
            p, q = material.lumping.log_probs(log_p), material.lumping.log_probs(law)
            lumped.append((p.exp() * (p - q)).sum(-1))
    kinds, doc = torch.cat(parts), c.doc[rows]
    told: Value = {
        name: _mean(doc, kinds[:, i], plan) for i, name in enumerate(("shannon", "gini_simpson", "renyi_2"))
    }
    told["tail_mass"] = clean(material.tail)
    told["information_full"] = _mean(doc, torch.cat(full), plan)
    told["information_lumped"] = _mean(doc, torch.cat(lumped or full), plan)
    return told


def feature_errors(rows: Mapping[int, DraftRows], head: TargetHead, plan: Plan) -> list[Value]:
    """How much of the head's feature error lies in directions that change the target's law, per depth.

    The error is the head's output against the target's final state, both at unit RMS: the norm that follows forgets
    the scale. `share` is log e'Ge / (|e|^2 tr G / d): above 0 the error lies in predictive directions, 0 is isotropic.
    `size` is |e|^2 over the state's own; `kl` what moving the target's state by e really costs, nats.
    """
    told: list[Value] = []
    for k, each in sorted(rows.items()):
        ours, final, doc = each.states
        if not doc.numel() or ours.shape[1] != final.shape[1]:
            continue
        error = _unit(ours) - _unit(final)
        parts = [
            forecast(head, _unit(state), wrong)
            for state, wrong in zip(torch.split(final, 32), torch.split(error, 32), strict=True)
        ]
        share, kl = torch.cat([p.share for p in parts]), torch.cat([p.exact_kl for p in parts])
        size = error.square().mean(-1)
        row: Value = {"depth": k, "share": _mean(doc, share, plan), "kl": _mean(doc, kl, plan)}
        told.append(row | {"size": _mean(doc, size, plan)})
    return told


def _unit(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-12)
