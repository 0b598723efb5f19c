"""Whether one claimed relation holds, under any fair reading of its percentages, units and rounding."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

from prefixloss.detect.maths.expressions import (
    DivisionByZeroError,
    Expression,
    NoValueError,
    Rational,
    close,
    evaluate,
    is_number,
    magnitude,
    value,
)
from prefixloss.detect.maths.reader import Run
from prefixloss.detect.maths.text import words

MANY_DIGITS = 4
ROUGHLY, CLOSELY = 100, 250  # "about 12" may be one part of so many off, "about 12.34" of so many
CONGRUENT = "\\equiv"
EQUALITIES = frozenset(("=", "is", "~="))
_ORDERS: dict[str, Callable[[Rational, Rational], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "\\ne": operator.ne,
}
_APPLIED = words("half third quarter twice double triple root square cube reciprocal negative remainder average mean")
_OF_BOTH = words("of between among")
_WHOLE = words(
    "value sum difference product quotient result total factorization factorisation"
)  # "the sum of 3 + 4" is what 3 + 4 is
_LINKING = words("of than after before between above below")  # what stands before is told of, not the number
_CLAIMING = words(
    "so then thus therefore hence and or that since because have get is are be gives give us yields leaves produces "
    "find obtain conclude equation means implies becomes"
)


def holds(left: Run, right: Run, relation: str, values: Mapping[str, Rational], bases: Iterable[Rational] = ()) -> bool:
    """Whether "left relation right" is true, with the names' `values`.

    bases: what a percentage on its own may be a share of. NoValueError where a side has no value.
    """
    rounded = [run for run in (left, right) if run.places is not None] if relation == "~=" else []
    allowed = max(rounding(run, relation) for run in rounded or (left, right))
    try:
        if any(_true(a, b, relation, values, allowed) for a, b in readings(left, right)):
            return True
        if right.places is None or "%" not in right.expression or relation not in EQUALITIES:
            return False
        whole, share = value(left.expression, values), value(right.expression, values)
        return any(close(share * base, whole) for base in bases)
    except DivisionByZeroError:
        return False


def divides_out(left: Run, right: Run) -> bool:
    """Whether "a / b = q remainder r" is true; NoValueError where it says something else."""
    if len(left.expression) != 3 or left.expression[2] != "/" or len(right.expression) != 3:
        raise NoValueError("a remainder of something else")
    (a, b, _), (quotient, rest, _) = ((*run.expression,) for run in (left, right))
    return evaluate((b, quotient, "*", rest, "+"), {}) == evaluate((a,), {})


def modulus(runs: Iterable[Run]) -> Rational | None:
    """What the last of a chain's runs says it is calculated modulo: 7 of "3 (mod 7)"."""
    found = None
    for run in runs:
        for item, following in zip(run.expression, run.expression[1:], strict=False):
            if following == "mod" and not isinstance(item, str):
                found = item
    return found


def congruent(left: Run, right: Run, values: Mapping[str, Rational], by: Rational) -> bool:
    """Whether two integers are the same modulo `by`; NoValueError for other numbers."""
    a, b = value(left.expression, values), value(right.expression, values)
    if not all(isinstance(number, int) for number in (a, b, by)) or not by:
        raise NoValueError("a congruence of no integers")
    return (a - b) % by == 0


def _true(
    left: Expression, right: Expression, relation: str, values: Mapping[str, Rational], allowed: Fraction
) -> bool:
    a, b = value(left, values), value(right, values)
    return close(a, b, allowed) if relation in EQUALITIES else _ORDERS[relation](a, b)


def rounding(run: Run, relation: str = "=") -> Fraction:
    """How far a value may be from the number that a run is, by the digits it is written with.

    Half a unit of the last decimal (of a percentage: of the last digit); other integers are exact. For "about equal" a
    whole unit of the last decimal, half a unit of the last digit that is not 0 of an integer, or 1 %; 0.4 % where
    `MANY_DIGITS` are written.
    """
    if run.places is None:
        return abs(Fraction(value(run.expression, {}))) / 100 if relation == "~=" and not run.names else Fraction(0)
    percent = "%" in run.expression
    unit = Fraction(1, 10 ** (run.places + 2 * percent))
    if relation != "~=":
        return unit / 2 if run.places or percent else Fraction(0)
    number = magnitude(evaluate(run.expression, {}))
    while number and not run.places and number % (unit * 10) == 0:
        unit *= 10
    share = ROUGHLY if number < unit * 10 ** (MANY_DIGITS - 1) else CLOSELY
    return max(unit / 2 if unit > 1 else unit, Fraction(number) / share)


def readings(left: Run, right: Run) -> Iterator[tuple[Expression, Expression]]:
    """What the two sides may mean: as written; percentages as plain numbers (100% - 20 = 80%); in common units."""
    kinds = [{unit.dimension for _, unit in run.units} for run in (left, right)]
    sizes = {unit.size for run in (left, right) for _, unit in run.units}
    dozens = len(kinds[0] | kinds[1]) == 1 and "number" in kinds[0] ^ kinds[1]
    common = len(sizes) > 1 and len(kinds[0] | kinds[1]) == 1 and all(kinds)
    if not (common and left.places is not None and right.places is not None):
        yield left.expression, right.expression
    taken = _taken_off(left.expression)
    if taken:
        yield taken, right.expression
    for percent_left, percent_right in ((False, True), (True, False), (False, False)):
        readings = _percent(left.expression, percent_left), _percent(right.expression, percent_right)
        if readings != (left.expression, right.expression):
            yield readings
    if common or dozens:
        yield left.converted, right.converted


def _taken_off(expression: Expression) -> Expression | None:
    """What "50 - 20%" is where the percentage is a share of what stands before it."""
    *whole, share, percent, sign = expression if len(expression) > 3 else (0, "", "", "")
    if percent != "%" or sign not in ("+", "-"):
        return None
    return (*whole, *whole, share, "%", "*", sign)


def _percent(expression: Expression, keep: bool) -> Expression:
    return expression if keep else tuple(item for item in expression if item != "%")


def describes(lead: Sequence[str], between: Sequence[str], left: Run, right: Run) -> bool:
    """Whether the first relation of a chain may name something, not calculate: "the cost of 5 shirts = 5 * 20".

    lead, between: the words right before it, and all since the last relation.
    """
    if "than" in lead or (lead[-1:] == ("and",) and _OF_BOTH.intersection(between)):
        return True  # "the smallest integer greater than or equal to 7/2 is 4", "the multiple of 3! and 4! is 24"
    applied = lead[-2:] if lead[-1:] == ("of",) else lead[-1:]
    if _APPLIED.intersection(applied) or (_LINKING.intersection(lead[-1:]) and not _WHOLE.intersection(lead[-2:])):
        return True  # "the square root of 16 + 9 is 5", "the last digit of 2^4 is 6", "the next after 9 * 8 is 9 * 9"
    calculates = not is_number(right.expression)
    if _is_share(left) and not _is_share(right) and (right.worded or calculates):
        return True  # "2/5 is equal to 12 hectares"
    if not is_number(left.expression):
        return left.worded and calculates
    kinds, others = ({unit.dimension for _, unit in run.units} for run in (left, right))
    converts = kinds and (others or {"number"}) == kinds and not calculates
    return not converts and (left.worded or not claims(lead))


def claims(lead: Sequence[str]) -> bool:
    """Whether the words before a chain do not rather make it a name or a mention: "so x = 2", not "the line x = 2"."""
    return not lead or lead[-1] in _CLAIMING


def _is_share(run: Run) -> bool:
    """Whether a run is a fraction below 1."""
    if len(run.expression) != 3 or run.expression[2] != "/" or run.names:
        return False
    return 0 < value(run.expression[:1], {}) < value(run.expression[1:2], {})
