"""Which names a response uses for one thing only: a value found in one place is not held against another otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.expressions import Expression, NoValueError, Rational, close, magnitude, names, value
from prefixloss.detect.maths.reader import Chain, Reading
from prefixloss.detect.maths.text import words

RESTARTS = words("let now define denote call redefine set")
_CASES = words("for at with either any all every each take first second third fourth")
_INDEXED = re.compile(r"_\{?[a-zA-Z]\}?\Z")  # x_i is a different number for each i
_SAME = 100  # values that differ by less than a part of so many are one, rounded


class Scopes(NamedTuple):
    """cases: names that are given values by way of trial, or only for a part of the response. several: those that are
    said to have more than one value."""

    cases: frozenset[str]
    several: frozenset[str]

    @classmethod
    def of(cls, readings: Iterable[Reading]) -> Scopes:
        cases: set[str] = set()
        values: dict[Expression, list[Rational]] = {}
        restarted: set[str] = set()
        for chain in (chain for reading in readings for chain in reading.chains):
            if chain.supposed or _CASES.intersection(chain.lead):
                cases.update(*(run.names for run in chain.runs))
            if RESTARTS.intersection(chain.lead):
                restarted |= chain.runs[0].names
            elif chain.runs[0].names and not chain.runs[0].partial:
                values.setdefault(chain.runs[0].expression, []).extend(_values(chain))
            cases.update(name for run in chain.runs for name in run.names if _INDEXED.search(name))
        several = [said for said, found in values.items() if not all(_alike(a, found[0]) for a in found)]
        cases.update(*(names(said) - restarted for said in several if len(said) > 1))
        return cls(frozenset(cases), frozenset(str(said[0]) for said in several if len(said) == 1))


def _values(chain: Chain) -> Iterable[Rational]:
    """What "x = 6 / 2 = 3" says x is, without other names."""
    for run in chain.runs[1:]:
        if not run.names and not run.partial:
            try:
                yield value(run.expression, {})
            except NoValueError:
                continue


def _alike(a: Rational, b: Rational) -> bool:
    return close(a, b, (magnitude(a) + magnitude(b)) / Fraction(2 * _SAME))
