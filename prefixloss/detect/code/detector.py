"""Programs with tests: the first step with which the program so far does not parse, raises or fails a test.

A wrong value may come from any function that the failing test reaches. The earliest of them is taken, but for those
that a test which holds names and no failing one does.

The tests run in a process that the program cannot touch (see `sandbox`). A test that depends on what a process holds,
such as patched names, files, classes of its own or the identity of data, runs in the program's: it still finds what is
wrong, but when it passes that is the program's own word, and counts for less.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.code.limits import ProgramText, limit_met
from prefixloss.detect.code.sandbox import Cell, Check, Execution, Limits, Result, Sandbox
from prefixloss.detect.code.text import Line, code_lines, stated_tests

_OUTLINE = Path(__file__).with_name("outline.py")
_PROGRAM, _TEST = "<program>", "<test>"
_OWN_FAULT = {"NameError", "ImportError"}  # errors whose cause is the raising line
_MOST_CHARACTERS = 1 << 16  # of a program
_LONGEST_REASON = 160
_LEAST_SECONDS = 0.5  # with less left, no earlier step is looked at


@dataclass(frozen=True)
class Code(Detector):
    """Runs the program of each step in a sandbox, against these tests and those that the problem or the answer states.

    tests: Python, held against every response; stated ones are assertions and `>>>` examples. limits: of one run;
    there is one of the whole program and, where a test fails, one for each step before. unprotected: run foreign code
    even where the sandbox cannot hold it.
    """

    tests: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    unprotected: bool = False

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        lines = code_lines(steps)
        if not any(line.text.strip() for line in lines):
            return FirstError(None, "no code", 0.0)
        if sum(len(line.text) for line in lines) > _MOST_CHARACTERS:
            return FirstError(None, "too much code", 0.0)
        tests = [*self.tests, *stated_tests(problem), *stated_tests(answer or "")]
        with Sandbox(self.limits, 0.9 * self.seconds, unprotected=self.unprotected) as box:
            try:
                return _Trial(box, lines, tests, len(self.tests)).verdict()
            except _CannotTellError as error:
                return FirstError(None, str(error), 0.0)


class _CannotTellError(Exception):
    """Why nothing can be said about the response."""


class _Fault(NamedTuple):
    """Something wrong, and the step at fault. confidence: 0 where nothing can be said from this step on."""

    step: int
    reason: str
    confidence: float


class _Statement(NamedTuple):
    """A top-level statement of the program or the tests, from the outline. piece: the one it is complete with."""

    first: int
    last: int
    text: str
    binds: frozenset[str]
    uses: frozenset[str]
    functions: tuple[tuple[int, int], ...]
    defines: bool
    stub: bool
    checks: bool
    imports: bool
    modules: frozenset[str]
    raising: frozenset[int]
    shared: bool
    piece: int

    @classmethod
    def of(cls, fields: dict[str, Any]) -> _Statement:
        sets = {key: frozenset(fields[key]) for key in ("binds", "uses", "modules", "raising")}
        return cls(**{"piece": -1, **fields, **sets, "functions": tuple(map(tuple, fields["functions"]))})


class _Outcome(NamedTuple):
    """How a run ended: program by piece, tests in their order."""

    program: dict[int, Result]
    tests: list[Result]
    run: Execution


class _Trial:
    """One response. Its pieces are the steps with code, counted from 0; `steps` are their places in the response."""

    def __init__(self, box: Sandbox, lines: list[Line], tests: list[str], own_tests: int) -> None:
        self.box, self.lines = box, lines
        self.steps = sorted({line.step for line in lines})
        ends = [sum(line.step <= step for line in lines) for step in self.steps]
        text = "\n".join(line.text for line in lines)
        call = f"print(outline({text!r}, {ends!r}, {tests!r}))"
        # as tests: the program's process, and the one it is forked from, must not know the problem's
        run = box.run([], [Check("<outline>", _OUTLINE.read_text(encoding="utf-8")), Check("<outline>", call)])
        if any(result.error for result in run.tests):
            raise _CannotTellError(f"cannot be parsed: {run.tests[-1].error}")
        outline = json.loads(run.printed)
        for text, statements in zip(tests[:own_tests], outline["tests"], strict=False):
            if statements is None:
                raise ValueError(f"the test is not Python: {text[:80]!r}")
        self.error: tuple[int, str] | None = outline["error"]
        self.program = [_Statement.of(fields) for fields in outline["statements"]]
        # a problem's tests may repeat the function that is to be written
        defined = {name for statement in self.program for name in statement.binds}
        stated = [_Statement.of(fields) for statements in outline["tests"] for fields in statements or ()]
        self.tests = [test for test in stated if not (test.defines and test.binds & defined)]
        self.defined = frozenset(defined)
        modules = _union(statement.modules for statement in (*self.program, *self.tests))
        self.text = ProgramText(_PROGRAM, frozenset().union(*(s.raising for s in self.program)), modules)
        used = _union(statement.uses for statement in self.program)
        self.inside = self.with_their_names({k for k, test in enumerate(self.tests) if self.is_shared(test, used)})
        self.hearsay = False

    def verdict(self) -> FirstError:
        """The earliest of all that is found wrong."""
        faults = [_Fault(self.steps[self.error[0]], f"does not parse: {self.error[1]}", 0.95)] if self.error else []
        pieces = sorted({statement.piece for statement in self.program})
        if pieces:
            faults += self.faults(pieces)
        elif not faults:
            raise _CannotTellError("no code")
        if faults:
            step, reason, confidence = min(faults, key=lambda fault: (fault.step, -fault.confidence))
            return FirstError(step if confidence else None, " ".join(reason.split())[:_LONGEST_REASON], confidence)
        if self.hearsay:
            return FirstError(None, "all tests pass, some of them by what only the program can say", 0.5)
        if any(test.uses - _BUILTINS for test in self.tests):
            return FirstError(None, "all tests pass", 0.9)
        if any(statement.checks for statement in self.program):
            return FirstError(None, "its own assertions pass; there are no other tests", 0.5)
        return FirstError(None, "runs without an error; there are no tests", 0.0)

    def faults(self, pieces: list[int]) -> list[_Fault]:
        """Of the first piece that raises, and of the tests after the last one before it."""
        outcome = self.run(pieces[-1])
        raising = next((piece for piece in pieces if _raises(outcome.program[piece])), None)
        if raising is None:
            return self.faults_of_tests(pieces, outcome, whole=self.error is None)
        failure = outcome.program[raising]
        before = [piece for piece in pieces if piece < raising]
        earlier = self.run(before[-1]) if before and self.tests else None
        faults = self.faults_of_tests(before, earlier, whole=False) if earlier else []
        return [*faults, self.fault_of_program(raising, failure, outcome.run, earlier)]

    # ---- running -------------------------------------------------------------------------------------------

    def run(self, last: int) -> _Outcome:
        """The program up to and with piece `last`, then the tests: once more inside, those that turn out to need it."""
        pieces = sorted({statement.piece for statement in self.program if statement.piece <= last})
        cells = [Cell(_PROGRAM, self.source(piece)) for piece in pieces]
        while True:
            tests = [Check(_TEST, t.text, k in self.inside, self.own_names(t)) for k, t in enumerate(self.tests)]
            run = self.box.run(cells, tests)
            if not run.honest:
                raise _CannotTellError("the program meddles with its own tests")
            unpassable = {k for k, result in enumerate(run.tests) if result.error == "unpassable"} - self.inside
            if not unpassable or self.box.seconds_left() < _LEAST_SECONDS:
                return _Outcome(dict(zip(pieces, run.results, strict=True)), list(run.tests), run)
            self.inside |= self.with_their_names(unpassable)

    def is_shared(self, test: _Statement, used: frozenset[str]) -> bool:
        """Whether a test needs the program's process, or sets a name that the program uses."""
        taken = test.binds & used
        return test.shared or not taken <= (self.defined if test.imports else frozenset())

    def with_their_names(self, tests: set[int]) -> set[int]:
        """These tests and, in turn, those that set names which they use, or use names which they set."""
        while True:
            binds = _union(self.tests[k].binds for k in tests)
            uses = _union(self.tests[k].uses for k in tests)
            more = {
                k for k, test in enumerate(self.tests) if test.binds & uses or test.uses & binds or test.binds & binds
            }
            if more <= tests:
                return tests
            tests = tests | more

    def own_names(self, test: _Statement) -> tuple[str, ...]:
        """The built-ins' names that mean the program's in a test: where it names nothing else that the program has."""
        named = test.uses & self.defined
        return () if named - _BUILTINS else tuple(sorted(named))

    def source(self, piece: int) -> str:
        """A piece's statements, on the lines they have in the whole."""
        own = [statement for statement in self.program if statement.piece == piece]
        first, last = own[0].first, own[-1].last
        return "\n" * (first - 1) + "\n".join(line.text for line in self.lines[first - 1 : last])

    # ---- whose fault ---------------------------------------------------------------------------------------

    def fault_of_program(self, piece: int, failure: Result, run: Execution, before: _Outcome | None) -> _Fault:
        """Of a piece that raises in `run`. before: how the tests end without it."""
        own = self.steps[piece]
        if (reason := limit_met(failure, run, self.text)) is not None:
            return _Fault(own, reason, 0.0)
        statements = [statement for statement in self.program if statement.piece == piece]
        lines = self.lines_of(failure)
        if not lines:  # it ran out of time or died somewhere in the piece
            steps = {own} | self.suspects(_union(s.uses for s in statements), piece, frozenset())
        elif failure.error == "AssertionError" and self.start_of(lines[-1]) is None:
            if before is not None and not any(result.error for result in before.tests):
                return _Fault(own, "its own assertion fails, the tests pass", 0.8)
            denied = [s for s in statements if s.first <= lines[-1] <= s.last]
            steps = {own} | self.suspects(_union(s.uses for s in denied), piece, frozenset())
        else:
            steps = self.steps_of_trace(failure)
            if failure.error not in _OWN_FAULT:
                passed = [s for s in self.program if s.defines and any(s.first <= line <= s.last for line in lines)]
                steps |= self.suspects(_union(s.uses for s in passed), piece, frozenset())
        return _Fault(min(steps), self.describe(failure), 0.9 if len(steps) == 1 else 0.6)

    def faults_of_tests(self, pieces: list[int], outcome: _Outcome, whole: bool) -> list[_Fault]:
        """Of the tests that fail after the last of `pieces`. whole: nothing that a test may need is still to come."""
        last = pieces[-1]
        failing = {
            number: result
            for number, result in enumerate(outcome.tests)
            if result.error not in ("", "not run") and (whole or not self.is_early(self.tests[number], result, last))
        }
        self.hearsay |= any(result.hearsay for result in outcome.tests)
        broken = self.pieces_that_break(pieces, set(failing))
        held = [self.uses_through_tests(test) for test, r in zip(self.tests, outcome.tests, strict=True) if not r.error]
        held += [s.uses for s in self.program if s.checks and s.piece <= last]
        cleared = _union(held) - _union(self.uses_through_tests(self.tests[number]) for number in failing)
        faults = []
        for number, failure in failing.items():
            if (reason := limit_met(failure, outcome.run, self.text)) is not None:
                faults.append(_Fault(self.steps[last], reason, 0.0))
            elif number in broken:
                what = f"a test no longer holds, {self.describe(failure)}: {self.tests[number].text}"
                faults.append(_Fault(self.steps[broken[number]], what, 0.9))
            elif not self.lacks_another_test(failure):
                faults.append(self.fault_of_test(self.tests[number], failure, last, cleared))
        return faults

    def is_early(self, test: _Statement, failure: Result, last: int) -> bool:
        """Whether the test needs what piece `last` and those before do not define, or only as a stub."""
        defining = [
            [s.stub for s in self.program if name in s.binds and s.piece <= last]
            for name in self.uses_through_tests(test)
        ]
        return failure.error == "NameError" or any(stubs and all(stubs) for stubs in defining)

    def fault_of_test(self, test: _Statement, failure: Result, last: int, cleared: frozenset[str]) -> _Fault:
        """Of a test that never held. cleared: names that other tests show to be right, as far as tests can."""
        what = f"a test fails, {self.describe(failure)}: {test.text}"
        steps = possible = self.steps_of_trace(failure)
        if failure.error not in _OWN_FAULT:
            possible = steps | self.suspects(self.uses_through_tests(test), last, frozenset())
            steps = steps | self.suspects(self.uses_through_tests(test), last, cleared)
        if steps:
            return _Fault(min(steps), what, 0.9 if len(possible) == 1 else 0.6)
        if failure.error == "NameError":  # the program never says what the test asks for
            return _Fault(self.steps[last], what, 0.3)
        return _Fault(self.steps[last], f"a test fails whatever the program: {test.text}", 0.0)

    def lacks_another_test(self, failure: Result) -> bool:
        """Whether a test only misses a name that an earlier one failed to set."""
        name = re.match(r"name '(\w+)' is not defined", failure.message) if failure.error == "NameError" else None
        return name is not None and any(name[1] in test.binds for test in self.tests)

    def pieces_that_break(self, pieces: list[int], failing: set[int]) -> dict[int, int]:
        """For the failing tests that held earlier: the piece after which they no longer did."""
        broken: dict[int, int] = {}
        for piece, after in zip(pieces[-2::-1], pieces[:0:-1], strict=True):
            if failing == set(broken) or self.box.seconds_left() < _LEAST_SECONDS:
                break
            held = [number for number, result in enumerate(self.run(piece).tests) if not result.error]
            broken.update(dict.fromkeys(failing.intersection(held) - set(broken), after))
        return broken

    def lines_of(self, failure: Result) -> list[int]:
        """The program's lines in a traceback, the raising one last."""
        return [line for file, line in failure.places if file == _PROGRAM and 0 < line <= len(self.lines)]

    def steps_of_trace(self, failure: Result) -> set[int]:
        """The step of the line that raises, where that is the cause; else those where the functions on the way there
        start, for what is wrong may stand above."""
        lines = self.lines_of(failure)
        if failure.error in _OWN_FAULT:
            return {self.lines[line - 1].step for line in lines[-1:]}
        return {self.lines[(self.start_of(line) or line) - 1].step for line in lines}

    def start_of(self, line: int) -> int | None:
        """Where the innermost function around a line starts."""
        functions = (function for statement in self.program for function in statement.functions)
        return max((first for first, last in functions if first <= line <= last), default=None)

    def suspects(self, names: frozenset[str], last: int, cleared: frozenset[str]) -> set[int]:
        """The steps, up to piece `last`, that define these names and, in turn, what they use, but for the cleared."""
        steps: set[int] = set()
        waiting, seen = set(names), set(names | cleared)
        while waiting:
            name = waiting.pop()
            binding = [s for s in self.program if name in s.binds and s.piece <= last]
            for statement in [s for s in binding if not s.stub] or binding:
                steps.add(self.lines[statement.first - 1].step)
                waiting |= statement.uses - seen
                seen |= statement.uses
        return steps

    def uses_through_tests(self, test: _Statement) -> frozenset[str]:
        """The names a test uses; for those that other tests set, what these use."""
        names = test.uses
        while (more := names | _union(other.uses for other in self.tests if other.binds & names)) != names:
            names = more
        return names - _union(other.binds for other in self.tests)

    def describe(self, failure: Result) -> str:
        if failure.error == "OutOfTime":
            return f"runs longer than {self.box.limits.cpu_seconds:g} s"
        return ": ".join(part for part in (failure.error, failure.message) if part)


_BUILTINS = frozenset(dir(builtins))


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*sets)


def _raises(result: Result) -> bool:
    left = result.error == "SystemExit" and result.message in ("", "0", "None")
    return result.error not in ("", "not run") and not left
