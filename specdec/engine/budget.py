"""How much to draft: what a node or a level must promise to pay, and whether speculation pays at all.

Everything is expressed in milliseconds and tokens: a node is verified when the tokens it is expected to add are worth
more than the time it takes at the rate already achieved; a level is grown on the same terms; and where whole rounds
of speculation earn less than plain ones, it is switched off and tried again later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from specdec.drafting.protocol import PLAIN, Shape
from specdec.engine.cost_table import CostTable
from specdec.engine.experience import LONGEST_PAUSE, SHORTEST_PAUSE, TRIAL, Pace, Trial
from specdec.tree import DraftTree

FEWEST = 4  # rounds of however many requests before speculation may be judged by what it earned
PROBE = 4  # rounds before whole sizes may be judged by what they promise
NEW_PAUSE = 4  # plain rounds that tell what plain ones take, before a new text or long success is tried again
LOSS = 0.98  # of plain decoding's rate that speculation must earn; looking in vain for lookups costs nothing
MOST_BESIDE = 4.0  # forwards that a round's drafting and accepting may count for
FEW_NODES = 16  # nodes over which the price of a single one is averaged
CARRY = 0.6  # share of a frontier's mass that the next level is expected to win


@dataclass(slots=True)
class Budget:
    """Chooses the shape of the next round's trees.

    Args:
        costs: the measured table; None fixes the shape.
        limit: the largest tree ever used, or the fixed one.
        adaptive: False always answers `limit`.
        fixed: trees are one of a few whole sizes, never cut by what a round's own drafts promise: rounds that are one
            device program cannot ask.
    """

    costs: CostTable | None
    limit: Shape
    adaptive: bool = True
    fixed: bool = False
    trials: dict[int, Trial] = field(default_factory=dict)
    paces: dict[int, Pace] = field(default_factory=dict)

    def shape(self, batch: int) -> Shape:
        """The shape for a round of `batch` requests."""
        if not self.adaptive or self.costs is None or self.limit.depth == 0:
            return self.limit
        trial = self._trial(batch)
        if trial.paused > 0:
            trial.paused -= 1
            return PLAIN
        if self.fixed:
            return self._size(batch, trial)[0]
        # time in tokens per request, and in the drafter's own currency: a node promising p brings trust * p
        worth = self._rate(batch, trial) / batch / trial.trust()
        one = self.costs.verify_ms(batch, 1)
        prices = [worth * (self._verify_ms(batch, n) - one) for n in range(1, self.limit.nodes + 1)]
        few = min(FEW_NODES, self.limit.nodes)
        first = self.costs.draft_ms(batch, 1)
        level = self.costs.draft_ms(batch, 2) - first
        return replace(
            self.limit,
            node_floor=prices[few - 1] / max(few - 1, 1),
            # what a level wins takes at least one more node to keep
            level_floor=(worth * level + prices[min(1, len(prices) - 1)]) / CARRY if level else 0.0,
            prices=tuple(prices),
            first_level=worth * first,
            next_level=worth * level,
        )

    def welcome(self, running: int) -> None:
        """A request joins `running` others. What was learned of the last text alone says little of this one."""
        if running == 0 and 1 in self.trials:
            self.trials[1].paused = min(self.trials[1].paused, NEW_PAUSE)
            if 1 in self.paces:
                self.paces[1].rounds = 0

    def _trial(self, batch: int) -> Trial:
        """What is known of this batch size. Whole sizes that cost too much from the start are tried later."""
        trial = self.trials.get(_bucket(batch))
        if trial is None:
            trial = self.trials[_bucket(batch)] = Trial()
            if self.fixed and self._size(batch, trial)[1] < LOSS:
                trial.rest()
        return trial

    def _size(self, batch: int, trial: Trial) -> tuple[Shape, float]:
        """The whole size that would have earned most lately, and its rate over plain decoding's.

        What a smaller tree would have brought is not known, so accepted drafts are taken to grow with the number of
        times the tree's size has doubled, which is how EAGLE's trees grow (each doubling adds a little less).
        """
        assert self.costs is not None
        gain, costs = trial.gain(), self.costs
        plain = costs.verify_ms(batch, 1)

        def rate(shape: Shape) -> float:
            ms = costs.verify_ms(batch, shape.nodes) + costs.draft_ms(batch, shape.depth)
            return (1 + gain * math.log2(shape.nodes)) * plain / ms

        best = max(self.sizes(), key=rate)
        return best, rate(best)

    def sizes(self) -> list[Shape]:
        """The limit and smaller trees in its proportions: half the nodes, one level less, down to chains of two."""
        out = [self.limit]
        while out[-1].nodes >= 8 and out[-1].depth > 1:
            out.append(replace(out[-1], nodes=out[-1].nodes // 2, depth=out[-1].depth - 1))
        return out

    def _rate(self, batch: int, trial: Trial) -> float:
        """Tokens per millisecond that time is worth now: at least what plain decoding earns."""
        assert self.costs is not None
        plain = batch / self.costs.verify_ms(batch, 1)
        return max(plain, trial.tokens / trial.ms) if trial.ms and trial.rounds >= TRIAL // 2 else plain

    def note(
        self, shape: Shape, tree: DraftTree, emitted: int, seconds: Mapping[str, float] | None = None
    ) -> None:
        """A round over `tree` gave `emitted` tokens in all; `seconds` by phase, where they were taken."""
        if not self.adaptive or self.costs is None:
            return
        batch = len(tree.tokens)
        if shape.depth:
            # looking in vain costs nothing to speak of; and a trial's first round reads all that was written while
            # nobody asked, which no later one has to
            timed = (tree.nodes > 1 or tree.levels) and self._trial(batch).rounds > 0
            beside = None
            if timed and seconds:
                beside = _beside(seconds, "draft", "accept")
                self._note_tree(batch, tree.nodes, seconds["verify"])
            self.earned(batch, tree.nodes, tree.levels, tree.promised(), emitted, beside)
            if seconds:
                self._compare_again(batch)
        elif seconds:
            beside, pace = _beside(seconds, "accept"), seconds["verify"] / self.costs.verify_ms(batch, 1)
            self.paces.setdefault(_bucket(batch), Pace()).note_plain(beside, pace)

    def _compare_again(self, batch: int) -> None:
        """Where speculation goes on and on, what plain rounds take is known from long ago, if at all, and what trees
        take only against that: a table or a minute that flattered trees would never be found out."""
        trial, pace = self._trial(batch), self.paces.get(_bucket(batch))
        if trial.rounds > (4 * TRIAL if pace is None else LONGEST_PAUSE):
            self.trials[_bucket(batch)] = Trial(paused=NEW_PAUSE, pause=trial.pause)
            if pace is not None:
                pace.rounds = 0

    def _note_tree(self, batch: int, nodes: int, seconds: float) -> None:
        """A forward over trees took so long. Only of use while the plain ones before it are not long ago."""
        assert self.costs is not None
        pace = self.paces.get(_bucket(batch))
        if nodes > 1 and pace is not None and self._trial(batch).rounds < TRIAL:
            pace.note_tree(seconds / self.costs.verify_ms(batch, nodes))

    def _verify_ms(self, batch: int, nodes: int) -> float:
        """The table's word, corrected by how trees turn out here."""
        assert self.costs is not None
        pace = self.paces.get(_bucket(batch))
        return self.costs.verify_ms(batch, nodes) * (pace.trees if pace is not None and nodes > 1 else 1.0)

    def earned(
        self, batch: int, nodes: int, levels: int, promised: float, emitted: int, beside: float | None = None
    ) -> None:
        """A speculating round over `batch` trees of `nodes` nodes and `levels` levels gave `emitted` tokens in all.

        Args:
            beside: what the round took beside its forward, as a multiple of it. The forward is the clock, because a
                machine has faster and slower minutes; without it the table's word on drafting is taken.
        """
        if not self.adaptive or self.costs is None:
            return
        trial = self._trial(batch)
        spent, pace = self._verify_ms(batch, nodes), self.paces.get(_bucket(batch))
        if beside is None:
            spent += self.costs.draft_ms(batch, levels)
        else:
            spent *= (1 + beside) / (1 + (pace.beside if pace is not None else 0.0))
        trial.note(emitted, spent, promised, emitted - batch, batch * math.log2(nodes) if nodes > 1 else 1.0)
        plain = batch / self.costs.verify_ms(batch, 1)
        loses = trial.rounds >= _enough(batch) and trial.tokens / trial.ms < LOSS * plain
        if self.fixed and trial.rounds >= PROBE:
            loses = loses or self._size(batch, trial)[1] < LOSS
        if loses:
            trial.rest()
            if not self.fixed:  # where rounds are cut by their own drafts, each trial is judged by itself
                self.trials[_bucket(batch)] = Trial(paused=trial.paused, pause=trial.pause)
        elif trial.rounds > 4 * TRIAL:
            trial.pause = SHORTEST_PAUSE


def _beside(seconds: Mapping[str, float], *phases: str) -> float:
    """Time of these phases over the forward's; a pause of the machine in one of them must not count for much."""
    return min(sum(seconds[phase] for phase in phases) / max(seconds["verify"], 1e-9), MOST_BESIDE)


def _enough(batch: int) -> int:
    """Rounds before a verdict: the more requests took part in each, the fewer."""
    return max(round(TRIAL / math.sqrt(batch)), FEWEST)


def _bucket(batch: int) -> int:
    """Batch sizes that share a verdict: powers of two."""
    return 1 << (batch - 1).bit_length()
