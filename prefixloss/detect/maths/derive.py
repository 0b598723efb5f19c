"""An equation that is said to follow from the one right before it, by rewriting it alone: whether it can.

The words between the two decide: "subtracting 3 from both sides, we get" takes nothing else in, "substituting" does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from prefixloss.detect.maths.expressions import NoValueError, Rational, names
from prefixloss.detect.maths.names import gaps
from prefixloss.detect.maths.symbols import Equation, consistent
from prefixloss.detect.maths.text import words

ARROW = "->"
_REWRITING = words(
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
_ALL = _REWRITING | _CONCLUDING | _LINKING | {ARROW}
_SAMPLES = (17, 23, 31, 41, 53, 61, 71, 83)  # values of the other names: no small number that an equation has by chance
_SHIFT = 7  # between two tries


class Said(NamedTuple):
    """An equation, the step that says it, and whether it is one of several that stand side by side."""

    equation: Equation
    step: int
    listed: bool


def derives(before: Said, after: Said, between: Collection[str]) -> bool:
    """Whether `after` claims to be `before`, rewritten. between: the words between them."""
    used = _names(before.equation)
    if _defines(before.equation) or before.listed or _names(after.equation) != used or not _ALL.issuperset(between):
        return False
    near = len(used) == 1 and before.step == after.step
    return bool((_REWRITING | {ARROW} | (_CONCLUDING if near else set())).intersection(between))


def beside(before: Said, after: Equation, step: int, between: Collection[str]) -> bool:
    """Whether an equation stands beside the one before it, as in a system of equations."""
    alike = before.step == step and _names(before.equation) == _names(after) and not _defines(before.equation)
    return alike and {"and", "or"}.issuperset(between)


def _defines(equation: Equation) -> bool:
    """Whether a side is no more than a name."""
    return any(len(side) == 1 and isinstance(side[0], str) for side in equation)


def contradicts(before: Equation, after: Equation) -> bool:
    """Whether the two have no solution together, whatever all names but one stand for; false where that is not decided.

    An equation that was rightly rewritten keeps a solution, for each choice of the other names, if it has one.
    """
    if gaps(*after) == {0}:
        return False
    try:
        choices = list(_choices(sorted(_names(before))))
        possible = all(consistent((before,), values) for values in choices)
        return possible and not any(consistent((before, after), values) for values in choices)
    except NoValueError:
        return False


def _choices(free: list[str]) -> Iterator[dict[str, Rational]]:
    """Values for all names but one."""
    for left_out in free:
        for shift in (0, _SHIFT)[: len(free)]:
            values = {name: sample + shift for name, sample in zip(free, _SAMPLES, strict=False)}
            yield {name: number for name, number in values.items() if name != left_out}


def _names(equation: Equation) -> set[str]:
    return names(equation[0]) | names(equation[1])
