"""Values of expressions in postfix form: exact rationals, or 45 digits where roots and pi come in; no recursion.

An expression is a tuple of numbers, names and operators in postfix order: (2, "x", "*", 3, "+") is 2x + 3. "neg" is the
unary minus, "%" makes a percentage a number, "root" takes its degree first.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

Rational = int | Fraction
Expression = tuple[Rational | str, ...]

MAX_BITS = 4096  # of a numerator or denominator: beyond, nothing is calculated
MAX_FACTORIAL = 300
MAX_ROOT = 64
_DIGITS = decimal.Context(prec=50, Emax=9999, Emin=-9999)
_ROUGH = 10**30
_PI = Decimal("3.14159265358979323846264338327950288419716939937511")


class NoValueError(Exception):
    """An expression has no value here: a name without one, or a number beyond the bounds."""


class IrrationalError(NoValueError):
    """An expression has no rational value."""


class DivisionByZeroError(NoValueError):
    """An expression divides by zero: whatever is claimed of it is wrong."""


def magnitude(a: Rational) -> Rational:
    """The absolute value."""
    return a if a >= 0 else -a


def bounded(a: Rational) -> Rational:
    """The number, as an int where it is one; NoValueError beyond the bounds."""
    if isinstance(a, int):
        bits = a.bit_length()
    else:
        bits = max(a.numerator.bit_length(), a.denominator.bit_length())
        if a.denominator == 1:
            a = a.numerator
    if bits > MAX_BITS:
        raise NoValueError("a number beyond the bounds")
    return a


def divide(a: Rational, b: Rational) -> Rational:
    if not b:
        raise DivisionByZeroError("division by zero")
    return bounded(Fraction(a) / b)


def remainder(a: Rational, b: Rational) -> Rational:
    if not b:
        raise DivisionByZeroError("division by zero")
    return bounded(a % b)


def power(a: Rational, b: Rational) -> Rational:
    if isinstance(b, Fraction):
        return power(root(b.denominator, a), b.numerator)
    if b < 0:
        return divide(1, power(a, -b))
    bits = max(abs(a.numerator), a.denominator).bit_length() - 1
    if bits * b > MAX_BITS:
        raise NoValueError("a number beyond the bounds")
    if not bits:
        b = min(b, 2 - b % 2)  # 0, 1 and -1: only whether the exponent is 0, odd or even matters
    return bounded(a**b)


def root(degree: Rational, a: Rational) -> Rational:
    """The real root of a; IrrationalError where it is not rational."""
    if not isinstance(degree, int) or not 0 < degree <= MAX_ROOT or a < 0:
        raise NoValueError("no real root")
    numerator, denominator = (_integer_root(n, degree) for n in (a.numerator, a.denominator))
    if numerator**degree != a.numerator or denominator**degree != a.denominator:
        raise IrrationalError("an irrational root")
    return divide(numerator, denominator)


def _integer_root(n: int, degree: int) -> int:
    """The integer part of the root of n >= 0: Newton's method, from above."""
    if degree == 2:
        return math.isqrt(n)
    guess = 1 << -(-n.bit_length() // degree)
    while (better := ((degree - 1) * guess + n // guess ** (degree - 1)) // degree) < guess:
        guess = better
    return guess


def factorial(a: Rational) -> Rational:
    if not isinstance(a, int) or not 0 <= a <= MAX_FACTORIAL:
        raise NoValueError("no factorial")
    return math.factorial(a)


BINARY: dict[str, Callable[[Rational, Rational], Rational]] = {
    "+": lambda a, b: bounded(a + b),
    "-": lambda a, b: bounded(a - b),
    "*": lambda a, b: bounded(a * b),
    "/": divide,
    "mod": remainder,
    "^": power,
    "root": root,
}
UNARY: dict[str, Callable[[Rational], Rational]] = {
    "neg": lambda a: -a,
    "%": lambda a: divide(a, 100),
    "!": factorial,
    "sqrt": lambda a: root(2, a),
}


def evaluate(expression: Expression, values: Mapping[str, Rational]) -> Rational:
    """The exact value with the names' `values`; NoValueError where there is none."""
    stack: list[Rational] = []
    for item in expression:
        if not isinstance(item, str):
            stack.append(item)
        elif item in BINARY:
            right = stack.pop()
            stack[-1] = BINARY[item](stack[-1], right)
        elif item in UNARY:
            stack[-1] = UNARY[item](stack[-1])
        elif item in values:
            stack.append(values[item])
        elif item == "pi":
            raise IrrationalError("pi")
        else:
            raise NoValueError(f"{item} has no value")
    return stack[0]


_DECIMAL_BINARY: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "+": _DIGITS.add,
    "-": _DIGITS.subtract,
    "*": _DIGITS.multiply,
    "/": _DIGITS.divide,
    "^": _DIGITS.power,
    "root": lambda degree, a: _DIGITS.power(a, _DIGITS.divide(Decimal(1), degree)),
}
_DECIMAL_UNARY: dict[str, Callable[[Decimal], Decimal]] = {
    "neg": _DIGITS.minus,
    "%": lambda a: _DIGITS.divide(a, Decimal(100)),
    "sqrt": _DIGITS.sqrt,
}


def _decimal(a: Rational) -> Decimal:
    return _DIGITS.divide(Decimal(a.numerator), Decimal(a.denominator))


def approximate(expression: Expression, values: Mapping[str, Rational]) -> Rational:
    """The value to some 45 digits, for expressions with irrational parts; NoValueError where there is none."""
    stack: list[Decimal] = []
    try:
        for item in expression:
            if item == "pi":
                stack.append(_PI)
            elif not isinstance(item, str) or item in values:
                stack.append(_decimal(values[item] if isinstance(item, str) else item))
            elif item in _DECIMAL_BINARY:
                right = stack.pop()
                stack[-1] = _DECIMAL_BINARY[item](stack[-1], right)
            elif item in _DECIMAL_UNARY:
                stack[-1] = _DECIMAL_UNARY[item](stack[-1])
            else:
                raise NoValueError(f"{item} has no value")
    except decimal.DecimalException as error:
        raise NoValueError(type(error).__name__) from None
    if abs(stack[0].adjusted()) > MAX_BITS // 4:
        raise NoValueError("a number beyond the bounds")
    return Fraction(stack[0])


def value(expression: Expression, values: Mapping[str, Rational]) -> Rational:
    """The exact value, or one to 45 digits where it is irrational; NoValueError where there is none."""
    try:
        return evaluate(expression, values)
    except IrrationalError:
        return approximate(expression, values)


def is_rough(a: Rational) -> bool:
    """Whether a number is an irrational value, or made of one: those alone have so many digits."""
    return a.denominator > _ROUGH


def close(a: Rational, b: Rational, allowed: Rational = 0) -> bool:
    """Whether a is b, but for what is `allowed` and, where irrational values are compared, for their last digits."""
    gap = magnitude(a - b)
    return gap <= allowed or (is_rough(gap) and gap * _ROUGH <= max(magnitude(a), 1))


def names(expression: Expression) -> set[str]:
    """The names in an expression."""
    return {i for i in expression if isinstance(i, str) and i not in BINARY and i not in UNARY and i != "pi"}


def numbers(expression: Expression) -> list[Rational]:
    """The numbers in an expression, in the order written and with their signs."""
    found: list[Rational] = []
    for item, following in zip(expression, (*expression[1:], ""), strict=True):
        if not isinstance(item, str):
            found.append(-item if following == "neg" else item)
    return found


def is_number(expression: Expression) -> bool:
    """Whether an expression is a single number, perhaps negative or a percentage, with nothing to calculate."""
    return not isinstance(expression[0], str) and all(item in ("neg", "%") for item in expression[1:])


def show(a: Rational) -> str:
    """A short spelling."""
    text = str(a) if a.denominator < 1000 else f"{_decimal(a):.6g}"
    return text if len(text) <= 24 else f"{text[:10]}..{text[-4:]}"
