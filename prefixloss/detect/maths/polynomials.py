"""The terms of polynomials: sympy's sparse polynomials do the arithmetic, on expressions that were already read.

Square roots of integers and pi count as names, but for the squares of the roots. sympy is imported at the first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from prefixloss.detect.maths.expressions import Expression, NoValueError, names

Terms = dict[tuple[int, ...], Fraction]  # the powers of the names, in their order, with the number before them

MAX_DEGREE = 12
MAX_TERMS = 400
MAX_NAMES = 8
_ROOT = "root "


def order(*expressions: Expression) -> tuple[str, ...]:
    """The names in some expressions, with "root 2" and "pi" as further names."""
    used = set().union(*map(names, expressions))
    roots = {
        f"{_ROOT}{item}"
        for expression in expressions
        for item, behind in pairwise(expression)
        if behind == "sqrt" and isinstance(item, int)
    }
    return (*sorted(used), *sorted(roots), *(("pi",) if any("pi" in e for e in expressions) else ()))


def terms(expression: Expression, names: Sequence[str]) -> Terms:
    """NoValueError for what is no polynomial, or a large one. names: the `order`."""
    over, under = _Builder(names).quotient(expression)
    if not under.is_ground:
        raise NoValueError("not a polynomial")
    return _collected(over.quo_ground(under.LC), names)


def difference(left: Expression, right: Expression, names: Sequence[str]) -> Terms:
    """The terms of left - right, multiplied by both denominators; NoValueError for what is no quotient of polynomials,
    or a large one."""
    builder = _Builder(names)
    (a, under_a), (b, under_b) = builder.quotient(left), builder.quotient(right)
    return _collected(a * under_b - b * under_a, names)


class _Builder:
    """Quotients of polynomials in some names."""

    def __init__(self, names: Sequence[str]) -> None:
        if len(names) > MAX_NAMES:
            raise NoValueError("too many names")
        try:
            sympy = importlib.import_module("sympy")
        except ImportError:
            raise NoValueError("polynomials need sympy: pip install prefixloss[detect]") from None
        self.ring = sympy.polys.rings.PolyRing([f"v{n}" for n in range(len(names))], sympy.QQ)
        self.names = dict(zip(names, self.ring.gens, strict=True))

    def quotient(self, expression: Expression) -> tuple[Any, Any]:
        """Numerator and denominator."""
        stack: list[tuple[Any, Any]] = []
        for item, before in zip(expression, (0, *expression[:-1]), strict=True):
            if not isinstance(item, str):
                stack.append((self.ring(self.ring.domain(item.numerator, item.denominator)), self.ring.one))
            elif item in self.names:
                stack.append((self.names[item], self.ring.one))
            elif item == "sqrt" and f"{_ROOT}{before}" in self.names:
                stack[-1] = self.names[f"{_ROOT}{before}"], self.ring.one
            elif item == "neg":
                stack[-1] = -stack[-1][0], stack[-1][1]
            elif item == "^":
                stack.pop()
                stack[-1] = self._power(stack[-1], before)
            elif item in ("+", "-", "*", "/"):
                right = stack.pop()
                stack[-1] = _joined(item, stack[-1], right)
            else:
                raise NoValueError("not a polynomial")
            if any(len(part) > MAX_TERMS or sum(part.degrees()) > 2 * MAX_DEGREE for part in stack[-1] if part):
                raise NoValueError("a polynomial beyond the bounds")
        return stack[0]

    def _power(self, base: tuple[Any, Any], exponent: object) -> tuple[Any, Any]:
        if not isinstance(exponent, int) or not 0 <= exponent <= MAX_DEGREE:
            raise NoValueError("not a polynomial")
        if any(len(part) ** exponent > MAX_TERMS**2 for part in base):
            raise NoValueError("a polynomial beyond the bounds")
        return base[0] ** exponent, base[1] ** exponent


def _joined(sign: str, left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    (a, under_a), (b, under_b) = left, right
    if sign == "*":
        return a * b, under_a * under_b
    if sign == "/":
        if not b:
            raise NoValueError("division by zero")
        return a * under_b, under_a * b
    if under_a != under_b:
        a, b, under_a = a * under_b, b * under_a, under_a * under_b
    return (a + b if sign == "+" else a - b), under_a


def _collected(polynomial: Any, names: Sequence[str]) -> Terms:
    """With numbers for the squares of roots."""
    found: Terms = {}
    for powers, number in polynomial.terms():
        factor = Fraction(int(number.numerator), int(number.denominator))
        kept = list(powers)
        for place, name in enumerate(names):
            if name.startswith(_ROOT):
                factor *= int(name.removeprefix(_ROOT)) ** (kept[place] // 2)
                kept[place] %= 2
        found[tuple(kept)] = found.get(tuple(kept), Fraction(0)) + factor
    return {powers: number for powers, number in found.items() if number}
