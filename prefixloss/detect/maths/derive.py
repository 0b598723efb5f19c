"""An equation that is said to follow from the one right before it, by rewriting it alone: whether it can.

The words between the two decide: "subtracting 3 from both sides, we get" takes nothing else in, "substituting" does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.expressions import NoValueError, Rational, close, divide, magnitude, names, value
from prefixloss.detect.maths.names import gaps
from prefixloss.detect.maths.symbols import Equation, consistent, named
from prefixloss.detect.maths.text import words

ARROW = "->"
REWRITING = words(
    "add adding cancel canceling collecting combine combining cross-multiplying distribute distributing divide "
    "dividing equivalent expand expanded expanding expands factor factored factoring factors isolate isolating "
    "multiply multiplying rearrange rearranged rearranges rearranging reduces rewrite rewritten simplified simplifies "
    "simplify simplifying squaring subtract subtracting"
)
_CONCLUDING = words(
    "becomes get give gives hence implies means moving obtain so solve solving then therefore thus yields"
)
_LINKING = words(
    "a above again all also and as be both by can common equation expression finally first following for from further "
    "hand have in is it left left-hand like move need next now of on one out result resulting results right right-hand "
    "side sides terms that the these this through to us we we'll which will"
)
ALL = REWRITING | _CONCLUDING | _LINKING | {ARROW}
_SAMPLES = (17, 23, 31, 41, 53, 61, 71, 83)  # values of the other names: no small number that an equation has by chance
_POINTS = (0, 1, 2, 5)
MAX_PLACES = 12
MIN_CALCULATION = 3  # items of an expression
_SHIFT = 7  # between two tries


class Said(NamedTuple):
    """An equation, the step that says it, and whether it is one of several that stand side by side."""

    equation: Equation
    step: int
    listed: bool


def derives(before: Said, after: Said, between: Collection[str]) -> bool:
    """Whether `after` claims to be `before`, rewritten. between: the words between them."""
    used = named(before.equation)
    dropped = used - named(after.equation)
    if defines(before.equation) or before.listed or not ALL.issuperset(between) or not named(after.equation) <= used:
        return False
    if any(_matters(name, before.equation) for name in dropped):
        return False
    near = len(used) == 1 and before.step == after.step
    if near and not between:  # right below it; "x - 1 = 0, x - 2 = 0" are two cases
        return (0,) not in before.equation
    return announced(between, concluding=near)


def announced(between: Collection[str], *, concluding: bool) -> bool:
    """Whether words say that what follows is what stands before them, rewritten; concluding: "so" and "hence", too."""
    return bool((REWRITING | {ARROW} | (_CONCLUDING if concluding else set())).intersection(between))


def restates(before: Said, after: Said, between: Collection[str]) -> bool:
    """Whether "x = 6 * 7, so x = 43" says twice what a name is, first by a calculation."""
    (name, calculation), (again, result) = before.equation, after.equation
    if not defines(before.equation) or name != again or names(calculation) or len(calculation) < MIN_CALCULATION:
        return False
    said = (_CONCLUDING | _LINKING | {ARROW, "simplified", "simplifies", "simplifying"}).issuperset(between)
    return before.step == after.step and said and len(result) == 1 and not names(result)


def _matters(name: str, equation: Equation) -> bool:
    """Whether an equation says anything of a name in it: x + y = 3 + y says nothing of y."""
    others = dict(zip(sorted(named(equation)), _SAMPLES, strict=False))
    try:
        left, right = (
            [value(side, {**others, name: _SAMPLES[0] + shift}) for shift in (0, _SHIFT)] for side in equation
        )
    except NoValueError:
        return True
    return left[0] - right[0] != left[1] - right[1]


def beside(before: Said, after: Equation, step: int, between: Collection[str]) -> bool:
    """Whether an equation stands beside the one before it, as in a system of equations. Without a word between them,
    those in one name are rewritten, line by line."""
    if not between and len(named(after)) == 1:
        return False
    alike = before.step == step and named(before.equation) == named(after) and not defines(before.equation)
    return alike and {"and", "or"}.issuperset(between)


def defines(equation: Equation) -> bool:
    """Whether a side is no more than a name."""
    return any(len(side) == 1 and isinstance(side[0], str) for side in equation)


def contradicts(before: Equation, after: Equation) -> bool:
    """Whether the two have no solution together, whatever all names but one stand for; false where that is not decided.

    An equation that was rightly rewritten keeps a solution, for each choice of the other names, if it has one. Where
    decimals come in, they may be rounded.
    """
    if gaps(*after) == {0}:
        return False
    rounded = _decimals(after) - _decimals(before)
    root = _root(before) if len(named(before)) == 1 else None
    if root is not None and _root(after) is not None:
        return not _solves(root, after, rounded)
    if rounded or _proportional(before, after):
        return False
    try:
        choices = list(_choices(sorted(named(before)), named(after)))
        if any(consistent((before, after), values) for values in choices):
            return False
        return all(consistent((before,), values) for values in choices)
    except NoValueError:
        return False


def _proportional(before: Equation, after: Equation) -> bool:
    """Whether the one seems to be the other times a number: the difference of its sides is so at a few points."""
    ratios = set()
    for shift in (0, _SHIFT, _SHIFT**2):
        values = {name: sample + shift for name, sample in zip(sorted(named(before)), _SAMPLES, strict=False)}
        try:
            gaps_here = [value(left, values) - value(right, values) for left, right in (before, after)]
            ratios.add(divide(gaps_here[1], gaps_here[0]))
        except NoValueError:
            return False
    return len(ratios) == 1


def _decimals(equation: Equation) -> set[Fraction]:
    """The numbers that are written with a point, or as one with a fraction."""
    return {item for side in equation for item in side if isinstance(item, Fraction)}


def _solves(root: Rational, equation: Equation, rounded: Collection[Fraction]) -> bool:
    """Whether a number solves an equation in which some numbers are rounded, by a unit of the last place at most."""
    [name] = named(equation)

    def gap(change: Mapping[Rational | str, Rational]) -> Rational:
        left, right = (value(tuple(change.get(item, item) for item in side), {name: root}) for side in equation)
        return left - right

    exact = gap({})
    allowed = sum(magnitude(gap({number: number + _unit(number)}) - exact) for number in rounded)
    return close(exact, 0, allowed)


def _unit(number: Fraction) -> Fraction:
    """A unit of the last decimal place that a number needs; 0 for one that no decimals write."""
    return next((Fraction(1, 10**n) for n in range(1, MAX_PLACES) if 10**n % number.denominator == 0), Fraction(0))


def _root(equation: Equation) -> Rational | None:
    """The solution of a linear equation in one name; None for any other."""
    [name] = named(equation)
    try:
        found = [value(equation[0], {name: at}) - value(equation[1], {name: at}) for at in _POINTS]
    except NoValueError:
        return None
    start, slope = found[0], found[1] - found[0]
    straight = all(close(start + n * slope, number) for n, number in zip(_POINTS, found, strict=True))
    return -start / Fraction(slope) if straight and not close(slope, 0) else None


def _choices(used: list[str], free: Collection[str]) -> Iterator[dict[str, Rational]]:
    """Values for all names used, but for one of the free ones."""
    for left_out in sorted(free):
        for shift in (0, _SHIFT)[: len(used)]:
            values = {name: sample + shift for name, sample in zip(used, _SAMPLES, strict=False)}
            yield {name: number for name, number in values.items() if name != left_out}
