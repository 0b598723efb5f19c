"""What a text says of numbers in words, rule by rule; and whether it takes back what it said.

A rule is a pattern of a claim and a check of its match. In a sentence that doubts, asks or lists cases nothing is
claimed.
"""

from __future__ import annotations

import re

from prefixloss.detect.maths import amounts, divisors, final_digits, properties
from prefixloss.detect.maths.clocks import wrong_time
from prefixloss.detect.maths.listed import wrong_list
from prefixloss.detect.maths.properties import DOUBT, MARKS, Rule

MAX_CLAIMS = 40  # of a text, by each rule
RULES: tuple[Rule, ...] = (*properties.RULES, *divisors.RULES, *final_digits.RULES, *amounts.RULES)
_TAKES_BACK = re.compile(
    r"\b(?:oops|wait,|apolog\w+|(?:a|my|the|our) mistake|miscalculat\w+|correction:"
    r"|let(?:'s| me| us) correct\b|should (?:be|have been) [^.;]{1,40},? (?:and )?not\b)",
    re.IGNORECASE,
)


def wrong_statement(text: str) -> str | None:
    """The first claim that is false, as a reason; None if there is none."""
    flat = " ".join(MARKS.sub("", text).split())
    for rule in RULES:
        for claim, _ in zip(rule.pattern.finditer(flat), range(MAX_CLAIMS), strict=False):
            begin = flat.rfind(". ", 0, claim.start()) + 1
            if not DOUBT.search(flat[begin : claim.start()]) and not rule.is_true(claim):
                return f"{claim[0]} is false"
    return wrong_time(text) or wrong_list(text)


def takes_back(text: str) -> bool:
    """Whether a text says itself that something in it was wrong: "Wait, that should be 12, not 14"."""
    return _TAKES_BACK.search(text) is not None
