"""Lengths between points whose coordinates the problem gives: with D(7, 5) and E(3, 5), DE = 5 is false."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from prefixloss.detect.maths.expressions import Expression, Rational, bounded
from prefixloss.detect.maths.properties import MARKS

MAX_POINTS = 26
_NUMBER = r"-?\d{1,6}(?:\.\d{1,6}|/[1-9]\d{0,5})?"
_POINT = re.compile(rf"(?<![A-Za-z\\])([A-Z])\s?=?\s?\(\s?({_NUMBER})\s?,\s?({_NUMBER})\s?\)")

Points = Mapping[str, tuple[Rational, Rational]]


def given(problem: str) -> Points:
    """The points of a problem with their coordinates; those that have several are left out."""
    found: dict[str, tuple[Rational, Rational]] = {}
    several: set[str] = set()
    before, *drawings = problem.split("[asy]")
    text = before + "".join(drawing.partition("[/asy]")[2] for drawing in drawings)
    text = MARKS.sub("", text).replace("\\left", "").replace("\\right", "")
    for name, x, y in _POINT.findall(text)[:MAX_POINTS]:
        point = bounded(Fraction(x)), bounded(Fraction(y))
        if found.setdefault(name, point) != point:
            several.add(name)
    return {name: point for name, point in found.items() if name not in several}


def length(name: str, points: Points) -> Expression | None:
    """The length that a name such as AB is; None for any other name."""
    if len(name) != 2 or name[0] == name[1] or not set(name) <= points.keys():
        return None
    (a, b), (c, d) = (points[letter] for letter in name)
    return (a - c, 2, "^", b - d, 2, "^", "+", "sqrt")
