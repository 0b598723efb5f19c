"""What a problem and a response say of their names: values, and the equations that hold between them."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from prefixloss.detect.maths.expressions import (
    DivisionByZeroError,
    Expression,
    NoValueError,
    Rational,
    close,
    is_rough,
    names,
    value,
)
from prefixloss.detect.maths.symbols import Equation, consistent, named

MAX_EQUATIONS = 24
MAX_CHECKS = 24  # of whether equations hold together
_PROBES = ((7, 11, 13, 17, 19, 23), (29, 5, 41, 3, 47, 2), (-9, 31, -4, 37, -15, 43), (101, 64, 89, 55, 77, 35))


def gaps(left: Expression, right: Expression) -> set[Rational]:
    """The values of left - right at a few points: {0} for an identity, one other number if they are never equal."""
    free = sorted(names(left) | names(right))
    found: set[Rational] = set()
    for probe in _PROBES:
        at = {name: probe[n % len(probe)] + n // len(probe) for n, name in enumerate(free)}
        try:
            a, b = value(left, at), value(right, at)
        except DivisionByZeroError:
            continue
        found.add(0 if close(a, b) else a - b)
    return found


class Names:
    """values: what the names were said to be. equations: what was said to hold between names without a value."""

    def __init__(self, equations: Iterable[Equation]) -> None:
        self.values: dict[str, Rational] = {}
        self.equations = list(equations)[:MAX_EQUATIONS]
        self.checks = 0

    def about(self, name: str) -> list[Equation]:
        """The equations with the name."""
        return [equation for equation in self.equations if name in named(equation)]

    def forget(self, name: str) -> None:
        """The name begins a new life."""
        self.values.pop(name, None)
        about = self.about(name)
        self.equations = [equation for equation in self.equations if equation not in about]

    def add(self, left: Expression, right: Expression) -> None:
        if len(self.equations) < MAX_EQUATIONS:
            self.equations.append((left, right))

    def refute(self, left: Expression, right: Expression) -> bool:
        """Whether the equation contradicts itself or what was said before; NoValueError where that is not decided."""
        found = gaps(left, right)
        if found == {0}:
            return False
        if len(found) == 1:
            return True
        linked = self._linked((left, right))
        if len(linked) == 1:
            return False
        known = {name: self.values[name] for name in named(*linked) & self.values.keys()}
        if any(is_rough(number) for number in known.values()):
            raise NoValueError("equations with irrational values")
        self.checks += 1
        if self.checks > MAX_CHECKS:
            raise NoValueError("too many equations")
        return not consistent(linked, known)

    def refute_value(self, name: str, number: Rational, rounding: Fraction) -> bool:
        """Whether "name = number" does not solve what was said. rounding: how far it may be from the true value."""
        about = self.about(name)
        complete = [equation for equation in about if named(equation) <= {*self.values, name}]
        if not all(self._solves(equation, name, number, rounding) for equation in complete):
            return True
        return len(complete) < len(about) and not rounding and self.refute((name,), (number,))

    def _solves(self, equation: Equation, name: str, number: Rational, rounding: Fraction) -> bool:
        """Whether the equation holds at the number, or between it and its neighbours within the rounding."""
        try:
            sides = [
                [value(side, {**self.values, name: at}) for side in equation]
                for at in (number, number - rounding, number + rounding)
            ]
        except DivisionByZeroError:
            return False
        except NoValueError:
            return True
        differences = [left - right for left, right in sides]
        return close(*sides[0]) or min(differences) < 0 < max(differences)

    def _linked(self, equation: Equation) -> list[Equation]:
        """The equation, and all that share names with it, directly or not."""
        linked, reached = [equation], named(equation)
        rest = list(self.equations)
        while near := [e for e in rest if named(e) & reached]:
            linked += near
            reached |= named(*near)
            rest = [e for e in rest if e not in near]
        return linked
