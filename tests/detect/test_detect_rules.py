"""Rules: formulas against truth tables, chains of rules in several forms, and one step made wrong."""

import pickle
import random
import subprocess
import sys
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from work import at_most

from prefixloss.detect.base import FirstError
from prefixloss.detect.puzzles.logic import (
    And,
    Atom,
    Formula,
    Iff,
    Implies,
    Not,
    Or,
    Theory,
    UndecidedError,
    follows,
    judge,
    symbols,
)
from prefixloss.detect.puzzles.rules import Rules
from prefixloss.detect.puzzles.rules_english import English

pytest.importorskip("z3")

LETTERS = "PQRS"
formulas = st.recursive(
    st.sampled_from([Atom(letter) for letter in LETTERS]),
    lambda inner: st.one_of(
        st.builds(Not, inner), *(st.builds(operator, inner, inner) for operator in (And, Or, Implies, Iff))
    ),
    max_leaves=8,
)


def true(formula: Formula, case: dict[str, bool]) -> bool:
    if isinstance(formula, Atom):
        return case[formula.name]
    if isinstance(formula, Not):
        return not true(formula.inner, case)
    left, right = true(formula.left, case), true(formula.right, case)
    if isinstance(formula, And):
        return left and right
    if isinstance(formula, Or):
        return left or right
    return (not left or right) if isinstance(formula, Implies) else left == right


def by_truth_table(premises: list[Formula], claim: Formula) -> str:
    cases = [dict(zip(LETTERS, values, strict=True)) for values in product((False, True), repeat=len(LETTERS))]
    left = [true(claim, case) for case in cases if all(true(p, case) for p in premises)]
    return "follows" if all(left) else "open" if any(left) else "refuted"


@settings(max_examples=150, deadline=None)
@given(st.lists(formulas, max_size=4), formulas)
def test_the_solver_agrees_with_truth_tables(premises: list[Formula], claim: Formula) -> None:
    assert judge(premises, claim) == by_truth_table(premises, claim)
    assert follows(premises, claim) == (by_truth_table(premises, claim) == "follows")


@settings(max_examples=150, deadline=None)
@given(formulas)
def test_a_formula_is_read_as_it_is_written(formula: Formula) -> None:
    assert symbols(str(formula)) == formula


@settings(max_examples=40, deadline=None)
@given(st.lists(formulas, min_size=1, max_size=3), formulas)
def test_the_first_step_that_does_not_follow_is_found(premises: list[Formula], claim: Formula) -> None:
    problem = " ".join(f"{p}." for p in premises) + f" Query: {claim}"
    found = Rules().detect(problem, [f"{premises[0]}.", f"So {claim}."])
    if by_truth_table(premises, And(Atom("P"), Not(Atom("P")))) == "follows":
        assert found.confidence == 0.0
        return
    expected = {"follows": (None, 0.95), "refuted": (1, 0.95), "open": (1, 0.85)}
    assert (found.step, found.confidence) == expected[by_truth_table(premises, claim)]


def test_outcomes_by_hand() -> None:
    p, q = Atom("P"), Atom("Q")
    assert judge([Implies(p, q), p], q) == "follows"
    assert judge([Implies(p, q), Not(q)], p) == "refuted"
    assert judge([Implies(p, q), q], p) == "open"
    assert Theory([p]).judge(q, under=[Implies(p, q)]) == "follows"


def test_a_hard_question_ends_undecided_and_the_same_way_each_time() -> None:
    holes = 11
    sits = [[Atom(f"p{i}h{h}") for h in range(holes)] for i in range(holes + 1)]
    theory = Theory(milliseconds=60_000)
    for row in sits:
        clause: Formula = row[0]
        for atom in row[1:]:
            clause = Or(clause, atom)
        theory.add(clause)
    for h in range(holes):
        for i in range(holes + 1):
            for j in range(i):
                theory.add(Not(And(sits[i][h], sits[j][h])))
    for _ in range(2):
        with pytest.raises(UndecidedError):
            theory.contradicts()


READINGS = {
    "Max is a cat": "cat(max)",
    "Max is not a cat": "~cat(max)",
    "Every cat is a mammal": "(cat(?) -> mammal(?))",
    "Cats are mammals.": "(cat(?) -> mammal(?))",
    "A cat is not a plant": "(cat(?) -> ~plant(?))",
    "All cats are big and red": "(cat(?) -> (big(?) & red(?)))",
    "No cats are dogs": "(cat(?) -> ~dog(?))",
    "Only cats are red": "(red(?) -> cat(?))",
    "If someone is red and kind then they are big": "((red(?) & kind(?)) -> big(?))",
    "Everything that is a cat and a dog is nice": "((cat(?) & dog(?)) -> nice(?))",
    "Everyone who likes the dog is red": "(likes the dog(?) -> red(?))",
    "Nothing that is red is big": "(red(?) -> ~big(?))",
    "All kind, rough people are furry": "((kind(?) & rough(?)) -> furry(?))",
    "The cat does not chase the dog": "~chases the dog(the cat)",
    "The cat chases the dog": "chases the dog(the cat)",
    "If something sees the bear and the bear is red then it is big": "((sees the bear(?) & red(the bear)) -> big(?))",
    "If Bob is red then he is big": "(red(bob) -> big(bob))",
    "Max is a cat, a dog, and not nice": "((cat(max) & dog(max)) & ~nice(max))",
    "Max is a cat or Fae is not kind": "(cat(max) | ~kind(fae))",
    "It is not the case that Max is red": "~red(max)",
    "Max and Fae are cats": "(cat(fae) & cat(max))",
    "if A then B": "(A -> B)",
    "If A and B, then C": "((A & B) -> C)",
    "A -> B | C & ~D": "(A -> (B | (C & ~D)))",
    "A ∧ B ↔ ¬C": "((A & B) <-> ~C)",
    "A -> B -> C": "(A -> (B -> C))",
}


def test_sentences_are_read_as_formulas() -> None:
    english = English()
    for singular in ("cat", "mammal", "dog", "plant", "chases"):  # the form that came first stands for all
        english.words(singular)
    for text, expected in READINGS.items():
        english.note_names(text)
        assert str(english.sentence(text)) == expected


KINDS = ["wumpus", "yumpus", "cat", "mammal", "sterpus", "butterfly", "box"]
RULE_FORMS = [
    "Every {0} is a {1}.",
    "{2} are {3}.",
    "All {2} are {3}.",
    "Everything that is a {0} is a {1}.",
    "If something is a {0} then it is a {1}.",
]
WHEREFORE = [
    "So {0} is a {1}.",
    "Therefore, {0} is a {1}.",
    "{0} is a {1}.",
    "{0} must be a {1}.",
    "This means that {0} is a {1}.",
]


def plural(word: str) -> str:
    return word[:-1] + "ies" if word.endswith("y") else word + ("es" if word[-1] in "sx" else "s")


def chain(seed: int) -> tuple[str, list[str], list[str]]:
    """A chain of rules about one name, with a rule that leads elsewhere: the problem, the steps, and the kinds."""
    rng = random.Random(seed)
    kinds = rng.sample(KINDS, 5)
    *line, elsewhere = kinds
    name = rng.choice(["Max", "Fae", "Polly"])

    def rule(low: str, high: str) -> str:
        text = rng.choice(RULE_FORMS).format(low, high, plural(low), plural(high))
        return text[0].upper() + text[1:]

    rules = [rule(low, high) for low, high in pairwise(line)]
    premises = [*rules, rule(elsewhere, line[0]), f"{name} is a {line[0]}."]
    rng.shuffle(premises)
    steps = [f"{name} is a {line[0]}."]
    for k, text in enumerate(rules):
        steps += [text, rng.choice(WHEREFORE).format(name, line[k + 1])]
    return (
        " ".join(premises) + f" True or false: {name} is a {line[-1]}.",
        [*steps, "The answer is true."],
        [name, *kinds],
    )


SEEDS = pytest.mark.parametrize("seed", range(20))


@SEEDS
def test_a_right_chain_has_no_error(seed: int) -> None:
    problem, steps, _ = chain(seed)
    assert Rules().detect(problem, steps, "True") == FirstError(None, "every report agrees", 0.95)


@SEEDS
def test_a_claim_that_does_not_follow_is_the_first_error(seed: int) -> None:
    problem, steps, (name, *kinds) = chain(seed)
    k = random.Random(seed).choice([2, 4, 6])
    steps[k] = f"So {name} is a {kinds[-1]}."
    found = Rules().detect(problem, steps)
    assert (found.step, found.confidence) == (k, 0.85)


@SEEDS
def test_a_rule_turned_round_is_an_error(seed: int) -> None:
    problem, steps, (_, low, high, *_) = chain(seed)
    steps[1] = f"Every {high} is a {low}."
    assert Rules().detect(problem, steps).step == 1


PROBLEM = (
    "Every cat is a mammal. Mammals are warm. Each mammal is an animal. Animals are not plants. "
    "Max is a cat. Rex is a dog. True or false: Max is not warm."
)
RIGHT = {
    "since": [
        "Since Max is a cat and cats are mammals, Max is a mammal.",
        "Max is warm because mammals are warm.",
        "So the statement is False.",
    ],
    "from": [
        "From Max is a cat and every cat is a mammal, we get that Max is a mammal.",
        "We know that mammals are warm, so Max is warm.",
        "Answer: No",
    ],
    "by contradiction": [
        "Assume Max is a plant. Max is a cat, so Max is an animal, but animals are not plants. Contradiction.",
        "Therefore Max is not a plant. Max is warm.",
        "False",
    ],
    "under a condition": [
        "If Rex is a mammal, then Rex is warm. Then Rex is an animal.",
        "Max is warm, so the answer is false.",
    ],
    "talk": [
        "Let's think about Max.",
        "We need to check whether Max is warm.",
        "Max is warm.",
        "The final answer is: false",
    ],
}
WRONG = {
    "open": (["Max is a cat.", "So Max is a dog.", "False"], 1, 0.85),
    "refuted": (["Max is a cat.", "So Max is a plant.", "False"], 1, 0.95),
    "a universal that only holds of Max": (["Max is warm.", "Every cat is warm.", "Every animal is warm."], 2, 0.85),
    "a premise of a because": (["Max is warm because Max is a dog."], 0, 0.85),
    "no contradiction": (["Assume Rex is warm. Contradiction. So Rex is not warm."], 0, 0.95),
    "a supposition taken for true": (["If Rex is a mammal, then Rex is warm.", "Rex is warm."], 1, 0.85),
    "supposed no more": (["Assume Max is a plant. Contradiction.", "Rex is a cat."], 1, 0.85),
    "the answer": (["Max is warm.", "The answer is true."], 1, 0.95),
    "the answer as unknown": (["Max is a cat.", "It cannot be determined."], 1, 0.95),
}


@pytest.mark.parametrize("steps", RIGHT.values(), ids=RIGHT)
def test_right_responses(steps: list[str]) -> None:
    assert Rules().detect(PROBLEM, steps) == FirstError(None, "every report agrees", 0.95)


@pytest.mark.parametrize(("steps", "step", "confidence"), WRONG.values(), ids=WRONG)
def test_wrong_responses(steps: list[str], step: int, confidence: float) -> None:
    found = Rules().detect(PROBLEM, steps)
    assert (found.step, found.confidence) == (step, confidence)


def test_symbols_in_steps() -> None:
    problem = "P -> Q. Q -> R. P. ~S | ~R. Query: S"
    right = [
        "P -> Q and P, so Q.",
        "From Q -> R and Q, we get R (modus ponens).",
        "~S | ~R, and R, so ~S.",
        "The answer is false.",
    ]
    assert Rules().detect(problem, right).confidence == 0.95
    assert Rules().detect(problem, right).step is None
    assert Rules().detect(problem, ["P, so Q.", "Therefore S."])[::2] == (1, 0.95)


def test_in_a_closed_world_what_does_not_follow_is_false() -> None:
    steps = ["Rex is not warm.", "So the answer is true."]
    problem = PROBLEM.replace("Max is not warm", "Rex is not warm")
    assert Rules(world="closed").detect(problem, steps).step is None
    assert Rules(world="closed").detect(problem, steps).confidence == 0.95
    assert Rules().detect(problem, steps)[::2] == (0, 0.85)
    assert Rules().detect(problem, ["Unknown."]) == FirstError(None, "every report agrees", 0.95)


def test_unread_steps_are_wrong_or_ignored_as_told() -> None:
    steps = ["Max is somehow usually like those mammals.", "Max is warm.", "False"]
    assert Rules().detect(PROBLEM, steps)[::2] == (0, 0.3)
    ignored = Rules(unread="ignore").detect(PROBLEM, steps)
    assert ignored[::2] == (None, 0.0)
    assert "cannot be read" in ignored.reason
    assert Rules(unread="ignore").detect(PROBLEM, [steps[0], "Max is a plant."])[::2] == (1, 0.5)


def test_without_an_answer_nothing_is_all_right() -> None:
    assert Rules().detect(PROBLEM, ["Max is a cat."]) == FirstError(None, "no final answer", 0.0)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("Some cats are red. Max is a cat. Query: Max is red.", "problem:"),
        ("What is 2 + 2?", "no premises"),
        ("P. ~P. Query: P", "contradict"),
        ("", "no premises"),
    ],
)
def test_a_problem_that_cannot_be_read_says_so(problem: str, reason: str) -> None:
    found = Rules().detect(problem, ["Max is red.", "True"])
    assert found[::2] == (None, 0.0)
    assert reason in found.reason


def test_a_known_answer_that_the_problem_does_not_give_is_told() -> None:
    assert Rules().detect(PROBLEM, ["Max is warm."], "true")[::2] == (None, 0.0)


LARGE = [
    "a " * 500_000,
    "(" * 10_000,
    "~" * 10_000 + "P",
    "Max is a cat. " * 70_000,
    "if " * 300_000,
    ", " * 400_000,
    " " * 10**6,
    "P & " * 200_000,
    "Every cat is " * 300,
    "(P -> " * 120,
    "if Max is a cat, " * 28,
    "Since " * 80,
    "\n".join(["Max is a cat"] * 280),
    "cat and " * 60,
    "not " * 120,
    "which " * 600,
]


@pytest.mark.parametrize("text", LARGE, ids=range(len(LARGE)))
def test_large_texts_end_soon_as_steps_and_as_problems(text: str) -> None:
    with at_most(20):
        assert len(Rules(seconds=60).detect(PROBLEM, [text]).reason) < 1000
        found = Rules(seconds=60).detect(text, ["Max is a cat."])
    assert len(found.reason) < 1000


def test_the_time_limit_holds() -> None:
    found = Rules(seconds=0.05).detect(
        PROBLEM, [f"If P{k} is a cat then Max is a cat or P{k} is a dog." for k in range(3000)] * 3
    )
    assert found.confidence <= 0.5


def test_it_is_picklable_and_repeats_itself() -> None:
    rules = Rules(unread="ignore", world="closed", seconds=3.0)
    again = pickle.loads(pickle.dumps(rules))
    assert again == rules
    problem, steps, _ = chain(3)
    assert again.detect(problem, steps) == rules.detect(problem, steps)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unread"):
        Rules(unread="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="world"):
        Rules(world="flat")  # type: ignore[arg-type]


def test_the_solver_is_imported_only_when_needed() -> None:
    code = (
        "import sys, prefixloss.detect.puzzles.rules, prefixloss.detect.puzzles.knights; sys.exit('z3' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.lists(st.text(max_size=200), max_size=4))
def test_no_text_raises_or_is_all_right_unread(problem: str, steps: list[str]) -> None:
    found = Rules().detect(problem, steps)
    assert found[::2] == (None, 0.0) or found.step in range(len(steps))
