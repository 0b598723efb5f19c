"""What a text says of single numbers in words: "209 is prime", "24 is divisible by 9"."""

from __future__ import annotations

import math
import re

MAX_CLAIMS = 40  # of a text
MARKS = re.compile(r"\\?\$|\\[()\[\]]")
_CLAIM = re.compile(
    r"(?:(?<=\A)|(?<=[,.:;=]\s)|(?<=\bsince\s)|(?<=\bbut\s)|(?<=\bso\s)|(?<=\bthat\s)|(?<=\band\s)|(?<=\bbecause\s)"
    r"|(?<=\bthus\s)|(?<=\bnumber\s))(?P<number>\d{1,9}) is (?P<no>not )?(?:also |evenly |itself )?"
    r"(?:divisible by (?P<by>\d{1,9})(?![\d^!*/+]|[.,]\d| [*/^+-])"
    r"|(?:a )?(?:(?P<prime>prime)(?: number)?|(?P<square>perfect square))(?! (?:factor|divisor|power|to|if|only)))",
    re.IGNORECASE,
)
DOUBT = re.compile(r"\b(?:if|whether|suppose|assume|neither|nor|unless|either|or|when|false|all)\b|\?", re.IGNORECASE)


def wrong_property(text: str) -> str | None:
    """The first such claim that is false, as a reason; None if there is none."""
    text = " ".join(MARKS.sub("", text).split())
    for claim, _ in zip(_CLAIM.finditer(text), range(MAX_CLAIMS), strict=False):
        begin = text.rfind(". ", 0, claim.start()) + 1
        if not DOUBT.search(text[begin : claim.start()]) and not _is_true(claim):
            return f"{claim[0]} is false"
    return None


def _is_true(claim: re.Match[str]) -> bool:
    number = int(claim["number"])
    if claim["by"]:
        has = int(claim["by"]) > 0 and number % int(claim["by"]) == 0
    elif claim["prime"]:
        has = number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
    else:
        has = math.isqrt(number) ** 2 == number
    return has != bool(claim["no"])
