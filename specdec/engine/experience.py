"""What a budget has seen of one batch size: what speculation earned there, and what its rounds take.

Running sums that fade; no decision is made here.
"""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.95  # of running sums and means: about the last twenty rounds
TRIAL = 12  # rounds of one request before speculation may be judged by what it earned
SHORTEST_PAUSE, LONGEST_PAUSE = 32, 512  # plain rounds between trials
TREE_DECAY = 0.8  # of how trees turn out against the table: the few rounds of a trial must tell
MOST_DEARER = 2.0  # than believed, that one round may say of that
# bounds of the correction of a drafter's probabilities, so that one streak cannot end drafting
LEAST_TRUST = 0.25
# accepted drafts per doubling of the tree before any round, and its weight
FIRST_GAIN, FIRST_DOUBLINGS = 0.35, 16


@dataclass(slots=True)
class Trial:
    """Running sums of speculation at one batch size: what it earned, what drafts promised, whether it is paused."""

    tokens: float = 0.0
    ms: float = 0.0
    promised: float = 0.0
    kept: float = 0.0
    doublings: float = 0.0
    rounds: int = 0
    paused: int = 0
    pause: int = SHORTEST_PAUSE

    def note(self, tokens: float, ms: float, promised: float, kept: float, doublings: float) -> None:
        """Add a round; older ones fade."""
        self.doublings = self.doublings * DECAY + doublings
        self.tokens = self.tokens * DECAY + tokens
        self.ms = self.ms * DECAY + ms
        self.promised = self.promised * DECAY + promised
        self.kept = self.kept * DECAY + kept
        self.rounds += 1

    def rest(self) -> None:
        """Pause, for longer each time; what is known stays known."""
        self.paused, self.pause, self.rounds = self.pause, min(2 * self.pause, LONGEST_PAUSE), 0

    def gain(self) -> float:
        """Accepted drafts per doubling of the tree."""
        return (self.kept + FIRST_GAIN * FIRST_DOUBLINGS) / (self.doublings + FIRST_DOUBLINGS)

    def trust(self) -> float:
        """Accepted drafts over promised ones: how far the drafter's own probabilities can be believed."""
        if self.rounds < TRIAL // 2 or self.promised <= 0:
            return 1.0
        return min(max(self.kept / self.promised, LEAST_TRUST), 1 / LEAST_TRUST)


@dataclass(slots=True)
class Pace:
    """What rounds of one batch size take here and now, against what the table says.

    Attributes:
        beside: plain rounds' time beside their forward, as a multiple of it.
        plain: seconds of a plain forward over the table's milliseconds.
        trees: the same of trees over that of plain forwards, measured one soon after the other: texts are longer than
            the table's, and a tree may suffer more from that.
        rounds: plain ones that `beside` and `plain` are means of; set to 0, the next ones replace what is known.
    """

    beside: float = 0.0
    plain: float = 0.0
    trees: float = 1.0
    rounds: int = 0

    def note_plain(self, beside: float, pace: float) -> None:
        """A plain round took so much."""
        self.rounds += 1
        step = max(1 / self.rounds, 1 - DECAY)
        self.beside += step * (beside - self.beside)
        self.plain += step * (pace - self.plain)

    def note_tree(self, pace: float) -> None:
        """A round over trees took so much soon after plain ones; a pause of the machine must not count for much."""
        ratio = min(max(pace / self.plain, self.trees / MOST_DEARER), self.trees * MOST_DEARER)
        self.trees += (1 - TREE_DECAY) * (ratio - self.trees)
