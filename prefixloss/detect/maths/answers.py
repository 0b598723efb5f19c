r"""The answer that a text states ("the answer is 5", "#### 5", \boxed{5}), and whether it is the right one.

There are two questions: whether it surely is another one, for detectors, and whether it is the same, for rewards. What
cannot be decided is neither.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.claims import EQUALITIES, holds, readings
from prefixloss.detect.maths.expressions import BINARY, UNARY, Expression, NoValueError, Rational, close, value
from prefixloss.detect.maths.lexemes import declared as names_in
from prefixloss.detect.maths.names import gaps
from prefixloss.detect.maths.reader import Run, read
from prefixloss.detect.maths.text import UnreadableError, words

MAX_ANSWER = 400  # characters
MAX_COLLECTION = 100
_MARKS = re.compile(r"(?<!\\)\\[()\[\] ,;!]|\\?\$|\\(?:left|right|boxed)\b")
_COLLECTION = re.compile(r"(?:\\\{|\(|\[|\\begin|\\pm|-?\d+, ?-?\d).{0,98}", re.DOTALL)
_LARGE = re.compile(r"[\^!]|\*\*|\d{12}")
_SENTENCE_END = re.compile(r"[.!?][*_)\"']*(?:\s|$)")
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s?\{([^{}]*)\}")
_ALONE = re.compile(r"\A\(([^(),\[\]]*)\)\Z")  # "(B)" is the choice B
_BRACKETS = re.compile(r"(?P<open>\(|\[|\\?\{)(?P<inner>.*?)(?P<close>\)|\]|\\?\})", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d),\d{3}(?!\d)")
_DOUBT = words("or not")
_STATED = re.compile(
    r"####\s?(?=[-$\d.\\])|\\boxed\s?\{|\banswer\s?(?:is|was|will be|should be|=|:)\**:?", re.IGNORECASE
)


def stated(text: str) -> str | None:
    """The last answer that a text states; None where it states none, or was cut off within the braces of one."""
    matches = list(_STATED.finditer(text))
    if not matches:
        return None
    rest = text[matches[-1].end() :][:MAX_ANSWER]
    return _in_braces(rest) if matches[-1][0].startswith("\\") else rest.split("\n")[0]


def _in_braces(text: str) -> str | None:
    """The text up to the brace that closes one opened before it, None if none does."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return None


def right_answer(text: str) -> str:
    """What a data set's answer says: that which it states, if it is a written solution, else all of it."""
    return stated(text) or text


# ---- whether it is the right one: for rewards, so in doubt it is not


def states(text: str, right: str) -> bool:
    """Whether the last answer that a text states is the right one, whatever stands around it. Never raises."""
    said = stated(text)
    return said is not None and same(said, right)


def same(said: str, right: str) -> bool:
    """Whether two answers are surely the same: numbers exactly, formulas by value, the members of a collection one by
    one, words by their spelling but for case and space.

    A calculation that is still to be done is no answer, "7+5" is not 12; nor is more than one, "12 or 13".
    """
    if max(len(said), len(right)) > MAX_ANSWER:
        return said == right
    said, right = _spelled(_SENTENCE_END.split(said)[0]), _spelled(right)
    if not said or not right:
        return False
    if said == right:
        return True
    names = names_in(f"{said}\n{right}")
    try:
        values, wanted = _values(said, names), _values(right, names)
        if len(wanted) == 1:
            return _are(values, wanted[0])
    except (UnreadableError, NoValueError):
        return False
    members = [_members(side) for side in (said, right)]
    return None not in members and _same_members(*members)  # type: ignore[arg-type]


def _spelled(text: str) -> str:
    """One spelling for equal words."""
    text = " ".join(_bare(_WORDS.sub(r"\1", text)).strip("*_` ").rstrip(".").lower().split())
    return _ALONE.sub(r"\1", text)


def _values(text: str, names: Collection[str]) -> list[Run]:
    """Everything that an answer says its value is, none where that is not clear: 7, 3 + 4 and 7 of "x = 3 + 4 = 7"."""
    reading = read(text, names)
    found: list[Run] = []
    for chain in reading.chains:
        doubtful = _DOUBT.intersection((*chain.lead, chain.tail)) or not EQUALITIES.issuperset(chain.relations)
        if doubtful or chain.supposed or any(run.partial for run in chain.runs):
            return []
        found += chain.runs[1:] if chain.runs[0].name and len(chain.runs) > 1 else chain.runs
    return [] if reading.unread else found


def _are(values: Sequence[Run], right: Run) -> bool:
    """Whether the values are all the right one, and one of them has nothing left to calculate."""
    return any(_is_worked_out(run, right) for run in values) and all(_equal(run, right) for run in values)


def _equal(said: Run, right: Run) -> bool:
    if said.names or right.names:
        return said.names == right.names and gaps(said.expression, right.expression) == {0}
    return any(close(value(a, {}), value(b, {})) for a, b in readings(said, right))


def _is_worked_out(said: Run, right: Run) -> bool:
    """Whether an answer has no operation that the right one has not; a sign, a percentage and, where the value is no
    whole number, a fraction are none. With names, every form is an answer."""
    if said.names:
        return True
    signs = ["neg", "%"] if value(right.expression, {}).denominator == 1 else ["neg", "%", "/"]
    return _operations(said.expression) <= _operations(right.expression) + Counter(signs)


def _operations(expression: Expression) -> Counter[Rational | str]:
    return Counter(item for item in expression if item in BINARY or item in UNARY)


class _Collection(NamedTuple):
    """brackets: those around it, "" if there are none."""

    brackets: str
    members: list[str]


def _members(text: str) -> _Collection | None:
    """The members of a set, a list, a point or an interval, None if an answer is none of them, or a long one."""
    if len(text) > MAX_COLLECTION:
        return None
    match = _BRACKETS.fullmatch(text)
    inner = match["inner"] if match else text
    parts, depth = [""], 0
    for place, character in enumerate(inner):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth < 0:
            return None
        if character == "," and depth == 0 and not _THOUSANDS.match(inner, place):
            parts.append("")
        else:
            parts[-1] += character
    return _Collection(match["open"] + match["close"] if match else "", parts) if len(parts) > 1 else None


def _same_members(said: _Collection, right: _Collection) -> bool:
    """In any order, but for points and intervals."""
    if said.brackets != right.brackets or len(said.members) != len(right.members):
        return False
    if said.brackets not in ("", "\\{\\}", "{}"):
        return all(map(same, said.members, right.members))
    left = list(right.members)
    for member in said.members:
        place = next((k for k, other in enumerate(left) if same(member, other)), None)
        if place is None:
            return False
        del left[place]
    return True


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
