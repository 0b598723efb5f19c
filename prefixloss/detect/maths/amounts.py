"""How many numbers of a kind lie in a range: "there are 33 multiples of 3 from 1 to 100"."""

from __future__ import annotations

import math
import re

from prefixloss.detect.maths.properties import Rule, is_prime

MAX_PRIME = 10_000  # up to which primes are counted
_NUMBER = r"(\d{1,3}(?:,\d{3})+|\d{1,9})(?![\d^]|[.,]\d)"
_KIND = (
    rf"(?:multiples of (?P<of>{_NUMBER})|(?P<square>perfect squares)|(?P<cube>perfect cubes)"
    r"|(?P<prime>primes?(?: numbers)?)|(?P<odd>odd (?:numbers|integers))|(?P<even>even (?:numbers|integers)))"
)
_DIVIDED = rf"(?:that |which )?(?:are )?(?:divisible by|multiples of) (?P<by>{_NUMBER})"
_MORE = (  # conditions
    r"(?!\)?,? \(?(?:inclusive|that|which|and|or|but|are|not|with|whose|divisible|when|apart|except|other)\b)"
)
_RANGE = (
    rf"(?:(?:between|from) (?P<low>{_NUMBER}) (?:and|to|through) (?P<high>{_NUMBER})"
    rf"|(?P<limit>less than or equal to|less than|up to|below|not exceeding|under) (?P<top>{_NUMBER}))"
    r"(?P<inclusive>,? \(?inclusive\b)?"
)
_AMOUNT = (
    r"\b(?:there (?:are|is)|we have|a total of|or approximately|or about|contains?|this gives) (?:exactly |only )?"
    rf"(?P<amount>{_NUMBER}) (?:positive |natural )?"
)
_OF_A_KIND = re.compile(rf"{_AMOUNT}{_KIND} {_RANGE}{_MORE}", re.IGNORECASE)
_OF_NUMBERS = re.compile(rf"{_AMOUNT}(?:numbers|integers) {_RANGE} {_DIVIDED}{_MORE}", re.IGNORECASE)


def _is_true(claim: re.Match[str]) -> bool:
    """A range that may be meant with its ends or without has several true counts."""
    groups = claim.groupdict()
    by = _number(groups.get("of") or groups.get("by") or "1")
    if by < 1:
        return True
    if groups["low"]:
        low, high = _number(groups["low"]), _number(groups["high"])
        shifts = (0,) if groups["inclusive"] else (0, 1)
        ranges = [(low + a, high - b) for a in shifts for b in shifts]
    else:
        top = _number(groups["top"])
        with_it = groups["limit"].lower() in ("less than or equal to", "up to", "not exceeding")
        ranges = [(first, top if with_it else top - 1) for first in (0, 1)]
    return any(_count(groups, by, *ends) in (None, _number(groups["amount"])) for ends in ranges)


def _count(kind: dict[str, str | None], by: int, low: int, high: int) -> int | None:
    """None for more than can be counted."""
    if kind.get("prime"):
        return None if high > MAX_PRIME else sum(map(is_prime, range(low, high + 1)))
    if kind.get("square"):
        return math.isqrt(high) - (math.isqrt(low - 1) if low > 0 else -1)
    if kind.get("cube"):
        return None if high > MAX_PRIME else sum(low <= n**3 <= high for n in range(high + 1))
    if kind.get("odd"):
        return (high + 1) // 2 - low // 2
    return high // (2 if kind.get("even") else by) - (low - 1) // (2 if kind.get("even") else by)


def _number(text: str) -> int:
    return int(text.replace(",", ""))


RULES = (Rule(_OF_A_KIND, _is_true), Rule(_OF_NUMBERS, _is_true))
