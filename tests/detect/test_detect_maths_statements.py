"""What the maths detector checks of statements in words, solutions and lengths: each right claim beside a wrong one."""

import pytest
from maths_steps import step

from prefixloss.detect.maths.systems import wrong_common_solution

SAID = [
    # last digits
    (
        r"We have \(2^n = 2^{12}\) has a units digit of 6 (since",
        r"We have \(2^n = 2^{12}\) has a units digit of 4 (since",
    ),
    ("The last digit of 7^{2023} is 3.", "The last digit of 7^{2023} is 7."),
    ("The last two digits of 7^4 are 01.", "The last two digits of 7^4 are 43."),
    ("The last digit of 324 is 4", "The last digit of 324 is 3"),
    ("Here 2^10 ends in 24.", "Here 2^10 ends in 26."),
    ("3 + 2^{12} has a units digit of 9", "3, 2^{12} has a units digit of 9"),
    ("The last digit of 3^4 is 7 times that", "The last digit of 3^4 is 7"),
    ("Either the last digit of 3^4 is 7 or 1.", "Now the last digit of 3^4 is 7."),
    ("The last digit of 3^4 is 7 or 1.", "The last digit of 3^4 is 7, I see."),
    ("The last two digits of 7^2 are 49.", "The last two digits of 7^2 are 9."),
    # which number divides which
    (r"\(7 \mid 9 - 2\)", r"\(7 \mid 9 - 3\)"),
    (r"\(7 \mid 91\)", r"\(7 \mid 92\)"),
    (r"\(5 \nmid 3 + 1 = 4\)", r"\(4 \nmid 3 + 1 = 4\)"),
    ("So 8 does not divide 28.", "So 8 does not divide 24."),
    ("So 8 divides 24.", "So 8 divides 28."),
    (r"8 \mid 20 \cdot 2", r"8 \mid 20"),
    (r"1 + 8 \mid 18", r"1, 8 \mid 18"),
    (r"If 8 \mid 20, it is even", r"Now 8 \mid 20, it is even"),
    # how many there are
    (
        "There are 9 numbers from 1 to 99 that are divisible by 10.",
        "There are 10 numbers from 1 to 99 divisible by 10.",
    ),
    (
        "There are 10 multiples of 11 between 11 and 110, inclusive.",
        "There are 8 multiples of 11 between 11 and 110, inclusive.",
    ),
    ("There are 8 multiples of 11 between 11 and 110.", "There are 7 multiples of 11 between 11 and 110."),
    ("So, there are 30 multiples of 10 less than or equal to 300.", "So, there are 31 multiples of 10 less than 300."),
    ("There are 13 primes less than 42.", "There are 14 primes less than 42."),
    ("There are 10 perfect squares from 1 to 100.", "There are 12 perfect squares from 1 to 100."),
    ("There are 9 perfect squares from 1 to 100.", "There are 11 perfect squares from 1 to 100."),
    ("There are 50 even numbers from 1 to 100.", "There are 48 even numbers from 1 to 100."),
    ("There are 4 primes up to 7.", "There are 4 primes less than 7."),
    ("There are 31 multiples of 10 up to 300.", "There are 32 multiples of 10 up to 300."),
    ("There are 4 perfect cubes from 1 to 100.", "There are 5 perfect cubes from 1 to 100."),
    ("There are 50 odd numbers from 1 to 99.", "There are 47 odd numbers from 1 to 99."),
    ("There are 6 multiples of 7 up to 30 that are even.", "There are 6 multiples of 7 up to 30."),
    ("There are 4 - 1 multiples of 7 up to 30 with that.", "There are 3 multiples of 7 up to 30."),
    ("Take 3 primes less than 42.", "We have 3 primes less than 42."),
    ("There are 3 primes less than 42, and more.", "There are 3 primes less than 42, I see."),
    ("There are 8 primes from 2 to 42 (inclusive) with 1.", "There are 8 primes from 2 to 42 (inclusive)."),
    # numbers as before
    ("So 3 + 4 = 7, which is more than 6", "So 3 + 4 = 8, which is more than 6"),
    ("The second square is 3 + 4 = 7", "The second square is 3 + 4 = 8"),
    ("So 7.5 + 3.333... + 0.001388... = 7801/720", "So 7.5 + 3.333 + 0.001388 = 7801/720"),
    ("So 1/6 = 0.1666...", "So 1/6 = 0.1777..."),
    # rounding, where many digits are written
    (r"0.971 \times 1.164231 \approx 1.1305", r"0.971 \times 1.164231 \approx 1.1358"),
    (r"0.971 \times 1.164231 \approx 1.14", r"0.971 \times 1.164231 \approx 1.15"),
    (r"\sqrt{2} \approx 1.4", r"\sqrt{2} \approx 1.422"),
    (r"\sqrt{960000} \approx 985", r"\sqrt{960000} \approx 985.1"),
    (r"1999 \div 31 \approx 64.1613, which is not an integer", r"1999 \div 31 \approx 64.1613, which is not small"),
    # what is taken back
    (
        "So 14 * 71 = 999. Since it is less, a should be 5, not 0.",
        "So 14 * 71 = 999. Since it is less, a is 5, and not 0.",
    ),
    ("We get 2 + 2 = 5. Oops, it is 4", "We get 2 + 2 = 5. Yes, it is 5"),
    ("We get 2 + 2 = 5. Wait, it is 4", "We get 2 + 2 = 5. We wait for more"),
]


@pytest.mark.parametrize(("right", "wrong"), SAID)
def test_a_right_statement_passes_and_its_wrong_twin_is_accused(right: str, wrong: str) -> None:
    assert step("1 + 1 = 2", right) is None
    assert step("1 + 1 = 2", wrong) == 1


PAIRS = r"Determine all pairs $(a, b)$ of positive integers for which $a^{3}+2 a b=2013$."
ROOT = r"Determine all values of $x$ for which $2+\sqrt{x-2}=x-2$."
TWO = r"Find all pairs $(x, y)$ such that $x + y = 5$ and $x y = 6$."
SOLUTIONS = [
    (
        PAIRS,
        r"So \((1, 1006)\) and \((3, 331)\) satisfy the equation.",
        r"So \((1, 1006)\) and \((61, 106)\) satisfy the equation.",
    ),
    (ROOT, r"So \( x = 6 \) is a valid solution.", r"So \( x = 6 \) and \( x = 3 \) are valid solutions."),
    (ROOT, r"Clearly \( x = 3 \) is not a solution.", r"Clearly \( x = 3 \) is a solution."),
    (ROOT, r"Does \( x = 3 \) satisfy it?", r"Now \( x = 3 \) satisfies it."),
    (TWO, "(2, 3) and (3, 2) are solutions.", "(2, 3) and (3, 3) are solutions."),
    (TWO, "(1, 4) satisfies the first equation.", "(1, 4) satisfies the equations."),
    (TWO, "f(1, 4) and (2, 3) are solutions.", "(1, 4) and (2, 3) are solutions."),
    ("One pair $(x, y)$ has $x + y = 5$.", "(1, 1) is a solution of a riddle.", "1 + 4 = 6"),
    ("Find the pairs $(x, y)$ such that $x + y = z$.", "(1, 4) is a solution.", "1 + 4 = 6"),
    ("Let $y = x^2$. Find the pairs $(x, y)$ such that it is odd.", "(2, 3) is a solution.", "1 + 4 = 6"),
]


@pytest.mark.parametrize(("problem", "right", "wrong"), SOLUTIONS)
def test_a_stated_solution_is_put_into_the_problem_s_equations(problem: str, right: str, wrong: str) -> None:
    assert step("We start.", right, problem=problem) is None
    assert step("We start.", wrong, problem=problem) == 1


HEXAGON = "Hexagon $A B C D E F$ has vertices $A(0,0), B(4,0), C = (7,2), D(7,5), E(3,5)$, $F(0,3)$."
LENGTHS = [
    (HEXAGON, r"A height of \(DE = 4\) units", r"A height of \(DE = 5\) units"),
    (
        HEXAGON,
        r"\( BC = \sqrt{3^2 + 2^2} = \sqrt{13} \approx 3.61 \)",
        r"\( BC = \sqrt{3^2 + 2^2} = \sqrt{13} \approx 3.16 \)",
    ),
    (HEXAGON, r"If \(DE = 5\), it is a square", r"Now \(DE = 5\), it is a square"),
    (HEXAGON, r"\(DG = 5\)", r"\(DE = 5\)"),
    ("[asy] pair D = (7,5), E = (3,5); [/asy] It is drawn.", r"\(DE = 5\)", "5 = 4"),
    ("First $D = (7,5)$, $E = (3,5)$, later $E = (2,5)$.", r"\(DE = 5\)", "5 = 4"),
]


@pytest.mark.parametrize(("problem", "right", "wrong"), LENGTHS)
def test_a_length_is_the_distance_of_the_problem_s_points(problem: str, right: str, wrong: str) -> None:
    assert step("1 + 1 = 2", right, problem=problem) is None
    assert step("1 + 1 = 2", wrong, problem=problem) == 1


def test_a_number_in_another_base_is_read_before_a_remark() -> None:
    assert step("1 + 1 = 2", r"We get \( 41 = 1121_3 \), which still has more than two digits.") == 1
    assert step("1 + 1 = 2", r"We get \( 41 = 1112_3 \), which still has more than two digits.") is None


def test_a_problem_s_letters_with_spaces_are_one_name() -> None:
    problem = r"Let $T=67$. Rectangles lie in the plane with $A F=\frac{4 T}{3}$."
    assert step(r"\[AF = \frac{268}{3} \approx 89.33\]", problem=problem) is None
    assert step(r"\[AF = \frac{286}{3} \approx 95.33\]", problem=problem) == 0


LISTS = [
    (
        r"\(a\) can be 0, 3, or 6 (since \(0 \leq a \leq 8\)).",
        r"\(a\) can be 0, 3, 6, or 9 (since \(0 \leq a \leq 8\)).",
    ),
    (r"\(a\) can be 1, 3, or 6 (since \(0 < a\)).", r"\(a\) can be 0, 3, or 6 (since \(0 < a\))."),
    (
        r"So \(A \neq 8\). Possible values for \(A\) are 2, 5.",
        r"So \(A \neq 8\). Possible values for \(A\) are 2, 5, 8.",
    ),
    (r"As \(A \equiv 2 \pmod{3}\), \(A = 2, 5, 8\)", r"As \(A \equiv 2 \pmod{3}\), \(A = 2, 5, 7\)"),
    (r"So \(n \le 1\) or \(n \ge 9\). Values of n are 0, 1, 9, 10.", r"So \(n \ge 9\). Values of n are 8, 9."),
    (r"Here \(2a \le 8\). Values of a are 2, 9, 5.", r"Here \(a \le 8\). Values of a are 2, 9, 5."),
    (r"Here \(a \le 8\). So. Now. Values of a are 2, 9, 5.", r"Here \(a \le 8\). So. Values of a are 2, 9, 5."),
    (r"Here \(a < 3\). \(a = 1, 2, 3, \ldots\)", r"Here \(a < 3\). \(a = 1, 2, 3\)"),
    (
        r"The values of \( k \) that make \( k(10 - k) \) a perfect square are \( k = 1, 2, 8, 9 \).",
        r"The values of \( k \) that make \( k(10 - k) \) a perfect square are \( k = 1, 2, 3, 9 \).",
    ),
]


@pytest.mark.parametrize(("right", "wrong"), LISTS)
def test_listed_values_keep_what_the_sentence_says_of_them(right: str, wrong: str) -> None:
    assert step("1 + 1 = 2", right) is None
    assert step("1 + 1 = 2", wrong) == 1


def test_a_congruence_with_the_word_modulo_and_a_list_are_read() -> None:
    assert step("1 + 1 = 2", r"It is \(738 - 360 = 378 - 360 = 18\) modulo \(360\).") is None
    assert step("1 + 1 = 2", r"It is \(738 - 360 = 378 - 360 = 19\) modulo \(360\).") == 1
    assert step("1 + 1 = 2", r"So the last digits of \(3^2, (2*3)^2\) are 9, 6.") is None
    assert step("1 + 1 = 2", r"So there are \(3^2, (2*3)^2\) are 9.") == 1


SYSTEMS = [
    ("and x - y = 1, x = 3, y = 2.", "and x - y = 1, x = 3, y = 1."),
    ("and x = y: x = 2.5 and y = 2.5", "and x = y: x = 2 and y = 3"),
    ("and x - y = 1 if x = 3, y = 1.", "and x - y = 1 so x = 3, y = 1."),
    ("and x + y = z: x = 3, y = 1.", "and x + y = 4: x = 3, y = 1."),
]


@pytest.mark.parametrize(("right", "wrong"), SYSTEMS)
def test_a_common_solution_solves_the_equations_of_its_sentence(right: str, wrong: str) -> None:
    again = ["Now x = 7 and y = 8.", "Next x = 9 and y = 7."]  # the names stand for several things
    assert step(*again, f"Solving x + y = 5 {right}") is None
    assert step(*again, f"Solving x + y = 5 {wrong}") == 2


@pytest.mark.parametrize(
    "text",
    [
        "and x - y = 1 is short. x = 3, y = 1.",
        "alone: x = 3, y = 1.",
        "and 2x = y: x = 3.",
        "and 3x = 6: x = 3, y = 2.",
    ],
)
def test_equations_of_another_sentence_or_without_all_values_say_nothing(text: str) -> None:
    assert wrong_common_solution(f"Solving x + y = 5 {text}", frozenset("xy")) is None
    assert wrong_common_solution("Solving x + y = 5 and x - y = 1: x = 3, y = 1.", frozenset("xy"))
