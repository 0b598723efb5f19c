"""The maths detector where it once accused right steps: each text beside a neighbour with a real error."""

import pytest
from maths_steps import MATHS, step

PAIRS = [
    # neighbouring formulas do not multiply, subtract or run together
    (r"\[ y = \frac{16}{6} = \frac{8}{3} \] \[ x = 5 \]", r"\[ y = \frac{16}{6} = \frac{8}{2} \] \[ x = 5 \]"),
    (r"\( 3 + 5 = 8 \) \( x = 5 \)", r"\( 3 + 5 = 9 \) \( x = 5 \)"),
    (r"$$ 3 + 5 = 8 $$ $$ (x - 1) = 5 $$", r"$$ 3 + 5 = 7 $$ $$ (x - 1) = 5 $$"),
    ("$3 + 5 = 8$ $-2 + 7 = 5$", "$3 + 5 = 8$ $-2 + 7 = 9$"),
    ("$3$ + $5$ = $8$", "$3$ + $5$ = $9$"),
    # what touches a number may be a part of it
    ("2,5 + 1 = 3", "2.5 + 1 = 3"),
    (r"E(6,3) - \frac63 = 2 - 2 = 0", r"\frac63 - \frac63 = 2 - 1 = 0"),
    ("(1, 2) - 3 + 4 = 0", "3 + 4 = 0"),
    ("1,00,000 + 50,000 = 1,50,000", "1,00,000 + 50,000 = 1,60,000"),
    (r"\frac{2}{9} = 0.\overline{2}", r"\frac{2}{9} = 0.\overline{3}"),
    (r"\frac{1}{6} = 0.1\overline{6}", r"\frac{1}{6} = 0.1\overline{7}"),
    (r"\sum_{k=1}^{44} 1 = 44", "1 = 44"),
    (r"\frac{\begin{pmatrix} 2 \\ 1 \end{pmatrix} \cdot v}{5} = 0", r"\frac{5}{5} = 0"),
    ("So !5 = 44", "So 5! = 44"),
    (r"Here \(\pi(j) < \pi(k) < \pi(i)\)", r"Here \(\pi(2) < \pi(3) < \pi(1)\)"),
    ("So 9 * 9n' = 9", "So 9 * 9 = 9"),
    ("So $3 + 5 = 8$ (2 + 1)", "So $3 + 5 = 8 (2 + 1)$"),
    ("DC = 3 and AB = 5, so BD : DC = AB : AC", "DC = 3 and AB = 5, so DC = AB"),
    (r"1 + \sqrt{16081} \approx 1 + 126.81 = 127.81", r"1 + \sqrt{16081} \approx 1 + 136.81 = 137.81"),
    # what stands beside a number may say what it is
    ("2023 \u00f7 4 = 505 remainder 3", "2023 \u00f7 4 = 505"),
    ("17 / 5 = 3 R 2", "17 / 5 = 3"),
    ("17 / 5 = 3, with a remainder of 2", "17 / 5 = 3, with two left"),
    (r"17 \div 5 = 3 \text{ (quotient)}", r"17 \div 5 = 3"),
    ("31^2 is 600 greater than 19^2", "31^2 is 600"),
    ("The units digit of 16^17 is 6", "So 16^17 is 6"),
    ("The last two digits of 7^4 = 01", "The value of 7^4 = 01"),
    ("50 - 20% = 40", "50 - 20% = 45"),
    ("5 feet 6 inches = 66 inches", "5 feet 6 inches = 67 inches"),
    ("2 hours 30 minutes (in all) = 150 minutes", "2 hours 30 minutes (in all) = 230 minutes"),
    ("9 am + 5 hours = 2 pm", "9 + 5 hours = 2"),
    ("10 a.m. - 3 hours = 7 a.m., 9 p.m. + 4 hours = 1 a.m.", "9 + 4 hours = 1"),
    ("9 am + 5 hours = 2 pm.", "9 am + 5 hours = 3 pm."),
    ("So 9:30 p.m. + 4 hours 45 minutes = 2:15 a.m.", "So 9:30 p.m. + 4 hours 45 minutes = 1:15 a.m."),
    ("10 pm + 3 hours - 30 minutes = 12:30 am", "10 pm + 3 hours - 30 minutes = 12:30 pm"),
    ("Noon plus 1.5 hours is 1:30 pm", "Noon plus 1.5 hours is 2:30 pm"),
    ("11:30 am + 90 minutes = 1:00", "11:30 am + 90 minutes = 1:30"),
    ("11:30 am + 90 minutes = 13:00", "11:30 am + 90 minutes = 12:00"),
    ("$12\\text{ pm} - 8:15$ is unread; 12 pm - 8:15 am = 3 hours and 45 minutes", "12 pm - 8:15 am = 4 hours"),
    ("6 am - 10 pm = 8 hours", "6 am - 10 pm = 16 hours"),
    ("If 9 am + 5 hours = 3 pm, it is late", "Now 9 am + 5 hours = 3 pm, it is late"),
    ("9 am + 5 hours = 11 am PST", "9 am + 5 hours = 11 am"),
    ("Between 8 and 9 am + 5 hours = 3 pm + 1 hour", "At 9 am + 5 hours = 3 pm"),
    ("13 pm + 5 hours = 7 pm", "1 pm + 5 hours = 7 pm"),
    ("It was 2 + 9 am + 5 hours = 3 pm", "It was 9 am + 5 hours = 3 pm"),
    ("Suppose 2+2=5. That is false", "So 2+2=5. That is true"),
    ("Assume that 3 = 4, then all is lost", "It follows that 3 = 4, then all is lost"),
    ("\uff13 \uff0b \uff14 \uff1d \uff17", "\uff13 \uff0b \uff14 \uff1d \uff18"),
]


@pytest.mark.parametrize(("right", "wrong"), PAIRS)
def test_a_right_step_is_not_accused_and_its_neighbour_is(right: str, wrong: str) -> None:
    assert step("5 + 5 = 10", right) is None
    assert step("5 + 5 = 10", wrong) == 1


def test_a_letter_in_a_formula_of_its_own_is_a_name_and_no_unit() -> None:
    given = r"It is \( C = 7k \), and \( C \) is never \( 3m \) for an integer \( m \)."
    assert step(given, "So $20 < C < 30$.") is None


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        ("343 - 21 = 322", "= 300 + 21", 1),
        ("343 - 21 = 322", "= 300 + 22", None),
        ("343 - 21 = 322", "So, 7(49 - 3ab) = 42", None),  # something unreadable stands between
        ("343 - 21 = 322", "f(3) = 42", None),
        ("343 - 21 = 322", "Then = 42", None),
        ("343 - 21 = 322", "Then, = 42", None),
        ("343 - 21 = 322 is what he has of f(x)", "= 42", None),  # and so it does here
    ],
)
def test_only_a_relation_right_behind_goes_on_from_the_step_before(before: str, after: str, wrong: int | None) -> None:
    assert step(before, after) == wrong


SCOPES = [
    # cases, trials and alternatives: what holds in one says nothing in the next
    (["For n = 1: n+1 = 2.", "For n = 2: n+1 = 3."], "", None),
    (["For n = 1: 1+1 = 2.", "For n = 2: 2+1 = 4."], "", 1),
    (["x^2 - 5x + 6 = 0", "x = 2", "x = 3"], "", None),
    (["x^2 - 5x + 6 = 0", "x = 2", "x = 4"], "", 2),
    (["If $x > 2$ then $x = 3$.", "If $x < 2$ then $x = 1$.", "So $2x = 2$."], "", None),
    (["Try k = 3.", "k + 1 = 4 is no prime.", "Try k = 4.", "k + 1 = 5 is one."], "", None),
    (["Substituting x = 1 and y = 3 gives 4.", "y = 2x"], "", None),
    (["n(n+1) = 30 for the first.", "n(n+1) = 84 for the second, and n = 5."], "", None),
    (["The sum S = 55, so 2S = 110.", "The next S > 55."], "", None),
    (["The sum S = 55, so 2S = 111."], "", 0),
    (["S(1) = 1", "S(1 + 9) = S(10) = 1 + 0 = 1", "S(2 + 9) = S(11) = 1 + 1 = 2"], "", None),
    (["By the formula with a = 1, b = 6 and c = 2 it is 3.", "The sides are a = 3, b = 4."], "", None),
    # inside one case the numbers still count
    (["If $x = 3$ then $y = 3 + 4 = 8$."], "", 0),
    (["Substituting $x = 5/2$: $y = 1 / (5 - 5/2) = 1 / (5/2) = 1$"], "", 0),
    # a name of one life keeps its value
    (["Let n = 3.", "So n + 1 = 5."], "", 1),
    # and what is rewritten has to follow from what stands right before it, whatever the names are elsewhere
    (["First, take a = 2.", "(3a-1) + (a^2+1) + (a^2+2) = 16", "Simplifying, 2a^2 + 3a + 2 = 16."], "", None),
    (["First, take a = 2.", "(3a-1) + (a^2+1) + (a^2+2) = 16", "Simplifying, a^2 + 3a + 2 = 16."], "", 2),
    (["First, take a = 2.", "(a-3)(a+1) = 0, so we get a - 3 = 0, or a + 1 = 0"], "", None),
    (["First, take a = 2.", "2a - 6 = 0, so we get a + 1 = 0"], "", 1),
    (["First, take x = 2.", "(x+1)(x+2) = x^2 + 2x + x + 2 = x^2 + 3x + 3"], "", 1),
    (["First, take x = 2.", "(x+1)(x+2) = x^2 + 2x + x + 2 = x^2 + 3x + 2"], "", None),
    (["First, take i = 2.", "(1+i)^2 = 1 + 2i + i^2 = 2i"], "", None),
]


@pytest.mark.parametrize(("steps", "problem", "wrong"), SCOPES)
def test_a_name_s_value_belongs_to_its_place(steps: list[str], problem: str, wrong: int | None) -> None:
    pytest.importorskip("sympy")
    assert step(*steps, problem=problem) == wrong


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        (["4x12 = 48 minutes.", r"48 minutes (regular) + 5 minutes (extra) = 53 minutes.", r"So \boxed{53}."], None),
        (["4x12 = 48 minutes.", r"48 minutes (regular) + 5 minutes (extra) = 53 minutes.", r"So \boxed{54}."], 2),
        (["1 + 2 = 3 slices", r"\text{Total} = 3 + 3, \text{ so Total} = 6", r"\boxed{6}"], None),
        (["1 + 2 = 3 slices", "The code prints 17", r"\boxed{17}"], None),
        (["1 + 2 = 3 slices", "It is clear", r"\boxed{17}"], 2),
    ],
)
def test_an_answer_is_accused_only_if_it_stands_nowhere_before(steps: list[str], wrong: int | None) -> None:
    assert step(*steps) == wrong


@pytest.mark.parametrize(
    ("steps", "sure", "unsure"),
    [
        (["1 + 1 = 3"], 0.68, 0.40),
        (["2x + 3 = 7", "x = 3"], 0.50, 0.23),
        (["x^2 + x = 7, simplified: x^2 + x - 6 = 0"], 0.86, 0.66),
    ],
)
def test_confidence_is_the_measured_share_of_right_finds(steps: list[str], sure: float, unsure: float) -> None:
    pytest.importorskip("sympy")
    for before, expected in (("1 + 1 = 2", sure), ("f(1) + 1 = 2", unsure)):
        found = MATHS.detect("", [before, *steps])
        assert (found.step, found.confidence) == (len(steps), expected)


def test_in_the_calculation_of_an_expression_finds_are_nearly_always_right() -> None:
    steps = ["7+5=12", "12*3=35", "Answer: 31"]
    bare, asked = (MATHS.detect(problem, steps) for problem in ("(7+5)*3-4=?", "What is (7+5)*3-4?"))
    assert bare.step == asked.step == 1
    assert bare.confidence > 0.9 > asked.confidence


def test_a_name_that_is_set_in_an_equation_begins_a_new_life() -> None:
    pytest.importorskip("sympy")
    assert step("It is 400N = 4800.", "We set 225N = 4800.", "Hence N = 21.33.") is None
    assert step("It is 400N = 4800.", "We use 225N = 4800.", "Hence N = 21.33.") == 2
