"""The maths detector on equations that are rewritten: each wrong rewriting beside the right one."""

import pytest
from maths_steps import MATHS, step

pytest.importorskip("sympy")


CASES = "First, take $x = 1$. First, take $y = 2$. First, take $k = 3$."  # so that nothing is known of the names


REWRITINGS = [
    ("$10 + (62 - x) = 36$. Simplifying the equation gives us: $x = {}$.", "6", "36"),
    ("Solving $10 + 4x = 100$ gives us $x = {}$.", "20", "22.5"),
    (r"\[ \frac{{6}}{{10}} = \frac{{x}}{{8 - x}} \Rightarrow x = {} \]", r"\frac{24}{15}", "3"),
    ("$x^2 + 30x = 100x + 150$. Rearranging gives $x^2 - 70x {} 150 = 0$.", "+", "-"),
    ("$4x = k^2x - 3k^2$, which simplifies to $0 = (k^2 - 4)x {} 3k^2$.", "+", "-"),
    ("$x^2y + xy^2 = 6$, which can be rewritten as $xy(x {} y) = 6$.", "-", "+"),
    ("$(x+1)^2 + (k+1)^2 = 4$. Expanding, $x^2 + k^2 + 2x + 2k = {}$.", "3", "2"),
    (r"\[ 16 + x = 27, \] \[ x = {}. \]", "8", "11"),
    ("$x^2 - 3x + 2 = 322$: $x^2 - 3x - {} = 0$", "318", "320"),
    ("$(8x + y) - (x + y) = -8$. Simplifying this gives $7x = {}$.", "-9", "-8"),
    (r"$6 = r * 80\pi$, so $r = \frac{{6}}{{{}\pi}}$", "160", "80"),
    ("$61 + 2x = 33$, so $2x = {}$", "-28.55", "-28"),
    ("$3x = 10$, so $x = {}$", "3.43", "3.33"),
    ("$k = 42 * 56$, so $k = {}$.", "2336", "2352"),
    ("$k = 2310 / 42$\n$k = {}$", "18", "55"),
    ("Then $(x + k)(x + y) = x^2 + xy + kx + {}$.", "ky^2", "ky"),
    ("Then $k = 38x + 8 + 19y + 2 - 18 = 38x + 19y {} 8$.", "+", "-"),
]


@pytest.mark.parametrize(("text", "wrong", "right"), REWRITINGS)
def test_a_wrong_rewriting_is_accused_and_the_right_one_is_not(text: str, wrong: str, right: str) -> None:
    assert step(CASES, text.format(wrong)) == 1
    assert step(CASES, text.format(right)) is None


def test_a_rewriting_may_be_in_the_next_step() -> None:
    before = "$x^2 - 5x + 2 = 16$"
    assert step(CASES, before, "Simplifying further, we get: $x^2 - 5x - 12 = 0$") == 2
    assert step(CASES, before, "Simplifying further, we get: $x^2 - 5x - 14 = 0$") is None


@pytest.mark.parametrize(
    "text",
    [
        "$x + y = 7$ and $3x + y = 45$",  # a system
        "$x + y = 7$ and $x - y = 1$, which implies $x = 3 + y - 2$",  # of both
        "$x + y = 7$. Substituting into the other equation, we get $2x + y = 9$.",
        "$xy = 19$. We know that $x + y = 14$. Therefore $x^2 + y^2 + 2xy = 196$.",
        "$x^2 - 5x + 6 = 0$, so $x = 3$",
        "$x^2 = 3x$. Dividing both sides by x, we get $x = 3$.",
        "If $x + 1 = 2$, then $x + 1 = 3$, simplified",
        "$x = 2$, or rewritten, $x = 3$",  # two values
        "$x = (5 + 1)/2 = 3$ and $x = 2$, $x = (5 + 1)/2$ or, with the minus sign, $x = 2$",
        "$x - 2 = 0$\n$x - 3 = 0$",  # two cases
        "$2x + y = 3 + y^2$. Simplifying gives $2x = 3$.",
        "$1.157625x = 100$, which becomes $1.158x = 100$",  # rounded
        "$3 = 4 + 2x - 2x$, so $x = 3$",  # no solution anyway
        "We solve $x^2 + 1 = (x + 3)^2$ for x.",  # an equation, not an expansion
        "The distances are the same: $(x+1)^2 + y^2 = (x+3)^2 + y^2$.",
        "The distances are the same: $(x+1)^2 + k^2 + y^2 + y = (x+3)^2 + k^2 + y^2 + y$.",
        "To solve is $(x+1)^2 + k^2 = x^2 + k^2 + 4x + 9$.",  # half of the terms are the same by chance
        "-14 = x + 2 -16 = x",  # two claims in a row
        "$xi + yi^2 = xi - y$",
    ],
)
def test_what_takes_other_equations_in_is_not_accused(text: str) -> None:
    assert step(CASES, text) is None


def test_what_is_rewritten_within_a_supposition_has_to_be_the_same_too() -> None:
    assert step(CASES, "If k = x + 1, then $k = x(x + 1) + 1 = x^2 + x + 2x$.") == 1
    assert step(CASES, "If k = x + 1, then $k = x(x + 1) + 1 = x^2 + x + 1$.") is None


def test_a_system_of_equations_may_be_combined_in_the_next_step() -> None:
    assert step(CASES, "$x + 2k = 12$ and $2x + k = 24$", "Combining, $x + k = 12$") is None
    assert step(CASES, "$x + 2k = 12$", "Simplifying, $x + k = 12$") == 2


def test_an_equation_said_before_is_no_identity_in_a_chain() -> None:
    given = "We solve $2^{x-1} = 3 / 5^x$."
    assert step(CASES, given, "$2^{x-1} = 3 * 5^{-x} = 3 / 5^x$") is None
    assert step(CASES, "$2^{x-1} = 3 * 5^{-x} = 3 / 5^x$") == 1


def test_what_is_only_mentioned_gives_no_name_a_value() -> None:
    assert MATHS.detect("y + 1 = 5", ["The lines $x = 4$ and $y = 3$ are drawn."]).step is None
    assert MATHS.detect("y + 1 = 5", ["So $x = 4$ and $y = 3$."]).step == 0
