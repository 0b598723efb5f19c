r"""Solutions of the problem's equations that a step states: "(3, 4) satisfies the equation", "x = 3 is a solution".

Each is put into the equations. Only what the problem seeks is looked at: "all pairs $(m, n)$ for which ...", or the one
name of its equations.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.derive import defines
from prefixloss.detect.maths.expressions import DivisionByZeroError, NoValueError, Rational, bounded, close, value
from prefixloss.detect.maths.properties import MARKS
from prefixloss.detect.maths.symbols import Equation, named
from prefixloss.detect.maths.task import Task

MAX_SOLUTIONS = 60  # of a step
_LETTER = r"[a-zA-Z](?:_\{?\d\}?)?"
_SOUGHT = re.compile(
    r"(?:pairs?|triples?|triplets?|quadruples?|tuples?|solutions?)\s(?:of [a-z ]{1,40}?)?"
    rf"\(\s?({_LETTER}(?:\s?,\s?{_LETTER}){{1,3}})\s?\)"
)
_SEEKS = re.compile(
    r"\b(?:solve|satisf\w+|for which|such that|solutions? (?:of|to)|roots? of|(?:find|determine|compute) (?:all|the)"
    r"(?: \w+){0,3} values? of)\b",
    re.IGNORECASE,
)
_SAYS = re.compile(
    r"\b(?:satisf(?:y|ies)|valid solutions?"
    r"|(?:is|are) (?:indeed |both |all |also )?(?:an? |the (?:only )?|both )?(?:correct )?solutions?)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"\b(?:not|no|none|neither|nor|cannot|never|if|whether|check|verify|test|try|must|should|need|want|only if"
    r"|fails?|extraneous|inequality|condition|modulo|congruence|congruent|would|could|might|may|suppose|assume|mod"
    r"|new|this|these|simplified|reduced|first|second|one|quadratic|latter|constraints?|conditions)\b"
    r"|n't|\\(?:ne|not|le|ge|pmod)|[?<>]",
    re.IGNORECASE,
)
_NUMBER = r"-?\d{1,9}(?:/[1-9]\d{0,8})?"
_SENTENCES = re.compile(r"(?<=[.;!?])\s|\n")


class Sought(NamedTuple):
    """The names that the problem asks for, in the order of its tuples, and the equations that they have to solve."""

    order: tuple[str, ...]
    equations: tuple[Equation, ...]

    @classmethod
    def of(cls, problem: str, declared: Collection[str]) -> Sought | None:
        """None where the problem does not seek solutions. An equation with other names rules nothing out."""
        if not _SEEKS.search(problem):
            return None
        found = _SOUGHT.search(MARKS.sub("", problem).replace("\\left", "").replace("\\right", ""))
        order = tuple(re.split(r"\s?,\s?", found[1])) if found else ()
        equations = tuple(e for e in Task.of(problem, {*declared, *order}).equations if not defines(e))
        used = named(*equations)
        if not order and len(used) == 1:
            order = tuple(used)
        return cls(order, equations) if used and order else None

    def wrong(self, text: str) -> str | None:
        """The first stated solution in a step that is none, as a reason; None if there is none."""
        for sentence in _SENTENCES.split(text.replace("\\left", "").replace("\\right", "")):
            if not _SAYS.search(sentence) or _DENIES.search(sentence):
                continue
            for solution in self._stated(MARKS.sub("", sentence.replace("\\(", "").replace("\\)", ""))):
                if not all(_holds(equation, solution) for equation in self.equations):
                    listed = ", ".join(f"{name} = {number}" for name, number in solution.items())
                    return f"{listed} does not solve the problem's equation"
        return None

    def _stated(self, sentence: str) -> Iterator[dict[str, Rational]]:
        if len(self.order) == 1:
            pattern = (
                rf"(?<![\w^+*/-])(?<![+*/-]\s){re.escape(self.order[0])}\s?=\s?({_NUMBER})(?![\w^!.]|\s?[-+*/^\\])"
            )
        else:
            pattern = rf"(?<![\w)])\(\s?({_NUMBER}(?:\s?,\s?{_NUMBER}){{{len(self.order) - 1}}})\s?\)"
        for found, _ in zip(re.finditer(pattern, sentence), range(MAX_SOLUTIONS), strict=False):
            parts = (bounded(Fraction(part.strip())) for part in found[1].split(","))
            yield dict(zip(self.order, parts, strict=True))


def _holds(equation: Equation, solution: dict[str, Rational]) -> bool:
    """What cannot be decided holds."""
    try:
        left, right = (value(side, solution) for side in equation)
    except DivisionByZeroError:
        return False
    except NoValueError:
        return True
    return close(left, right)
