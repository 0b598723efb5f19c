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

from prefixloss.detect.maths import trigonometry

Rational = int | Fraction
Expression = tuple[Rational | str, ...]

MAX_BITS = 4096  # of a numerator or denominator: beyond, nothing is calculated
MAX_FACTORIAL = 300
MAX_ROOT = 64
_DIGITS = decimal.Context(prec=50, Emax=9999, Emin=-9999)
_ROUGH = 10**30
_LAST = Decimal("1e-30")  # what is nearer to an integer is one


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


def choose(a: Rational, b: Rational) -> Rational:
    """The binomial coefficient a over b."""
    if not isinstance(b, int) or not 0 <= b <= MAX_FACTORIAL:
        raise NoValueError("no binomial coefficient")
    found: Rational = 1
    for n in range(b):
        found = divide(found * (a - n), n + 1)
    return found


def common(function: Callable[[int, int], int], a: Rational, b: Rational) -> Rational:
    """The greatest common divisor, or the least common multiple."""
    if not isinstance(a, int) or not isinstance(b, int):
        raise NoValueError("no integers")
    return bounded(function(a, b))


def _irrational(*_: Rational) -> Rational:
    raise IrrationalError("a function")


def _unknown(*_: Rational) -> Rational:
    raise NoValueError("a quotient with a remainder")


BINARY: dict[str, Callable[[Rational, Rational], Rational]] = {
    "+": lambda a, b: bounded(a + b),
    "-": lambda a, b: bounded(a - b),
    "*": lambda a, b: bounded(a * b),
    "/": divide,
    "mod": remainder,
    "^": power,
    "root": root,
    "choose": choose,
    "gcd": lambda a, b: common(math.gcd, a, b),
    "lcm": lambda a, b: common(math.lcm, a, b),
    "max": max,
    "min": min,
    "log": _irrational,  # of b to the base a
    "rem": _unknown,  # "3 remainder 2": no number
}
UNARY: dict[str, Callable[[Rational], Rational]] = {
    "neg": lambda a: -a,
    "%": lambda a: divide(a, 100),
    "!": factorial,
    "sqrt": lambda a: root(2, a),
    "abs": magnitude,
    "floor": math.floor,
    "ceil": math.ceil,
    **dict.fromkeys(("sin", "cos", "tan", "ln"), _irrational),
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
    "log": lambda base, a: _DIGITS.divide(_DIGITS.ln(a), _DIGITS.ln(base)),
    "max": max,
    "min": min,
}
_DECIMAL_UNARY: dict[str, Callable[[Decimal], Decimal]] = {
    "neg": _DIGITS.minus,
    "%": lambda a: _DIGITS.divide(a, Decimal(100)),
    "sqrt": _DIGITS.sqrt,
    "abs": _DIGITS.abs,
    "floor": lambda a: _DIGITS.quantize(a, _LAST).to_integral_value(decimal.ROUND_FLOOR),
    "ceil": lambda a: _DIGITS.quantize(a, _LAST).to_integral_value(decimal.ROUND_CEILING),
    "ln": _DIGITS.ln,
    "sin": lambda a: trigonometry.sine(a, _DIGITS),
    "cos": lambda a: trigonometry.cosine(a, _DIGITS),
    "tan": lambda a: trigonometry.tangent(a, _DIGITS),
}


def _decimal(a: Rational) -> Decimal:
    return _DIGITS.divide(Decimal(a.numerator), Decimal(a.denominator))


def approximate(expression: Expression, values: Mapping[str, Rational]) -> Rational:
    """The value to some 45 digits, for expressions with irrational parts; NoValueError where there is none."""
    stack: list[Decimal] = []
    try:
        for item in expression:
            if item == "pi":
                stack.append(trigonometry.PI)
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
