"""Sine, cosine and tangent of decimal numbers: the standard library has none."""

from __future__ import annotations

from decimal import Context, Decimal

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
_TERMS = 40  # the last is below 1e-70


def sine(a: Decimal, digits: Context) -> Decimal:
    """By its series, from an angle between -pi and pi."""
    circle = digits.multiply(PI, Decimal(2))
    turns = digits.to_integral_value(digits.divide(a, circle))
    a = digits.subtract(a, digits.multiply(turns, circle))
    total = term = a
    for n in range(2, 2 * _TERMS, 2):
        term = digits.divide(digits.multiply(digits.multiply(term, a), digits.minus(a)), Decimal(n * (n + 1)))
        total = digits.add(total, term)
    return total


def cosine(a: Decimal, digits: Context) -> Decimal:
    return sine(digits.add(a, digits.divide(PI, Decimal(2))), digits)


def tangent(a: Decimal, digits: Context) -> Decimal:
    return digits.divide(sine(a, digits), cosine(a, digits))
