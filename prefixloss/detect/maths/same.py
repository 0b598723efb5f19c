"""Whether two sides are the same for every value of their names, by trying some."""

from __future__ import annotations

from fractions import Fraction

from prefixloss.detect.maths.expressions import Expression, NoValueError, Rational, close, names, value

_POINTS: tuple[tuple[Rational, ...], ...] = (  # positive: the root of x^2 is x
    (7, 11, 13, 17, 19, 23),
    (2, 3, 5, 4, 6, 9),
    (3, 2, 7, 5, 11, 4),
    (5, 9, 2, 3, 4, 8),
    tuple(Fraction(1, n) for n in (7, 9, 4, 5, 11, 3)),
    tuple(Fraction(2, n) for n in (7, 11, 9, 13, 5, 15)),
)


def differ(left: Expression, right: Expression) -> bool | None:
    """Whether two sides have different values for most values of their names; None where they have none."""
    free = sorted(names(left) | names(right))
    found = []
    for point in _POINTS:
        at = {name: point[n % len(point)] + n // len(point) for n, name in enumerate(free)}
        try:
            found.append(not close(value(left, at), value(right, at)))
        except NoValueError:
            continue
    return 2 * sum(found) > len(found) if len(found) > 1 else None
