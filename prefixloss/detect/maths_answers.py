r"""The answer that a text states ("the answer is 5", "#### 5", \boxed{5}), and whether it is another one."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Collection, Mapping
from fractions import Fraction

from prefixloss.detect.maths_claims import holds
from prefixloss.detect.maths_expressions import NoValueError, Rational, close
from prefixloss.detect.maths_names import gaps
from prefixloss.detect.maths_reader import Run, read

MAX_ANSWER = 400  # characters
_MARKS = re.compile(r"(?<!\\)\\[()\[\] ,;!]|\$|\\(?:left|right|boxed)\b")
_COLLECTION = re.compile(r"(?:\\\{|\(|\[|\\begin|\\pm|-?\d+, ?-?\d).{0,98}", re.DOTALL)
_LARGE = re.compile(r"[\^!]|\*\*|\d{12}")
_STATED = re.compile(
    r"####\s?(?=[-$\d.\\])|\\boxed\s?\{|\banswer\s?(?:is|was|will be|should be|=|:)\**:?", re.IGNORECASE
)


def stated(text: str) -> str | None:
    """The last answer that a text states."""
    matches = list(_STATED.finditer(text))
    if not matches:
        return None
    rest = text[matches[-1].end() :][:MAX_ANSWER]
    return _in_braces(rest) if matches[-1][0].startswith("\\") else rest.split("\n")[0]


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


def is_collection(text: str) -> bool:
    """Whether an answer is a set, an interval, a point or a matrix, and short and plain enough for math-verify, which
    has no bounds of its own."""
    text = _bare(text)
    return _COLLECTION.fullmatch(text) is not None and not _LARGE.search(text)


def collections_differ(said: str, right: str) -> bool:
    """Whether two answers, one of them a collection, are surely not the same. Without math-verify nothing is sure."""
    try:
        library = importlib.import_module("math_verify")
    except ImportError:
        return False
    if _LARGE.search(said + right) or len(said + right) > MAX_ANSWER:
        return False
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are left to us
    kinds = [library.LatexExtractionConfig()]
    sides = [
        library.parse(f"${_bare(text)}$", extraction_config=kinds, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (said, right)
    ]
    return all(sides) and not any(library.verify(*pair, timeout_seconds=None) for pair in (sides, sides[::-1]))


def _bare(text: str) -> str:
    return _MARKS.sub("", text).strip().rstrip(".")
