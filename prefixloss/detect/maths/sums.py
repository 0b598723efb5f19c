r"""Short sums and products in full: \sum_{k=1}^{3} k^2 is ((1)^2 + (2)^2 + (3)^2)."""

from __future__ import annotations

import re

MAX_TERMS = 24
_SUM = re.compile(
    r"\\(?P<kind>sum|prod)(?:\\limits)?\s?_\s?\{\s?(?P<name>[a-z])\s?=\s?(?P<low>\d{1,6})\s?\}\s?\^\s?"
    r"(?:\{\s?(?P<high>\d{1,6})\s?\}|(?P<digit>\d))\s?(?P<term>(?:\\(?:frac|left|right|cdot)(?![A-Za-z])"
    r"|[a-z\d\s*^/(){}+.-]){1,60})(?=\s?(?:&|=|<|>|\\approx|\\le|\\ge|\\\)|\\\]|\$|\Z))"
)


def written_out(text: str) -> str:
    return _SUM.sub(_written_out, text) if "\\sum" in text or "\\prod" in text else text


def _written_out(found: re.Match[str]) -> str:
    low, high, term = int(found["low"]), int(found["high"] or found["digit"]), found["term"]
    letters = set(re.findall(r"(?<![\\A-Za-z])[a-z]+", term))
    if not 0 <= high - low < MAX_TERMS or letters != {found["name"]} or _is_sum(term):
        return found[0]
    at = re.compile(rf"(?<![\\A-Za-z]){found['name']}(?![A-Za-z])")
    terms = (f"({at.sub(f'({number})', term)})" for number in range(low, high + 1))
    return f"({('+' if found['kind'] == 'sum' else '*').join(terms)})"


def _is_sum(term: str) -> bool:
    """Whether a sign stands outside all brackets: it is not clear what belongs to the sum then."""
    depth = 0
    for character in term.strip():
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(character, 0)
        if depth < 0 or (depth == 0 and character in "+-"):
            return True
    return depth != 0
