"""Two sides that are meant to be the same for every value of their names, as in an expansion, and are not.

An equation to be solved is not the same on both sides either. What tells them apart: an expansion that went wrong still
has most of its terms right.
"""

from __future__ import annotations

from prefixloss.detect.maths.expressions import NoValueError
from prefixloss.detect.maths.symbols import Equation, terms

MIN_SHARED = 2  # terms, of those with names


def misses(sides: Equation) -> bool:
    """Whether one side is nearly the other, multiplied out; false where that is not decided."""
    try:
        (left, products_left), (right, products_right) = (terms(side) for side in sides)
    except NoValueError:
        return False
    shared = [term for term, number in left.items() if right.get(term) == number]
    named = sum(bool(term) for term in shared)
    return products_left != products_right and named >= MIN_SHARED and 2 * len(shared) > max(len(left), len(right))
