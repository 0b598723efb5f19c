"""Whether equations can hold together: sympy decides it for linear systems, and for polynomials in one name.

sympy is imported at the first use, and is given expressions that were already read: it never parses text.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from prefixloss.detect.maths.expressions import Expression, NoValueError, Rational, names

Equation = tuple[Expression, Expression]

MAX_DEGREE = 8
MAX_TERMS = 250  # of a polynomial
MAX_NAMES = 6
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def named(*equations: Equation) -> set[str]:
    """The names in them."""
    return set().union(*(names(side) for equation in equations for side in equation))


def consistent(equations: Sequence[Equation], values: Mapping[str, Rational]) -> bool:
    """Whether the equations have a common solution in the complex numbers, given the values of some names.

    NoValueError where that is not decided: polynomials in several names, or large ones, or no polynomials; or no sympy.
    """
    sympy = _sympy()
    known = {
        sympy.Symbol(name): sympy.Rational(number.numerator, number.denominator) for name, number in values.items()
    }
    polynomials = [sympy.expand(_numerator(equation).subs(known)) for equation in equations]
    symbols = sorted(set().union(*(p.free_symbols for p in polynomials)), key=str)
    if any(p != 0 for p in polynomials if not p.free_symbols):
        return False
    if len(symbols) > MAX_NAMES:
        raise NoValueError("too many names")
    linear = [p for p in polynomials if p.free_symbols and sympy.Poly(p, *symbols).total_degree() == 1]
    if linear and sympy.linsolve(linear, *symbols) == sympy.S.EmptySet:
        return False
    alone = ([p for p in polynomials if p.free_symbols == {symbol}] for symbol in symbols)
    if not all(sympy.gcd_list(group).free_symbols for group in alone if group):
        return False
    if any(len(p.free_symbols) > 1 and p not in linear for p in polynomials):
        raise NoValueError("equations of a higher degree in several names")
    return True


def _sympy() -> Any:
    try:
        return importlib.import_module("sympy")
    except ImportError:
        raise NoValueError("equations need sympy: pip install prefixloss[detect]") from None


@lru_cache(maxsize=256)
def _numerator(equation: Equation) -> Any:
    """The numerator of left - right, expanded: 0 where the equation holds."""
    sympy = _sympy()
    used = len(named(equation))
    (left, over_left), (right, over_right) = (_degrees(side) for side in equation)
    degree = max(left + over_right, right + over_left)
    if degree > MAX_DEGREE or math.comb(used + degree, degree) > MAX_TERMS:
        raise NoValueError("a polynomial beyond the bounds")
    difference = _built(equation[0], sympy) - _built(equation[1], sympy)
    if difference.has(sympy.zoo, sympy.nan):
        raise NoValueError("division by zero")
    return sympy.expand(sympy.fraction(sympy.together(difference))[0])


def _degrees(expression: Expression) -> tuple[int, int]:
    """Bounds on the degrees of numerator and denominator; NoValueError for what is no quotient of polynomials."""
    stack: list[tuple[int, int]] = []
    for item, before in zip(expression, (0, *expression[:-1]), strict=True):
        if not isinstance(item, str):
            stack.append((0, 0))
        elif item in _OPERATIONS:
            (b, under_b), (a, under_a) = stack.pop(), stack.pop()
            if item == "/":
                b, under_b = under_b, b
            top = max(a + under_b, b + under_a) if item in "+-" else a + b
            stack.append((top, under_a + under_b))
        elif item == "^":
            if not isinstance(before, int) or not 0 <= before <= MAX_DEGREE:
                raise NoValueError("not a polynomial")
            stack.pop()
            stack[-1] = stack[-1][0] * before, stack[-1][1] * before
        elif item not in ("neg", "%"):
            if item not in names((item,)):
                raise NoValueError("not a polynomial")
            stack.append((1, 0))
        if max(stack[-1]) > MAX_DEGREE:
            raise NoValueError("a polynomial beyond the bounds")
    return stack[0]


def _built(expression: Expression, sympy: Any) -> Any:
    """The sympy expression."""
    stack: list[Any] = []
    for item in expression:
        if not isinstance(item, str):
            stack.append(sympy.Rational(item.numerator, item.denominator))
        elif item == "neg":
            stack[-1] = -stack[-1]
        elif item == "%":
            stack[-1] = stack[-1] / 100
        elif item == "^":
            exponent = stack.pop()
            stack[-1] = stack[-1] ** exponent
        elif item in _OPERATIONS:
            right = stack.pop()
            stack[-1] = _OPERATIONS[item](stack[-1], right)
        else:
            stack.append(sympy.Symbol(item))
    return stack[0]
