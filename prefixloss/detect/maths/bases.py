r"""Numbers with their base as a subscript, in decimal: 1121_3 and (1121)_{3} are (43)."""

from __future__ import annotations

import re

_NUMERAL = re.compile(
    r"(?<![\w.,^}])(?:\((?P<inner>\d{1,40})\)|(?P<bare>\d{1,40}))\s?_\s?"
    r"(?:\{\s?(?P<braced>\d{1,2})\s?\}|(?P<base>\d{1,2}))(?![\w^!]|[.,]\d)"
)


def spelled(text: str) -> str:
    return _NUMERAL.sub(_decimal, text)


def _decimal(found: re.Match[str]) -> str:
    """What has a digit that its base has not is no such number, and keeps its spelling."""
    digits, base = found["inner"] or found["bare"], int(found["braced"] or found["base"])
    if not 2 <= base <= 10 or any(int(digit) >= base for digit in digits):
        return found[0]
    return f"({int(digits, base)})"
