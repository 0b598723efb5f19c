"""Swaps: generated puzzles, right responses in several wordings, and one fact of a response made false."""

import pickle
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from work import at_most

from prefixloss.detect.base import FirstError
from prefixloss.detect.puzzles.swaps import Swaps

PEOPLE = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred", "Gertrude")
LETTERS = "ABCDEFG"


class World(NamedTuple):
    """What changes hands. called: things by their names in the problem, and by short names."""

    intro: str
    holds: str
    swap: str
    called: dict[str, str]


WORLDS = {
    "balls": World(
        "At the start of the game, they are each holding a ball: ",
        "has a",
        "swap balls",
        {f"{c} ball": c for c in ("red", "blue", "green", "white", "black", "pink", "brown")},
    ),
    "books": World(
        "At the start of the semester, they each buy one new book: ",
        "gets",
        "swap books",
        {"The Great Gatsby": "Gatsby", "Ulysses": "Ulysses", "Moby Dick": "Moby Dick", "Catch-22": "Catch-22",
         "Now, Voyager": "Voyager", "The Pearl": "The Pearl", "The Fellowship of the Ring": "Fellowship"},
    ),
    "dancers": World(
        "At the start of a song, they each have a partner: ",
        "is dancing with",
        "switch partners",
        {name: name for name in ("Sam", "Helga", "Rodrigo", "Karl", "Ophelia", "Izzi", "Jamie")},
    ),
    "positions": World(
        "At the start of the match, they are each assigned to a position: ",
        "is playing",
        "trade positions",
        {"left midfielder": "left mid", "right midfielder": "right mid", "goalkeeper": "goalkeeper",
         "left winger": "left winger", "striker": "striker", "benchwarmer": "benchwarmer", "fullback": "fullback"},
    ),
}  # fmt: skip


class Problem(NamedTuple):
    world: World
    start: dict[str, str]
    swaps: list[tuple[str, str]]
    asked: str

    @property
    def text(self) -> str:
        held = [f"{person} {self.world.holds} {thing}" for person, thing in self.start.items()]
        swaps = [f"{one} and {other} {self.world.swap}." for one, other in self.swaps]
        options = [f"({letter}) {thing}." for letter, thing in zip(LETTERS, self.start.values(), strict=False)]
        return (
            f"{', '.join(self.start)} are friends. {self.world.intro}{', '.join(held[:-1])}, and {held[-1]}.\n"
            f"Then they start to trade. First, {' Then, '.join(swaps)} At the end, {self.asked} {self.world.holds}\n"
            f"Options:\n" + "\n".join(options)
        )

    def after(self, swaps: int) -> dict[str, str]:
        held = dict(self.start)
        for one, other in self.swaps[:swaps]:
            held[one], held[other] = held[other], held[one]
        return held

    @property
    def final(self) -> str:
        """The thing that is asked for."""
        return self.after(len(self.swaps))[self.asked]

    def letter(self, thing: str) -> str:
        return f"({LETTERS[list(self.start.values()).index(thing)]})"


def puzzle(world: str, rng: random.Random) -> Problem:
    people = PEOPLE[: rng.choice((3, 5, 7))]
    things = rng.sample(sorted(WORLDS[world].called), len(people))
    swaps = [tuple(rng.sample(people, 2)) for _ in range(rng.randint(3, 6))]
    return Problem(WORLDS[world], dict(zip(people, things, strict=True)), swaps, rng.choice(people))


class Teller:
    """Tells the facts of a puzzle, the one with number `lie` falsely."""

    def __init__(self, problem: Problem, lie: int | None = None) -> None:
        self.problem, self.lie, self.told = problem, lie, 0

    def _tell(self, fact: str, others: list[str]) -> str:
        self.told += 1
        return others[self.told % len(others)] if self.told - 1 == self.lie else fact

    def thing(self, thing: str) -> str:
        return self._tell(thing, [t for t in self.problem.start.values() if t != thing])

    def short(self, thing: str) -> str:
        return self.problem.world.called[self.thing(thing)]

    def pair(self, pair: tuple[str, str]) -> tuple[str, str]:
        one, other = pair
        return one, self._tell(other, [p for p in self.problem.start if p not in pair])


def listed(problem: Problem, tell: Teller) -> list[str]:
    """The form of BIG-Bench Mistake."""

    def state(held: dict[str, str]) -> str:
        return ", ".join(f"{person}: {tell.short(thing)}" for person, thing in held.items()) + "."

    steps = [f"(0) At the start: {state(problem.start)}"]
    for k, swap in enumerate(problem.swaps, start=1):
        one, other = tell.pair(swap)
        steps.append(f"({k}) {one} and {other} {problem.world.swap}: {state(problem.after(k))}")
    end = f"At the end of the game, {problem.asked} {problem.world.holds} {tell.thing(problem.final)}."
    return [*steps, f"{end} So the answer is {problem.letter(tell.thing(problem.final))}"]


def initials(problem: Problem, tell: Teller) -> list[str]:
    """Only states, and people by their initials."""
    steps = [
        ", ".join(f"{person[0]}: {tell.short(thing)}" for person, thing in problem.after(k).items())
        for k in range(len(problem.swaps) + 1)
    ]
    return [*steps, f"Answer: {problem.letter(tell.thing(problem.final))}"]


def prose(problem: Problem, tell: Teller) -> list[str]:
    """Sentences, about those who swap only, and the answer by its name."""

    def claim(person: str, thing: str) -> str:
        return f"{person} {problem.world.holds} {tell.thing(thing)}"

    start = " and ".join(claim(*held) for held in problem.start.items())
    steps = ["Let me keep track of who has what.", f"Initially, {start}."]
    for k, swap in enumerate(problem.swaps, start=1):
        one, other = tell.pair(swap)
        now = problem.after(k)
        claims = [claim(person, now[person]) for person in swap]
        verb = problem.world.swap.split()[0]
        steps.append(f"Next, {one} {verb}s places with {other}, so {claims[0]}, while {claims[1]}.")
    return [*steps, f"Therefore the answer is {tell.thing(problem.final)}."]


def markdown(problem: Problem, tell: Teller) -> list[str]:
    """Bullets and arrows: those who swap, then the state in lines of its own."""
    steps = []
    for k, swap in enumerate(problem.swaps, start=1):
        one, other = tell.pair(swap)
        state = "\n".join(f"- **{person}** → {tell.short(thing)}" for person, thing in problem.after(k).items())
        steps.append(f"### Step {k}\nSwap between *{one}* and *{other}*:\n\n{state}")
    return [*steps, f"**Answer:** {problem.letter(tell.thing(problem.final))}"]


Form = Callable[[Problem, Teller], list[str]]
FORMS = pytest.mark.parametrize("form", [listed, initials, prose, markdown])
KINDS = pytest.mark.parametrize("world", WORLDS)


def detect(problem: Problem, steps: list[str], answer: str | None = None) -> FirstError:
    return Swaps().detect(problem.text, steps, answer)


@KINDS
@FORMS
def test_a_right_response_has_no_error(form: Form, world: str) -> None:
    for seed in range(15):
        problem = puzzle(world, random.Random(seed))
        steps = form(problem, Teller(problem))
        assert detect(problem, steps) == (None, "every report agrees", 0.95), (problem.text, steps)


@KINDS
@FORMS
def test_one_false_fact_is_found_in_its_step(form: Form, world: str) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        problem = puzzle(world, rng)
        teller = Teller(problem)
        right = form(problem, teller)
        for lie in rng.sample(range(teller.told), min(6, teller.told)):
            wrong = form(problem, Teller(problem, lie))
            (place,) = (k for k, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
            found = detect(problem, wrong)
            assert (found.step, found.confidence) == (place, 0.95), (problem.text, wrong[place], found)


@KINDS
@FORMS
def test_a_swap_left_out_or_done_twice_is_found_where_it_shows(form: Form, world: str) -> None:
    checked = 0
    for seed in range(10):
        problem = puzzle(world, random.Random(seed))
        right = form(problem, Teller(problem))
        first = len(right) - 1 - len(problem.swaps)  # the step of the first swap
        for k in range(len(problem.swaps) - 1):
            if set(problem.swaps[k]) != set(problem.swaps[k + 1]):
                place = first + k
                assert detect(problem, right[: place + 1] + right[place:]).step == place + 1
                if form is not initials or k:  # a first report may be of the next swap
                    assert detect(problem, right[:place] + right[place + 1 :]).step == place
                checked += 1
    assert checked


# one puzzle, for what is told about it

SMALL = Problem(
    WORLDS["balls"],
    {"Alice": "red ball", "Bob": "blue ball", "Claire": "green ball"},
    [("Alice", "Bob"), ("Bob", "Claire"), ("Claire", "Alice")],
    "Alice",
)
RIGHT = listed(SMALL, Teller(SMALL))


def test_the_small_puzzle_reads_as_written() -> None:
    assert RIGHT == [
        "(0) At the start: Alice: red, Bob: blue, Claire: green.",
        "(1) Alice and Bob swap balls: Alice: blue, Bob: red, Claire: green.",
        "(2) Bob and Claire swap balls: Alice: blue, Bob: green, Claire: red.",
        "(3) Claire and Alice swap balls: Alice: red, Bob: green, Claire: blue.",
        "At the end of the game, Alice has a red ball. So the answer is (A)",
    ]


@pytest.mark.parametrize(
    ("place", "right"),
    [
        (0, "At the beginning, Alice holds the red ball, Bob still has the blue ball and Claire holds the green one."),
        (0, "Alice, Bob, and Claire are friends who play a game."),
        (1, "Alice and Bob swap balls."),
        (1, "Alice swaps with Bob, and now Alice has blue and Bob has red."),
        (1, "First, Alice <-> Bob swap: Alice: blue ball; Bob: red ball."),
        (1, "Trade between Alice & Bob. Alice = blue, Bob = red, Claire = green (unchanged)"),
        (1, "After the first swap, (Alice, Bob) switch: Bob: red, Alice: blue."),
        (2, "Bob and Claire exchange their balls. Bob is now holding the green ball, Claire the red ball."),
        (2, f"{RIGHT[2]} At the end, Claire has the blue ball."),
        (3, "Claire and Alice swap balls: C: blue, A: red, B: green."),
        (3, f"At the start, Bob has the blue ball. {RIGHT[3]}"),
        (4, "The answer is the red ball."),
        (4, "**Answer: A**"),
        (4, "So, at the end of the game, Alice has the red ball. The answer is: (A) red ball."),
    ],
)
def test_other_ways_to_say_what_is_so(place: int, right: str) -> None:
    steps = [*RIGHT[:place], right, *RIGHT[place + 1 :]]
    assert detect(SMALL, steps) == (None, "every report agrees", 0.95)


@pytest.mark.parametrize(
    ("place", "wrong", "reason"),
    [
        (0, "At the start: Alice: red, Bob: blue.", "leaves out Claire"),
        (1, "Alice and Bob swap balls: Alice: blue, Claire: green.", "leaves out Bob"),
        (1, "Alice and Bob swap balls: Alice: silver, Bob: red, Claire: green.", "not something else"),
        (1, "Alice and Bob swap balls: Alice: blue, Bob: nothing, Claire: green.", "not something else"),
        (1, "Bob and Claire swap balls.", "swap 1 is of Alice and Bob"),
        (2, "Bob swaps with Claire, and now Bob has the red ball.", "Bob holds green ball, not red ball"),
        (4, "Alice and Bob swap balls again.", "swaps after the last swap"),
        (4, "At the end, Bob has the red ball.", "Bob holds green ball"),
        (4, "So the answer is (B)", "Alice ends with red ball, not blue ball"),
        (4, "The answer is the green ball.", "Alice ends with red ball, not green ball"),
        (4, "**Answer: C**", "Alice ends with red ball, not green ball"),
    ],
)
def test_the_reason_says_what_is_wrong(place: int, wrong: str, reason: str) -> None:
    found = detect(SMALL, [*RIGHT[:place], wrong, *RIGHT[place + 1 :]])
    assert found.step == place
    assert reason in found.reason


UNREAD = "Alice, who likes the red ball, thinks of Bob."


def test_what_cannot_be_read_is_ignored_or_wrong_as_asked_and_never_all_right() -> None:
    steps = [*RIGHT[:2], UNREAD, *RIGHT[2:]]
    wrong = detect(SMALL, steps)
    assert (wrong.step, wrong.confidence) == (2, 0.3)
    ignored = Swaps(unread="ignore").detect(SMALL.text, steps)
    assert (ignored.step, ignored.confidence) == (None, 0)
    assert "step 3 cannot be read" in ignored.reason
    later = Swaps(unread="ignore").detect(SMALL.text, [*steps[:-1], "So the answer is (B)"])
    assert (later.step, later.confidence) == (5, 0.5)


@pytest.mark.parametrize("last", ["So the answer is (Z)", "The answer is unknown.", "Answer:"])
def test_an_answer_that_names_nothing_is_unread(last: str) -> None:
    found = detect(SMALL, [*RIGHT[:-1], last])
    assert (found.step, found.confidence) == (4, 0.3)


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_response_without_an_answer_is_not_all_right(kept: int) -> None:
    found = detect(SMALL, RIGHT[:kept])
    assert (found.step, found.confidence) == (None, 0)
    assert found.reason == ("no final answer" if kept else "no steps")


@pytest.mark.parametrize("answer", ["(A)", "A", "red ball", "The red ball."])
def test_a_known_answer_that_agrees_changes_nothing(answer: str) -> None:
    assert detect(SMALL, RIGHT, answer) == (None, "every report agrees", 0.95)


@pytest.mark.parametrize("answer", ["(B)", "C", "blue ball", "(Z)", ""])
def test_a_known_answer_that_does_not_follow_means_the_problem_was_misread(answer: str) -> None:
    for steps in (RIGHT, [*RIGHT[:-1], "So the answer is (B)"]):
        found = detect(SMALL, steps, answer)
        assert (found.step, found.confidence) == (None, 0)
        assert "known answer" in found.reason


@pytest.mark.parametrize(
    "problem",
    [
        "",
        "How much is 2 + 2?",
        "Alice and Bob swap balls. Alice has the",
        "Alice has a red ball. Alice and Bob swap balls. At the end, Alice has the",
        "Alice has a red ball and Bob has a blue ball. At the end, Alice has the",
        "Alice has a red ball and Bob has a blue ball. Alice and Bob swap balls. Who has what?",
        "Alice has a red ball and Bob has a blue ball. Alice and Zoe swap balls. At the end, Alice has the",
        "Alice has a red ball, Bob has a blue ball, and Alice has a pink ball. Alice and Bob swap balls. Alice has the",
    ],
)
def test_other_problems_are_unread(problem: str) -> None:
    found = Swaps().detect(problem, RIGHT)
    assert (found.step, found.confidence) == (None, 0)
    assert found.reason.startswith("problem: ")


HOSTILE = {
    "letters": "A",
    "names": "Alice ",
    "pairs": "Alice and Bob ",
    "claims": "Alice: red, ",
    "prose": "Alice has the red ball and ",
    "possessives": "Alice's ",
    "swaps": "swap Alice and ",
    "answers": "answer is ",
    "asides": "Alice (",
    "hyphens": "Al-",
    "spaces": " ",
    "lines": " \n",
    "brackets": "(",
    "marks": "*",
}


@pytest.mark.parametrize("part", HOSTILE.values(), ids=HOSTILE)
def test_endless_text_ends(part: str) -> None:
    text = part * (50_000 // len(part))
    nested = "(" * 10_000 + "Alice " + part * 1_000 + "red ball" + ")" * 10_000
    detector = Swaps(seconds=600)
    for problem, step in (
        (SMALL.text, text),
        (SMALL.text, nested),
        (SMALL.text + text, RIGHT[0]),
        (text + SMALL.text, RIGHT[0]),
        (text, RIGHT[0]),
    ):
        with at_most(10):
            found = detector.detect(problem, [step])
        assert "out of time" not in found.reason
        assert "failed" not in found.reason
        assert found.step is not None or found.confidence == 0


@pytest.mark.parametrize("part", ["x", "Alice: red, "])
def test_a_step_of_a_megabyte_is_read_in_time(part: str) -> None:
    with at_most(20):
        found = Swaps(seconds=600).detect(SMALL.text, [part * (1_000_000 // len(part)) + "Alice: blue"])
    assert found.step == (0 if part != "x" else None)
    assert "out of time" not in found.reason


def test_configured_detectors_can_be_pickled() -> None:
    detector = Swaps(unread="ignore", seconds=1.0)
    assert pickle.loads(pickle.dumps(detector)) == detector


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="unread: got 'maybe'"):
        Swaps(unread="maybe")  # type: ignore[arg-type]


FIVE = Problem(
    WORLDS["balls"],
    dict(zip(PEOPLE, ("red ball", "blue ball", "green ball", "black ball", "pink ball"), strict=False)),
    [("Alice", "Bob"), ("Bob", "Claire")],
    "Bob",
)
BEGIN = "At the start: Alice: red, Bob: blue, Claire: green, Dave: black, Eve: pink."


def test_those_to_whom_nothing_happened_may_be_left_out() -> None:
    """A list of the two who swap and one other does not lose the rest, who stay as they are."""
    first, second = "Alice: blue, Bob: red, Claire: green.", "Bob: green, Claire: red, Alice: blue."
    steps = [BEGIN, f"Alice and Bob swap: {first}", f"Bob & Claire swap: {second}", "The answer is the green ball."]
    assert detect(FIVE, steps) == (None, "every report agrees", 0.95)


def test_a_list_of_all_but_one_lost_that_one() -> None:
    """Dave stayed as he was, but everyone else who did is there: in doubt, and less than sure."""
    found = detect(FIVE, [BEGIN, "Alice and Bob swap: Alice: blue, Bob: red, Claire: green, Eve: pink."])
    assert (found.step, found.reason, found.confidence) == (1, "leaves out Dave", 0.6)
    found = detect(FIVE, [BEGIN, "Alice and Bob swap: Alice: blue, Claire: green, Dave: black, Eve: pink."])
    assert (found.step, found.reason, found.confidence) == (1, "leaves out Bob", 0.95)


def test_initials_of_people_and_of_things() -> None:
    """ "B=B" is Bob and his blue ball: every name of the balls has a word with a b, "ball", and that says nothing."""
    steps = ["A=R, B=B, C=G", "A<->B: A=B, B=R, C=G", "B<->C: A=B, B=G, C=R", "The answer is the green ball."]
    three = FIVE._replace(start=dict(list(FIVE.start.items())[:3]))
    assert detect(three, steps) == (None, "every report agrees", 0.95)
    assert detect(three, [steps[0], "A<->B: A=R, B=B, C=G"]).step == 1


def test_a_short_name_for_two_things_is_unread_and_not_wrong() -> None:
    """The green and the grey ball are both "g"."""
    problem = FIVE._replace(start={"Alice": "green ball", "Bob": "grey ball", "Claire": "red ball"})
    found = detect(problem, ["Alice: g, Bob: g, Claire: red."])
    assert (found.step, found.confidence) == (0, 0.3)
    assert found.reason.startswith("cannot be read")
