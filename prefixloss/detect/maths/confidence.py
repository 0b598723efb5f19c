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
    "false": (0.66, 0.32),  # a false claim about numbers, or names with values: 56 of 85, 37 of 116
    "rewriting": (0.79, 0.62),  # what is rewritten into something else: 11 of 14, 29 of 47
    "equation": (0.40, 0.25),  # equations that cannot hold together: 2 of 5, 4 of 16
    "answer": (0.20, 0.20),  # a final answer that the steps do not give: 0 of 3, by Laplace's rule
    "nowhere": (0.14, 0.14),  # a number without an origin, where the answer is known to be wrong: 18 of 132
}
_EXPRESSION = 0.94  # anything wrong in the calculation of a given expression: 117 of 124
ALL_RIGHT = 0.9  # nothing wrong, where every step could be checked


def confidence(kind: Kind, unsure: bool, bare: bool) -> float:
    """unsure: whether something before could not be read. bare: whether the problem is no more than an expression."""
    return _EXPRESSION if bare else _SHARES[kind][unsure]
