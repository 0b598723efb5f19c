"""How sure a find is: the probability that its step is the first wrong one.

Each number is the share of the finds of that kind that human labels put at the same step: in half of ProcessBench
(1,700 solutions of word problems, competition and olympiad mathematics, given without their right answers; the rules
were written looking at most of that half) or, for problems that are no more than an expression to calculate, in
half of BIG-Bench Mistake's arithmetic. A find that comes too late, behind an error that no rule can see, counts as
wrong as a false alarm does; that is what most of the rest are. `prefixloss detect eval` shows what the numbers are
worth on any labelled file.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["false", "rewriting", "equation", "answer", "nowhere"]

# (where everything in the steps before could be read, where something could not)
_SHARES: dict[Kind, tuple[float, float]] = {
    "false": (0.68, 0.40),  # a false claim about numbers, or names with values: 59 of 87, 48 of 120
    "rewriting": (0.86, 0.66),  # what is rewritten into something else: 18 of 21, 55 of 83
    "equation": (0.50, 0.23),  # equations that cannot hold together: 2 of 4, 3 of 13
    "answer": (0.20, 0.20),  # a final answer that the steps do not give: 0 of 3, by Laplace's rule
    "nowhere": (0.14, 0.14),  # a number without an origin, where the answer is known to be wrong: 18 of 132
}
_EXPRESSION = 0.94  # anything wrong in the calculation of a given expression: 117 of 124
ALL_RIGHT = 0.9  # nothing wrong, where every step could be checked


def confidence(kind: Kind, unsure: bool, bare: bool) -> float:
    """unsure: whether something before could not be read. bare: whether the problem is no more than an expression."""
    return _EXPRESSION if bare else _SHARES[kind][unsure]
