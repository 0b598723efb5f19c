r"""Which number divides which: "7 \mid 91", "4 \nmid 3 + 1", "8 does not divide 24"."""

from __future__ import annotations

import re

from prefixloss.detect.maths.properties import Rule

_NUMBER = r"\d{1,12}"
_CLAIM = re.compile(
    rf"(?<![\w.^+*/|-])(?<![+*/^|-]\s)(?<!dot\s)(?<!times\s)(?P<divisor>{_NUMBER})\s?"
    r"(?:(?P<no>\\nmid|\\not\s?\\mid|\u2224|does not divide)|\\mid|\u2223|divides)(?![a-z])\s?"
    rf"(?P<sum>{_NUMBER}(?:\s?[+-]\s?{_NUMBER})?)(?![\w^!(]|[.,]\d|\s?[-+*/^(\\])"
)
_PART = re.compile(rf"([+-]?)\s?({_NUMBER})")


def _is_true(claim: re.Match[str]) -> bool:
    divisor = int(claim["divisor"])
    number = sum(-int(part) if sign == "-" else int(part) for sign, part in _PART.findall(claim["sum"]))
    return (divisor > 0 and number % divisor == 0) != bool(claim["no"])


RULES = (Rule(_CLAIM, _is_true),)
