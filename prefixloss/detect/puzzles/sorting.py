"""Word sorting by letters: words are compared by their first letters, those that tie by the next, until none do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, groupby, islice, zip_longest
from typing import NamedTuple

from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_WHICH = re.compile(rf"\b(?:({'|'.join(_ORDINALS)})|(\d{{1,2}})(?:st|nd|rd|th))\s+letters?\b", re.IGNORECASE)
_SORTS = re.compile(r"\bsort|alphabet|lexicographic", re.IGNORECASE)
_HAVE = re.compile(r"(?<![\"`])\bwe (?:now )?have\b(?! (?:now|to|not)\b):?", re.IGNORECASE)
_ANSWER = re.compile(r"(?<![\"`])\banswer[\s*]*(?:is\b|:|=)[\s*:]*", re.IGNORECASE)
_QUOTED = re.compile(r"[\"`]([^\"`]+)[\"`]")
_BARE = re.compile(r"[^\W\d](?:[\w'&-]*\w)?")
# "kitten": "k" (11)
_ENTRY = re.compile(
    r"(?<![^\s\"`,;()])(?P<word>[^\s\"`:,;()]{1,100})[\"`]?\s*(?::|=|->|→)\s*"
    r"(?:[\"`](?P<quoted>[^\"`]{0,20})[\"`]|(?P<bare>[^\s(),;\"`]{0,20}))(?:\s*\(\s*(?P<position>\d{1,3})\s*\))?"
)
_KEY = re.compile(r"\((\d{1,3})\)")
_CHAIN_END = re.compile(r"\.(?:\s|$)|\bfor (?:the|this) subpart\b|\n", re.IGNORECASE)
_NO_LETTER = frozenset(("", "-", "none", "nothing", "empty"))
_SHOWN = 3  # words that a reason shows


@dataclass(frozen=True)
class Sorting(Replay):
    """Problem: words in a row, alone or after the last colon. A step gives the letters by which words that tie are
    compared, with their positions in the alphabet (from 1); or the order that follows, of the words compared and then
    of all, as in (2) ["be" ? "by"] < (3) "cat", where words in brackets tie; or the answer.

    Ties are broken from the left, one comparison at a time; letters that the words share may be passed over.
    """

    def start(self, problem: str) -> Puzzle:
        if ":" in problem and not _SORTS.search(problem):
            raise UnreadError("nothing to sort")
        return _Words(problem)


class _Tie(NamedTuple):
    """Words that the letters compared so far do not tell apart, in alphabetical order. letters: how many those are."""

    words: list[str]
    letters: int

    @property
    def open(self) -> bool:
        return self.words[0] != self.words[-1]

    def split(self, letter: int) -> list[_Tie]:
        """By the letter with this index; a word that has none comes first."""
        groups = groupby(self.words, lambda word: word[letter : letter + 1])
        return [_Tie(list(words), letter + 1) for _, words in groups]


class _Piece(NamedTuple):
    """What stands between two "<": words that tie, and the positions in the alphabet written beside them."""

    words: list[str]
    positions: list[int]


def _list(text: str) -> list[str]:
    words = (word.strip("\"'`.[]()").lower() for word in re.split(r"[\s,;<]+", text))
    return [word for word in words if word]


def _answered(text: str) -> list[str]:
    """The words of an answer, to the end of its line or sentence."""
    return _list(re.split(r"\n|\.\s", text.strip(), maxsplit=1)[0])


def _pieces(text: str, most: int) -> list[_Piece]:
    """The parts of a chain; what goes beyond `most` stays in one piece."""
    text = _CHAIN_END.split(text.lower(), maxsplit=1)[0]
    quoted = '"' in text or "`" in text
    parts = text.split("<" if "<" in text or quoted else None, most)
    return [_Piece((_QUOTED if quoted else _BARE).findall(p), [int(k) for k in _KEY.findall(p)]) for p in parts]


def _shape(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Ties without their order; a word that stands twice ties with nothing."""
    return [tie for group in groups for tie in ([sorted(group)] if len(set(group)) != 1 else [[w] for w in group])]


def _position(word: str, letter: int) -> int | None:
    """A letter's position in the alphabet, 0 if the word has none, None if it has no place there."""
    character = word[letter : letter + 1]
    return 0 if not character else ord(character) - ord("a") + 1 if "a" <= character <= "z" else None


class _Words(Puzzle):
    """The order as far as it is known. compared: the tie whose letters were given last, and which letter it was."""

    def __init__(self, problem: str) -> None:
        self.sorted = sorted(_list(problem.rpartition(":")[2]))
        if len(self.sorted) < 2 or not all(map(_BARE.fullmatch, self.sorted)):
            raise UnreadError("not a list of words")
        self.order = [_Tie(self.sorted, 0)]
        self.place = 0  # the ties before it are broken
        self.compared: tuple[_Tie, int] | None = None

    def agrees(self, answer: str) -> bool:
        return _answered(answer) == self.sorted

    def read(self, step: str) -> None:
        answer = _ANSWER.search(step)
        text = step[: answer.start()] if answer else step
        orders = list(_HAVE.finditer(text))
        letters = text[: orders[0].start()] if orders else text
        looked_at = list(_WHICH.finditer(letters))
        if looked_at:
            self._check_letters(letters, looked_at)
        if orders:
            ends = [m.start() for m in orders[1:]] + [len(text)]
            chains = [_pieces(text[m.end() : end], len(self.sorted)) for m, end in zip(orders, ends, strict=True)]
            self._check_orders([chain for chain in chains if any(piece.words for piece in chain)])
        if answer:
            self._check_answer(step[answer.end() :])
        if not (looked_at or orders or answer) and not set(_QUOTED.findall(text.lower())).isdisjoint(self.sorted):
            raise UnreadError("words in no known report")

    def _next(self) -> _Tie:
        """The leftmost tie that has to be broken."""
        while self.place < len(self.order) and not self.order[self.place].open:
            self.place += 1
        if self.place == len(self.order):
            raise WrongError("goes on after the words are sorted")
        return self.order[self.place]

    def _next_comparison(self, splits: bool) -> tuple[_Tie, int]:
        """Of the leftmost tie: by the next letter, or if it splits the tie by the next that does."""
        tie = self._next()
        first, last = tie.words[0], tie.words[-1]
        differs = next(k for k in count(tie.letters) if first[k : k + 1] != last[k : k + 1])
        return tie, differs if splits else tie.letters

    def _check_letters(self, text: str, looked_at: Sequence[re.Match[str]]) -> None:
        which = {_ORDINALS.index(m[1].lower()) if m[1] else int(m[2]) - 1 for m in looked_at}
        if len(which) > 1:
            raise UnreadError("more than one letter is looked at")
        letter = which.pop()
        subpart = _QUOTED.findall(text[: looked_at[-1].end()].lower())
        entries = list(_ENTRY.finditer(text[looked_at[-1].end() :].lower()))
        if not subpart and not entries:
            return
        tie = self._next()
        if subpart:
            self._check_same(subpart, tie.words)
        if letter < tie.letters or tie.words[0][:letter] != tie.words[-1][:letter]:
            raise WrongError(f"the next letter to compare is number {tie.letters + 1}, not {letter + 1}")
        for entry in entries:
            self._check_entry(entry, letter)
        if entries:
            self._check_same([e["word"].strip("'") for e in entries], tie.words)
        self.compared = tie, letter

    @staticmethod
    def _check_entry(entry: re.Match[str], letter: int) -> None:
        word = entry["word"].strip("'")
        true = word[letter : letter + 1]
        said = entry["quoted"] if entry["quoted"] is not None else entry["bare"].strip("'.")
        if said != true and (true or said not in _NO_LETTER):
            raise WrongError(f"letter {letter + 1} of {word} is {true or 'missing'}, not {said}")
        position = _position(word, letter)
        if entry["position"] and position not in (None, int(entry["position"])):
            raise WrongError(f"{true} is number {position} of the alphabet, not {entry['position']}")

    @staticmethod
    def _check_same(said: list[str], true: list[str]) -> None:
        """Whether two lists hold the same words, in any order."""
        if len(said) != len(true) or sorted(said) != true:
            new, lost = Counter(said) - Counter(true), Counter(true) - Counter(said)
            raise WrongError(
                "; ".join(f"{name}: {_show(words)}" for name, words in (("has", new), ("lacks", lost)) if words)
            )

    def _check_orders(self, chains: Sequence[Sequence[_Piece]]) -> None:
        """First the words compared, split, or all words; then all words. A comparison may be left to the reader, and
        an order may be said again before the next."""
        split: list[_Tie] | None = None
        letter = 0
        for chain in chains:
            if split is None:
                if self.compared is None and self._is_whole(chain):
                    continue
                tie, letter = self.compared or self._next_comparison(splits=len(chain) > 1)
                split = tie.split(letter)
                self.order[self.place : self.place + 1] = split
                self.compared = None
                if not self._is_whole(chain):
                    self._check_order(chain, split, range(letter, letter + 1))
                    continue
            self._check_order(chain, self.order, range(letter + 1))

    def _is_whole(self, chain: Sequence[_Piece]) -> bool:
        """Whether a chain is the order of all words, as far as it is known."""
        if sum(len(piece.words) for piece in chain) != len(self.sorted):
            return False
        return _shape([piece.words for piece in chain]) == _shape([tie.words for tie in self.order])

    def _check_order(self, chain: Sequence[_Piece], order: Sequence[_Tie], letters: range) -> None:
        """Whether a chain is an order, with positions of those letters (by index) beside it."""
        said, true = _shape([piece.words for piece in chain]), _shape([tie.words for tie in order])
        if said != true:
            pairs = zip_longest(said, true, fillvalue=())
            raise WrongError(next(f"{_show(a)} where {_show(b)} follows" for a, b in pairs if a != b))
        for piece in chain:
            places = [_position(piece.words[0], letter) for letter in letters]
            if None not in places and not set(piece.positions) <= set(places):
                raise WrongError(f"{_show(piece.words)} stands under a wrong number")

    def _check_answer(self, text: str) -> None:
        said = _answered(text)
        if not said:
            raise UnreadError("no answer behind the word")
        if said != self.sorted:
            pairs = zip_longest(said, self.sorted, fillvalue="nothing")
            raise WrongError(next(f"{a} in the answer where {b} follows" for a, b in pairs if a != b))
        self.answered = True


def _show(words: Iterable[str]) -> str:
    shown = list(islice(words, _SHOWN + 1))
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "") or "nothing"
