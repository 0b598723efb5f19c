"""Things that change hands (tracking shuffled objects): who holds what, reported after each swap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError

Thing = tuple[str, ...]  # the words of its name, in lower case

_MOST_PEOPLE = 60
_LEFT_OUT = 0.6  # confidence where a list leaves out someone to whom nothing happened
_LONGEST = 200  # characters of a text that names a thing
_NAME = r"(?<![\w'-])[A-Z][\w'-]*(?: [A-Z][\w'-]*){0,2}"
_SWAP = r"(?i:swap|switch|trade|trading|exchange|exchanging)\w*"
_HOLDS = (
    r"(?i:(?:(?:now|then|still|also|will|currently)\s+)*"
    r"(?:has|have|gets?|got|holds?|owns?|keeps?|plays?|takes?|receives?|becomes?|(?:ends?\s+up|starts?)\s+with"
    r"|is(?:\s+(?:now|still))*(?:\s+\w+ing)?(?:\s+(?:with|as|at|in|on))?)\b)"
)
_ANSWER = r"(?i:\banswer\W{0,4}(?:is|:|=))"
_START = r"(?i:\b(?:at|in|from) the (?:start|beginning|outset)\b|\binitial)"
_FINISH = r"(?i:\b(?:at|in|by) the end\b(?! of (?:this|that|each|step|swap)))"
_FILLERS = frozenset(("the", "a", "an", "now", "still", "then", "also", "again", "instead", "currently"))
# where the text that names a thing may end
_STOP = re.compile(r"[,;\n()]|[.!?](?=\s|$)|\b(?:and|from|while|whereas|but|so|because|after|with)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_OPTION = re.compile(r"\(([A-Z])\)([^\n(]{1,200})")
_LETTER = re.compile(r"\(([A-Z])\)|^\W*([B-Z]|A(?! [a-z]))(?![\w'])")
_MARKUP = re.compile(r"[*_`]")


@dataclass(frozen=True)
class Swaps(Replay):
    """Problem: who holds what at the start, then swaps of two, then whose thing is asked for, and options where there
    are some. Steps name a swap, or who holds what after the next one, or both; short names and initials will do. A
    report of some people must not lose any that were reported before, unless it is of the two that swapped.
    """

    def start(self, problem: str) -> Puzzle:
        return _Holders(problem)


class _Things:
    """The things of a problem. A short name means the only one whose words it begins, in order ("left mid")."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.all = [_words(text) for text in texts]
        self.known: dict[str, Thing | None] = {}
        # last words such as "ball", or "one" for them, where the words before them tell the things apart
        short = {thing[:-1] for thing in self.all}
        distinct = len(short) == len(texts) and () not in short
        self.kinds = {"one", *(thing[-1] for thing in self.all)} if distinct else set()

    def find(self, text: str) -> Thing | None:
        """The thing a text names, None if that is none or may be several."""
        if text not in self.known:
            self.known[text] = self._find(_words(text))
        return self.known[text]

    def _find(self, words: Thing) -> Thing | None:
        if words in self.all:
            return words
        for said in (words, tuple(w for w in words if w not in self.kinds)):
            meant = self._meant(said)
            if meant:
                return meant.pop() if len(meant) == 1 else None
        return None

    def _meant(self, said: Thing) -> set[Thing]:
        """The things that a short name may be for: "b" means the blue ball, not any ball, where there is one blue."""
        meant = {thing for thing in self.all if _abbreviates(said, thing)}
        telling = {thing for thing in meant if self.kinds and _abbreviates(said, thing[:-1])}
        return telling or meant

    def unclear(self, text: str) -> bool:
        """Whether a text is a short name for several things."""
        return len(self._meant(_words(text[:_LONGEST]))) > 1

    def first(self, text: str) -> Thing | None:
        """The thing a text starts with; titles may hold commas, so the longest text that names one wins."""
        ends = [m.start() for m in _STOP.finditer(text, 0, _LONGEST)][:6] + [min(len(text), _LONGEST)]
        return next((thing for end in reversed(ends) if (thing := self.find(text[:end])) is not None), None)

    def mentioned(self, text: str) -> bool:
        return any(word in thing for word in _words(text[:_LONGEST]) for thing in self.all)


def _tidy(text: str) -> str:
    """Text without markup, and without runs of white space (which would slow the patterns down)."""
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", _MARKUP.sub("", text)))


def _words(text: str) -> Thing:
    words = tuple(re.findall(r"\w+", text.lower()))
    return tuple(w for w in words if w not in _FILLERS) or words


def _abbreviates(said: Thing, thing: Thing) -> bool:
    rest = iter(thing)
    return bool(said) and all(any(word.startswith(s) for word in rest) for s in said)


class _Problem:
    """A problem read. start, final: who holds what; asked: the one whose thing in the end is the answer."""

    def __init__(self, problem: str) -> None:
        text, _, options = _tidy(problem).partition("Options:")
        swap = re.compile(rf"({_NAME}) and ({_NAME}) {_SWAP}|({_NAME}) {_SWAP}(?: \w+){{0,4}} with ({_NAME})")
        found = list(swap.finditer(text))
        if not found:
            raise UnreadError("no swap")
        held = list(re.finditer(rf"({_NAME})\s+{_HOLDS}", text[: found[0].start()]))
        people = [m[1] for m in held]
        if not 2 <= len(people) <= _MOST_PEOPLE or len(set(people)) < len(people):
            raise UnreadError("who holds what at the start")
        texts = [text[m.end() : end] for m, end in zip(held, [m.start() for m in held[1:]] + [None], strict=True)]
        texts = [
            *(t.rstrip(" ,;").removesuffix("and") for t in texts[:-1]),
            _SENTENCE_END.split(texts[-1], maxsplit=1)[0],
        ]
        self.things = _Things(texts)
        self.start = dict(zip(people, self.things.all, strict=True))
        self.swaps = [(self._person(m[1] or m[3]), self._person(m[2] or m[4])) for m in found]
        self.final = dict(self.start)
        for pair in self.swaps:
            _exchange(self.final, pair)
        asked = re.findall(_any_of(people), text[found[-1].end() :])
        if not asked:
            raise UnreadError("whose thing is asked for")
        self.asked = asked[-1]
        self.options = {m[1]: self.things.first(m[2]) for m in _OPTION.finditer(options)}

    def _person(self, name: str) -> str:
        """A name that may have words before it, as in "Then Claire"."""
        words = name.split(" ")
        for start in range(len(words)):
            if (person := " ".join(words[start:])) in self.start:
                return person
        raise UnreadError(f"{name} swaps, but holds nothing at the start")


class _Event(NamedTuple):
    """Something a step says: a "swap" of people, a "claim" that one holds a thing (None: of no one here), "start" or
    "finish" (what follows is about then), the "answer", or something "unread". text: what follows it.

    listed: a claim that is written as in a list ("Bob: red").
    """

    kind: str
    people: tuple[str, ...] = ()
    thing: Thing | None = None
    text: str = ""
    listed: bool = False


class _Reader:
    """Steps to events, for one problem."""

    def __init__(self, people: Sequence[str], things: _Things) -> None:
        self.things = things
        initials = [p[0] for p in people]
        self.people = {p: p for p in people} | {p[0]: p for p in people if initials.count(p[0]) == 1}
        person = f"({_any_of(self.people)})"
        aside = r"(?:\s*\([^()]{1,60}\))?"
        joined = r"\s*(?:\band\b|&|\bwith\b|/|<?[-=]+>|↔|⇄)"
        words = r"(?:\s+\w+){0,4}?"
        both = rf"{person}{aside}{joined}?\s*{person}{aside}\s*(?::|(?:both |then |now |will )?{_SWAP})"
        one_with_other = rf"{person}\s+{_SWAP}{words}\s+with\s+{person}"
        swap_between = rf"\b{_SWAP}{words}\s*(?::\s*)?{person}{joined}\s*{person}(?!\s+(?:now|have|hold))"
        sign = r"(?P<sign>:|=>?|->|→|[-\u2013\u2014](?=\s))"
        claim = rf"{person}(?:'s{words})?{aside}\s*(?:{sign}|{_HOLDS})"
        self.person = re.compile(person)
        self.event = re.compile(
            rf"(?P<swap>{both}|{one_with_other}|{swap_between})|(?P<claim>{claim})"
            rf"|(?P<answer>{_ANSWER})|(?P<start>{_START})|(?P<finish>{_FINISH})"
        )

    def events(self, step: str) -> list[_Event]:
        text = _tidy(step)
        found = list(self.event.finditer(text))
        if not found:
            return [_Event("unread")] if self.person.search(text) and self.things.mentioned(text) else []
        ends = [m.start() for m in found[1:]] + [len(text)]
        events = [self._event(m, text[m.end() : end]) for m, end in zip(found, ends, strict=True)]
        return [event for event in events if event is not None]

    def _event(self, match: re.Match[str], behind: str) -> _Event | None:
        kind = str(match.lastgroup)
        people = tuple(self.people[group] for group in match.groups() if group in self.people)
        if kind != "claim":
            return _Event(kind, people, text=behind)
        thing = self.things.first(behind)
        if thing is None and (self.things.mentioned(behind) or self.things.unclear(_STOP.split(behind, maxsplit=1)[0])):
            return _Event("unread")
        if thing is None and match["sign"] is None:  # "Bob has to swap" claims nothing
            return None
        return _Event(kind, people, thing, listed=match["sign"] is not None)


class _Holders(Puzzle):
    """Who holds what. place: how many swaps are done; named: whether steps name the swaps they do."""

    def __init__(self, problem: str) -> None:
        self.problem = _Problem(problem)
        self.reader = _Reader(list(self.problem.start), self.problem.things)
        self.now = dict(self.problem.start)
        self.place = 0
        self.named = False
        self.reported: set[str] = set()

    def agrees(self, answer: str) -> bool:
        return self._meant(answer) == self.problem.final[self.problem.asked]

    def read(self, step: str) -> None:
        events = self.reader.events(step)
        kinds = {e.kind for e in events}
        claims = [e for e in events if e.kind == "claim"]
        moved: set[str] = set()
        if len(claims) > 1 and not self.named and not kinds & {"swap", "start", "finish"}:
            moved.update(self._unnamed_swap(claims))
        state = self.now
        for event in events:
            if event.kind == "swap":
                self._named_swap(event.people)
                moved.update(event.people)
                state = self.now
            elif event.kind == "claim":
                self._check_claim(event, state)
            elif event.kind == "answer":
                self._check_answer(event.text)
            elif event.kind == "start":
                state = self.problem.start
            elif event.kind == "finish":
                state = self.problem.final
        if "finish" not in kinds:
            self._check_nobody_lost(claims, moved, whole="start" in kinds)
        if "unread" in kinds:
            raise UnreadError("people and things, but not who holds what")

    def _unnamed_swap(self, claims: Sequence[_Event]) -> tuple[str, ...]:
        """A report without a swap is about the next one; the first report is about the start, unless only the next
        swap makes it true. Returns the two who swapped."""
        if self.place == len(self.problem.swaps):
            return ()
        pair = self.problem.swaps[self.place]
        after = dict(self.now)
        _exchange(after, pair)
        if not self.reported and (_hold(claims, self.now) or not _hold(claims, after)):
            return ()
        self.now = after
        self.place += 1
        return pair

    def _named_swap(self, people: tuple[str, ...]) -> None:
        self.named = True
        if self.place == len(self.problem.swaps):
            raise WrongError("swaps after the last swap")
        pair = self.problem.swaps[self.place]
        if set(people) != set(pair):
            raise WrongError(f"swap {self.place + 1} is of {pair[0]} and {pair[1]}, not {' and '.join(people)}")
        _exchange(self.now, pair)
        self.place += 1

    def _check_claim(self, claim: _Event, state: dict[str, Thing]) -> None:
        person = claim.people[0]
        if claim.thing is None:
            raise WrongError(f"{person} holds {' '.join(state[person])}, not something else")
        if claim.thing != state[person]:
            raise WrongError(f"{person} holds {' '.join(state[person])}, not {' '.join(claim.thing)}")

    def _check_nobody_lost(self, claims: Sequence[_Event], moved: set[str], whole: bool) -> None:
        """A list of more than those who moved last has everybody it had before, or at the start everybody. One of few
        others may leave out those to whom nothing happened; one of most others lost them, as far as one can tell."""
        people = {claim.people[0] for claim in claims}
        lost = (set(self.problem.start) if whole else self.reported) - people
        just_moved = moved or set(self.problem.swaps[self.place - 1] if self.place else ())
        if len(people) > 1 and all(c.listed for c in claims) and lost and people != just_moved:
            stayed = set(self.problem.start) - just_moved
            sure = whole or not lost.isdisjoint(just_moved)
            if sure or 2 * len(stayed & people) > len(stayed):
                raise WrongError(f"leaves out {', '.join(sorted(lost))}", *([] if sure else [_LEFT_OUT]))
        self.reported |= people

    def _check_answer(self, text: str) -> None:
        meant = self._meant(text)
        true = self.problem.final[self.problem.asked]
        if meant is None:
            raise UnreadError("the answer")
        if meant != true:
            raise WrongError(f"{self.problem.asked} ends with {' '.join(true)}, not {' '.join(meant)}")
        self.answered = True

    def _meant(self, answer: str) -> Thing | None:
        """The thing that an answer means by its letter, else by its name."""
        letter = _LETTER.search(answer)
        chosen = self.problem.options.get(letter[1] or letter[2]) if letter else None
        return chosen or self.problem.things.first(answer)


def _exchange(state: dict[str, Thing], pair: tuple[str, str]) -> None:
    one, other = pair
    state[one], state[other] = state[other], state[one]


def _hold(claims: Sequence[_Event], state: dict[str, Thing]) -> bool:
    return all(state[c.people[0]] == c.thing for c in claims)


def _any_of(names: Iterable[str]) -> str:
    longest_first = sorted(names, key=len, reverse=True)
    return rf"(?<![\w'])(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
