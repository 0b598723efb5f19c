"""The terms of polynomials: sympy's sparse polynomials do the arithmetic, on expressions that were already read.

A function of something, sin x or the root of 6, counts as a name; what is known of the squares of roots and of sine and
cosine is put to use. sympy is imported at the first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from prefixloss.detect.maths.expressions import BINARY, UNARY, Expression, NoValueError

Item = int | Fraction | str | Expression  # a function with what it is applied to is one item
Terms = dict[tuple[int, ...], Fraction]  # the powers of the names, in their order, with the number before them

MAX_DEGREE = 12
MAX_TERMS = 150
MAX_NAMES = 8
_FUNCTIONS = UNARY.keys() - {"neg", "%"}


def order(*expressions: Expression) -> tuple[str | Expression, ...]:
    """The names in some expressions, with the functions in them; sine and cosine in pairs."""
    items = {item for expression in expressions for item in _folded(expression)}
    functions = {item for item in items if isinstance(item, tuple)}
    pairs = {(*item[:-1], other) for item in functions if item[-1] in ("sin", "cos") for other in ("sin", "cos")}
    known = {item for item in items if isinstance(item, str) and item not in BINARY and item not in UNARY}
    return (*sorted(known), *sorted(functions | pairs, key=str))


def terms(expression: Expression, names: Sequence[str | Expression]) -> Terms:
    """NoValueError for what is no polynomial, or a large one. names: the `order`."""
    over, under = _Builder(names).quotient(_folded(expression))
    if not under.is_ground:
        raise NoValueError("not a polynomial")
    return _collected(over.quo_ground(under.LC), names)


def difference(left: Expression, right: Expression, names: Sequence[str | Expression]) -> Terms:
    """The terms of left - right, multiplied by both denominators; NoValueError for what is no quotient of polynomials,
    or a large one."""
    builder = _Builder(names)
    (a, under_a), (b, under_b) = builder.quotient(_folded(left)), builder.quotient(_folded(right))
    return _collected(a * under_b - b * under_a, names)


def _folded(expression: Expression) -> list[Item]:
    """The expression with each function and what it is applied to as one item."""
    found: list[Item] = []
    starts: list[tuple[int, int]] = []  # of each operand, in the expression and in what was found
    for place, item in enumerate(expression):
        if item in BINARY:
            starts.pop()
        elif item not in UNARY:
            starts.append((place, len(found)))
        found.append(item)
        if item in _FUNCTIONS or item in ("log", "root", "choose"):
            start, kept = starts[-1]
            found[kept:] = [expression[start : place + 1]]
    return found


class _Builder:
    """Quotients of polynomials in some names."""

    def __init__(self, names: Sequence[str | Expression]) -> None:
        if len(names) > MAX_NAMES:
            raise NoValueError("too many names")
        try:
            sympy = importlib.import_module("sympy")
        except ImportError:
            raise NoValueError("polynomials need sympy: pip install prefixloss[detect]") from None
        self.ring = sympy.polys.rings.PolyRing([f"v{n}" for n in range(len(names))], sympy.QQ)
        self.names = dict(zip(names, self.ring.gens, strict=True))

    def quotient(self, items: Sequence[Item]) -> tuple[Any, Any]:
        """Numerator and denominator."""
        stack: list[tuple[Any, Any]] = []
        for item, before in zip(items, (0, *items[:-1]), strict=True):
            if isinstance(item, int | Fraction):
                stack.append((self.ring(self.ring.domain(item.numerator, item.denominator)), self.ring.one))
            elif item in self.names:
                stack.append((self.names[item], self.ring.one))
            elif item == "neg":
                stack[-1] = -stack[-1][0], stack[-1][1]
            elif item == "^":
                stack.pop()
                stack[-1] = self._power(stack[-1], before)
            elif item in ("+", "-", "*", "/"):
                right = stack.pop()
                stack[-1] = _joined(str(item), stack[-1], right)
            else:
                raise NoValueError("not a polynomial")
            if any(len(part) > MAX_TERMS or sum(part.degrees()) > 2 * MAX_DEGREE for part in stack[-1] if part):
                raise NoValueError("a polynomial beyond the bounds")
        return stack[0]

    def _power(self, base: tuple[Any, Any], exponent: Item) -> tuple[Any, Any]:
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


def _collected(polynomial: Any, names: Sequence[str | Expression]) -> Terms:
    """With numbers for the squares of their roots, and 1 - sin^2 for cos^2."""
    found: Terms = {}
    waiting = {tuple(powers): Fraction(int(n.numerator), int(n.denominator)) for powers, n in polynomial.terms()}
    while waiting:
        powers, number = waiting.popitem()
        changed = next((p for p, name in enumerate(names) if _reducible(name, powers[p])), None)
        if changed is None:
            found[powers] = found.get(powers, Fraction(0)) + number
            continue
        less = _plus(powers, changed, -2)
        name = names[changed]
        if name[-1] == "cos":
            sine = _plus(less, names.index((*name[:-1], "sin")), 2)
            waiting[sine] = waiting.get(sine, Fraction(0)) - number
            waiting[less] = waiting.get(less, Fraction(0)) + number
        else:
            waiting[less] = waiting.get(less, Fraction(0)) + number * int(name[0])
    return {powers: number for powers, number in found.items() if number}


def _reducible(name: str | Expression, power: int) -> bool:
    """Whether the square of a name is known: cos^2, or that of the root of an integer."""
    root = isinstance(name, tuple) and name[-1] == "sqrt" and len(name) == 2 and isinstance(name[0], int)
    return power > 1 and isinstance(name, tuple) and (root or name[-1] == "cos")


def _plus(powers: tuple[int, ...], place: int, more: int) -> tuple[int, ...]:
    return (*powers[:place], powers[place] + more, *powers[place + 1 :])
