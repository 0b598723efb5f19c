"""Arithmetic and algebra: the first step that claims what is false, or contradicts what was said before.

Every equality and inequality is checked: numbers exactly, names by what they were said to be, solutions by
substitution. What is not false but has no origin is a doubt: a number from nowhere, a calculation that is no part of
the problem's, a rewriting with another value. Where the final answer is known to be wrong and no claim is false, the
first doubt is blamed; without one, no step is: which is wrong is not known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.maths.answers import answer_in, collections_differ, differ, follows, is_collection, stated
from prefixloss.detect.maths.claims import (
    CONGRUENT,
    EQUALITIES,
    claims,
    congruent,
    describes,
    divides_out,
    holds,
    modulus,
    rounding,
)
from prefixloss.detect.maths.confidence import ALL_RIGHT, Kind, confidence
from prefixloss.detect.maths.derive import Said, beside, contradicts, defines, derives, restates
from prefixloss.detect.maths.expressions import (
    DivisionByZeroError,
    Expression,
    NoValueError,
    Rational,
    close,
    evaluate,
    is_number,
    magnitude,
    names,
    numbers,
    show,
    value,
)
from prefixloss.detect.maths.identities import misses
from prefixloss.detect.maths.lexemes import declared
from prefixloss.detect.maths.names import Names, gaps
from prefixloss.detect.maths.points import given, length
from prefixloss.detect.maths.reader import SUPPOSING, Chain, Reading, Run, read
from prefixloss.detect.maths.rewriting import Rewriting
from prefixloss.detect.maths.scope import RESTARTS, Scopes
from prefixloss.detect.maths.solutions import Sought
from prefixloss.detect.maths.statements import takes_back, wrong_statement
from prefixloss.detect.maths.systems import wrong_common_solution
from prefixloss.detect.maths.task import Task, parts
from prefixloss.detect.maths.text import MAX_TEXT, UnreadableError, words

MAX_RESPONSE = 10 * MAX_TEXT  # characters
MAX_REWRITINGS = 40  # that are checked of a response
MAX_BASES = 8  # numbers before it that a percentage may be a share of

_MENTIONED_BEFORE = words("has have")  # "x^2 + 1 = 0 has no real root"
_MENTIONED_BEHIND = words(
    "of line lines axis curve curves graph graphs circle circles parabola ellipse"
)  # "the roots of x^2 = 4"
_COMMON = frozenset((*range(17), 20, 24, 25, 28, 29, 30, 31, 36, 50, 52, 60, 90, 100, 180, 360, 365, 366, 1000, 3600))
_NUMBER = re.compile(r"\d+(?:[,.]\d+)*")
_SIGNS = {"is": "=", "~=": "\u2248", "\\ne": "\u2260", "<=": "\u2264", ">=": "\u2265"}


class WrongError(Exception):
    """A step is wrong: why, and what kind of find that is."""

    def __init__(self, reason: str, kind: Kind) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


@dataclass(frozen=True)
class Maths(Detector):
    """strict_numbers: a number from neither the problem, an earlier step nor common knowledge is an error, not a doubt.

    solve: a problem that is an expression to calculate gives its right answer itself, where none is passed.
    """

    strict_numbers: bool = False
    solve: bool = False

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        if sum(map(len, (problem, *steps))) > MAX_RESPONSE:
            return FirstError(None, f"more than {MAX_RESPONSE} characters", 0.0)
        response = _Response(problem, steps, self.strict_numbers)
        for k, step in enumerate(steps):
            try:
                response.check(k, step)
            except WrongError as wrong:
                if not takes_back(step):
                    return response.found(k, wrong.reason, wrong.kind)
                response.unread.setdefault(k, "a claim that is taken back")
        if answer is None and self.solve and response.task.value is not None:
            answer = str(response.task.value)
        return response.judge(answer)


def _reading(text: str, declared: Collection[str]) -> Reading | None:
    try:
        return read(text, declared)
    except UnreadableError:
        return None


class _Response:
    """What the steps so far say, and what is wrong with it."""

    def __init__(self, problem: str, steps: Sequence[str], strict_numbers: bool) -> None:
        self.strict_numbers = strict_numbers
        self.declared = declared("\n".join((problem, *steps)))
        self.task = Task.of(problem, self.declared)
        self.sought = Sought.of(problem, self.declared)
        self.points = given(problem)
        self.bare = self.task.expression is not None and not any(map(str.isalpha, problem))
        self.names = Names(self.task.equations)
        self.rewriting = Rewriting(problem, steps, self.declared)
        self.known = {*self.task.numbers, *_COMMON}  # numbers that have an origin
        self.steps = len(steps)
        self.step = 0
        self.readings = [_reading(step, self.declared) for step in steps]
        self.scopes = Scopes.of([]) if self.task.expression else Scopes.of(r for r in self.readings if r)
        self.checked: set[int] = set()  # steps in which something was found right
        self.unread: dict[int, str] = {}  # steps in which something could not be read or decided
        self.doubts: dict[int, str] = {}
        self.results: list[tuple[int, Rational]] = []  # the values that were found right, with their steps
        self.calculations: list[tuple[int, Expression]] = []  # those that were found right, with their steps
        self.final: tuple[int, str] | None = None  # the last answer, with its step
        self.asserts = True  # whether the words before the chain let it contradict what was said before
        self.text = ""  # of the step
        self.mentions = False  # whether the chain is only supposed or mentioned
        self.latest: Said | None = None  # the equation right before, for what may be rewritten from it
        self.rewritings = 0  # that were checked
        self.bound = {
            name for equation in self.task.equations for side in equation for name in names(side)
        }  # by equations
        self.before: set[str] = set()  # the numbers as the steps before this one write them
        self.last: Run | None = None  # where the next text may go on with "= ..."

    def check(self, k: int, text: str) -> None:
        """The next step; WrongError at the first thing that is wrong."""
        self.step = k
        self.text = text
        reading = self.readings[k]
        if reading is None:
            self._unsure("a text beyond the bounds")
            self.last = None
            return
        if reading.unread:
            self._unsure("a claim that cannot be read")
        before = frozenset(self.names.values)
        for chain in reading.chains:
            self._origin(chain)
            self._length(chain)
            self._chain(chain)
        if not reading.ends:
            self.last = None
        solves = wrong_common_solution(text, self.declared) or (self.sought and self.sought.wrong(text))
        if reason := wrong_statement(text) or solves:
            raise WrongError(reason, "false")
        if reason := self.rewriting.wrong(k, text, reading):
            raise WrongError(reason, "rewriting")
        if self.task.expression:
            self._copies(reading, before)
        self._answer(text, reading)
        self.before.update(_NUMBER.findall(text))

    def _unsure(self, reason: str) -> None:
        self.unread.setdefault(self.step, reason)

    # ---- claims

    def _chain(self, chain: Chain) -> None:
        """Every relation of a chain."""
        if chain.opening and self.last:
            chain = chain._replace(runs=[self.last, *chain.runs], relations=[chain.opening, *chain.relations])
        runs = chain.runs
        self.last = runs[-1]
        if len(runs) > 1 and (chain.tail == "?" or SUPPOSING.intersection(chain.lead)):  # "suppose 2 + 2 = 5"
            self._unsure("a claim that is only supposed or mentioned")
            return
        beside_it = self.mentions and chain.between == ("and",)
        self.mentions = (
            beside_it
            or chain.supposed
            or chain.tail in _MENTIONED_BEFORE
            or bool(_MENTIONED_BEHIND.intersection(chain.lead[-1:]))
        )
        if len(runs[0].names) == 1 and RESTARTS.intersection(chain.lead):
            self.names.forget(*runs[0].names)
        self.asserts = claims(chain.lead)
        for n in range(len(chain.relations)):
            try:
                self._relation(chain, n)
            except NoValueError as error:
                self._unsure(str(error))

    def _relation(self, chain: Chain, n: int) -> None:
        """The relation between run n and the next; NoValueError where it cannot be decided."""
        left, right, relation = chain.runs[n], chain.runs[n + 1], chain.relations[n]
        self._derived(chain, n, left, right, relation)
        if left.partial or right.partial or (right.worded and right.names and n + 2 < len(chain.runs)):
            raise NoValueError("a claim that cannot be read")
        used = left.names | right.names
        if used and relation not in EQUALITIES and not self.task.expression:
            raise NoValueError("a bound on a name")
        if relation == CONGRUENT or "rem" in right.expression:
            self._whole_numbers(chain, n)
            return
        if self.scopes.cases & used or (self.mentions and used):
            if relation in EQUALITIES:
                self._rewriting(left, right, len(chain.runs) > 2 and chain.runs[0].names == used, n > 0)
            raise NoValueError("a name that may stand for several things")
        if not (left.names | right.names) <= self.names.values.keys():
            if relation in EQUALITIES:
                self._equation(left, right, len(chain.runs) > 2, n > 0)
            return
        before_it = chain.runs[max(0, n - MAX_BASES) : n] if "%" in right.expression else []
        bases = [magnitude(number) for run in before_it for number in numbers(run.expression)]
        if holds(left, right, relation, self.names.values, bases):
            self._right(right)
            if not left.names and not is_number(left.expression):
                self.calculations.append((self.step, left.expression))
        elif n == 0 and describes(chain.lead, chain.between, left, right):
            raise NoValueError("a claim that may be a description")
        elif (by := modulus(chain.runs[n + 1 :])) and congruent(left, right, self.names.values, by):
            self._right(right)
        else:
            raise WrongError(self._false(left, right, relation), "false")

    def _length(self, chain: Chain) -> None:
        """A length between two points of the problem: what it is said to be is compared with their distance."""
        distance = length(chain.runs[0].name or "", self.points)
        for run, relation in zip(chain.runs[1:], chain.relations, strict=True):
            if distance is None or chain.supposed or relation not in EQUALITIES or run.names or run.partial:
                return
            said = chain.runs[0]._replace(expression=distance, names=frozenset())
            if not holds(said, run, relation, {}):
                raise WrongError(self._false(said, run, relation), "false")

    def _whole_numbers(self, chain: Chain, n: int) -> None:
        """A quotient with a remainder, or a congruence."""
        left, right = chain.runs[n], chain.runs[n + 1]
        if chain.relations[n] != CONGRUENT:
            holds = divides_out(left, right)
        elif by := modulus(chain.runs):
            holds = congruent(left, right, self.names.values, by)
        else:
            raise NoValueError("a congruence without a modulus")
        if not holds:
            raise WrongError("not what is left over", "false")
        self.checked.add(self.step)

    def _derived(self, chain: Chain, n: int, left: Run, right: Run, relation: str) -> None:
        """WrongError if an equation does not follow from the one before it that it is said to be."""
        before, self.latest = self.latest, None
        if left.partial or right.partial or relation != "=":
            return
        if not left.names | right.names:
            self.latest = before if n and before and not defines(before.equation) else None
            return
        equation = left.expression, right.expression
        if n and gaps(*equation) == {0}:
            self.latest = before  # E = F = G says of E = F the same as of E = G
            return
        first = before if n == 0 else None
        listed = first is not None and beside(first, equation, self.step, chain.between)
        self.latest = said = Said(equation, self.step, listed)
        rewrites = first and not chain.supposed and derives(first, said, chain.between)
        if first and rewrites and self._may_compare() and contradicts(first.equation, equation):
            raise WrongError("this does not follow from the equation right before", "rewriting")
        if first and not chain.supposed and restates(first, said, chain.between):
            first_value = value(first.equation[1], {})
            if not close(first_value, value(right.expression, {}), rounding(right)):
                raise WrongError(f"{left.name} is {show(first_value)}", "rewriting")

    def _may_compare(self) -> bool:
        """Whether there is work left for comparing equations."""
        self.rewritings += 1
        return self.rewritings <= MAX_REWRITINGS

    def _identity(self, left: Run, right: Run, chained: bool, later: bool) -> bool:
        """Whether two sides are the same; WrongError if they are not, and are meant to be.

        chained, later: whether the relation is one of several in a chain, and one behind the first: what a side was
        said to be is rewritten. A chain's first may be an equation that was said before.
        """
        used, gap = left.names | right.names, gaps(left.expression, right.expression)
        if gap == {0}:
            return True
        rewrites = left.names == right.names and (later or (chained and not used & self.bound))
        if not left.name:
            self.bound |= used
        one = later and len(used) == 1 < len(gap)  # what is rewritten within a supposition has to be the same too
        if (self.mentions and not one) or "i" in used or left.name or (right.name and len(gap) == 1):
            return False
        if rewrites and 1 in (len(used), len(gap)):
            raise WrongError("two sides that are not the same", "rewriting")
        if self._may_compare() and misses(left.expression, right.expression):
            raise WrongError("an expansion that is not the same", "rewriting")
        return False

    def _rewriting(self, left: Run, right: Run, chained: bool, later: bool) -> None:
        """An equality whose names have no value here: it may still be an identity."""
        if self._identity(left, right, chained, later):
            self.checked.add(self.step)

    def _right(self, run: Run) -> None:
        """A run whose value was found right."""
        number = value(run.expression, self.names.values)
        self.checked.add(self.step)
        self.results.append((self.step, number))
        self.known.add(magnitude(number))

    def _false(self, left: Run, right: Run, relation: str) -> str:
        try:
            a, b = (show(value(run.expression, self.names.values)) for run in (left, right))
        except DivisionByZeroError:
            return "division by zero"
        return f"{a} {_SIGNS.get(relation, relation)} {b} is false"

    def _equation(self, left: Run, right: Run, chained: bool, later: bool) -> None:
        """An equality with a name that has no value. chained, later: whether it is one of several in a chain, and one
        behind the first."""
        known = self.names.values.keys()
        for side, other in ((left, right), (right, left)):
            if side.name and other.names <= known:
                self._solution(side.name, other)
                return
        if "i" in left.names | right.names:
            raise NoValueError("a name that may be the imaginary unit")
        same = self._identity(left, right, chained, later)
        derived = any(self.names.about(name) for name in left.names | right.names)
        try:
            refuted = self.names.refute(left.expression, right.expression)
        finally:
            self.names.add(left.expression, right.expression)
        if refuted:
            self._contradiction("an equation that contradicts what was said before")
        if same or derived:
            self.checked.add(self.step)

    def _solution(self, name: str, run: Run) -> None:
        """A name gets its value, unless an equation contradicts it."""
        number = value(run.expression, self.names.values)
        self.names.values[name] = number
        refuted = True
        try:
            refuted = self.names.refute_value(name, number, rounding(run))
        finally:
            if refuted or name in self.scopes.several:
                del self.names.values[name]
        if refuted:
            self._contradiction(f"{name} = {show(number)} does not solve what was said before")
        self._right(run)

    def _contradiction(self, reason: str) -> NoReturn:
        if self.asserts:
            raise WrongError(reason, "equation")
        raise NoValueError(reason)

    # ---- origins

    def _origin(self, chain: Chain) -> None:
        """Doubts the step if the chain starts from a number without an origin."""
        start = chain.runs[1] if chain.runs[0].name and len(chain.runs) > 1 else chain.runs[0]
        strange = [number for number in numbers(start.expression) if not self._has_origin(magnitude(number))]
        if strange and not is_number(start.expression) and not self.task.expression:
            reason = f"{show(strange[0])} comes from nowhere"
            if self.strict_numbers:
                raise WrongError(reason, "nowhere")
            self.doubts.setdefault(self.step, reason)
        self.known.update(magnitude(number) for run in chain.runs for number in numbers(run.expression))

    def _has_origin(self, n: Rational) -> bool:
        """From the problem, an earlier step or common knowledge; perhaps as a percentage, its complement or on top."""
        return not self.known.isdisjoint((n, n * 100, 100 - n, 100 - n * 100, n * 100 - 100))

    def _copies(self, reading: Reading, before: frozenset[str]) -> None:
        """Compares the problem's expression with its copies, and with a formula in the names that the step defines."""
        defines = self.names.values.keys() - before
        for chain in reading.chains:
            copy = chain.runs[0]
            rewrites = defines and len(copy.names) > 1 and len(chain.runs) == 1
            if copy.partial or (copy.names and not rewrites):
                continue
            try:
                same = evaluate(copy.expression, self.names.values) == self.task.value
            except NoValueError:
                same = False
            if same:
                self.checked.add(self.step)
            elif not copy.names and self.task.resembles(copy.expression):
                raise WrongError("the problem's expression is copied wrongly", "false")
            elif copy.names:
                definitions = (c.runs[1].expression for c in reading.chains if c.runs[0].name and len(c.runs) > 1)
                if not all(is_number(definition) or self.task.copies(definition) for definition in definitions):
                    raise WrongError("a part of the problem's expression is copied wrongly", "false")
                self.doubts.setdefault(self.step, "this is not the problem's expression")

    def _strays(self) -> dict[int, str]:
        """The steps with a calculation that is no part of the problem's expression."""
        if self.task.expression is None:
            return {}
        try:
            found = parts(self.task.expression)
        except NoValueError:
            return {}
        strays = (k for k, calculation in self.calculations if not found.have(calculation, value(calculation, {})))
        return dict.fromkeys(strays, "this is no part of the problem")

    # ---- the answer

    def _answer(self, text: str, reading: Reading) -> None:
        """The answer that the step states; WrongError if the steps give another."""
        said = stated(text)
        if said is None:
            return
        self.final = self.step, said
        run = None if is_collection(said) else answer_in(said, self.declared)
        if run is None:
            self._unsure("an answer that cannot be read")
            return
        if not self.results or max(self.unread, default=-1) >= self.results[-1][0]:
            return  # the answer may follow from what could not be read
        try:
            number = value(run.expression, self.names.values)
        except NoValueError:
            return
        beside = {chain.runs[0].expression for chain in reading.chains if len(chain.runs) == 1} - {run.expression}
        unknown = any(other.names - self.names.values.keys() for chain in reading.chains for other in chain.runs)
        if not self.bare and (beside or unknown):
            return  # the answer may follow in words, "8 times as many as 5 are 40", or from an equation
        if self.task.expression:
            derived = [self.results[-1][1]]
        else:
            derived = [result for k, result in self.results if k == self.step] or [result for _, result in self.results]
            if self.before.intersection(_NUMBER.findall(said)):
                return  # it stands there already, so it may come from where nothing could be read
        if not any(follows(number, result, rounding(run)) for result in derived):
            raise WrongError(f"the steps give {show(derived[-1])}, not {show(number)}", "answer")
        self.checked.add(self.step)

    def found(self, step: int, reason: str, kind: Kind) -> FirstError:
        unsure = any(earlier < step for earlier in self.unread)
        return FirstError(step, reason, confidence(kind, unsure, self.bare))

    def judge(self, right: str | None) -> FirstError:
        """The first error where no claim is false. right: the right answer, where it is known.

        A wrong answer alone says that some step is wrong, not which: the step that states it is blamed only where all
        before it was read, of the calculation of an expression.
        """
        if right is not None and self.final and self._is_not(right):
            step = self.final[0]
            doubts = {**self._strays(), **self.doubts}
            if self.task.expression and min(self.unread, default=step) >= step:
                doubts.setdefault(step, "the answer is wrong")
            if doubts and min(doubts) <= step:
                return self.found(min(doubts), doubts[min(doubts)], "nowhere")
            return FirstError(None, "no error found, but the answer is wrong", 0.0)
        if self.unread:
            first = min(self.unread)
            return FirstError(None, f"step {first + 1}: {self.unread[first]}", 0.0)
        if self.task.value is not None and self.final and self._is_not(str(self.task.value)):
            return FirstError(None, "no claim is false, but the answer is not the problem's value", 0.0)
        if not self.checked:
            return FirstError(None, "nothing to check", 0.0)
        return FirstError(None, "every claim holds", ALL_RIGHT * len(self.checked) / self.steps)

    def _is_not(self, right: str) -> bool:
        """Whether the stated answer is surely not the right one."""
        if self.final is None:
            return False
        if is_collection(self.final[1]) or is_collection(right):
            return collections_differ(self.final[1], right)
        said, known = answer_in(self.final[1], self.declared), answer_in(right, self.declared)
        return said is not None and known is not None and differ(said, known, self.names.values)
