"""Two sides that are meant to be the same for every value of their names, as in an expansion, and are not.

An equation to be solved is not the same on both sides either. What tells them apart: an expansion that went wrong still
has most of its terms right.
"""

from __future__ import annotations

from prefixloss.detect.maths.expressions import BINARY, UNARY, Expression, NoValueError, names
from prefixloss.detect.maths.polynomials import order, terms

MIN_SHARED = 2  # terms, of those with names


def misses(left: Expression, right: Expression) -> bool:
    """Whether one side is nearly the other, multiplied out; false where that is not decided."""
    product, flat = (left, right) if _multiplies(left) else (right, left)
    if _multiplies(flat) or not _multiplies(product) or not names(flat) <= names(product):
        return False
    try:
        used = order(left, right)
        terms_left, terms_right = terms(left, used), terms(right, used)
    except NoValueError:
        return False
    shared = [term for term, number in terms_left.items() if terms_right.get(term) == number]
    named = sum(any(term) for term in shared)
    return named >= MIN_SHARED and 2 * len(shared) > max(len(terms_left), len(terms_right))


def factors(left: Expression, right: Expression) -> bool:
    """Whether the right side is a product with the degree and the first number of the left one, in one name."""
    if len(names(left)) != 1 or names(left) != names(right) or _multiplies(left) or not _multiplies(right):
        return False
    try:
        used = order(left, right)
        first = [max(terms(side, used).items(), default=None) for side in (left, right)]
    except NoValueError:
        return False
    return len(used) == 1 and first[0] == first[1]


def repeats(expression: Expression) -> bool:
    """Whether a sum has two terms alike, still to be added."""
    try:
        return sum(item in ("+", "-") for item in expression) >= len(terms(expression, order(expression)))
    except NoValueError:
        return False


def _multiplies(expression: Expression) -> bool:
    """Whether a sum with a name in it is a factor, or raised to a power."""
    stack: list[tuple[bool, bool]] = []  # of each operand: whether it has names, and whether it is a sum
    for item in expression:
        if item in BINARY:
            (b, sum_b), (a, sum_a) = stack.pop(), stack.pop()
            if item in ("*", "^") and ((a and sum_a) or (b and sum_b)):
                return True
            stack.append((a or b, item in ("+", "-")))
        elif item not in UNARY:
            stack.append((isinstance(item, str), False))
    return False
