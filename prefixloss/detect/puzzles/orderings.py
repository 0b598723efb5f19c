"""Things in a row (logical deduction): what a step says has to follow from the statements that were repeated by then.

All orders of the things are listed, and a statement is the set of those in which it holds: an exact decision, so there
is nothing that a solver could add.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError

Orders = npt.NDArray[np.bool_]  # [orders]: those in which something holds

_MOST_THINGS = 8

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
             "eleventh", "twelfth")  # fmt: skip
_NTH = rf"(?:{'|'.join(_ORDINALS)}|\d{{1,2}}(?:st|nd|rd|th))"
# words for the low end of a row, and for being nearer to it; all others mean the high end
_LOW = frozenset(
    ("left", "leftmost", "old", "older", "oldest", "cheap", "cheaper", "cheapest", "less", "least", "above", "ahead",
     "before", "first", "top", "topmost", "early", "earlier", "earliest", "short", "shorter", "shortest", "small",
     "smaller", "smallest", "light", "lighter", "lightest")
)  # fmt: skip
_SUPERLATIVE = (
    r"(?:(?:left|right|top|bottom)most|(?:most|least) \w+|last|top|bottom"
    r"|(?:old|new|young|cheap|tall|short|light|heavi|small|larg|bigg|long|earli|lat)est)"
)
_COMPARATIVE = (
    r"(?:(?:to the )?(?:left|right) of|(?:more|less) \w+ than|(?:above|below|before|after|behind|ahead of)"
    r"|(?:old|new|young|cheap|tall|short|light|heavi|small|larg|bigg|long|earli|lat)er than)"
)
_PLACE = (
    rf"(?:{_NTH}[- ](?:from[- ](?:the[- ])?(?:left|right|top|bottom)|to[- ]last|{_SUPERLATIVE})|{_SUPERLATIVE}|{_NTH})"
)
_CUT = (
    r";|,? ?\b(?:so|since|because|therefore|thus|hence|which means|but|that)\b"
    r"|,(?= (?:and )?(?:the )?\w+ (?:is|are|was|were|must)\b)"
)
_VERB = r"(?:is|are|was|were|(?:can(?: only)?|could|must|will|may|might|has to|have to) be)"
# "from oldest to newest: first can be any vehicle, then second is ..."
_LISTING = re.compile(
    r"\bfrom (?:the )?(?P<start>[\w -]+?) to (?:the )?[\w -]+?\s*:(?P<rest>.*)", re.DOTALL | re.IGNORECASE
)
_ENTRY = re.compile(
    rf"(?P<head>(?:\b{_NTH}\b(?:,? ?(?:and|or|to|through)? ?))+)\s*(?:[a-z]+\s+)??(?P<verb>{_VERB})\s+(?P<what>.*?)"
    rf"(?=(?:[,;.])? (?:and )?(?:then |so |but the )?\b{_NTH}\b(?:,| and| or| to|(?: \w+)? {_VERB})|\.|$)",
    re.IGNORECASE,
)
_OPEN = re.compile(r"\b(?:any|unknown|except|other than|not)\b", re.IGNORECASE)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_ANSWER = re.compile(r"\banswer\W{0,4}(?:is|:|=)?\W*\(?([A-Z])\b", re.IGNORECASE)
_OPTION = re.compile(r"\(([A-Z])\)\s*(.*)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_STATEMENT_END = re.compile(r"\n|\r|(?<=[a-z][.?]) +(?=[A-Z])")  # a statement a line, or a sentence
_ARTICLE = re.compile(r"^(?:and )?(?:an? |the )?", re.IGNORECASE)
_LISTED = re.compile(r",| and (?=(?:an? |the )?[\w ]+$)")


@dataclass(frozen=True)
class Orderings(Replay):
    """Problem: things in a fixed order, a statement about it a line, options. A step repeats statements and says what
    follows from those repeated by then: places, relations, or the whole row as far as it is known ("from left to
    right: first is the owl, then second can be any bird"), which must have every place that was repeated.
    """

    unread: Literal["ignore", "wrong"] = "ignore"

    def start(self, problem: str) -> Puzzle:
        return _Deduction(problem)


class _Claim(NamedTuple):
    """holds: where it holds. about: "place", "relation", or "listed" in a row; "possible" as one of several; "open"
    names places (`places`) that may be anything's. text: for a reason."""

    holds: Orders
    about: str
    text: str
    places: tuple[int, ...] = ()


@lru_cache(maxsize=_MOST_THINGS)
def _all_orders(things: int) -> npt.NDArray[np.int8]:
    """[orders, things]: each thing's place, 0 at the low end."""
    return np.array(list(permutations(range(things))), dtype=np.int8)


def _is_low(words: str) -> bool:
    return not _LOW.isdisjoint(words.lower().replace("-", " ").split())


def _number(word: str) -> int:
    """0 for "first"."""
    word = word.lower()
    return _ORDINALS.index(word) if word in _ORDINALS else int(re.sub(r"\D", "", word)) - 1


class _Row:
    """Text to claims about a row of things. upward: whether the row that was listed last began at its low end."""

    def __init__(self, names: Sequence[str]) -> None:
        self.things: dict[str, int] = {}
        kinds = {name.split()[-1].lower() for name in names}
        for number, name in enumerate(map(str.lower, names)):
            self.things[name] = number
            if len(kinds) == 1 and " " in name:  # "the black one" of books alone
                self.things[name.rpartition(" ")[0]] = number
            if name.endswith("s"):
                self.things[name[:-1]] = number
        if not 2 <= len(names) <= _MOST_THINGS or len(set(self.things.values())) < len(names):
            raise UnreadError(f"{len(names)} things in a row, expected 2 to {_MOST_THINGS} different ones")
        self.count = len(names)
        self.places = _all_orders(self.count)
        self.upward = True
        longest_first = sorted(map(re.escape, self.things), key=len, reverse=True)
        self.token = re.compile(
            rf"(?P<thing>\b(?:{'|'.join(longest_first)})\b)|(?P<pronoun>\b(?:it|they|he|she)\b)"
            rf"|(?P<relation>\b{_COMPARATIVE}\b)|(?P<place>\b{_PLACE}\b)"
            rf"|(?P<question>\bwhich\b(?! means))|(?P<cut>{_CUT})"
            r"|(?P<no>\b(?:cannot|can not|can't|not|never|neither|nor|\w+n't)\b)|(?P<or>\bor\b)",
            re.IGNORECASE,
        )

    def claims(self, sentence: str) -> Iterator[_Claim]:
        listing = _LISTING.search(sentence)
        text = sentence[: listing.start()] if listing else sentence
        clause: list[re.Match[str]] = []
        subject: re.Match[str] | None = None
        for token in (*self.token.finditer(text), None):
            if token is not None and token.lastgroup not in ("cut", "question"):
                clause.append(token)
                continue
            things = [t for t in clause if t.lastgroup == "thing"]
            if subject and not things:
                clause = [subject if t.lastgroup == "pronoun" else t for t in clause]
            subject = things[0] if things else subject
            yield from self._clause([t for t in clause if t.lastgroup != "pronoun"])
            clause = []
            if token is not None and token.lastgroup == "question":
                break
        if listing:
            self.upward = _is_low(listing["start"])
            yield from self._listed(listing["rest"])

    def _clause(self, tokens: list[re.Match[str]]) -> Iterator[_Claim]:
        kinds = [token.lastgroup for token in tokens]
        text = " ".join(token[0] for token in tokens)
        things = [self.things[token[0].lower()] for token in tokens if token.lastgroup == "thing"]
        places = [self._place(token[0]) for token in tokens if token.lastgroup == "place"]
        if "relation" in kinds:
            middle = kinds.index("relation")
            left = kinds[:middle].count("thing")
            if 0 < left < len(things):
                holds = self._relation(tokens[middle][0], things[:left], things[left:])
                yield _Claim(~holds if "no" in kinds else holds, "relation", text)
            elif things and left == len(things) and len(places) == 1 and kinds[-1] == "place":
                holds = self._beyond(tokens[middle][0], things, places[0])
                yield _Claim(~holds if "no" in kinds else holds, "relation", text)
            elif things:
                raise UnreadError(text)
        elif things and places:
            if "or" in kinds or 1 in (len(things), len(places)):
                if min(len(things), len(places)) > 1 or (len(things) > 1 and "or" not in kinds):
                    raise UnreadError(text)
                holds = self._any_at(things, places)
            elif len(things) == len(places):
                holds = np.logical_and.reduce([self._any_at([t], [p]) for t, p in zip(things, places, strict=True)])
            else:
                raise UnreadError(text)
            yield _Claim(~holds if "no" in kinds else holds, "place", text)

    def _listed(self, text: str) -> Iterator[_Claim]:
        named: set[int] = set()
        for entry in _ENTRY.finditer(text):
            said = f"{entry['head'].strip()} {entry['verb']} {entry['what']}"
            numbers = [_number(word) for word in re.findall(_NTH, entry["head"], re.IGNORECASE)]
            if len(numbers) == 2 and re.search(r"\b(?:to|through)\b", entry["head"]):
                numbers = list(range(numbers[0], numbers[1] + 1))
            either = _OR.search(said) is not None
            if max(numbers, default=0) >= self.count:
                raise WrongError(f"there are {self.count} places: {said}")
            if not named.isdisjoint(numbers):
                raise WrongError(f"a place that is listed twice: {said}")
            named.update(numbers)
            places = [number if self.upward else self.count - 1 - number for number in numbers]
            things = [self.things[t[0].lower()] for t in self.token.finditer(entry["what"]) if t.lastgroup == "thing"]
            if not things or _OPEN.search(entry["what"]):
                yield _Claim(np.ones(len(self.places), np.bool_), "open", said, tuple(places))
            elif len(things) > 1 and len(places) > 1:
                if len(things) == len(places) and not either:
                    each = [self._any_at([t], [p]) for t, p in zip(things, places, strict=True)]
                else:
                    each = [self._any_at([thing], places) for thing in things]
                yield _Claim(np.logical_and.reduce(each), "listed", said)
            elif len(places) > 1 and not either:
                raise WrongError(f"one thing in several places: {said}")
            else:
                yield _Claim(self._any_at(things, places), "listed", said)
                yield from (_Claim(self._any_at([thing], places), "possible", said) for thing in things)

    def _any_at(self, things: Sequence[int], places: Sequence[int]) -> Orders:
        """Where any of the things is at any of the places."""
        found = np.isin(self.places[:, list(things)], list(places))
        return np.asarray(found.any(axis=1))

    def _relation(self, words: str, left: Sequence[int], right: Sequence[int]) -> Orders:
        pairs = [(self.places[:, a], self.places[:, b]) for a in left for b in right]
        low = _is_low(words)
        return np.logical_and.reduce([a < b if low else a > b for a, b in pairs])

    def _beyond(self, words: str, things: Sequence[int], place: int) -> Orders:
        """Where all of the things stand on that side of a place: "older than the fourth-oldest"."""
        at = self.places[:, list(things)]
        return np.asarray((at < place if _is_low(words) else at > place).all(axis=1))

    def _place(self, words: str) -> int:
        """ "second from the left", "third-newest", "second-to-last", "last", "third" as in the row listed last."""
        nth = re.match(_NTH, words, re.IGNORECASE)
        steps, end = (_number(nth[0]), words[nth.end() :].strip(" -")) if nth else (0, words)
        low = _is_low(end) if end else self.upward
        place = steps if low else self.count - 1 - steps
        if not 0 <= place < self.count:
            raise WrongError(f"there are {self.count} places, none is {words}")
        return place


class _Deduction(Puzzle):
    """repeated: the orders that the statements repeated so far allow; placed: the same for those that give a place."""

    def __init__(self, problem: str) -> None:
        lines = [line.strip(" \t-*") for line in _STATEMENT_END.split(problem)]
        first = next((n for n, line in enumerate(lines) if _LISTED.search(line.rpartition(":")[2])), None)
        if first is None:
            raise UnreadError("no list of things")
        names = [_ARTICLE.sub("", name.strip(" .")) for name in _LISTED.split(lines[first].rpartition(":")[2])]
        self.row = _Row([name for name in names if name])
        self.options: dict[str, Orders] = {}
        self.statements: list[Orders] = []
        for line in lines[first + 1 :]:
            option = _OPTION.match(line)
            claims = [claim.holds for claim in self.row.claims(option[2] if option else line)]
            if option:
                self.options.update((option[1], holds) for holds in claims[:1])
            elif not line.endswith(("?", ":")):
                self.statements += claims
        self.given = np.ones(len(self.row.places), np.bool_)
        for statement in self.statements:
            self.given &= statement
        if not self.statements or not self.given.any():
            raise UnreadError("no statements, or none that can hold together")
        self.repeated, self.placed = np.ones_like(self.given), np.ones_like(self.given)

    def agrees(self, answer: str) -> bool:
        option = re.search(r"\(?([A-Z])\b", answer)
        return option is not None and self._is_right(option[1])

    def _is_right(self, letter: str) -> bool:
        return letter in self.options and bool(self.options[letter][self.given].all())

    def read(self, step: str) -> None:
        unread: UnreadError | None = None
        for sentence in _SENTENCE_END.split(step):
            answer = _ANSWER.search(sentence)
            if answer:
                self._answer(answer[1])
                continue
            try:
                for claim in self.row.claims(sentence):
                    self._check(claim)
            except UnreadError as error:
                unread = error
        if unread:
            raise unread

    def _answer(self, letter: str) -> None:
        if not self._is_right(letter):
            raise WrongError(f"({letter}) does not follow from the statements")
        self.answered = True

    def _check(self, claim: _Claim) -> None:
        if claim.about in ("place", "relation") and self._is_statement(claim.holds):
            self.repeated &= claim.holds
            if claim.about == "place":
                self.placed &= claim.holds
        elif claim.about == "open":
            places = self.row.places[self.placed]
            if any((places == place).all(axis=0).any() for place in claim.places):
                raise WrongError(f"leaves out a place that is known: {claim.text}")
        elif not claim.holds[self.repeated].any():
            raise WrongError(f"contradicts the statements: {claim.text}")
        elif claim.about != "possible" and not claim.holds[self.repeated].all():
            raise WrongError(f"does not follow yet: {claim.text}")

    def _is_statement(self, holds: Orders) -> bool:
        return any(np.array_equal(holds, statement) for statement in self.statements)
