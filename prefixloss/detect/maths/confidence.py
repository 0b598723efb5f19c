"""How sure a find is: the probability that its step is the first wrong one.

Each number is the share of the finds of that kind that human labels put at the same step, in half of ProcessBench
(1,700 solutions of word problems, competition and olympiad mathematics, given without their right answers; the rules
were written looking at half of that half) and, for expressions to calculate, in half of BIG-Bench Mistake's arithmetic
as well. A find that comes too late, behind an error that no rule can see, counts as wrong as a false alarm does; that
is what most of the rest are. `prefixloss detect eval` shows, for any labelled file, what the numbers are worth there.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["false", "equation", "answer", "nowhere"]

# (where everything in the steps before could be read, where something could not)
_SHARES: dict[Kind, tuple[float, float]] = {
    "false": (0.59, 0.26),  # a false claim between numbers, or names with values: 43 of 73, 28 of 108
    "equation": (0.57, 0.30),  # equations that cannot hold together, rewritings that change something: 8 / 14, 14 / 46
    "answer": (0.2, 0.2),  # a final answer that the steps do not give: 0 of 3, by Laplace's rule
    "nowhere": (0.14, 0.14),  # a number without an origin, where the answer is known to be wrong: 18 of 132
}
_EXPRESSION = 0.9  # anything wrong in the calculation of a given expression: 121 of 135
ALL_RIGHT = 0.9  # nothing wrong, where every step could be checked


def confidence(kind: Kind, unsure: bool, expression: bool) -> float:
    """unsure: whether something before could not be read. expression: whether the problem is one to calculate."""
    return _EXPRESSION if expression else _SHARES[kind][unsure]
