"""The maths detector on formulas with functions and several names: each wrong rewriting beside the right one."""

import pytest
from maths_steps import step

from prefixloss.detect.maths.atoms import Atoms

pytest.importorskip("sympy")


NAMES = "Here $x$, $y$, $a$, $b$, $c$, $m$ and $n$ are numbers, and so is $k$."

REWRITINGS = [
    # an expression that was only mentioned, written in another way
    ("We want $abc - 1$. It can be written as $abc - 1 = (ab + 1)(c - 1) + ab - {}$.", "2c", "c"),
    ("It is $x^4 + x^2 + 1$. Factoring, $x^4 + x^2 + 1 = (x^2 + x + 1)(x^2 {} x + 1)$.", "+", "-"),
    (
        r"The term is $\frac{{2}}{{n^2 - 1}}$. Using partial fractions, "
        r"$\frac{{2}}{{n^2 - 1}} = \frac{{1}}{{n - 1}} {} \frac{{1}}{{n + 1}}$.",
        "+",
        "-",
    ),
    (
        r"It is $\frac{{1}}{{\sin k}}$. By the identity, $\frac{{1}}{{\sin k}} = \cot \frac{{k}}{{2}} {} \cot k$.",
        "+",
        "-",
    ),
    (r"It is $\sin 2\alpha$. By an identity, $\sin 2\alpha = {}\sin\alpha\cos\alpha$.", "3", "2"),
    (r"Use the identity $\frac{{1}}{{\sin x}} = \cot \frac{{x}}{{2}} {} \cot x$.", "+", "-"),
    ("So $x^3 - 4x^2 + 3 = 0$. The quotient is clear: $x^3 - 4x^2 + 3 = (x - 1)(x^2 - 3x {} 3)$.", "+", "-"),
    ("Combining like terms, $x^2 + 2x - x^2 - x = {}$.", "2x", "x"),
    # values of functions
    ("Let $f(x) = x^3 + ax^2 + 1$. Notice $f(-x) = -x^3 {} ax^2 + 1$.", "-", "+"),
    ("Let $f(x) = x^3 + ax^2 + a$. Notice $f(2) = 8 + {}a$.", "4", "5"),
    # sides of a chain
    ("Now $k = a(b + c) + a = ab + ac + a = a(b + c {} 1)$.", "-", "+"),
    (r"Then $k = \cos^2 x - \sin^2 x = 1 - {}\sin^2 x$.", "3", "2"),
    # expansions
    (r"Squaring, $(m + n\sqrt{{6}})^2 = m^2 + {}mn\sqrt{{6}} + 6n^2$.", "6", "2"),
    ("So $(1 + x)(f(x) + x^2) = f(x) + x^2 + xf(x) + {}$.", "2x^3", "x^3"),
    # the same side, rewritten
    ("Now $a = a * c$. Factor out $a$ on the right-hand side: $a = {}$.", "a(c - 1)", "a(c)"),
    ("Let $f(x) = (x - a)(x - b)$. Expanding, $f(x) = x^2 - (a + b)x {} ab$.", "-", "+"),
    (r"$\sin^2 x = \cos x * 1 \implies \sin^2 x = {}$.", r"1 - \sin^2 x", r"\cos x"),
    (
        r"$\sqrt{{1 - \cos^2 y}} - 2\cos y = 1$. Squaring both sides, "
        r"$1 - \cos^2 y {} 4\cos^2 y = 1$.",
        "+",
        r"- 4\cos y\sqrt{{1 - \cos^2 y}} +",
    ),
    ("$3^{{m}}(3^2 - 9) = 2^n(2^5 - 5)$. Simplifying, $3^{{m}}({}) = 2^n(27)$.", "-6", "9 - 9"),
    (
        r"\[ \frac{{c^2(c + b) - c^2(c + a)}}{{c + b}} = k. \] Simplify the numerator: "
        r"\[ \frac{{c^3 + c^2 b - c^3 {} c^2 a}}{{c + b}} = k. \]",
        "+",
        "-",
    ),
    # an equation, but for one term
    (r"\[ 2a - b - (3a + b) = 4 - 9 \] \[ -a{} = -5 \]", "", " - 2b"),
    (r"\[ 1 - \sin^4 x - \cos^2 x = 2y \] \[ \sin^2 x - \sin^4 x = 2y {} \]", "+ 1", ""),
    (r"\[ 4a = k^2a - 3k^2 \] \[ 0 = (k^2 - 4)a {} 3k^2 \]", "+", "-"),
    ("$b^2 - 4c = b^2 - 4bc + 4c^2$. Rearranging terms gives $4c^2 - 4bc {} = 0$.", "", "+ 4c"),
    (r"\[ 2x + 3y + a_{{n+1}} = 7 \] \[ 2x + 3y = 7 {} a_{{n+1}} \]", "+", "-"),
]


@pytest.mark.parametrize(("text", "wrong", "right"), REWRITINGS)
def test_a_wrong_rewriting_is_accused_and_the_right_one_is_not(text: str, wrong: str, right: str) -> None:
    assert step(NAMES, text.format(wrong)) == 1
    assert step(NAMES, text.format(right)) is None


@pytest.mark.parametrize(
    "text",
    [
        "It is $x^2 + y^2$, and by the condition $x^2 + y^2 = 2xy + 1$.",  # an equation
        "It is $x^2 + y^2$. We know that $xy = x + y$. Simplifying, $x^2 + y^2 = x^2y^2 - 2x - 2y$.",  # by another
        "It is $x^2 + y^2$. Here $x^2 + y^2 = 2xy + 1$.",
        r"By the identity $\sqrt{x - 6} = x - 5$ for some.",  # it has too few values
        "As $f(-x) = x^2 - ax$, $f(b) = b^2 + ab$.",
        "Since $xy = x + y$, we have $k = (x + y)^2 = x^2y^2$.",
        "It is $5x + 10$. It can be written as an equation, $5x + 10 = 10x + 5$.",
        "It is $x^2 - 2x$. If it can be written as $x^2 - 2x = 3x$, then all is well.",
        "We have $x^2 - 5x + 4 = 0$. It is $x^2 - 5x + 4 = (x - 1)^2 - 3(x - 1)$.",  # factors, or not
        "We have $x^2 - 5x + 4 = 0$ and $x^2 - 5x + 4 = 2(x - 1)(x + 2)$ for others.",
        "Comparing, $(x + a)(x + b) = x^2 + ax + bx + c$.",
        "The distances are $k = (n - 2)^2 + m^2 = (n - 4)^2 + m^2$.",  # two sides of one shape
        "$b = a + c$ or, by expanding, $b = a - c$",
        "$k = a(c + 1)$. Combining both equations, $k = a(c + 2)$.",
        "$x + 1 = 2a + b$ here. Multiplying it by a factor, $x + 1 = 3a + b$.",
        "$ab + c = 7k$. Subtracting it from what is known, $ab + c - 1 = 9k - 1$.",
        r"Now $c = a\pi$. Multiplying by a factor, $c = 180$.",
        "$f(x) = x + a$ for small $x$, $f(x) = 2x + a$ for others, and $f(b) = b + a$.",
        "If $f(x) = x + a$, then with another $f$ also $f(a) = a$.",
        "Let $f(x) = x^3 + x$. We want $f(2) = 2a$, and $f(a) = 10$.",
        r"As $k = \ln((e - 1)y) - \ln e = \ln(e - 1) + \ln y - 1$, all is well.",
        "As $k = (1 + i)(1 - i) = 1 + 1 = 2i/i$, all is well.",
        r"Squaring both sides of $\sqrt{x + y} = x - 1$, $x + y = x^2 - 2x + 1$.",
        "$2x + 4y = 0$. Simplifying, $x + 2y = 0$.",
        r"So $\sqrt{x - 2} = x - 4$. We get $(\sqrt{x - 2})^2 = (x - 4)^2$.",
        "Substitute $x = 2$ into the simplified expressions. Then $(x + 2 - x) = 2$.",
        "$a - b - c = 4$ and $a - b + c = 4$",
        "$a - b = 4$\n$a - b = -4$",
        "$2a = 4b$\n$3a = 5b$",
        r"In vectors, $\vec{a} = \vec{b} + \vec{c}$, expanded $\vec{a} = \vec{b} - \vec{c}$.",
    ],
)
def test_what_is_no_rewriting_is_not_accused(text: str) -> None:
    assert step(NAMES, text) is None


def test_what_was_said_in_the_problem_counts() -> None:
    text = "Factoring, $x^4 + x^2 + 1 = (x^2 + x + 1)(x^2 + x + 1)$."
    assert step(text, problem="Find all primes among the $x^4 + x^2 + 1$.") == 0
    assert step(text) is None


def test_equations_in_one_name_may_be_cases() -> None:
    assert step("First, take $x = 1$. First, take $x = 2$.", "$x^2 - 5x + 6 = 0$\n$-12 = 10x - 2x^2$") is None


def test_the_next_step_may_go_on_with_something_else() -> None:
    assert step(NAMES, "Now $b = a + c$", "From what we factored out before, $b = a - c$") is None
    assert step(NAMES, "Now $b = a + c$", "Expanded, $b = a - c$") == 2


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        (r"\sin^2 x", r" \Fsin(x)^2"),
        (r"\sec(2x)^2", r" (1/\Fcos(2x))^2"),
        (r"\tan 30^\circ", r" \Ftan((30*\pi/180))"),
        (r"\cos(60^\circ - x)", r" \Fcos((60*\pi/180) - x)"),
        (r"\sin x^{\circ} + 1", r" \Fsin(x) + 1"),
        (r"\sin\left(\cos x\right)", r" \Fsin( \Fcos(x) )"),
        (r"2f(x) + f( x) + f(y)", "2 Q_{0} +  Q_{0} +  Q_{1}"),
        (r"\theta_1 + \theta_{1} + a_{n+1}", " Q_{1} +  Q_{1} +  Q_{0}"),
        ("xf(x)", "x Q_{0}"),
        (r"\sin(x", r"\sin(x"),
        (r"\sin x!", r"\sin x!"),
        ("a(x) and x_1", "a(x) and x_1"),
    ],
)
def test_what_is_applied_to_names_gets_a_spelling_that_can_be_read(text: str, spelled: str) -> None:
    assert Atoms("").spelled(text) == spelled
