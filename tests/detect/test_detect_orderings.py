"""Orderings: what follows from the statements that were repeated by then, and nothing else, is right."""

import pickle
import random
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import at_most

from prefixloss.detect.base import FirstError
from prefixloss.detect.puzzles.orderings import Orderings

PROBLEM = """The following statements each describe a set of five objects arranged in a fixed order.
- On a branch, there are five birds: a crow, a blue jay, an owl, a robin, and a hawk.
- The robin is to the left of the owl.
- The crow is the second from the right.
- The blue jay is the leftmost.
- The hawk is to the right of the crow.
Q: Given the above statements, which of the following is correct?
Options:
(A) The crow is the third from the left.
(B) The robin is the second from the left.
(C) The owl is the rightmost."""
# blue jay, robin, owl, crow, hawk


def found(*steps: str, **options: str) -> FirstError:
    return Orderings(**options).detect(PROBLEM, steps)


def first_error(*steps: str) -> int | None:
    result = found(*steps)
    assert result.confidence > 0 or result.step is None, result
    return result.step


RIGHT = (
    "I should first find any statements about absolute positions of birds.",
    "The blue jay is the leftmost. So from left to right: first is the blue jay, then second, third, fourth, and fifth "
    "can be any bird.",
    "The crow is the second from the right. So from left to right: first is the blue jay, then second and third can be "
    "any bird, then fourth is the crow, then fifth can be any bird.",
    "The hawk is to the right of the crow, so it must be the rightmost.",
    "The robin is to the left of the owl. So from left to right: first is the blue jay, then second is the robin, then "
    "third is the owl, then fourth is the crow, then fifth is the hawk.",
    "According to this ordering, the second from the left is the robin. So the answer is (B)",
)


def test_a_right_deduction_is_right() -> None:
    assert found(*RIGHT) == FirstError(None, "every report agrees", 0.95)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (1, "The blue jay is the leftmost. So from left to right: first is the crow, then second to fifth can be any."),
        (1, "The blue jay is the leftmost. So from right to left: first is the blue jay, then second can be any bird."),
        (2, RIGHT[2].replace("first is the blue jay", "first can be any bird")),  # forgets
        (2, RIGHT[2].replace("fifth can be any bird", "fifth is the hawk")),  # true, but nobody has said why
        (2, RIGHT[2].replace("then fifth", "then fifth can be any bird, then sixth")),
        (2, RIGHT[2].replace("second and third can be any bird", "second and third are the robin")),
        (2, RIGHT[2].replace("second and third can be", "second to fourth can be")),  # the fourth twice
        (2, RIGHT[2].replace("second and third can be any bird", "second or fifth is the robin")),
        (3, "The hawk is to the right of the crow, so it must be the second from the left."),
        (3, "The hawk is to the right of the crow, so they cannot be the rightmost."),
        (3, "The hawk is to the left of the crow."),
        (3, "The hawk is to the right of the crow. So from left to right: first is the blue jay, then fifth is the "
            "hawk or the owl."),
        (4, "The robin is to the left of the owl, so the owl is not to the right of the robin."),
        (4, "The robin is to the left of the owl, so the owl is the second from the left."),
        (5, "By process of elimination, the third bird must be the robin."),
        (5, "So the answer is (C)"),
        (5, "So the answer is (Z)"),
    ],
)  # fmt: skip
def test_the_step_that_does_not_follow_is_found(place: int, wrong: str) -> None:
    assert first_error(*RIGHT[:place], wrong, *RIGHT[place + 1 :]) == place


@pytest.mark.parametrize(
    "right",
    [
        "The crow is the second from the right, so it is the fourth from the left.",
        "The crow is the second from the right. So from left to right: first, second, and third can be any bird, then "
        "fourth is the crow, then fifth can be any bird.",
        "The crow is the second from the right. From right to left: first can be any bird, then second is the crow.",
        "The crow is the second from the right, so the crow cannot be the leftmost.",
        "Which bird is the leftmost? The question asks which bird is the second from the left.",
        "",
    ],
)
def test_other_ways_to_say_what_is_so(right: str) -> None:
    assert first_error(right) is None


def test_what_cannot_be_read_is_ignored_or_wrong_as_asked_and_never_all_right() -> None:
    unread = "The robin and the owl are the third from the left."
    steps = (*RIGHT[:2], unread, *RIGHT[2:])
    ignored = found(*steps)
    assert ignored.step is None
    assert ignored.confidence == 0
    assert "step 3" in ignored.reason
    assert found(*steps, unread="wrong").step == 2


@pytest.mark.parametrize(
    "problem",
    [
        "",
        "How much is 2 + 2?",
        "In a row: a cat and a dog.",
        "In a row: a, b, c, d, e, f, g, h, i, j.\nThe a is the leftmost.",
        "In a row: a cat, a dog, and a cat.\nThe dog is the leftmost.",
        "In a row: a cat, a dog, and a cow.\nThe cat is the leftmost.\nThe dog is the leftmost.",
        "[" * 10_000,
        "a, " * 100_000,
        ":" * 100_000,
    ],
)
def test_other_problems_are_unread(problem: str) -> None:
    result = Orderings().detect(problem, ["The cat is the leftmost."])
    assert result.step is None
    assert result.confidence == 0


@pytest.mark.parametrize(
    "step",
    ["from left to right: " + "first is " * 20_000, "the crow " * 20_000, "first, " * 20_000, "(" * 100_000,
     "from left to right: first is the crow, then " * 2_000, "so " * 50_000 + "9" * 100_000],
)  # fmt: skip
def test_endless_steps_end(step: str) -> None:
    with at_most(20):
        result = Orderings(seconds=600).detect(PROBLEM, [step])
    assert "out of time" not in result.reason


def test_a_known_answer_that_does_not_follow_means_the_problem_was_misread() -> None:
    assert Orderings().detect(PROBLEM, RIGHT, "(B)").step is None
    assert "not the one" in Orderings().detect(PROBLEM, RIGHT, "(C)").reason


def test_configured_detectors_can_be_pickled() -> None:
    detector = Orderings(unread="wrong", seconds=1.0)
    assert pickle.loads(pickle.dumps(detector)) == detector
    with pytest.raises(ValueError, match="unread"):
        Orderings(unread="maybe")  # type: ignore[arg-type]


# random puzzles, with a solver of their own

BIRDS = ("crow", "owl", "robin", "hawk", "quail")
NTH = ("first", "second", "third", "fourth", "fifth")


def statement(rng: random.Random, order: tuple[str, ...]) -> str:
    one, other = rng.sample(order, 2)
    place = order.index(one)
    if rng.random() < 0.5:
        return f"The {one} is to the {'left' if place < order.index(other) else 'right'} of the {other}."
    return f"The {one} is the {NTH[place]} from the left."


def allows(text: str, order: tuple[str, ...]) -> bool:
    words = text.strip(".").split()
    if "of" in words:
        before, after = order.index(words[1]), order.index(words[-1])
        return before < after if "left" in words else before > after
    return order.index(words[1]) == NTH.index(words[4])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_listed_row_is_right_exactly_if_every_order_agrees(seed: int) -> None:
    rng = random.Random(seed)
    order = tuple(rng.sample(BIRDS, 5))
    facts = [statement(rng, order) for _ in range(5)]
    problem = "\n".join(["There are five birds: a " + ", a ".join(BIRDS) + ".", *facts])
    told = facts[: rng.randint(1, 5)]
    allowed = [o for o in permutations(BIRDS) if all(allows(fact, o) for fact in told)]
    bird, place = rng.choice(BIRDS), rng.randrange(5)
    claim = f"The {bird} is the {NTH[place]} from the left."
    follows = claim in facts or all(o[place] == bird for o in allowed)
    steps = [*told, f"So {claim.replace('is', 'must be').replace('The', 'the')}"]
    assert Orderings().detect(problem, steps).step == (None if follows else len(told))


CARS = """In a show, there are five cars: a truck, a minivan, a tractor, a limousine, and a bus. The truck is older \
than the minivan. The tractor is older than the truck. The minivan is older than the limousine. The bus is the oldest.
Options:
(A) The truck is the third-oldest.
(B) The minivan is older than the fourth-oldest."""
# bus, tractor, truck, minivan, limousine


@pytest.mark.parametrize(
    ("claim", "right"),
    [
        ("The truck is older than the fourth-oldest.", True),
        ("The minivan is older than the fourth-oldest.", False),
        ("The minivan is not older than the fourth-oldest.", True),
        ("The limousine is newer than the second-newest.", True),
        ("The tractor is newer than the second-oldest.", False),
    ],
)
def test_a_thing_is_compared_with_a_place(claim: str, right: bool) -> None:
    """The problem's statements stand in one line, as sentences."""
    told = ["The bus is the oldest. The tractor is older than the truck. The truck is older than the minivan.",
            "The minivan is older than the limousine."]  # fmt: skip
    found = Orderings().detect(CARS, [*told, claim, "The answer is (A)"])
    assert found.step == (None if right else 2), found
    assert found.confidence == 0.95
