"""The maths detector on what it reads besides plain arithmetic: each right claim beside a wrong one."""

import pytest
from maths_steps import MATHS, step

READ = [
    (r"\sin 30^\circ = \frac12", r"\sin 30^\circ = \frac13"),
    (r"\cos 208^\circ = -\cos 28^\circ", r"\cos 208^\circ = \cos(-28^\circ)"),
    (r"\tan 30° = \frac{\sqrt{3}}{3}", r"\tan 30° = \sqrt{3}"),
    (r"\cos^2 60^\circ + \sin^2 60^\circ = 1", r"\cos^2 60^\circ + \sin^2 60^\circ = 2"),
    (r"\sin\frac{\pi}{6} = 0.5", r"\sin\frac{\pi}{6} = 0.6"),
    (r"\sin(\pi/2) = 1", r"\sin(\pi/2) = 0"),
    (r"\cos(2\pi/3) = -1/2", r"\cos(2\pi/3) = 1/2"),
    (r"\binom{6}{2} = 15", r"\binom{6}{2} = 12"),
    ("C(9, 7) = 36", "C(9, 7) = 35"),
    (r"\binom{5}{1}\binom{4}{2} = 30", r"\binom{5}{1}\binom{4}{2} = 35"),
    ("6 choose 2 is 15", "6 choose 2 is 12"),
    (r"\lceil -8.8 \rceil = -8", r"\lceil -8.8 \rceil = -9"),
    (r"⌊7/2⌋ = 3", r"⌊7/2⌋ = 4"),
    (r"|3 - 5| = 2", r"|3 - 5| = -2"),
    (r"\left|-7\right| + 1 = 8", r"\left|-7\right| + 1 = -6"),
    (r"\gcd(84, 36) = 12", r"\gcd(84, 36) = 6"),
    ("lcm(4, 6) = 12", "lcm(4, 6) = 24"),
    ("The gcd of 42 and 7 is 7", "The gcd of 42 and 7 is 1"),
    (r"\log_2 8 = 3", r"\log_2 8 = 4"),
    (r"\log_{10} 1000 = 3", r"\log_{10} 1000 = 4"),
    (r"\ln 2 \approx 0.693", r"\ln 2 \approx 0.793"),
    (r"\sum_{k=1}^{4} k^2 = 30", r"\sum_{k=1}^{4} k^2 = 29"),
    (r"\prod_{k=1}^{4} k = 24", r"\prod_{k=1}^{4} k = 25"),
    (r"\sum_{i=1}^{3} \frac{1}{i} = \frac{11}{6}", r"\sum_{i=1}^{3} \frac{1}{i} = \frac{11}{7}"),
    (r"17 \equiv 2 \pmod{5}", r"17 \equiv 3 \pmod{5}"),
    (r"7^2 = 49 \equiv 4 \pmod 9", r"7^2 = 49 \equiv 5 \pmod 9"),
    ("327 ≡ 4 (mod 17)", "327 ≡ 8 (mod 17)"),
    ("7^2 = 4 (mod 9)", "7^2 = 5 (mod 9)"),
    ("2023 ÷ 4 = 505 remainder 3", "2023 ÷ 4 = 505 remainder 2"),
    (r"$$355\div 6=59\;\mathrm{R}\;1.$$", r"$$355\div 6=58\;\mathrm{R}\;5.$$"),
    (r"\(133 \div 81 = 1\) remainder \(52\)", r"\(133 \div 81 = 1\) remainder \(42\)"),
    ("706 ÷ 7 = 100 with a remainder of 6", "706 ÷ 7 = 101 with a remainder of 1"),
    (
        "2250 / 360 = 6 full rotations with 90 degrees remaining",
        "2250 / 360 = 6 full rotations with 80 degrees remaining",
    ),
    ("327 divided by 17 = 19 remainder 4", "327 divided by 17 = 19 remainder 8"),
    ("half of 30 is 15", "half of 30 is 16"),
    ("3 dozen = 36", "3 dozen = 38"),
    ("₹3 + ₹4 = ₹7", "₹3 + ₹4 = ₹8"),
    ("所以 3 + 4 = 7", "所以 3 + 4 = 8"),
    ("3个苹果 + 4个苹果 = 7个苹果", "3个苹果 + 4个苹果 = 8个苹果"),
    ("Итак, 3 + 4 = 7 яблок", "Итак, 3 + 4 = 8 яблок"),
    ("17 ÷ 5 = 3 余 2", "17 ÷ 5 = 3 余 1"),
    ("| sum | 3 + 4 = 7 |", "| sum | 3 + 4 = 8 |"),
    (r"{10 \over 2} = 5", r"{10 \over 2} = 6"),
    (r"{6 \choose 2} = 15", r"{6 \choose 2} = 16"),
    ("two thirds of 30 is 20", "two thirds of 30 is 10"),
    (r"\max(3, 5) = 5", r"\max(3, 5) = 3"),
    (r"\frac{36^\circ}{2} = 18^\circ", r"\frac{36^\circ}{2} = 19^\circ"),
    ("4.5 \\text{ cm}^3 * 2 = 9 \\text{ cm}^3", "4.5 \\text{ cm}^3 * 2 = 8 \\text{ cm}^3"),
    (r"-161 \div 13 = -13 \text{ remainder } 8", r"-161 \div 13 = -13"),
    (r"\(5^8\) is \(5\) raised to the power of 8", r"\(5^8\) is \(5\) times the power of 8"),
    ("The smallest integer greater than or equal to 7/2 is 4", "So 7/2 is 4"),
    ("The least common multiple of 3! and 4! is 24, the sum of 3! and 4! is 30", "So 3! + 1 is 9"),
]


@pytest.mark.parametrize(("right", "wrong"), READ)
def test_a_right_claim_passes_and_its_wrong_twin_is_accused(right: str, wrong: str) -> None:
    assert step("1 + 1 = 2", right) is None
    assert step("1 + 1 = 2", wrong) == 1


@pytest.mark.parametrize(
    "text",
    [
        r"\sin 30 = -0.988, \sin 30 = 0.5",  # degrees or radians: nobody says
        r"\sin^{-1} 1 = 90^\circ, \sin 30^\circ x = 7, \sec^2 20^\circ = 3",
        r"\log 2 = 0.7, \log_a 2 = 3, \log_2 2^3 = 4",
        r"\sum_{k=1}^{100} k = 5, \sum_{k=1}^{3} k + 2 = 5, \sum_{k=1}^{3} kx = 5, \prod_{k=5}^{3} k = 9",
        r"17 \equiv 3, x \equiv 3 \pmod{5}, 1/2 \equiv 3 \pmod{5}, 7 \equiv 2 \pmod{m}",
        "5 = 3 remainder 1, 2 * 7 = 3 remainder 1",
        r"|A| = 5 and |A \cap B| = 3, 2 | 4 and 4 | 9",
        "半径为3的圆面积 = 28, 10 的 20% = 2",
        "x\u2081 + 2 = 5, 2x\u2081 + 3 = 8",
        "the smallest k such that $7^k \\equiv 1 \\pmod{11}$ is 10",
        "C(3, 4) lies left of D(5, 5)",
    ],
)
def test_what_may_mean_something_else_is_not_accused(text: str) -> None:
    assert step("1 + 1 = 2", text) is None


def test_a_price_of_a_dozen_is_no_count() -> None:
    assert step("2 dozen = $5") is None
    assert step("2 dozen = 20") == 0


def test_a_name_with_a_letter_for_its_index_is_many_numbers() -> None:
    assert step("Let $x_i = 1$ for small i, and $x_i = -1$ else.", "So $x_r = 1$ and $x_r = -1$.") is None
    assert step("Let $x_1 = 1$.", "So $x_1 + 1 = 3$.") == 1


@pytest.mark.parametrize(
    "letters", [r"\sum_{k=1}^{24} ", r"\Fsin(", "|(", "C(1,", "\\gcd(1,", r"\cos\frac{", "1 remainder "]
)
def test_functions_of_functions_are_read_in_time(letters: str) -> None:
    text = (letters * 4000)[:19_000]
    assert step("1 + 1 = 3", text) == 0
    MATHS.detect(text, [text])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Since 211 is a prime number, we are done.", "Since 209 is a prime number itself, we are done."),
        (r"Note that \(91\) is not prime.", r"Note that \(97\) is not prime."),
        ("But $4! = 24$ is divisible by $8$.", "But $4! = 24$ is divisible by $9$."),
        ("We see that 144 is a perfect square.", "We see that 145 is a perfect square."),
        ("The number 24 is not divisible by 0.", "The number 24 is divisible by 0."),
    ],
)
def test_a_number_has_the_property_it_is_said_to_have(right: str, wrong: str) -> None:
    assert step("1 + 1 = 2", right) is None
    assert step("1 + 1 = 2", wrong) == 1


@pytest.mark.parametrize(
    "text",
    [
        "We check whether, say, 209 is prime.",
        "Neither 10 nor 24 is divisible by 9, and so 11 is not prime if 1 = 2.",
        "Then 7k + 3 is prime, $x = 24$ is divisible by $9 + 15$, 9 is prime to 4, 9 is a prime power.",
        "Any power of 5 greater than or equal to 2 is divisible by 25.",
        "The claim that 9 is prime if and only if 4 is.",
    ],
)
def test_a_property_that_is_not_claimed_is_not_checked(text: str) -> None:
    assert step("1 + 1 = 2", text) is None
