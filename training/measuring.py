"""What is measured on the dev split while training: simulated tau of tree and chain, alpha by depth.

Knows captured dev texts and the decoder's own acceptance; nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.head.model import DraftHead
from specdec.stats import Counters, total
from training.chunks import BatchRule, collate, plan_epoch
from training.data import Sample
from training.evaluate import Growth, Text, simulate, teacher_forced
from training.features import Features
from training.objective import scaled
from training.trainer import padded

TREE, CHAIN = Growth(7, 10, 60), Growth(7, 1, 8)
TAUGHT = 4  # depths of the teacher-forced alpha


class DevSplit:
    """Texts of one kind with their features held in memory, in batches of like length.

    Args:
        features: of the texts.
        scale: what the head's features are divided by.
        batch_tokens: padded tokens measured at once.
    """

    def __init__(self, features: Features, scale: Tensor, batch_tokens: int = 4096) -> None:
        samples = [s for s in features.samples if s.loss_mask.any() and len(s) > 2]
        index = {id(s): i for i, s in enumerate(features.samples)}
        longest = max((len(s) for s in samples), default=1)
        rule = BatchRule(max(batch_tokens, longest))
        self.texts: list[Text] = []
        if not samples:
            return
        device = scale.device
        for batch in plan_epoch([len(s) for s in samples], rule, 0):
            made = collate(samples, batch)
            captured = features.take([index[id(samples[i])] for i in batch])
            taps = padded([one.features for one in captured], made.ids.shape[1]).to(device)
            dtype = torch.bfloat16 if taps.dtype == torch.bfloat16 else torch.float32
            self.texts.append(
                Text(scaled(taps, scale, dtype), made.ids.to(device), made.loss_mask.to(device),
                     made.lengths.to(device))
            )  # fmt: skip

    def counters(self, head: DraftHead, embed: Callable[[Tensor], Tensor], growth: Growth) -> Counters:
        return total([simulate(head, embed, text, growth) for text in self.texts])

    def taught(self, head: DraftHead, embed: Callable[[Tensor], Tensor]) -> list[float]:
        """Teacher-forced alpha, batches weighed equally."""
        rates = torch.tensor([teacher_forced(head, embed, text, TAUGHT) for text in self.texts])
        return [round(rate, 4) for rate in rates.mean(0).tolist()]


class Evaluator:
    """Callable that measures a head on greedy and on sampled dev text.

    Args:
        head, embed: what is trained.
        greedy, sampled: dev splits; "tau" is the mean of the tree taus of those that have rounds, and missing
            where none has: nothing was measured then.
    """

    def __init__(self, head: DraftHead, embed: Callable[[Tensor], Tensor], greedy: DevSplit,
                 sampled: DevSplit) -> None:  # fmt: skip
        self.head, self.embed, self.greedy, self.sampled = head, embed, greedy, sampled

    def __call__(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        taus = []
        for name, split in (("greedy", self.greedy), ("sampled", self.sampled)):
            tree = split.counters(self.head, self.embed, TREE)
            if not tree.rounds:
                continue
            chain = split.counters(self.head, self.embed, CHAIN)
            taus.append(tree.tau)
            row[name] = {
                "tau": round(tree.tau, 4), "alpha": _rounded(tree.alpha()), "rounds": tree.rounds,
                "tau_chain": round(chain.tau, 4), "alpha_chain": _rounded(chain.alpha()),
                "alpha_taught": split.taught(self.head, self.embed),
            }  # fmt: skip
        return ({"tau": round(sum(taus) / len(taus), 4)} if taus else {}) | row


def _rounded(rates: Sequence[float]) -> list[float]:
    return [round(rate, 4) for rate in rates]


def dev_texts(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many texts, spread over what there is."""
    step = max(1, len(samples) // max(1, most))
    return list(samples)[::step][:most]
