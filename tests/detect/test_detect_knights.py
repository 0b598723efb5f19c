"""Knights and knaves: generated islands, solved by trying every case, and responses right and with one thing wrong."""

import pickle
import random
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import at_most

from prefixloss.detect.base import FirstError
from prefixloss.detect.puzzles.knights import Knights

pytest.importorskip("z3")

World = dict[str, bool]  # who is a knight
NAMES = ["Ann", "Bo", "Cy", "Dee"]
SAYS = [
    "{0} says, '{1}.'",
    '{0} told you: "{1}."',
    "{0} said that {1}.",
    "According to {0}, {1}.",
    '"{1}," said {0}.',
    '{0} remarked, "{1}".',
]


def role(truthful: bool) -> str:
    return "knight" if truthful else "knave"


def statement(rng: random.Random, speaker: str, names: list[str]) -> tuple[str, Callable[[World], bool]]:
    """Something to say, in words and as what it means."""
    a, b = rng.sample(names, 2)
    x, y = rng.random() < 0.5, rng.random() < 0.5
    number = rng.randint(1, len(names) - 1)
    word = ["one", "two", "three"][number - 1]

    def count(w: World) -> int:
        return sum(w[n] == x for n in names)

    return rng.choice(
        [
            (f"{a} is a {role(x)}", lambda w: w[a] == x),
            (f"{a} is not a {role(x)}", lambda w: w[a] != x),
            (f"{a} and {b} are both {role(x)}s", lambda w: w[a] == x and w[b] == x),
            (f"{a} is a {role(x)} or {b} is a {role(y)}", lambda w: w[a] == x or w[b] == y),
            (f"{a} is a {role(x)} and {b} is a {role(y)}", lambda w: w[a] == x and w[b] == y),
            (f"if {a} is a {role(x)} then {b} is a {role(y)}", lambda w: w[a] != x or w[b] == y),
            (f"{a} is a {role(x)} if and only if {b} is a {role(y)}", lambda w: (w[a] == x) == (w[b] == y)),
            (f"{a} and {b} are of the same kind", lambda w: w[a] == w[b]),
            (f"{a} and {b} are different", lambda w: w[a] != w[b]),
            (f"neither {a} nor {b} is a {role(x)}", lambda w: w[a] != x and w[b] != x),
            (f"at least {word} of us is a {role(x)}", lambda w: count(w) >= number),
            (f"at most {word} of us are {role(x)}s", lambda w: count(w) <= number),
            (f"exactly {word} of us is a {role(x)}", lambda w: count(w) == number),
            (f"{a} is lying", lambda w: not w[a]),
            (f"{a} would say that {b} is a {role(x)}", lambda w: w[a] == (w[b] == x)),
            (f"I am a {role(x)} or {a} is a {role(y)}", lambda w: w[speaker] == x or w[a] == y),
        ]
    )


def island(seed: int) -> tuple[str, World]:
    """A puzzle with one solution."""
    rng = random.Random(seed)
    names = NAMES[: rng.choice([2, 3, 4])]
    while True:
        said = [(n, *statement(rng, n, names)) for n in names]
        worlds = [dict(zip(names, values, strict=True)) for values in product((True, False), repeat=len(names))]
        possible = [w for w in worlds if all(w[n] == means(w) for n, _, means in said)]
        if len(possible) == 1:
            break
    told = []
    for name, words, _ in said:
        form = rng.choice(SAYS)
        if words.startswith(("I ", "at ", "exactly")) and "that" in form:  # "I" is the speaker only in quotes
            form = SAYS[0]
        told.append(form.format(name, words[0].upper() + words[1:] if "'" in form or '"' in form else words))
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    intro = f"On an island live knights, who always tell the truth, and knaves, who always lie. You meet {listed}. "
    return intro + " ".join(told) + " Who is a knight and who is a knave?", possible[0]


SEEDS = pytest.mark.parametrize("seed", range(120))


@SEEDS
def test_the_one_solution_is_found_and_the_wrong_step_too(seed: int) -> None:
    problem, world = island(seed)
    steps = [f"So {n} {'is' if seed % 2 else 'must be'} a {role(k)}." for n, k in world.items()]
    known = ", ".join(f"{n} is a {role(k)}" for n, k in world.items())
    answer = f"The answer is: {known}."
    assert Knights().detect(problem, [*steps, answer], known) == FirstError(None, "every report agrees", 0.95)
    wrong = random.Random(seed).randrange(len(steps))
    name, truthful = list(world.items())[wrong]
    steps[wrong] = f"So {name} is a {role(not truthful)}."
    assert Knights().detect(problem, [*steps, answer])[::2] == (wrong, 0.95)


@SEEDS
def test_the_opposite_leads_to_a_contradiction_and_the_truth_does_not(seed: int) -> None:
    problem, world = island(seed)
    right = [
        f"Suppose {n} is a {role(not k)}. This leads to a contradiction. So {n} is a {role(k)}."
        for n, k in world.items()
    ]
    assert Knights().detect(problem, right) == FirstError(None, "every report agrees", 0.95)
    name, truthful = list(world.items())[-1]
    wrong = f"Assume that {name} is a {role(truthful)}. That is impossible. So {name} is a {role(not truthful)}."
    found = Knights().detect(problem, [*right[:-1], wrong])
    assert found == FirstError(len(right) - 1, "there is no contradiction", 0.95)


TWO = "A says, 'B is a knave'. B says, 'We are of the same kind.' Who is what?"  # A is a knight, B a knave
OPEN = "A says 'I am a knight.' B says: \"A is a knave or A is a knight.\" Is A a knight?"  # B is a knight, A either
RIGHT = {
    "cases": [
        "Case 1: A is a knight. Then B is a knave.",
        "Case 2: A is a knave. Then B is a knight, so they are of the same kind. Contradiction.",
        "So A is a knight and B is a knave.",
    ],
    "conditions": [
        "If A is a knight, then B is a knave. Then B's claim is false.",
        "If A were a knave, B would be a knight. B's statement 'We are of the same kind' would be true. Impossible.",
        "Answer: A: knight, B: knave",
    ],
    "a consistent case": [
        "Suppose A is a knight. Then B is a knave. This is consistent.",
        "Therefore the knight is A and B is a knave.",
    ],
    "quotes": [
        "A said that B is a knave.",
        'B says "We are of the same kind".',
        "A is telling the truth and B is lying.",
    ],
    "denied without the word": [
        "Suppose A is a knave. Then B is a knight. Hence A is a knight.",
        "A's statement is true, so B must be a knave.",
    ],
    "talk": [
        "Knights always tell the truth.",
        "A knave always lies.",
        "Let's look at A's statement.",
        "A is not a knave and B cannot be a knight.",
    ],
}
WRONG = {
    "refuted": (TWO, ["B is a knight."], 0, 0.95),
    "open": (OPEN, ["B is a knight.", "A is a knight."], 1, 0.85),
    "under what is supposed": (TWO, ["Suppose A is a knight. Then B is a knight."], 0, 0.95),
    "supposed no more": (TWO, ["Suppose A is a knave. This is a contradiction.", "So A is a knave."], 1, 0.95),
    "no contradiction": (OPEN, ["Assume A is a knight. This is a contradiction. So A is a knave."], 0, 0.95),
    "no consistency": (TWO, ["Suppose B is a knight. This is consistent."], 0, 0.95),
    "a condition taken for true": (OPEN, ["If A is a knight, then B is a knight.", "So A is a knight."], 1, 0.85),
    "misquoted": (TWO, ["A says that B is a knight."], 0, 0.95),
    "the answer": (TWO, ["A is a knight.", "The answer is: B is a knight."], 1, 0.95),
}


@pytest.mark.parametrize("steps", RIGHT.values(), ids=RIGHT)
def test_right_responses(steps: list[str]) -> None:
    assert Knights().detect(TWO, steps) == FirstError(None, "every report agrees", 0.95)


@pytest.mark.parametrize(("problem", "steps", "step", "confidence"), WRONG.values(), ids=WRONG)
def test_wrong_responses(problem: str, steps: list[str], step: int, confidence: float) -> None:
    found = Knights().detect(problem, steps)
    assert (found.step, found.confidence) == (step, confidence)


def test_other_words_for_the_two_kinds() -> None:
    told = (
        "On an island truth-tellers never lie and liars do. P says Q is a liar. Q says that P and Q are truth-tellers."
    )
    steps = ["P is a truth-teller.", "So Q is a liar."]
    assert Knights().detect(told, steps) == FirstError(None, "every report agrees", 0.95)
    strange = Knights(truthful=("saint", "angel"), lying=("sinner",))
    told = "P says: 'Q is a sinner.' Q says: 'P and I are angels.'"
    assert strange.detect(told, ["P is a saint.", "Q is a sinner."]) == FirstError(None, "every report agrees", 0.95)
    assert strange.detect(told, ["P is a sinner."])[::2] == (0, 0.95)


def test_plain_facts_count_too() -> None:
    told = "P says 'Q is a knight.' Exactly one of P, Q and R is a knight. R says that P is a knave."
    assert Knights().detect(told, ["P is a knave.", "Q is a knave, and R is a knight."])[::2] == (None, 0.95)


def test_unread_steps_are_wrong_or_ignored_as_told() -> None:
    steps = ["A is a knight just as the moon is a knave.", "A is a knight and B is a knave."]
    assert Knights().detect(TWO, steps)[::2] == (0, 0.3)
    assert Knights(unread="ignore").detect(TWO, steps)[::2] == (None, 0.0)
    assert Knights(unread="ignore").detect(TWO, [steps[0], "B is a knight."])[::2] == (1, 0.5)


def test_without_an_answer_nothing_is_all_right() -> None:
    assert Knights().detect(TWO, ["A is a knight."]) == FirstError(None, "no final answer", 0.0)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("What is 2 + 2?", "0 inhabitants"),
        ("A says 'I am a knave.'", "contradict"),
        ("A says 'B is a spy.' B says 'A is a knight.'", "spy"),
        ("A says 'one of us is a knave.' B says 'A is a knight.'", "one of us"),
        ("A says 'B is tall.' B says 'A is a knight.'", "B is tall"),
    ],
)
def test_a_problem_that_cannot_be_read_says_so(problem: str, reason: str) -> None:
    found = Knights().detect(problem, ["A is a knight."])
    assert found[::2] == (None, 0.0)
    assert reason in found.reason


def test_a_known_answer_that_the_problem_does_not_give_is_told() -> None:
    assert Knights().detect(TWO, ["A is a knight."], "B is a knight")[::2] == (None, 0.0)
    assert Knights().detect(TWO, ["B is a knight."], "A: knight, B: knave").step == 0


LARGE = [
    "A is a knight. " * 70_000,
    "(" * 10_000,
    "'" * 500_000,
    "A says " * 2_800,
    "A says 'B is a knave.' " * 800,
    "if " * 300_000,
    "A and B and " * 80_000,
    "A is a knight or " * 230,
    "not " * 120,
    "if A is a knight then " * 22,
    "\ue000" * 3_000,
    " " * 10**6,
    "A would say " * 40,
    '"' * 3_999,
    "A and " * 80,
]


@pytest.mark.parametrize("text", LARGE, ids=range(len(LARGE)))
def test_large_texts_end_soon_as_steps_and_as_problems(text: str) -> None:
    with at_most(20):
        assert len(Knights(seconds=60).detect(TWO, [text]).reason) < 1000
        found = Knights(seconds=60).detect(text, ["A is a knight."])
    assert len(found.reason) < 1000


def test_it_is_picklable_and_repeats_itself() -> None:
    knights = Knights(unread="ignore", lying=("knave",), seconds=3.0)
    again = pickle.loads(pickle.dumps(knights))
    assert again == knights
    problem, world = island(5)
    steps = [f"{n} is a {role(k)}." for n, k in world.items()]
    assert (
        again.detect(problem, steps) == knights.detect(problem, steps) == FirstError(None, "every report agrees", 0.95)
    )


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unread"):
        Knights(unread="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="truthful"):
        Knights(truthful=("liar",))
    with pytest.raises(ValueError, match="lying"):
        Knights(lying=())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_no_text_raises(problem: str, steps: list[str]) -> None:
    found = Knights().detect(TWO + problem, steps)
    assert found.step in (None, *range(len(steps)))
