r"""Values that a sentence lists for a name, against what it says of the name: "a can be 0, 3, 9 (since 0 \le a \le 8)".

Bounds, values left out, congruences, and an expression that the values are said to make a perfect square.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator

from prefixloss.detect.maths.expressions import NoValueError, value
from prefixloss.detect.maths.properties import MARKS
from prefixloss.detect.maths.reader import read

MAX_LINES = 200  # of a text
MAX_VALUES = 30
MAX_WINDOW = 400  # characters beside a list
MAX_LISTS = 40  # of a line
_INTEGER = r"-?\d{1,6}"
_LIST = (
    rf"(?P<list>{_INTEGER}(?:(?:,? (?:and|or) |, ?){_INTEGER}){{1,{MAX_VALUES}}})"
    r"(?!\d|\.\d|\s?,?\s?(?:\\[lc]?dots|\.\.\.|\u2026)|\s?[-+*/^])"
)
_LISTED = re.compile(
    r"(?:\b[Vv]alues? (?:for|of) (?P<of>[a-zA-Z]) (?:are|is|include)"
    r"|(?<![\w+*/^-])(?P<can>[a-zA-Z]) (?:can|could) (?:only )?be"
    rf"|(?<![\w+*/^-])(?P<equals>[a-zA-Z])\s?=):? (?:[a-zA-Z]\s?= ?)?{_LIST}"
)
_SQUARES = re.compile(
    r"\b[Vv]alues? of (?P<name>[a-zA-Z]) (?:that makes?|for which|such that) (?P<made>[^,.;:]{1,60}?) "
    rf"(?:is |are )?(?:a )?perfect squares? (?:are|is):? (?:[a-zA-Z]\s?= ?)?{_LIST}"
)
_SIGN = r"(\\ne|\\le|\\ge|<|>)"
_SIGNS = re.compile(r"\\(?:leqslant|leq)\b|\\(?:geqslant|geq)\b|\\neq\b|\u2264|\u2265|\u2260")
_PLAIN = {"\\leqslant": "\\le", "\\leq": "\\le", "\u2264": "\\le ", "\\geqslant": "\\ge", "\\geq": "\\ge"}
_PLAIN |= {"\u2265": "\\ge ", "\\neq": "\\ne", "\u2260": "\\ne "}
_ALTERNATIVES = re.compile(
    r"\b(?:or|if|when|not|no|case|otherwise|unless|suppose|assume|impossible|cannot|contradict\w*|fails?|invalid)\b|\?"
)
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "\\ne": operator.ne,
    "\\le": operator.le,
    "\\ge": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_SEPARATE = re.compile(r"(?<=[.;])\s")


def wrong_list(text: str) -> str | None:
    """The first listed value that the sentence's own conditions rule out, as a reason; None if there is none."""
    text = _SIGNS.sub(lambda sign: _PLAIN[sign[0]], MARKS.sub("", text))
    for line in (" ".join(line.split()) for line in text.split("\n")[:MAX_LINES]):
        for found, _ in zip(_LISTED.finditer(line), range(MAX_LISTS), strict=False):
            name = found["of"] or found["can"] or found["equals"]
            beside = line[: found.start()][-MAX_WINDOW:], line[found.end() :][:MAX_WINDOW]
            conditions = list(_conditions(name, *beside))
            for number in map(int, re.findall(_INTEGER, found["list"])):
                for condition, holds in conditions:
                    if not holds(number):
                        return f"{name} = {number} is ruled out by {condition}"
        if (made := _SQUARES.search(line)) and (wrong := _no_square(made)) is not None:
            return f"{made['made']} is no perfect square for {made['name']} = {wrong}"
    return None


def _conditions(name: str, before: str, behind: str) -> Iterator[tuple[str, Callable[[int], bool]]]:
    """What the sentence before the list and the rest of the list's own say of the name."""
    sentences = _SEPARATE.split(before.rstrip())
    window = f"{' '.join(sentences[-2:])} ; {_SEPARATE.split(behind)[0]}"
    if _ALTERNATIVES.search(window):
        return
    alone = rf"(?<![\w+*/^(-])(?<![+*/-]\s){name}"
    number = rf"({_INTEGER})(?![\w^*/]|\.\d|\s?[-+*/^\\])"
    for said in re.finditer(rf"{alone}\s?{_SIGN}\s?{number}", window):
        yield said[0], lambda at, said=said: _COMPARE[said[1]](at, int(said[2]))  # type: ignore[misc]
    for said in re.finditer(rf"(?<![\w.^*/+-])({_INTEGER})\s?{_SIGN}\s?{name}(?![\w(^])\s?(?=\\|<|>|[.,;)])", window):
        yield said[0], lambda at, said=said: _COMPARE[said[2]](int(said[1]), at)  # type: ignore[misc]
    modulus = r"\s?\\equiv\s?(-?\d{1,6})\s?\\pmod\s?\{?\s?(\d{1,6})\}?"
    for said in re.finditer(alone + modulus, window):
        by = int(said[2])
        yield said[0], lambda at, said=said, by=by: by == 0 or (at - int(said[1])) % by == 0  # type: ignore[misc]


def _no_square(made: re.Match[str]) -> int | None:
    """The first listed value for which the expression is no perfect square."""
    chains = read(made["made"], {made["name"]}).chains
    if len(chains) != 1 or len(chains[0].runs) != 1 or chains[0].runs[0].partial:
        return None
    for at in map(int, re.findall(_INTEGER, made["list"])):
        try:
            number = value(chains[0].runs[0].expression, {made["name"]: at})
        except NoValueError:
            return None
        if not isinstance(number, int) or number < 0 or math.isqrt(number) ** 2 != number:
            return at
    return None
