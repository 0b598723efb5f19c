"""What a problem gives: its numbers, its equations, and its value if it is an expression to calculate."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from prefixloss.detect.maths.expressions import (
    BINARY,
    UNARY,
    Expression,
    NoValueError,
    Rational,
    divide,
    evaluate,
    is_number,
    magnitude,
    numbers,
)
from prefixloss.detect.maths.reader import read
from prefixloss.detect.maths.symbols import Equation
from prefixloss.detect.maths.text import UnreadableError

Pair = tuple[str, Rational, Rational]  # "+" or "*", and its operands

MAX_WORDS = 12  # of a problem that is no more than an expression
MAX_PARTS = 4000
_FORMULA = re.compile(r"\$[^$]{1,400}\$|\\\([^()]{1,200}\\\)")
_SPACED = re.compile(r"(?<=(?<![A-Za-z\\])[A-Za-z\d])\s(?=[A-Za-z](?![A-Za-z]))")


@dataclass(frozen=True)
class Task:
    """expression, value: what is to be calculated; None for other problems."""

    numbers: frozenset[Rational] = frozenset()
    equations: tuple[Equation, ...] = ()
    expression: Expression | None = None
    value: Rational | None = None

    @classmethod
    def of(cls, problem: str, declared: Collection[str]) -> Task:
        try:
            chains = read(_closed(problem), declared).chains
        except UnreadableError:
            return cls()
        runs = [run for chain in chains for run in chain.runs if not run.partial]
        given = frozenset(magnitude(n) for run in runs for n in numbers(run.expression))
        equations = tuple(
            (left.expression, right.expression)
            for chain in chains
            for left, right, relation in zip(chain.runs, chain.runs[1:], chain.relations, strict=False)
            if relation == "=" and left.names | right.names and not (left.partial or right.partial)
        )
        alone = len(runs) == 1 and len(re.findall("[A-Za-z]{2,}", problem)) <= MAX_WORDS
        if not alone or is_number(runs[0].expression):
            return cls(given, equations)
        try:
            return cls(given, equations, runs[0].expression, evaluate(runs[0].expression, {}))
        except NoValueError:
            return cls(given, equations)

    def copies(self, part: Expression) -> bool:
        """Whether the numbers of an expression stand in the problem's, in this order and without gaps."""
        copied, given = numbers(part), numbers(self.expression or ())
        return any(given[at : at + len(copied)] == copied for at in range(len(given)))

    def resembles(self, expression: Expression) -> bool:
        """Whether an expression is the problem's, but for a quarter of its numbers, or its signs and brackets."""
        copied, given = numbers(expression), numbers(self.expression or ())
        changed = sum(a != b for a, b in zip(copied, given, strict=False))
        return len(copied) == len(given) > 2 and changed <= max(1, len(given) // 4)


def _closed(problem: str) -> str:
    """The problem with "2 a b" and "A B" in its formulas as 2ab and AB, as responses write them."""
    return _FORMULA.sub(lambda formula: _SPACED.sub("", formula[0]), problem)


class Parts(NamedTuple):
    """What right calculations on the way to the value of an expression can be: their values, without signs, and for
    those with two operands these. Neighbours in a sum or a product count in any grouping."""

    values: set[Rational]
    pairs: set[Pair]

    def have(self, calculation: Expression, result: Rational) -> bool:
        operands = numbers(calculation)
        if len(operands) == 2 and calculation[-1] in ("+", "-", "*", "/"):
            kind, (a, b) = _kind(str(calculation[-1])), operands
            return _pair(kind, a, *_inverse(str(calculation[-1]), [b])) in self.pairs
        return magnitude(result) in self.values


def parts(expression: Expression) -> Parts:
    """The parts of an expression; NoValueError beyond the bounds."""
    found = Parts(set(), set())
    stack: list[tuple[str, list[Rational]]] = []  # the terms of a sum, "+", the factors of a product, "*", or a value
    for item in expression:
        if not isinstance(item, str):
            stack.append(("", [item]))
            continue
        if item in UNARY:
            stack.append(("", [UNARY[item](_value(stack.pop()))]))
        elif item in ("+", "-", "*", "/"):
            kind = _kind(item)
            right, left = (_members(stack.pop(), kind) for _ in range(2))
            right = _inverse(item, right)
            heads, tails = (list(accumulate(side, BINARY[kind])) for side in (right, left[::-1]))
            if len(found.pairs) + len(heads) * len(tails) > MAX_PARTS:
                raise NoValueError("too many parts")
            found.values.update(magnitude(BINARY[kind](a, b)) for a in tails for b in heads)
            found.pairs.update(_pair(kind, a, b) for a in tails for b in heads)
            stack.append((kind, left + right))
        else:
            right_value, left_value = (_value(stack.pop()) for _ in range(2))
            stack.append(("", [BINARY[item](left_value, right_value)]))
        found.values.add(magnitude(_value(stack[-1])))
    return found


def _kind(sign: str) -> str:
    """A difference is a sum, and a quotient a product, with the second operand inverted."""
    return "+" if sign in "+-" else "*"


def _inverse(sign: str, operands: list[Rational]) -> list[Rational]:
    return [-b for b in operands] if sign == "-" else [divide(1, b) for b in operands] if sign == "/" else operands


def _pair(kind: str, a: Rational, b: Rational) -> Pair:
    """The operands of a sum or product, whatever their order and the sign of both together."""
    if kind == "*":
        a, b = magnitude(a), magnitude(b)
    small, large = max(sorted((a, b)), sorted((-a, -b)))
    return kind, small, large


def _members(entry: tuple[str, list[Rational]], kind: str) -> list[Rational]:
    """The members of a sum or product of this kind; of anything else its value."""
    return entry[1] if entry[0] == kind else [_value(entry)]


def _value(entry: tuple[str, list[Rational]]) -> Rational:
    return sum(entry[1]) if entry[0] == "+" else math.prod(entry[1])
