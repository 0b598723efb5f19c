"""Brackets to close (dyck languages): a stack, reported after each character, and closed from the top in the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError

_CUE = re.compile(
    r"(?P<end>\breached the end\b)"
    r"|(?P<final>\b(?:final|remaining|resulting) stack\b)"
    r"|(?P<top>\btop of the stack\b)"
    r"|(?P<stack>\bstack\b|\bleaving\b)"
    r"|(?P<pop>\bpop(?:s|ped|ping)?\b)"
    r"|(?P<none>\b(?:don't|do not|no) need\b)"
    r"|(?P<need>\b(?:need|add|append)(?:s|ed|ing)?\b)"
    r"|(?P<answer>\banswer\W{0,4}(?:is|:|=)|####)",
    re.IGNORECASE,
)
# arrows, numbers of steps such as "1)" or "(2)", and brackets that hug words are punctuation
_PUNCTUATION = re.compile(r"[-=]{1,3}>|<[-=]{1,3}|^\s*(?:\(\d+\)|\d+\))|\((?=\w)[^()\[\]{}<>\"]{1,80}(?<=\w)[.!]?\)")
_EMPTY = re.compile(r"(?<!not )(?<!non-)\b(?:empty|nothing|none)\b|∅", re.IGNORECASE)
_PROMISE = re.compile(r"[\s*]*(?:is|:|=)[\s*]*")
_SENTENCE_END = re.compile(r"[.;!?]\s")
_TIMES = {"once": 1, "twice": 2, "thrice": 3}
_SHOWN = 12  # brackets that a reason shows


@dataclass(frozen=True)
class Brackets(Replay):
    """Problem: opening and closing brackets in a row. A step names the next character and the stack after it, bottom
    first; the final stack; what is popped then, top first; what is needed to close it; the answer.

    pairs: the bracket kinds, each an opening and a closing character.
    """

    pairs: tuple[str, ...] = ("()", "[]", "{}", "<>", "⟨⟩", "«»", "⟦⟧", "「」", "【】", "《》")

    def __post_init__(self) -> None:
        super().__post_init__()
        characters = "".join(self.pairs)
        if not characters or any(len(p) != 2 for p in self.pairs) or len(set(characters)) < len(characters):
            raise ValueError(f"pairs: got {self.pairs!r}, expected different characters, two a kind")

    def start(self, problem: str) -> Puzzle:
        reader = _reader(self.pairs)
        return _Stack(reader, reader.sequence(problem))


class _Report(NamedTuple):
    """What a step says about one thing. kind: the cue it stands behind, "read" before the first one.

    brackets: None where nothing is said. promised: whether the cue announces what should stand there ("stack:").
    """

    kind: str
    brackets: list[str] | None
    promised: bool = False


class _Reader:
    """Text to reports, for some bracket kinds."""

    def __init__(self, pairs: tuple[str, ...]) -> None:
        self.closing = {p[0]: p[1] for p in pairs}
        bracket = f"[{re.escape(''.join(pairs))}]"
        self.bracket = re.compile(bracket)
        self.row = re.compile(rf"{bracket}(?:\s*{bracket})*")
        self.list = re.compile(rf"\[\s*((?:(['\"`]){bracket}\2[\s,]*)+)\]")  # ['(', '<']
        self.token = re.compile(
            rf"(?P<bracket>{bracket})|(?P<times>\b(?:once|twice|thrice|\d{{1,9}} times)\b)"
            r"|(?P<gap>[\s,;&\"'`*]+|\b(?:and|then)\b)|(?P<other>.)"
        )

    def sequence(self, problem: str) -> list[str]:
        """The brackets to close: the longest row, after the last "Input:" if there is one; none if most brackets are
        elsewhere, as in formulas."""
        rows = [self.bracket.findall(row) for row in self.row.findall(problem, max(0, problem.rfind("Input:")))]
        longest = max(rows, key=len, default=[])
        return longest if 2 * len(longest) > sum(map(len, rows)) else []

    def reports(self, step: str) -> Iterator[_Report]:
        text = _PUNCTUATION.sub(" ", step)
        cues = list(_CUE.finditer(text))
        ends = [cue.start() for cue in cues] + [len(text)]
        yield _Report("read", self._said(text[: ends[0]]))
        for cue, end in zip(cues, ends[1:], strict=True):
            kind, behind = str(cue.lastgroup), text[cue.end() : end]
            if kind == "none":
                yield _Report("need", [])
                continue
            if kind in ("stack", "final"):
                behind = self.list.sub(r"\1", behind).replace("[]", "empty")
            promised = kind == "answer" or _PROMISE.fullmatch(behind) is not None
            yield _Report(kind, self._said(behind), promised)

    def _said(self, text: str) -> list[str] | None:
        """The first brackets in a row, none for "empty", None if neither comes before the end of a sentence."""
        first = self.bracket.search(text)
        start = first.start() if first else len(text)
        empty = _EMPTY.search(text, 0, start)
        stop = _SENTENCE_END.search(text, 0, empty.start() if empty else start)
        if stop or not (empty or first):
            return None
        row: list[str] = []
        if empty:
            return row
        for token in self.token.finditer(text, start):
            if token["bracket"]:
                row.append(token[0])
            elif token["times"]:
                times = _TIMES.get(token[0]) or int(token[0].split()[0])
                row += [row[-1]] * min(times - 1, len(text) - len(row))
            elif token["other"]:
                break
        return row


@lru_cache(maxsize=8)
def _reader(pairs: tuple[str, ...]) -> _Reader:
    return _Reader(pairs)


class _Stack(Puzzle):
    """The stack while its sequence is read. place: how many characters are read."""

    def __init__(self, reader: _Reader, sequence: list[str]) -> None:
        self.reader = reader
        self.sequence = sequence
        self.stack: list[str] = []
        self.place = 0
        opened: list[str] = []
        for character in sequence:
            self._push_or_pop(opened, character)
        if not sequence:
            raise UnreadError("no brackets")
        self.needed = [reader.closing[b] for b in reversed(opened)]
        self.closed = sequence + self.needed

    def agrees(self, answer: str) -> bool:
        return self.reader.bracket.findall(answer) == self.needed

    def read(self, step: str) -> None:
        reports = list(self.reader.reports(step))
        last = self._advance(reports)
        for kind, brackets, _ in reports[1:]:
            if kind == "end" and self.place > 0:
                self._finish()
            elif brackets is not None:
                self._check_report(kind, brackets, last)
        silent = [kind for kind, brackets, promised in reports if promised and brackets is None]
        if silent:
            raise UnreadError(f"nothing behind {silent[0]!r}")

    def _check_report(self, kind: str, brackets: list[str], last: str | None) -> None:
        """last: the character that the step read, if it read any."""
        if kind == "stack":
            self._check_stack(brackets)
        elif kind == "final":
            self._finish()
            self._check("final stack", brackets, self.stack)
        elif kind == "top":
            self._check("top of the stack", brackets, self.stack[-1:])
        elif kind == "pop":
            self._check_pop(brackets, last)
        elif kind == "need":
            self._check_needed(brackets)
        elif kind == "answer":
            self._check("answer", brackets, self.needed)
            self.answered = True

    def _advance(self, reports: list[_Report]) -> str | None:
        """Reads the characters that a step names before it reports what became of them. Returns the last of them."""
        named = reports[0].brackets
        restated = len(reports) == 1 and named in (self.sequence, self.closed)
        if not named or restated:
            return None
        if not any(r.kind in ("stack", "top", "pop", "final") for r in reports):
            if len(reports) == 1 and self.place == len(self.sequence) and named == self.needed:
                return None
            raise UnreadError("brackets in no known place")
        for character in named:
            if self.place == len(self.sequence):
                raise WrongError(f"reads {character} after the last character")
            if self.sequence[self.place] != character:
                raise WrongError(f"character {self.place + 1} is {self.sequence[self.place]}, not {character}")
            self._push_or_pop(self.stack, character)
            self.place += 1
        return named[-1]

    def _push_or_pop(self, stack: list[str], character: str) -> None:
        if character in self.reader.closing:
            stack.append(character)
        elif stack and self.reader.closing[stack[-1]] == character:
            stack.pop()
        else:
            raise UnreadError(f"{character} closes nothing")

    def _finish(self) -> None:
        """A step speaks of the end: nothing may be left to read, unless none was read one by one."""
        if self.place == 0:
            for character in self.sequence:
                self._push_or_pop(self.stack, character)
            self.place = len(self.sequence)
        if self.place < len(self.sequence):
            raise WrongError(f"{len(self.sequence) - self.place} characters are not read yet")

    def _check_stack(self, brackets: list[str]) -> None:
        if self.place == 0 and brackets:
            self._finish()
        self._check("stack", brackets, self.stack)

    def _check_pop(self, brackets: list[str], last: str | None) -> None:
        if last is not None:  # a closing character pops its partner
            self._check("popped", [self.reader.closing.get(b, b) for b in brackets], [last])
        elif self.place == 0:
            raise UnreadError("pops before anything is read")
        else:
            self._finish()
            self._check("popped", brackets, self.stack[::-1])

    def _check_needed(self, brackets: list[str]) -> None:
        if brackets and self.place < len(self.sequence) and all(b in self.reader.closing for b in brackets):
            return  # an opening bracket that is added to the stack
        self._finish()
        self._check("needed brackets", brackets, self.needed)

    @staticmethod
    def _check(name: str, said: list[str], true: list[str]) -> None:
        if said != true:
            raise WrongError(f"{name}: {_show(said)} instead of {_show(true)}")


def _show(brackets: list[str]) -> str:
    more = " ..." if len(brackets) > _SHOWN else ""
    return (" ".join(brackets[:_SHOWN]) or "empty") + more
