r"""The answer that a text states ("the answer is 5", "#### 5", \boxed{5}), and whether it is another one."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from fractions import Fraction

from prefixloss.detect.maths_claims import holds
from prefixloss.detect.maths_expressions import NoValueError, Rational, close
from prefixloss.detect.maths_names import gaps
from prefixloss.detect.maths_reader import Run, read

MAX_ANSWER = 400  # characters
_STATED = re.compile(
    r"####\s?(?=[-$\d.\\])|\\boxed\s?\{|\banswer\s?(?:is|was|will be|should be|=|:)\**:?", re.IGNORECASE
)


def stated(text: str, declared: Collection[str]) -> Run | None:
    """The last answer that a text states; None if there is none that can be read."""
    matches = list(_STATED.finditer(text))
    if not matches:
        return None
    rest = text[matches[-1].end() :][:MAX_ANSWER]
    return answer_in(_in_braces(rest) if matches[-1][0].startswith("\\") else rest.split("\n")[0], declared)


def _in_braces(text: str) -> str:
    """The text up to the brace that closes one opened before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text


def answer_in(text: str, declared: Collection[str]) -> Run | None:
    """What "x = 3 + 4 = 7" ends in."""
    chains = read(text[:MAX_ANSWER], declared).chains
    if not chains or chains[0].runs[-1].partial or "not" in chains[0].lead:
        return None
    return chains[0].runs[-1]


def follows(number: Rational, derived: Rational, allowed: Fraction) -> bool:
    """Whether an answer is a derived value, perhaps rounded, up or down to an integer, or as a percentage."""
    forms = (derived, derived * 100)
    return any(close(number, n, allowed) or number in (math.floor(n), math.ceil(n)) for n in forms) or (
        number * 100 == derived
    )


def differ(run: Run, right: Run, values: Mapping[str, Rational]) -> bool:
    """Whether two answers are surely not the same."""
    try:
        return not holds(run, right, "=", values)
    except NoValueError:
        pass
    try:
        return gaps(run.expression, right.expression) != {0}
    except NoValueError:
        return False
