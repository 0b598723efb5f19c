"""Times of day: "9 am + 5 hours = 2 pm", "10:30 pm - 8:45 am = 13 hours 45 minutes".

Only sums and differences that say all there is to know are looked at; hours may run past midnight.
"""

from __future__ import annotations

import re
from fractions import Fraction

from prefixloss.detect.maths.properties import DOUBT, MARKS

MAX_CLAIMS = 40  # of a text
_HALF, _DAY = 720, 1440  # minutes
_TIME = r"(?:\d{1,2}(?::[0-5]\d)?\s?(?:[ap]\.m\.|[ap]m\b)|noon\b|midnight\b)"
_SPAN = r"\d{1,3}(?:\.\d{1,3})?\s?-?(?:hours?|hrs?|minutes?|mins?)\b"
_SPANS = rf"{_SPAN}(?:,?\s(?:and\s)?{_SPAN})?"
_BEFORE = r"(?<![\w+*/:.=-])(?<![+*/:=-]\s)"  # nothing that is a part of the claim
_BEHIND = r"(?!\s?[-+*/:\d]|\s[A-Z]{2,4}\b)"  # nor a time zone
_IS = r"\s?(?:=|is|equals)\s?"
_SHIFTED = re.compile(
    rf"{_BEFORE}(?P<start>{_TIME})(?P<shifts>(?:\s?(?:[-+]|plus|minus)\s?{_SPANS}){{1,4}}){_IS}"
    rf"(?P<end>{_TIME}|\d{{1,2}}:[0-5]\d\b){_BEHIND}",
    re.IGNORECASE,
)
_BETWEEN = re.compile(
    rf"{_BEFORE}(?P<end>{_TIME})\s?(?:-|minus)\s?(?P<start>{_TIME}){_IS}(?P<span>{_SPANS}){_BEHIND}", re.IGNORECASE
)
_SHIFT = re.compile(rf"([-+]|plus|minus)\s?({_SPANS})", re.IGNORECASE)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s?-?([hm])", re.IGNORECASE)


def wrong_time(text: str) -> str | None:
    """The first such claim that is false, as a reason; None if there is none."""
    text = " ".join(MARKS.sub("", text).split())
    for pattern, is_true in ((_SHIFTED, _shifted), (_BETWEEN, _between)):
        for claim, _ in zip(pattern.finditer(text), range(MAX_CLAIMS), strict=False):
            begin = max(text.rfind(". ", 0, claim.start()), text.rfind("; ", 0, claim.start())) + 1
            if not DOUBT.search(text[begin : claim.start()]) and not is_true(claim):
                return f"{claim[0]} is false"
    return None


def _shifted(claim: re.Match[str]) -> bool:
    """A start without an hour of the clock, as 13 pm, says nothing: in doubt it is true."""
    start, end = _minutes(claim["start"]), _minutes(claim["end"])
    if start is None or end is None:
        return True
    for sign, spans in _SHIFT.findall(claim["shifts"]):
        start += -_length(spans) if sign in ("-", "minus") else _length(spans)
    told = re.search(r"[apn]", claim["end"], re.IGNORECASE)  # else it may be of either half
    return (start - end) % (_DAY if told else _HALF) == 0


def _between(claim: re.Match[str]) -> bool:
    start, end = _minutes(claim["start"]), _minutes(claim["end"])
    return start is None or end is None or (end - start - _length(claim["span"])) % _DAY == 0


def _minutes(time: str) -> Fraction | None:
    """Since midnight; None for an hour that no such clock has."""
    time = time.lower()
    if time in ("noon", "midnight"):
        return Fraction(_HALF if time == "noon" else 0)
    hour, _, minute = re.sub(r"[^\d:]", "", time).partition(":")
    half = re.search(r"[ap]", time)
    if half is None:
        return Fraction(60 * int(hour) + int(minute or 0)) if int(hour) < 25 else None
    if not 1 <= int(hour) <= 12:
        return None
    return Fraction(60 * (int(hour) % 12) + int(minute or 0) + _HALF * (half[0] == "p"))


def _length(spans: str) -> Fraction:
    """In minutes."""
    return sum((Fraction(n) * (60 if unit in "hH" else 1) for n, unit in _PART.findall(spans)), Fraction(0))
