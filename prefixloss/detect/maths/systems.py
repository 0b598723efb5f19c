"""A common solution that a sentence states of the equations in it: "solving x + y = 5 and x - y = 1: x = 3, y = 1".

Only equations between several names count: those in one name are cases, or the solution.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from prefixloss.detect.maths.expressions import NoValueError, Rational, close, show, value
from prefixloss.detect.maths.reader import read
from prefixloss.detect.maths.symbols import Equation, named

MAX_SENTENCES = 20  # of a text
MAX_SENTENCE = 300  # characters
MIN_EQUATIONS = 2
_SOLVES = re.compile(r"\b(?:intersection of|solving|common solution of)\b", re.IGNORECASE)
_END = re.compile(r"\.(?:\s|\Z)|\n\n|;")
_DENIES = re.compile(
    r"\b(?:not?|if|or|either|suppose|assume|try|parallel|never|substitut\w+|modulo|mod)\b|\\pm", re.IGNORECASE
)


def wrong_common_solution(text: str, declared: Collection[str]) -> str | None:
    """The first stated solution that does not solve its sentence's equations, as a reason; None if there is none."""
    for found, _ in zip(_SOLVES.finditer(text), range(MAX_SENTENCES), strict=False):
        sentence = _END.split(text[found.start() : found.start() + MAX_SENTENCE])[0]
        if _DENIES.search(sentence):
            continue
        equations, values = _said(sentence, declared)
        solved = [equation for equation in equations if named(equation) <= values.keys()]
        if len(solved) >= MIN_EQUATIONS and not all(_holds(equation, values) for equation in solved):
            return f"{', '.join(f'{name} = {show(number)}' for name, number in values.items())} does not solve both"
    return None


def _said(sentence: str, declared: Collection[str]) -> tuple[list[Equation], dict[str, Rational]]:
    """The equations between names, and the first value of each name."""
    equations: list[Equation] = []
    values: dict[str, Rational] = {}
    for chain in read(sentence, declared).chains:
        if chain.relations != ["="] or any(run.partial for run in chain.runs):
            continue
        left, right = chain.runs
        if left.name and not right.names:
            try:
                values.setdefault(left.name, value(right.expression, {}))
            except NoValueError:
                continue
        elif len(left.names | right.names) > 1:
            equations.append((left.expression, right.expression))
    return equations, values


def _holds(equation: Equation, values: Mapping[str, Rational]) -> bool:
    """What cannot be decided holds."""
    try:
        return close(*(value(side, values) for side in equation))
    except NoValueError:
        return True
