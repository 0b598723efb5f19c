"""The last digits of numbers and powers: "2^{12} has a units digit of 4", "the last two digits of 7^4 are 01"."""

from __future__ import annotations

import re

from prefixloss.detect.maths.properties import Rule

MAX_EXPONENT = 10**9
_POWER = r"(?P<base>\d{1,30})(?:\s?\^\s?(?:\{\s?(?P<braced>\d{1,9})\s?\}|(?P<exponent>\d{1,9})))?"
_ALONE = r"(?<![\w.,^+*/!(-])(?<![+*/^(-]\s)(?<!dot\s)(?<!times\s)"  # nothing before that the number is a part of
_WHICH = r"(?:(?:units?|ones|last|final) digit|last (?P<count>two|three) digits)"
_END = (
    r"(?![\w^!%(]|[.,:]\d|\s?[-+*/^!]|\s?\\(?!\))|\sor\b|,\s\d|\sand\s\d|\s(?:in|modulo|times|more|less|different)\b)"
)
_SAID = re.compile(rf"\b{_WHICH} of {_POWER} (?:is|are|=|equals) (?:also )?(?P<digits>\d{{1,3}}){_END}", re.IGNORECASE)
_HAS = re.compile(
    rf"{_ALONE}{_POWER}(?: has (?:an?|the|its)? ?{_WHICH} (?:of |is |equal to )?|(?:,? which)? ends? (?:in|with) "
    rf"(?:an? |the digits? )?)(?P<digits>\d{{1,3}}){_END}",
    re.IGNORECASE,
)
_COUNTS = {"two": 2, "three": 3}


def _is_true(claim: re.Match[str]) -> bool:
    digits = claim["digits"]
    count = _COUNTS.get((claim["count"] or "").lower(), len(digits))
    if len(digits) > count or (claim["count"] is None and "digit " in claim[0] and len(digits) > 1):
        return True  # "the last digit of 12 is 10 less"
    exponent = int(claim["braced"] or claim["exponent"] or 1)
    return pow(int(claim["base"]), exponent, 10**count) == int(digits)


RULES = (Rule(_SAID, _is_true), Rule(_HAS, _is_true))
