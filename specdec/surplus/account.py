"""The head's account: what was predicted, what the engine counted, and where the head's gap comes from.

Knows rows and counters; builds values of report.json. Dimension legend: K draft depths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from specdec.errors import RequestError
from specdec.surplus.draft import DraftRows
from specdec.surplus.estimate import Estimate
from specdec.surplus.forecasts import Aligned
from specdec.surplus.interval import Interval, resamples
from specdec.surplus.outcome import Measured
from specdec.surplus.plan import Plan
from specdec.surplus.recorder import TreeShape
from specdec.surplus.values import Value, clean, number


def predicted_tau(aligned: Aligned, plan: Plan, shapes: Sequence[TreeShape]) -> dict[str, Interval]:
    """tau of every shape from predictor documents alone, with its document interval."""
    drawn = resamples(aligned.doc, draws=plan.draws, minimum=2)
    each = {name: aligned.rounds(name, shapes) for name in plan.shapes}
    return {name: drawn.ratio(rounds.tokens, rounds.start) for name, rounds in each.items()}


def selection(aligned: Aligned, plan: Plan) -> list[Value]:
    """Per draft depth of the chain: all text, survivors, and what the engine's rounds meet."""
    law, met = aligned.law(), aligned.rounds("chain", ()).alpha
    return [
        {
            "depth": j + 1,
            "forced": clean(float(law.forced[j])),
            "survivors": clean(float(law.alpha[j])),
            "rounds": clean(float(met[j])),
        }
        for j in range(len(aligned.depths))
    ]


def engine_row(run: Measured, predicted: Interval, domains: Sequence[str]) -> Value:
    """The engine's counters of one tree shape, and what was predicted."""
    depths = [j for j in range(1, run.reached.shape[1] + 1) if float(run.reached[:, j - 1].sum()) > 0]
    rows: list[Value] = []
    for i, name in enumerate(domains):
        keep = run.domain == i
        if int(keep.sum()):
            try:
                tau: Value | None = number(run.tau(keep))
            except RequestError:  # too few documents of this domain for an interval
                tau = None
            rows.append({"domain": name, "documents": int(keep.sum()), "tau": tau})
    return {
        "tau": number(run.tau()),
        "tau_predicted": clean(predicted.value),
        "tau_predicted_interval": number(predicted),
        "tau_expected": clean(float(run.expected @ run.rounds / run.rounds.sum())),
        "alpha": {str(j): number(run.alpha(j)) for j in depths},
        "by_domain": rows,
    }


def waterfall(
    big: Mapping[int, Estimate], small: Mapping[int, Estimate], head: Mapping[int, DraftRows], plan: Plan
) -> list[Value]:
    """Per depth, on contexts that all three scored: where the head's gap comes from, signed, in nats.

    own = big + (small - big) + (fresh - small) + (own - fresh): not recoverable, capacity, training shortfall,
    feature drift. At k > 2 `fresh` reads the target's states past t, so that term may be negative.
    """
    rows = []
    for k in sorted(set(big) & set(small) & set(head)):
        size = 1 + int(max(scores.at.max() for scores in (big[k].scores, small[k].scores, head[k].scores)))
        place = torch.full((3, size), -1, dtype=torch.int64)
        for i, scores in enumerate((big[k].scores, small[k].scores, head[k].scores)):
            place[i, scores.at] = torch.arange(scores.at.shape[0])
        at = (place >= 0).all(0).nonzero()[:, 0]
        if not at.numel():
            continue
        b, s = big[k].scores.gap[place[0, at]], small[k].scores.gap[place[1, at]]
        fresh, own = head[k].fresh_gap[place[2, at]], head[k].scores.gap[place[2, at]]
        drawn = resamples(big[k].scores.doc[place[0, at]], draws=plan.draws, minimum=2)
        terms = {
            "unrecoverable": b,
            "capacity": s - b,
            "training": fresh - s,
            "drift": own - fresh,
            "total": own,
        }
        rows.append({"depth": k} | {name: number(drawn.mean(value)) for name, value in terms.items()})
    return rows
