"""Problems, their answers, and the first wrong step of a response.

Two kinds of problem share one record. Built-in ones are generated: chained arithmetic whose written solution is unique,
so that a response is checked line by line against it. Problems from a file have a question and an answer only; their
responses are checked by the arithmetic equalities they state. Nothing here runs text as code or raises on it.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from prefixloss.detect.maths.answers import right_answer, states
from prefixloss.detect.records import FormatError, json_lines

MAX_VALUE = 99  # every number of a built-in problem has one or two digits
HELD_OUT_SHARE = 8  # one problem in eight is held out
_ANSWER_LINE = re.compile(r"^Answer:[^\n]*", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A question, its answer and, for built-in problems, the lines of the only right response (else empty)."""

    question: str
    answer: str
    lines: tuple[str, ...] = ()

    @property
    def solution(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Steps:
    """What the step checker found: `wrong` is the 0-based first wrong step and `offset` the character it starts at.

    Both are -1 where none was found. `right` counts the steps before it (all of them where none was found), `total`
    the steps the response has or, for built-in problems, should have. `reason` says what is wrong with it.
    """

    wrong: int
    offset: int
    right: int
    total: int
    reason: str = field(default="", compare=False)


# ---- built-in problems -------------------------------------------------------------------------------------


def chain(rng: random.Random, min_steps: int, max_steps: int) -> Problem:
    """A chain such as "(7+5)*3-4=?", worked from left to right; brackets keep it right by the usual precedence."""
    value = rng.randint(2, MAX_VALUE)
    expression, lines = str(value), []
    last = ""
    for k in range(1, rng.randint(min_steps, max_steps) + 1):
        ranges = {
            "+": (2, min(9, MAX_VALUE - value)),
            "-": (2, min(9, value)),
            "*": (2, min(9, MAX_VALUE // max(value, 1))),
        }
        sign = rng.choice([s for s, (low, high) in ranges.items() if low <= high])
        operand = rng.randint(*ranges[sign])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        if sign == "*" and last in ("+", "-"):
            expression = f"({expression})"
        expression, last = f"{expression}{sign}{operand}", sign
        lines.append(f"Step {k}: {value}{sign}{operand}={result}")
        value = result
    return Problem(f"{expression}=?", str(value), (*lines, f"Answer: {value}"))


def is_held_out(problem: Problem) -> bool:
    """The split goes by the question's checksum, so no seed can make training meet a held-out problem."""
    return zlib.crc32(problem.question.encode()) % HELD_OUT_SHARE == 0


def chains(
    seed: int,
    start: int,
    count: int,
    *,
    min_steps: int = 5,
    max_steps: int = 6,
    held_out: bool = False,
    free_form: bool = False,
) -> list[Problem]:
    """Problems `start` .. `start + count - 1` of the endless sequence that belongs to `seed` and the split.

    free_form: without the lines of their solution, for models that write in their own way.
    """
    problems = []
    for index in range(start, start + count):
        rng = random.Random(f"{seed} {held_out} {index}")
        while is_held_out(problem := chain(rng, min_steps, max_steps)) != held_out:
            pass
        problems.append(Problem(problem.question, problem.answer) if free_form else problem)
    return problems


# ---- problems from a file ----------------------------------------------------------------------------------


def load_problems(path: Path) -> list[Problem]:
    """Read {"question": ..., "answer": ...} objects, each question once. FormatError names the file and the line.

    An answer may be a written solution that ends in what it is, as GSM8K's: "... #### 72".
    """
    problems: dict[str, Problem] = {}
    for number, item in json_lines(path):
        for key, kinds in (("question", str), ("answer", (str, int, float))):
            value = item.get(key)
            if not isinstance(value, kinds) or isinstance(value, bool) or not str(value).strip():
                raise FormatError(f"{path}, line {number}: the key {key!r} is missing, empty or of the wrong type")
            if any("\ud800" <= character <= "\udfff" for character in str(value)):
                raise FormatError(f"{path}, line {number}: the key {key!r} has half a character, a lone surrogate")
        problems.setdefault(item["question"], Problem(item["question"], right_answer(str(item["answer"])).strip()))
    return list(problems.values())


def load_split(path: Path, most: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, `most` of these at most. FormatError where there are too few.

    A folder's lines are those of all its .jsonl files; those of test.jsonl are held out, if it is there.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    test = path / "test.jsonl"
    rest = [file for file in files if file != test]
    training = list({problem.question: problem for file in rest for problem in load_problems(file)}.values())
    if test in files:
        held_out = load_problems(test)[:most]
        asked = {problem.question for problem in held_out}
        training = [problem for problem in training if problem.question not in asked]
    elif len(training) >= 2:
        held_out, training = split(training, most)
    else:
        raise FormatError(f"{path} has {len(training)} different questions, expected at least 2")
    if not training or not held_out:
        raise FormatError(f"{path} has {len(training)} problems to train on and {len(held_out)} held out")
    return training, held_out


def split(problems: list[Problem], most: int) -> tuple[list[Problem], list[Problem]]:
    """Held-out problems (an eighth, at least one, `most` at most) and the others, by the questions' checksums."""
    ordered = sorted(problems, key=lambda p: (zlib.crc32(p.question.encode()), p.question))
    count = min(max(1, len(problems) // HELD_OUT_SHARE), most)
    return ordered[:count], ordered[count:]


def shuffled(problems: list[Problem], seed: int, start: int, count: int) -> list[Problem]:
    """Problems `start` .. `start + count - 1` of the endless sequence of reshuffled passes over `problems`."""
    picked = []
    for index in range(start, start + count):
        epoch, place = divmod(index, len(problems))
        order = list(range(len(problems)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        picked.append(problems[order[place]])
    return picked


# ---- answers -----------------------------------------------------------------------------------------------


def check_answer(problem: Problem, response: str) -> bool:
    """Whether the response states the right final answer, whatever stands around it.

    The response to a built-in problem ends with its first answer line: what is written after it is not read.
    """
    if problem.lines:
        line = _ANSWER_LINE.search(response)
        response = response[: line.end()] if line else ""
    return states(response, problem.answer)


# ---- steps -------------------------------------------------------------------------------------------------


def check_steps(problem: Problem, response: str) -> Steps:
    """The first wrong step of a response, meant for one whose answer is wrong.

    Built-in problems: the steps are the lines, the answer line the last of them; the first line that is not the right
    one is wrong, whether it miscalculates, miscopies, is malformed, missing or stands where another should.
    Others: the steps start at "Step 1", "Step 2", ...; text before the first belongs to it. A step is right if it
    states at least one equality between arithmetic expressions, all it states hold, and every number used is from
    the question or an earlier result. The first that is not is taken for wrong: in doubt, earlier.
    """
    return _check_lines(problem.lines, response) if problem.lines else _check_equalities(problem, response)


def _check_lines(expected: tuple[str, ...], response: str) -> Steps:
    offset = 0
    lines = response.split("\n")
    for k, right in enumerate(expected):
        if k >= len(lines) or lines[k].rstrip() != right:
            return Steps(k, min(offset, len(response)), k, len(expected), f"expected {right!r}")
        offset += len(lines[k]) + 1
    return Steps(-1, -1, len(expected), len(expected))


def step_starts(response: str) -> list[int]:
    """Offsets at which the steps start: markers "Step 1", "Step 2", ... in order, the first moved to 0."""
    starts: list[int] = []
    for match in re.finditer(r"^[*# \t]*Step ([0-9]{1,6})\b", response, flags=re.MULTILINE):
        if int(match[1]) == len(starts) + 1:
            starts.append(match.start())
    return [0, *starts[1:]] if starts else []


def _check_equalities(problem: Problem, response: str) -> Steps:
    starts = step_starts(response)
    known = set(_numbers(problem.question))
    for k, start in enumerate(starts):
        end = starts[k + 1] if k + 1 < len(starts) else len(response)
        if not _holds(response[start:end], known):
            return Steps(k, start, k, len(starts), "an equality that is false or cannot be checked")
    return Steps(-1, -1, len(starts), len(starts))


_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
_SPELLINGS = {"\\times": "*", "\\cdot": "*", "\u00d7": "*", "\u00b7": "*", "\\div": "/", "\u00f7": "/", "\u2212": "-"}
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
_LONGEST = 120  # characters of an expression; longer ones are in doubt


def _numbers(text: str) -> list[Fraction]:
    return [Fraction(n) for n in re.findall(_NUMBER, _plain(text))]


def _plain(text: str) -> str:
    """LaTeX and typographic arithmetic written in plain characters."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    for old, new in _SPELLINGS.items():
        text = text.replace(old, new)
    return re.sub(r"\\[()\[\]]|[$*]{2}|\$", " ", text)


def _holds(step: str, known: set[Fraction]) -> bool:
    """Whether every equality of a step holds, and there is one to check; adds its results to `known`."""
    checked = False
    for line in _plain(step).split("\n"):
        sides = line.split("=")
        for left, right in pairwise(sides):
            tail = left[len(left.rstrip("0123456789.+-*/() ")) :].strip()
            head = right[: len(right) - len(right.lstrip("0123456789.+-*/() "))].strip().rstrip(".")
            if not tail or not head:
                continue  # a name is defined, nothing is calculated
            a, b = evaluate(tail), evaluate(head)
            if a is None or b is None or not _equal(a, b, head):
                return False
            if len(_numbers(tail)) > 1:
                checked = True
                if not known.issuperset(_numbers(tail)):
                    return False
            known.update((a, b))
    return checked


def _equal(a: Fraction, b: Fraction, written: str) -> bool:
    """Equal, or `b` is `a` rounded to the decimals it is written with."""
    decimals = len(written.partition(".")[2]) if re.fullmatch(_NUMBER, written) else 0
    return a == b or (decimals > 0 and abs(a - b) <= Fraction(1, 2 * 10**decimals))


def evaluate(expression: str) -> Fraction | None:
    """The value of + - * / ( ) on decimal numbers, None if it is anything else: two stacks, no recursion."""
    values: list[Fraction] = []
    signs: list[str] = []

    def reduce(least: int) -> None:
        """Apply the pending signs down to those that bind less than `least`, or to a bracket."""
        while signs and _RANK.get(signs[-1], 0) >= least:
            b, a, sign = values.pop(), values.pop(), signs.pop()
            values.append(a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b)

    want_value = True
    try:
        for token in re.findall(rf"{_NUMBER}|\S", expression[: _LONGEST + 1]):
            if want_value and token == "(":
                signs.append(token)
            elif want_value:
                values.append(Fraction(token))
                want_value = False
            elif token == ")":
                reduce(1)
                if signs.pop() != "(":
                    return None
            else:
                reduce(_RANK[token])
                signs.append(token)
                want_value = True
        reduce(1)
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        return None
    return values[0] if len(values) == 1 and not signs and not want_value and len(expression) <= _LONGEST else None
