"""The maths detector on what is read across formulas and in other notations: each wrong claim beside the right one."""

import pytest
from maths_steps import step

CLAIMS = [
    (r"\[ (7 + 5)(3) \] \[ = 12 \cdot 3 \] \[ = {} \]", "38", "36"),
    ("$$ 2(x + 3) + 4 $$\n$$ = 2x + 6 + 4 $$\n$$ = 2x + {} $$", "9", "10"),
    (r"\[ (1 - x)^3 = (1 - 2x + x^2)(1 - x) \] \[ = 1 - 3 x + {} x^2 - x^3 \]", "2", "3"),
    (r"\[ \frac{{6!}}{{2}} = {} \cdot 5! \]", "4", "3"),
    (r"The prime factorization of \(k = 462\) is \(2 \cdot 3 \cdot {} \cdot 11\).", "5", "7"),
    (r"The gcd of 30 and 4 is 2, and the gcd of 30 and 45 is also {}.", "5", "15"),
    ("Written in other bases, $43 = 1121_{}$.", "4", "3"),
    (r"So \(245_7 + (36)_{{7}} = {}_7\).", "311", "314"),
]


@pytest.mark.parametrize(("text", "wrong", "right"), CLAIMS)
def test_a_wrong_claim_is_accused_and_the_right_one_is_not(text: str, wrong: str, right: str) -> None:
    assert step("1 + 1 = 2", text.format(wrong)) == 1
    assert step("1 + 1 = 2", text.format(right)) is None


def test_lines_in_one_name_are_each_rewritten_from_the_one_above() -> None:
    pytest.importorskip("sympy")
    lines = r"\[ (5 + x)(4) = 48, \] \[ 5 + x = 12, \] \[ x = {}. \]"
    assert step("For $x = 1$, nothing.", lines.format("8")) == 1
    assert step("For $x = 1$, nothing.", lines.format("7")) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\[ 2 + 3 = 5 \] \[ y = 7 \]",  # a display of its own
        "The prime factorization of 12 is unique. 2 is its least.",
        "Digits that base 3 has not: $43 = 1141_3$.",
        "We have $a_2 = 5$ and $43 = c_3$.",
        r"The gcd of 30 and 45 is also a divisor of 60.",
    ],
)
def test_what_is_no_such_claim_is_not_read_as_one(text: str) -> None:
    assert step("1 + 1 = 2", text) is None
