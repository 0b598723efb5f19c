"""Bracket stacks: generated sequences, right responses in several forms, and one step made wrong."""

import random

import pytest

from prefixloss.detect.base import FirstError
from prefixloss.detect.puzzles.brackets import Brackets

PAIRS = ("()", "[]", "{}", "<>", "«»", "「」")
CLOSING = {p[0]: p[1] for p in PAIRS}
OTHER = {p[k]: PAIRS[(i + 1) % len(PAIRS)][k] for i, p in enumerate(PAIRS) for k in (0, 1)}  # same side, other kind


def sequence(rng: random.Random, length: int) -> list[str]:
    """Brackets that leave something to close."""
    stack: list[str] = []
    written = []
    for k in range(length):
        if stack and rng.random() < 0.4 and (len(stack) > 1 or k < length - 1):
            written.append(CLOSING[stack.pop()])
        else:
            stack.append(rng.choice(PAIRS)[0])
            written.append(stack[-1])
    return written


def stacks(brackets: list[str]) -> list[list[str]]:
    """The stack after each character."""
    stack: list[str] = []
    found = []
    for b in brackets:
        stack = [*stack, b] if b in CLOSING else stack[:-1]
        found.append(stack)
    return found


def quoted(brackets: list[str], joint: str = ", ") -> str:
    return joint.join(f'"{b}"' for b in brackets)


def terse(brackets: list[str]) -> list[str]:
    """The form of BIG-Bench Mistake."""
    after = stacks(brackets)
    rest = after[-1][::-1]
    needed = [CLOSING[b] for b in rest]
    return [
        "We should process each input one by one and keep track of the stack configuration.",
        "stack: empty",
        *(f"{b} ; stack: {' '.join(stack) or 'empty'}" for b, stack in zip(brackets, after, strict=True)),
        f'Now, we have reached the end. The final stack is "{" ".join(after[-1])} ".',
        f"We will need to pop out {quoted(rest, ' , ')} one by one in that order.",
        f"So, we need {quoted(needed, ' and ')}. So the answer is {' '.join(needed)}",
    ]


def chatty(brackets: list[str]) -> list[str]:
    """The same with other words, numbers, lists of quoted brackets and Markdown."""
    after = stacks(brackets)
    needed = [CLOSING[b] for b in after[-1][::-1]]
    steps = ["1. We keep a stack, which is empty (nothing was read yet)."]
    for k, (b, stack) in enumerate(zip(brackets, after, strict=True)):
        if b in CLOSING:
            steps.append(f"{k + 2}) Read '{b}' -> push it. Stack: [{quoted(stack)}]")
        else:
            steps.append(
                f"**Step {k + 2}:** `{b}` matches the top (good), so pop. The stack is now: {''.join(stack) or '[]'}"
            )
    return [
        *steps,
        f"The remaining stack is {' '.join(after[-1])}.",
        f"We need to add {''.join(needed)}.",
        f"Answer: {''.join(needed)}",
    ]


FORMS = pytest.mark.parametrize("form", [terse, chatty])
SEEDS = pytest.mark.parametrize("seed", range(25))


def detect(brackets: list[str], steps: list[str], **options: object) -> FirstError:
    return Brackets(pairs=PAIRS, **options).detect(" ".join(brackets), steps)  # type: ignore[arg-type]


@SEEDS
@FORMS
def test_a_right_response_has_no_error(form, seed):
    brackets = sequence(random.Random(seed), 1 + seed)
    assert detect(brackets, form(brackets)) == (None, "every report agrees", 0.95)


@SEEDS
@FORMS
def test_one_wrong_bracket_is_found_in_its_step(form, seed):
    rng = random.Random(seed)
    brackets = sequence(rng, 3 + seed)
    right = form(brackets)
    places = [
        (k, i)
        for k, step in enumerate(right)
        for i, c in enumerate(step)
        if c in OTHER and step[i - 1 : i + 2] not in ("->", "-> ")
    ]
    checked = 0
    for k, i in rng.sample(places, min(20, len(places))):
        beside = right[k][max(0, i - 1)] + right[k][i + 1 : i + 2]
        if form is chatty and (right[k][i] in "[]" or "-" in beside or any(map(str.isalpha, beside))):
            continue  # a list's own brackets, an arrow or words in brackets
        wrong = [*right[:k], right[k][:i] + OTHER[right[k][i]] + right[k][i + 1 :], *right[k + 1 :]]
        assert detect(brackets, wrong).step == k, wrong[k]
        checked += 1
    assert checked
