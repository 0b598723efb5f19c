"""Formulas of propositional logic, what follows from them by z3, and how symbols spell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias

from prefixloss.detect.puzzles.replay import UnreadError


@dataclass(frozen=True)
class Atom:
    """name: what is said, of: whom, "" in propositional logic. `Atom("cat", "max")` is "Max is a cat"."""

    name: str
    of: str = ""

    def __str__(self) -> str:
        return f"{self.name}({self.of})" if self.of else self.name


@dataclass(frozen=True)
class Not:
    inner: Formula

    def __str__(self) -> str:
        return f"~{self.inner}"


@dataclass(frozen=True)
class _Pair:
    left: Formula
    right: Formula


@dataclass(frozen=True)
class And(_Pair):
    def __str__(self) -> str:
        return f"({self.left} & {self.right})"


@dataclass(frozen=True)
class Or(_Pair):
    def __str__(self) -> str:
        return f"({self.left} | {self.right})"


@dataclass(frozen=True)
class Implies(_Pair):
    def __str__(self) -> str:
        return f"({self.left} -> {self.right})"


@dataclass(frozen=True)
class Iff(_Pair):
    def __str__(self) -> str:
        return f"({self.left} <-> {self.right})"


Formula: TypeAlias = Atom | Not | And | Or | Implies | Iff
Outcome = Literal["follows", "refuted", "open"]

ANY = "?"  # in place of a name: a rule holds of anything that is put there


def ground(formula: Formula, name: str) -> Formula:
    """The formula about one named thing, in place of ANY."""
    if isinstance(formula, Atom):
        return Atom(formula.name, name) if formula.of == ANY else formula
    if isinstance(formula, Not):
        return Not(ground(formula.inner, name))
    return type(formula)(ground(formula.left, name), ground(formula.right, name))


def atoms(formula: Formula) -> Iterator[Atom]:
    if isinstance(formula, Atom):
        yield formula
    elif isinstance(formula, Not):
        yield from atoms(formula.inner)
    else:
        yield from atoms(formula.left)
        yield from atoms(formula.right)


def conjunction(formulas: Iterable[Formula]) -> Formula:
    return reduce(And, formulas)


def disjunction(formulas: Iterable[Formula]) -> Formula:
    return reduce(Or, formulas)


# what follows

_EFFORT = 200_000  # z3's count of its own work for one question: the same on every machine
_MOST_QUESTIONS = 3000


class UndecidedError(Exception):
    """The solver gave up within its limits."""


class Theory:
    """Premises, and what follows from them. milliseconds: the limit of one question, behind z3's own count of work."""

    def __init__(self, premises: Iterable[Formula] = (), milliseconds: int = 3000) -> None:
        import z3  # noqa: PLC0415  (an extra)

        self._z3: Any = z3
        self._context = z3.Context()
        self._solver = z3.SolverFor("QF_FD", ctx=self._context)
        self._solver.set("timeout", milliseconds)
        self._solver.set("rlimit", _EFFORT)
        self._contradicts: dict[tuple[Formula, ...], bool] = {}
        for premise in premises:
            self.add(premise)

    def add(self, premise: Formula) -> None:
        self._solver.add(self._term(premise))
        self._contradicts.clear()

    def contradicts(self, *formulas: Formula) -> bool:
        """Whether no case is left in which the premises and these formulas hold."""
        if formulas not in self._contradicts:
            if len(self._contradicts) == _MOST_QUESTIONS:
                raise UndecidedError(f"more than {_MOST_QUESTIONS} questions")
            self._solver.push()
            self._solver.add(*map(self._term, formulas))
            found = self._solver.check()
            self._solver.pop()
            if found == self._z3.unknown:
                raise UndecidedError("the solver gave up")
            self._contradicts[formulas] = found == self._z3.unsat
        return self._contradicts[formulas]

    def judge(self, claim: Formula, under: Sequence[Formula] = ()) -> Outcome:
        """under: what is supposed besides the premises."""
        if self.contradicts(*under, Not(claim)):
            return "follows"
        return "refuted" if self.contradicts(*under, claim) else "open"

    def _term(self, formula: Formula) -> Any:
        z3 = self._z3
        if isinstance(formula, Atom):
            return z3.Bool(str(formula), self._context)
        if isinstance(formula, Not):
            return z3.Not(self._term(formula.inner))
        left, right = self._term(formula.left), self._term(formula.right)
        if isinstance(formula, And):
            return z3.And(left, right)
        if isinstance(formula, Or):
            return z3.Or(left, right)
        return z3.Implies(left, right) if isinstance(formula, Implies) else left == right


def judge(premises: Iterable[Formula], claim: Formula) -> Outcome:
    """ "follows" (from contradictory premises everything does), "refuted" if the opposite follows, else "open"."""
    return Theory(premises).judge(claim)


def follows(premises: Iterable[Formula], claim: Formula) -> bool:
    return judge(premises, claim) == "follows"


# symbols

_DEEPEST = 40  # brackets, or operators in a row
_TOKEN = re.compile(
    r"\s*(?:(?P<iff><->|<=>|↔|⟺|⇔|iff\b)|(?P<implies>->|=>|→|⇒|⟹|implies\b)|(?P<and>&&?|∧|/\\|and\b)"
    r"|(?P<or>\|\|?|∨|\\/|or\b)|(?P<not>~|¬|!|not\b)|(?P<open>[(\[])|(?P<close>[)\]])"  # noqa: RUF001
    r"|(?P<atom>[A-Za-z]\w*(?:\(\s*\w+(?:\s*,\s*\w+)*\s*\))?)|(?P<other>\S))",
)
SYMBOL = re.compile(r"->|=>|[→⇒⟹↔⟺⇔¬∧∨~&|]")  # noqa: RUF001
_BINARY: dict[str, tuple[int, type[Iff | Implies | Or | And]]] = {
    "iff": (1, Iff),
    "implies": (2, Implies),
    "or": (3, Or),
    "and": (4, And),
}


class _Symbols:
    """One formula in symbols, by precedence climbing; implications group to the right."""

    def __init__(self, text: str) -> None:
        if SYMBOL.search(text) and re.search(r"\b(?:and|or|not|iff|implies)\b", text):
            raise UnreadError("words among symbols")
        self.tokens = [(str(m.lastgroup), m[0].strip()) for m in _TOKEN.finditer(text.rstrip())]
        self.place = 0

    def formula(self) -> Formula:
        formula = self._binary(0, 0)
        if self._kind() != "end":
            raise UnreadError("symbols")
        return formula

    def _kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else "end"

    def _next(self) -> tuple[str, str]:
        if self.place == len(self.tokens):
            raise UnreadError("symbols that break off")
        self.place += 1
        return self.tokens[self.place - 1]

    def _binary(self, tightest: int, depth: int) -> Formula:
        left = self._unary(depth + 1)
        while (kind := self._kind()) in _BINARY:
            precedence, operator = _BINARY[kind]
            if precedence < tightest:
                break
            self.place += 1
            left = operator(left, self._binary(precedence + (operator is not Implies), depth + 1))
        return left

    def _unary(self, depth: int) -> Formula:
        if depth > _DEEPEST:
            raise UnreadError("a formula too deep")
        kind, text = self._next()
        if kind == "not":
            return Not(self._unary(depth + 1))
        if kind == "atom":
            return Atom(re.sub(r"\s", "", text))
        if kind != "open":
            raise UnreadError("symbols")
        inner = self._binary(0, depth + 1)
        if self._next()[0] != "close":
            raise UnreadError("a bracket that is not closed")
        return inner


def symbols(text: str) -> Formula:
    """Reads `->`, `<->`, `&`, `|`, `~` and their like. Raises UnreadError."""
    return _Symbols(text).formula()
