"""What a text says of single numbers in words: "209 is prime", "24 is divisible by 9"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

MARKS = re.compile(r"\\?\$|\\[()\[\]]")
DOUBT = re.compile(r"\b(?:if|whether|suppose|assume|neither|nor|unless|either|or|when|false|all)\b|\?", re.IGNORECASE)
_CLAIM = re.compile(
    r"(?:(?<=\A)|(?<=[,.:;=]\s)|(?<=\bsince\s)|(?<=\bbut\s)|(?<=\bso\s)|(?<=\bthat\s)|(?<=\band\s)|(?<=\bbecause\s)"
    r"|(?<=\bthus\s)|(?<=\bnumber\s))(?P<number>\d{1,9}) is (?P<no>not )?(?:also |evenly |itself )?"
    r"(?:divisible by (?P<by>\d{1,9})(?![\d^!*/+]|[.,]\d| [*/^+-])"
    r"|(?:a )?(?:(?P<prime>prime)(?: number)?|(?P<square>perfect square))(?! (?:factor|divisor|power|to|if|only)))",
    re.IGNORECASE,
)


class Rule(NamedTuple):
    """A claim's pattern, and whether a match of it is true; in doubt it is."""

    pattern: re.Pattern[str]
    is_true: Callable[[re.Match[str]], bool]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _is_true(claim: re.Match[str]) -> bool:
    number = int(claim["number"])
    if claim["by"]:
        has = int(claim["by"]) > 0 and number % int(claim["by"]) == 0
    elif claim["prime"]:
        has = is_prime(number)
    else:
        has = math.isqrt(number) ** 2 == number
    return has != bool(claim["no"])


RULES = (Rule(_CLAIM, _is_true),)
