"""The first step after which the chance of a right answer falls for good, by continuations from prefixes.

Let p(k) be the chance that a continuation of the first k steps ends with the right answer. p(0) is that of the problem
alone; right steps can only raise it, for less is left to do; and it has fallen to 0 by the end of a response whose own
answer is wrong. A prefix has fallen when its p is below `fall` times that of the longest one known to have not; what is
wrong stays wrong, so bisection finds where, in about log2(steps) rounds, as in Luo et al. 2024, "Improve Mathematical
Reasoning in Language Models by Automated Process Supervision" (arXiv 2406.06592). There a single right continuation
clears a prefix; here it takes the share of a model that is still on its way, and the counts say how sure that is: each
p has the posterior Beta(1 + right, 1 + wrong) of a uniform prior, and the confidence is the probability that p was
above that line before the step and is below it behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prefixloss.detect.base import FirstError

_WIDE = 1.96  # standard deviations on each side of an interval


class Prefix(NamedTuple):
    """What is to be continued. text: the first steps of a response."""

    problem: str
    text: str
    answer: str


class Counts(NamedTuple):
    """right of `total` continuations end with the right answer."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    def above(self, line: float) -> float:
        """The probability that the chance is above a line from 0 to 1: of Beta(1 + right, 1 + wrong), whose
        distribution is that of a sum of total + 1 coins."""
        n = self.total + 1
        return math.fsum(math.comb(n, i) * line**i * (1 - line) ** (n - i) for i in range(self.right + 1))

    @property
    def interval(self) -> tuple[float, float]:
        """At 95 %: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference"."""
        n, z2 = self.total, _WIDE**2
        middle = (self.share + z2 / (2 * n)) / (1 + z2 / n)
        half = _WIDE / (1 + z2 / n) * math.sqrt(self.share * (1 - self.share) / n + z2 / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right} of {self.total} ({low:.2f} to {high:.2f})"


class Counted(FirstError):
    """A verdict with what the counts say of each step."""

    _chances: tuple[float | None, ...] = ()

    @property
    def chances(self) -> tuple[float | None, ...]:
        return self._chances

    @classmethod
    def of(cls, step: int, reason: str, confidence: float, chances: Sequence[float | None]) -> Counted:
        made = cls(step, reason, confidence)
        made._chances = tuple(chances)
        return made


Ask = Callable[[Sequence[Prefix]], list[Counts | str]]  # for each prefix its counts, or why there are none


@dataclass
class _Search:
    """One response. low, high: so many first steps have not, and have, fallen."""

    problem: str
    steps: Sequence[str]
    answer: str
    fall: float
    rounds: int
    low: int = 0
    high: int = field(init=False)
    counts: dict[int, Counts] = field(default_factory=dict)
    result: FirstError | None = None

    def __post_init__(self) -> None:
        self.high = len(self.steps)

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2 if self.counts else 0

    @property
    def next(self) -> Prefix:
        return Prefix(self.problem, prefix_of(self.steps, self.middle), self.answer)

    def told(self, counts: Counts | str) -> None:
        middle = self.middle
        if isinstance(counts, str):
            self.result = FirstError(None, counts, 0.0)
            return
        self.counts[middle] = counts
        if middle > 0 and counts.share < self.line:
            self.high = middle
        else:
            self.low = middle
        if self.counts[0].right == 0:
            self.result = FirstError(None, f"no right answer in {counts.total} continuations of the problem", 0.0)
        elif self.high - self.low == 1 or len(self.counts) == self.rounds:
            self.result = self.verdict()

    @property
    def line(self) -> float:
        return self.fall * self.counts[self.low].share

    def verdict(self) -> FirstError:
        """Where the rounds ran out, the earliest step that it may be, and so much less sure."""
        before, behind = self.counts[self.low], self.counts.get(self.high)
        up, down = before.above(self.line), 0.0 if behind is None else behind.above(self.line)
        sure, left = up * (1 - down), self.high - self.low
        then = "its own answer is wrong" if behind is None else f"{behind} behind it"
        where = "it" if left == 1 else f"it or the next {left - 1}"
        reason = f"right answers: {before} before {where}, {then}"
        # before the step as sure as at the prefix that has not fallen; where the rounds ran out, evenly down from there
        between = [up + (down - up) * number / left for number in range(1, left + 1)]
        chances = [*[up] * self.low, *between, *[None] * (len(self.steps) - self.high)]
        return Counted.of(self.low, reason, sure / left, chances)


def prefix_of(steps: Sequence[str], count: int) -> str:
    """The first steps as one text: those that end without white space get a blank line."""
    return "".join(step if step[-1:].isspace() else f"{step}\n\n" for step in steps[:count])


def search(
    responses: Sequence[tuple[str, Sequence[str], str]], ask: Ask, *, fall: float, rounds: int
) -> list[FirstError]:
    """(problem, steps, right answer) of responses whose own answer is wrong; one result each, in order.

    ask: told all prefixes of a round at once, each of them once. rounds: how many prefixes of a response at most.
    """
    searches = [_Search(problem, steps, answer, fall, rounds) for problem, steps, answer in responses]
    while open_ := [one for one in searches if one.result is None]:
        prefixes = list(dict.fromkeys(one.next for one in open_))
        found = dict(zip(prefixes, ask(prefixes), strict=True))
        for one in open_:
            one.told(found[one.next])
    return [one.result for one in searches if one.result is not None]
