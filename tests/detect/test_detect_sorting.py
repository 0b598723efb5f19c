"""Word sorting: generated lists, right responses in several wordings, and one fact of a response made false."""

import pickle
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from work import at_most

from prefixloss.detect.base import FirstError
from prefixloss.detect.puzzles.sorting import Sorting

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
LETTERS = "abcdefghijklm"  # of all words: the other half of the alphabet is for lies

Order = list[list[str]]  # words that tie stand together


class Comparison(NamedTuple):
    """Words that tie, the index of the letter they are compared by, what that splits them into, and all words then."""

    tie: list[str]
    letter: int
    split: Order
    order: Order


def comparisons(words: list[str], rng: random.Random) -> Iterator[Comparison]:
    """From the left; letters that the words of a tie share are sometimes passed over."""
    order, letters = [words], [0]
    while (k := next((k for k, tie in enumerate(order) if len(set(tie)) > 1), None)) is not None:
        tie, letter = order[k], letters[k]
        while len({word[letter : letter + 1] for word in tie}) == 1 and rng.random() < 0.5:
            letter += 1
        keys = sorted({word[letter : letter + 1] for word in tie})
        split = [[word for word in tie if word[letter : letter + 1] == key] for key in keys]
        order = [*order[:k], *split, *order[k + 1 :]]
        letters[k : k + 1] = [letter + 1] * len(split)
        yield Comparison(tie, letter, split, order)


def words(rng: random.Random) -> list[str]:
    """Some with a long beginning in common, some that begin another word, and now and then one that stands twice."""
    stems = [first + "".join(rng.choices(LETTERS, k=rng.randint(0, 2))) for first in rng.sample(LETTERS, 3)]
    made = {rng.choice(stems) + "".join(rng.choices(LETTERS, k=rng.randint(1, 3))) for _ in range(rng.randint(3, 12))}
    some = rng.sample(sorted({*stems, *made}), len({*stems, *made}))
    return [*some, some[0]] if rng.random() < 0.2 else some


def number(word: str, letter: int) -> int:
    return LETTERS.find(word[letter]) + 1 if letter < len(word) else 0


class Teller:
    """Tells facts, the one with number `lie` falsely."""

    def __init__(self, lie: int | None = None) -> None:
        self.lie, self.told = lie, 0

    def _lies(self) -> bool:
        self.told += 1
        return self.told - 1 == self.lie

    def letter(self, word: str, letter: int) -> str:
        true = word[letter : letter + 1]
        return "z" if self._lies() else true

    def number(self, word: str, letter: int) -> int:
        return number(word, letter) + (13 if self._lies() else 0)

    def ordinal(self, letter: int) -> str:
        return ORDINALS[(not letter) if self._lies() else letter]

    def words(self, some: list[str]) -> list[str]:
        """Lies by one too few, one too many or another."""
        if not self._lies():
            return some
        return (some[1:], [*some, some[0]], [*some[1:], "nonsense"])[self.told % 3]

    def order(self, order: Order) -> Order:
        """Lies by ties that change places, a word that is lost, or a word that joins others."""
        if not self._lies():
            return order
        k = self.told % len(order)
        if self.told % 3 == 0:
            return [*order[:k], order[k][1:], *order[k + 1 :]]
        if self.told % 3 == 1 and len(order) > 1 and set(order[0]) != set(order[-1]):
            return [order[-1], *order[1:-1], order[0]]
        return [*order[:k], [*order[k], "nonsense"], *order[k + 1 :]]


def quoted(tie: list[str]) -> str:
    names = " ? ".join(f'"{word}"' for word in tie)
    return f"[{names}]" if len(tie) != 1 else names


def chain(order: Order) -> str:
    return " < ".join(map(quoted, order))


def big_bench(some: list[str], tell: Teller, rng: random.Random) -> list[str]:
    """The form of BIG-Bench Mistake."""
    steps = []
    for k, (tie, letter, split, order) in enumerate(comparisons(some, rng)):
        which = tell.ordinal(letter)
        entries = " ".join(
            f'"{word}": "{tell.letter(word, letter)}" ({tell.number(word, letter)}).' for word in tell.words(tie)
        )
        numbered = " < ".join(f"({tell.number(t[0], letter)}) {quoted(t)}" for t in tell.order(split) if t)
        if k == 0:
            start = f"I should start by looking at the {which} letter of the words in the list."
            steps += [f"{start} The {which} letter: {entries}", f"We now have: {numbered}."]
        else:
            start = f"Now let's sort this subpart {quoted(tell.words(tie))} by looking at their {which} letters."
            steps.append(f"{start} The {which} letter: {entries}")
            end = f" Hence, we have {chain(tell.order(order))}." if len(split) > 1 else ""
            steps.append(f"We now have: {numbered} for the subpart.{end}")
    return [*steps, f"I have now sorted all the words. The answer is {' '.join(tell.words(sorted(some)))}"]


def plain(some: list[str], tell: Teller, rng: random.Random) -> list[str]:
    """Other marks and words, numbers for ordinals, no positions, and only the order of all words."""
    steps = ["Let me sort these words alphabetically."]
    for tie, letter, _, order in comparisons(some, rng):
        which = f"{ORDINALS.index(tell.ordinal(letter)) + 1}" + ("st", "nd", "rd", *["th"] * 5)[letter]
        told = tell.words(tie)
        entries = ", ".join(f"{word} -> {tell.letter(word, letter) or '-'}" for word in tell.words(tie))
        steps.append(f"{', '.join(f'`{word}`' for word in told)} tie, so I compare the {which} letters: {entries}")
        steps.append(f"**Now** we have: {chain(tell.order(order)).replace(chr(34), '`')}")
    return [*steps, f"**Answer:** {', '.join(tell.words(sorted(some)))}"]


def bare(some: list[str], tell: Teller, rng: random.Random) -> list[str]:
    """Orders of all words without quotes, and no word on how they come about."""
    steps = []
    for comparison in comparisons(some, rng):
        shown = " < ".join(f"({' ? '.join(t)})" if len(t) != 1 else t[0] for t in tell.order(comparison.order))
        steps.append(f"We have {shown}")
    return [*steps, f"So the answer is: {', '.join(tell.words(sorted(some)))}."]


Form = Callable[[list[str], Teller, random.Random], list[str]]
FORMS = pytest.mark.parametrize("form", [big_bench, plain, bare])
SEEDS = pytest.mark.parametrize("seed", range(30))


def problem(some: list[str], seed: int) -> str:
    return ("", "Put in alphabetical order: ", "Sort the words alphabetically: List: ")[seed % 3] + " ".join(some)


@SEEDS
@FORMS
def test_a_right_response_has_no_error(form: Form, seed: int) -> None:
    some = words(random.Random(seed))
    steps = form(some, Teller(), random.Random(seed))
    assert Sorting().detect(problem(some, seed), steps) == (None, "every report agrees", 0.95), steps


@SEEDS
@FORMS
def test_one_false_fact_is_found_in_its_step(form: Form, seed: int) -> None:
    rng = random.Random(seed)
    some = words(rng)
    teller = Teller()
    right = form(some, teller, random.Random(seed))
    for lie in rng.sample(range(teller.told), min(12, teller.told)):
        wrong = form(some, Teller(lie), random.Random(seed))
        (place,) = (k for k, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
        found = Sorting().detect(problem(some, seed), wrong)
        assert (found.step, found.confidence) == (place, 0.95), (some, right[place], wrong[place], found)


# one list, for what is told about it

WORDS = "being widen bellyache cat betel"
RIGHT = [
    "I should start by looking at the first letter of the words in the list. The first letter: "
    '"being": "b" (2). "widen": "w" (23). "bellyache": "b" (2). "cat": "c" (3). "betel": "b" (2).',
    'We now have: (2) ["being" ? "bellyache" ? "betel"] < (3) "cat" < (23) "widen".',
    'Now let\'s sort this subpart ["being" ? "bellyache" ? "betel"] by looking at their second letters. '
    'The second letter: "being": "e" (5). "bellyache": "e" (5). "betel": "e" (5).',
    'We now have: (5) ["being" ? "bellyache" ? "betel"] for the subpart.',
    'Now let\'s sort this subpart ["being" ? "bellyache" ? "betel"] by looking at their third letters. '
    'The third letter: "being": "i" (9). "bellyache": "l" (12). "betel": "t" (20).',
    'We now have: (9) "being" < (12) "bellyache" < (20) "betel" for the subpart. '
    'Hence, we have "being" < "bellyache" < "betel" < "cat" < "widen".',
    "I have now sorted all the words. The answer is being bellyache betel cat widen",
]


def found(steps: list[str], answer: str | None = None, text: str = WORDS, **options: str) -> FirstError:
    return Sorting(**options).detect(text, steps, answer)  # type: ignore[arg-type]


def test_the_list_is_sorted_right() -> None:
    assert found(RIGHT) == (None, "every report agrees", 0.95)


@pytest.mark.parametrize("text", ["List: ", "How much is 2 + 2? Words: "])
def test_a_list_behind_another_question_is_not_read(text: str) -> None:
    assert found(RIGHT, text=text + WORDS) == (None, "problem: nothing to sort", 0)


@pytest.mark.parametrize(
    ("place", "right"),
    [
        (0, "I sort the words by their letters."),
        (0, "First letters: being = b, widen = w, bellyache = b, cat = c, betel = b"),
        (0, 'The 1st letter is "b" for "being", "bellyache" and "betel", "c" for "cat" and "w" for "widen".'),
        (1, "We have (being, bellyache, betel) < cat < widen."),
        (1, "We now have [`betel` ? `bellyache` ? `being`] < `cat` < `widen`"),
        (1, RIGHT[1] + " " + RIGHT[1]),
        (2, "The words that tie share the second letter."),
        (3, RIGHT[1]),
        (4, "By the third letters: being: i (9), bellyache: l (12), betel: t (20)"),
        (4, ""),
        (5, "We have being < bellyache < betel < cat < widen"),
        (6, "Answer: being, bellyache, betel, cat, widen."),
        (6, '**The answer is:** ["being", "bellyache", "betel", "cat", "widen"]'),
        (6, "We have being < bellyache < betel < cat < widen. So the answer is Being Bellyache Betel Cat Widen. Done."),
    ],
)
def test_other_ways_to_say_what_is_so(place: int, right: str) -> None:
    assert found([*RIGHT[:place], right, *RIGHT[place + 1 :]]) == (None, "every report agrees", 0.95)


def test_letters_that_words_share_may_be_passed_over() -> None:
    assert found([*RIGHT[:2], *RIGHT[4:]]) == (None, "every report agrees", 0.95)
    assert found([RIGHT[1], *RIGHT[5:]]) == (None, "every report agrees", 0.95)


def test_an_order_may_be_said_again_before_the_next_but_the_next_must_be_right() -> None:
    again = RIGHT[1].replace("(2) ", "")
    assert found([RIGHT[1], f"{again} {RIGHT[5]}", RIGHT[6]]) == (None, "every report agrees", 0.95)
    assert found([RIGHT[1], again + RIGHT[5].replace('"cat" < "widen"', '"widen" < "cat"'), RIGHT[6]]).step == 1


def test_a_word_that_ends_comes_first_and_one_that_stands_twice_stays_so() -> None:
    steps = [
        'The first letter: "bee": "b" (2). "ant": "a" (1). "be": "b" (2). "bee": "b" (2).',
        'We now have: (1) "ant" < (2) ["bee" ? "be" ? "bee"].',
        'Now sort this subpart ["bee" ? "be" ? "bee"] by their third letters: "bee": "e" (5). "be": "", "bee": "e".',
        'We now have: (0) "be" < (5) ["bee" ? "bee"] for the subpart. Hence, we have "ant" < "be" < "bee" < "bee".',
        "The answer is ant be bee bee",
    ]
    assert found(steps, text="bee ant be bee") == (None, "every report agrees", 0.95)
    assert found([*steps[:4], "The answer is ant be bee"], text="bee ant be bee").step == 4
    assert found([*steps[:2], steps[2].replace('""', '"e"'), *steps[3:]], text="bee ant be bee").step == 2


@pytest.mark.parametrize(
    ("place", "wrong", "reason"),
    [
        (0, RIGHT[0].replace('"w" (23)', '"w" (22)'), "w is number 23 of the alphabet, not 22"),
        (0, RIGHT[0].replace('"w"', '"v"'), "letter 1 of widen is w, not v"),
        (0, RIGHT[0].replace('"betel"', '"beetle"'), "has: beetle; lacks: betel"),
        (0, RIGHT[0].replace('"cat": "c" (3). ', ""), "lacks: cat"),
        (1, RIGHT[1].replace(' ? "betel"', ""), "being, bellyache where being, bellyache, betel follows"),
        (1, RIGHT[1].replace("(3)", "(4)"), "cat stands under a wrong number"),
        (1, 'We now have: (2) "being" < (3) "cat" < (23) "widen".', "being where being, bellyache, betel follows"),
        (2, RIGHT[2].replace("second", "first"), "the next letter to compare is number 2, not 1"),
        (2, RIGHT[2].replace("second", "fourth"), "the next letter to compare is number 2, not 4"),
        (2, RIGHT[2].replace('? "betel"', '? "cat"'), "has: cat; lacks: betel"),
        (3, RIGHT[3].replace("?", "<"), "being where being, bellyache, betel follows"),
        (5, RIGHT[5].replace('(9) "being" < (12) "bellyache"', '(12) "bellyache" < (9) "being"'), "bellyache where"),
        (5, RIGHT[5].replace('"cat" < "widen"', '"widen" < "cat"'), "widen where cat follows"),
        (6, RIGHT[4], "goes on after the words are sorted"),
        (6, "The answer is being bellyache betel widen cat", "widen in the answer where cat follows"),
        (6, "The answer is being bellyache betel cat", "nothing in the answer where widen follows"),
        (6, "The answer is being bellyache betel cat widen zoo", "zoo in the answer where nothing follows"),
    ],
)  # fmt: skip
def test_the_reason_says_what_is_wrong(place: int, wrong: str, reason: str) -> None:
    result = found([*RIGHT[:place], wrong, *RIGHT[place + 1 :]])
    assert (result.step, result.confidence) == (place, 0.95)
    assert reason in result.reason


@pytest.mark.parametrize("last", ["b", "sorted: nothing", "being"])
def test_a_wrong_answer_alone_is_found(last: str) -> None:
    assert found([f"The answer is {last}"]).step == 0


@pytest.mark.parametrize(
    "unread",
    [
        'Clearly "being" goes to the left of "cat".',
        RIGHT[2].replace("The second", "The third"),
        "The answer is ",
    ],
)
def test_what_cannot_be_read_is_ignored_or_wrong_as_asked_and_never_all_right(unread: str) -> None:
    steps = [*RIGHT[:2], unread, *RIGHT[2:]]
    wrong = found(steps)
    assert (wrong.step, wrong.confidence) == (2, 0.3)
    ignored = found(steps, unread="ignore")
    assert (ignored.step, ignored.confidence) == (None, 0)
    assert "step 3 cannot be read" in ignored.reason
    later = found([*steps[:-1], "The answer is widen"], unread="ignore")
    assert (later.step, later.confidence) == (7, 0.5)


@pytest.mark.parametrize("kept", [0, 1, 6])
def test_a_response_without_an_answer_is_not_all_right(kept: int) -> None:
    result = found(RIGHT[:kept])
    assert (result.step, result.confidence) == (None, 0)
    assert result.reason == ("no final answer" if kept else "no steps")


@pytest.mark.parametrize("answer", ["being bellyache betel cat widen", "being, bellyache, betel, cat, widen.\n"])
def test_a_known_answer_that_agrees_changes_nothing(answer: str) -> None:
    assert found(RIGHT, answer) == (None, "every report agrees", 0.95)


@pytest.mark.parametrize("answer", ["being bellyache betel widen cat", "being", ""])
def test_a_known_answer_that_does_not_follow_means_the_problem_was_misread(answer: str) -> None:
    for steps in (RIGHT, RIGHT[::-1]):
        result = found(steps, answer)
        assert (result.step, result.confidence) == (None, 0)
        assert "known answer" in result.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "How much is 2 + 2?",
        "Q: which is first?",
        "Sort the words: ",
        "Sort: 3 1 2",
        "a b (c) d?",
        "a\x00b c",
    ],
)
def test_other_problems_are_unread(text: str) -> None:
    result = found(RIGHT, text=text)
    assert (result.step, result.confidence) == (None, 0)
    assert result.reason.startswith("problem: ")


HOSTILE = {
    "letters": "a",
    "words": "being ",
    "quoted words": '"being" ',
    "quotes": '"',
    "entries": '"being": "b" (2). ',
    "half entries": '"being": "',
    "which": "the first letter ",
    "orders": 'We have "being" < ',
    "haves": "we have ",
    "marks": "<",
    "answers": "the answer is ",
    "stars": "answer** :",
    "spaces": " ",
    "lines": " \n",
    "brackets": "[",
    "positions": "(1",
    "hyphens": "a-",
}


@pytest.mark.parametrize("part", HOSTILE.values(), ids=HOSTILE)
def test_endless_text_ends(part: str) -> None:
    text = part * (50_000 // len(part))
    brackets = f"{'[' * 10_000}{part * 1_000} being {']' * 10_000}"
    nested = f"The first letter: {brackets}. We have {brackets}"
    for problem_text, step in (
        (WORDS, text),
        (WORDS, nested),
        (WORDS, "The first letter: " + text),
        (WORDS, "We have: " + text),
        (WORDS + text, RIGHT[0]),
        ("Sort: " + text, "We have " + text),
    ):
        with at_most(10):
            result = Sorting(seconds=600).detect(problem_text, [step])
        assert "out of time" not in result.reason
        assert "failed" not in result.reason
        assert result.step is not None or result.confidence == 0


@pytest.mark.parametrize("part", ["x", '"being": "b" (2). ', "we have "])
def test_a_step_of_a_megabyte_is_read_in_time(part: str) -> None:
    text = "The first letter: " + part * (1_000_000 // len(part))
    with at_most(20):
        result = Sorting(seconds=600).detect(WORDS, [text + ' We have "cat" < "being"'])
    assert result.step == 0
    assert "out of time" not in result.reason


def test_configured_detectors_can_be_pickled() -> None:
    detector = Sorting(unread="ignore", seconds=1.0)
    assert pickle.loads(pickle.dumps(detector)) == detector


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="unread: got 'maybe'"):
        Sorting(unread="maybe")  # type: ignore[arg-type]


def test_words_may_hold_an_ampersand() -> None:
    problem = "Sort the following words alphabetically: List: r&d rock apple at&t"
    steps = [
        'The first letter: "r&d": "r" (18). "rock": "r" (18). "apple": "a" (1). "at&t": "a" (1).',
        'We now have: (1) ["apple" ? "at&t"] < (18) ["r&d" ? "rock"].',
        "I have now sorted all the words. The answer is apple at&t r&d rock",
    ]
    assert Sorting().detect(problem, steps) == FirstError(None, "every report agrees", 0.95)
    assert Sorting().detect(problem, [*steps[:2], "The answer is apple at&t rock r&d"]).step == 2
