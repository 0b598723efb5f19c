r"""Reads what a text claims: expressions ("6 cups * $2/cup", "\frac{1}{2}x") joined by relations.

Two stacks make an expression of lexemes. One beside maths that cannot be read along with it is partial: nothing is
claimed of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from prefixloss.detect.maths.expressions import Expression, Rational
from prefixloss.detect.maths.lexemes import QUALIFIERS, Lexeme, lexemes
from prefixloss.detect.maths.text import UnreadableError, words
from prefixloss.detect.maths.units import Unit

MAX_LEXEMES = 400  # of an expression
MAX_VISITS = 60_000  # lexemes looked at in a text
MAX_BEHIND = 6  # lexemes looked at behind an expression
MAX_LEAD = 4  # words kept before a chain
MAX_BETWEEN = 24  # words kept between two claims
UNREAD = "?"  # what stands there for maths that cannot be read
SUPPOSING = words("if suppose assume supposing assuming")
_TRYING = SUPPOSING | words("when whether try guess case unless consider substitute substituting plug plugging choose")


class Run(NamedTuple):
    """An expression in a text.

    names: those in it. places: the decimals written, where the run is a single number or percentage, else None. units:
    the places in `expression` of the numbers with a well-known unit, and the units. worded: whether a number has a unit
    in words. partial: whether maths beside the run could not be read along with it.
    """

    expression: Expression
    names: frozenset[str]
    places: int | None
    units: tuple[tuple[int, Unit], ...]
    worded: bool
    partial: bool

    @property
    def name(self) -> str | None:
        """The name that the run is, if it is no more than one."""
        return next(iter(self.names), None) if len(self.expression) == 1 and not self.partial else None

    @property
    def converted(self) -> Expression:
        """The expression with every number of a well-known unit in the smallest unit of its kind."""
        units = dict(self.units)
        items: list[Rational | str] = []
        for place, item in enumerate(self.expression):
            items += (item, units[place].size, "*") if place in units else (item,)
        return tuple(items)


class Chain(NamedTuple):
    """Runs joined by relations: relations[k] stands between runs[k] and runs[k + 1]; a lone run claims nothing.

    opening: the relation that the text starts with, where the chain goes on from the text before, else "". lead: the
    words of prose right before, the nearest last. tail: the word or sign right behind. supposed: whether the sentence
    has an "if" before. between: the words since the last relation in the text, `UNREAD` for maths that cannot be read.
    """

    runs: list[Run]
    relations: list[str]
    opening: str
    lead: tuple[str, ...]
    supposed: bool
    tail: str = ""
    between: tuple[str, ...] = ()


class Reading(NamedTuple):
    """The chains of a text, how many of its relations could not be read, and whether the last chain ends the text, so
    that the next may go on with "= ..."."""

    chains: list[Chain]
    unread: int
    ends: bool


# ---- expressions ---------------------------------------------------------------------------------------------

_BINDS = {"+": 1, "-": 1, "rem": 1, "*": 2, "/": 2, "mod": 2, "neg": 3, "^": 4}
_OF_ONE = ("sqrt", "abs", "floor", "ceil", "sin", "cos", "tan", "ln")
_OF_TWO = {
    "frac": "/",
    "root": "root",
    "binom": "choose",
    **{name: name for name in ("log", "gcd", "lcm", "max", "min")},
}
_BEHIND_FIRST = {name: f"{name} of" for name in _OF_TWO}  # what a prefix becomes behind the first of two arguments,
_BEHIND_LAST = {**dict(zip(_OF_ONE, _OF_ONE, strict=True)), **{f"{name} of": sign for name, sign in _OF_TWO.items()}}


class _Parser:
    """An expression in the making: what is read is in postfix order in `output` or waits in `pending`."""

    def __init__(self) -> None:
        self.output: list[Rational | str] = []
        self.units: list[tuple[int, Unit]] = []
        self.pending: list[str] = []
        self.depth = 0
        self.wants_value = True

    @property
    def complete(self) -> bool:
        return not self.wants_value and not self.depth

    def take(self, lexeme: Lexeme) -> bool:
        """Adds a lexeme; False if the expression cannot go on with it."""
        if not (self._operand(lexeme) if self.wants_value else self._operator(lexeme)):
            return False
        if not self.wants_value:
            while self.pending and self.pending[-1] in _BEHIND_LAST:
                self.output.append(_BEHIND_LAST[self.pending.pop()])
            if self.pending and self.pending[-1] in _BEHIND_FIRST:
                self.pending[-1] = _BEHIND_FIRST[self.pending[-1]]
                self.wants_value = True
        return True

    def _operand(self, lexeme: Lexeme) -> bool:
        kind, item, _, unit, _ = lexeme
        if kind in ("value", "name"):
            if unit:
                self.units.append((len(self.output), unit))
            self.output.append(item)
            self.wants_value = False
        elif kind == "open":
            self.pending.append("(")
            self.depth += 1
        elif kind == "prefix" or item == "neg":
            self.pending.append(str(item))
        else:  # between the arguments of a fraction, "*" is no product
            return item == "pos" or (item == "*" and self.pending[-1:] != [] and self.pending[-1].endswith(" of"))
        return True

    def _operator(self, lexeme: Lexeme) -> bool:
        kind, item = lexeme.kind, str(lexeme.item)
        if kind == "operator" and item in _BINDS and item != "neg":
            self._reduce(_BINDS[item] + (item == "^"))
            self.pending.append(item)
            self.wants_value = True
        elif kind == "close" and self.depth:
            self._reduce(1)
            self.pending.pop()
            self.depth -= 1
        elif kind == "postfix":
            self.output.append(item)
        else:
            return False
        return True

    def _reduce(self, binding: int) -> None:
        """Puts out the pending operators that bind at least so much, down to a bracket."""
        while self.pending and _BINDS.get(self.pending[-1], 0) >= binding:
            self.output.append(self.pending.pop())

    def expression(self) -> Expression:
        self._reduce(1)
        return tuple(self.output)


_WHOLE = words("integer whole")
_SENTENCE_ENDS = frozenset(".?!\n")
_STARTS = frozenset(("value", "name", "open", "prefix", "operator"))
_BESIDE = frozenset(("value", "name", "prefix", "postfix", "operator", "opaque"))


class _Runs:
    """The runs among lexemes."""

    def __init__(self, found: list[Lexeme]) -> None:
        self.lexemes = found
        self.visits = 0

    def kind(self, place: int) -> str:
        return self.lexemes[place].kind if 0 <= place < len(self.lexemes) else "break"

    def at(self, start: int) -> tuple[Run, int] | None:
        """The longest run that starts at `start`, and the place behind it."""
        parser, end, stop = self._parse(start, min(start + MAX_LEXEMES, len(self.lexemes)))
        if end == start:
            return None
        if end < stop:
            parser, end, _ = self._parse(start, end)
        inside = self.lexemes[start:end]
        expression = parser.expression()
        values = [lexeme for lexeme in inside if lexeme.kind == "value"]
        single = len(values) == 1 and all(item in ("neg", "%") for item in expression[1:])
        return Run(
            expression,
            frozenset(str(lexeme.item) for lexeme in inside if lexeme.kind == "name" and lexeme.item != "pi"),
            values[0].places if single else None,
            tuple(parser.units),
            any(lexeme.worded for lexeme in inside),
            self.kind(start - 1) in _BESIDE or self.kind(end) in (*_BESIDE, "open") or self._qualified(end),
        ), end

    def _qualified(self, place: int) -> bool:
        """Whether the words behind a run belong to what it says: "505 remainder 3", "600 greater than 19^2", or tell
        what alone matters of it: "64.16, which is not an integer". A "than" behind a comma is of the next clause."""
        clause = denied = False
        for behind in range(place, min(place + MAX_BEHIND, len(self.lexemes))):
            kind, item, *_ = self.lexemes[behind]
            clause, denied = clause or item == ",", denied or item == "not"
            if denied and item in _WHOLE:
                return True
            if (item in QUALIFIERS and not (clause and item == "than")) or (
                item == "r" and self.kind(behind + 1) == "value"
            ):
                return True
            if kind not in ("word", "break", "open") or item in _SENTENCE_ENDS:
                return False
        return False

    def _parse(self, start: int, limit: int) -> tuple[_Parser, int, int]:
        """What lexemes[start:limit] begin with, where it was last a complete expression, and where it had to stop."""
        parser = _Parser()
        complete, place = start, start
        while place < limit and parser.take(self.lexemes[place]):
            place += 1
            if parser.complete:
                complete = place
        self.visits += place + 1 - start
        if self.visits > MAX_VISITS:
            raise UnreadableError("too many brackets")
        return parser, complete, place


# ---- chains --------------------------------------------------------------------------------------------------


def read(text: str, names: Collection[str]) -> Reading:
    """What a text claims. names: those `declared` in the response. UnreadableError beyond the bounds."""
    found = lexemes(text, names)
    runs = _Runs(found)
    chains: list[Chain] = []
    lead: list[str] = []
    between: list[str] = []
    relation = ""  # the one right before
    behind = False  # whether a run stands right before
    supposed = False  # whether the sentence has an "if"
    loose = False  # whether the clause has a calculation without a relation
    begin = next((at for at, lexeme in enumerate(found) if lexeme.kind != "break"), 0)
    place, end, unread = 0, 0, 0
    while place < len(found):
        kind, item, *_ = found[place]
        run = runs.at(place) if kind in _STARTS else None
        if run:
            if relation and behind:
                chains[-1].runs.append(run[0])
                chains[-1].relations.append(relation)
                between = []
            else:
                opening = relation if place - 1 == begin else ""
                since = tuple(between[-MAX_BETWEEN:])
                chains.append(Chain([run[0]], [], opening, tuple(lead[-MAX_LEAD:]), supposed, between=since))
                lead = []
            relation, behind, place = "", True, run[1]
            end = place
            continue
        calculates = behind and len(chains[-1].runs[-1].expression) > 2 and chains[-1].runs[-1].expression[-1] != "mod"
        if kind == "relation" and not relation and (item != "is" or calculates):  # "2 + 3 is 5", not "x is 5"
            relation = str(item)
            unread += not behind and (loose or runs.kind(place - 1) == "opaque")
        else:
            unread += bool(relation) and behind and kind in _BESIDE
            loose = kind == "word" and (loose or (calculates and not relation))
            if behind:
                chains[-1] = chains[-1]._replace(tail=str(item))
            supposed = item in _TRYING or (supposed and item not in _SENTENCE_ENDS)
            lead = [*lead[-MAX_LEAD:], str(item)] if kind == "word" else []
            if kind in ("word", "opaque", "relation") or item == "->":
                between.append(str(item) if kind in ("word", "break") else UNREAD)
            relation, behind = "", False
        place += 1
    return Reading(chains, unread, all(lexeme.kind == "break" for lexeme in found[end:]))
