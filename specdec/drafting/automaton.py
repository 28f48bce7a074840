"""SuffixAutomaton: an index of every substring of one growing token sequence.

Knows nothing of models, trees or requests. Blumer et al. 1985: at most two states per token, built online in
amortised constant time. A state stands for a set of substrings that end at the same places; its link leads to
its longest suffix that also ends elsewhere: the link of the newest state is the longest suffix seen before.

    text     a b c a b        states of the suffixes:  [abcab] -> [ab] -> start
    match        ^ ^ = "ab", length 2; its transitions hold what followed it: c
"""

from __future__ import annotations

START = 0  # the state of the empty string
COUNTED = 8  # suffixes whose followers are counted per token; only periodic text has more
FOLLOWERS = 16  # followers remembered per state, the most recent ones


class SuffixAutomaton:
    """States are integers; everything is kept in flat lists.

    Attributes:
        lengths: of the longest substring of each state.
        links: each state's longest suffix in another state; START links to -1.
        moves: token -> state.
        followers: token -> how often it followed, oldest occurrence first.
        newest: the state of the whole sequence.
    """

    __slots__ = ("followers", "lengths", "links", "moves", "newest")

    def __init__(self) -> None:
        self.lengths: list[int] = [0]
        self.links: list[int] = [-1]
        self.moves: list[dict[int, int]] = [{}]
        self.followers: list[dict[int, int]] = [{}]
        self.newest = START

    def __len__(self) -> int:
        """Tokens appended."""
        return self.lengths[self.newest]

    def match(self) -> tuple[int, int]:
        """The longest suffix that occurred earlier: (its state, its length); (START, 0) when there is none.

        >>> automaton = SuffixAutomaton()
        >>> for token in (1, 2, 3, 1, 2): automaton.append(token)
        >>> automaton.match()[1], list(automaton.ranked(automaton.match()[0]))
        (2, [3])
        """
        state = self.links[self.newest]
        return (START, 0) if state < 0 else (state, self.lengths[state])

    def ranked(self, state: int) -> list[int]:
        """What followed the substrings of a state: most frequent first, the more recent of equals first."""
        followers = self.followers[state]
        if len(followers) < 2:
            return list(followers)
        return sorted(reversed(followers), key=followers.__getitem__, reverse=True)

    def append(self, token: int) -> None:
        """Add one token. Amortised O(1)."""
        lengths, links, moves = self.lengths, self.links, self.moves
        self._count(token)
        state = self.newest
        new = self._add(lengths[state] + 1, {}, {})
        while state >= 0 and token not in moves[state]:
            moves[state][token] = new
            state = links[state]
        if state < 0:
            links[new] = START
        else:
            links[new] = self._suffix(state, token)
        self.newest = new

    def _add(self, length: int, moves: dict[int, int], followers: dict[int, int]) -> int:
        self.lengths.append(length)
        self.links.append(START)
        self.moves.append(moves)
        self.followers.append(followers)
        return len(self.lengths) - 1

    def _suffix(self, state: int, token: int) -> int:
        """The state of `state`'s longest substring plus token, split off a longer one where needed."""
        lengths, links, moves = self.lengths, self.links, self.moves
        there = moves[state][token]
        if lengths[there] == lengths[state] + 1:
            return there
        clone = self._add(lengths[state] + 1, moves[there].copy(), self.followers[there].copy())
        links[clone], links[there] = links[there], clone
        while state >= 0 and moves[state].get(token) == there:
            moves[state][token] = clone
            state = links[state]
        return clone

    def _count(self, token: int) -> None:
        """Note that token follows the sequence and its nearest shorter suffixes."""
        state, left = self.newest, COUNTED + 1
        while state > START and left:
            followers = self.followers[state]
            followers[token] = followers.pop(token, 0) + 1  # moves it to the recent end
            if len(followers) > FOLLOWERS:
                del followers[next(iter(followers))]
            state, left = self.links[state], left - 1
