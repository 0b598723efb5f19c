"""Knights and knaves: who always tells the truth and who always lies, found from what they say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefixloss.detect.puzzles.knights_english import (
    MOST_PEOPLE,
    QUOTED,
    ROLE,
    SAYS,
    Clauses,
    Plain,
    Quotes,
    any_of,
    inhabitants,
    knight,
)
from prefixloss.detect.puzzles.logic import Formula, Iff, Not, Theory
from prefixloss.detect.puzzles.proof import Proof, sentences
from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError

_LONGEST = 20_000  # characters of a problem
_OTHER_KINDS = re.compile(r"\b(?:spy|spies|normals?|jokers?|alternators?|werewol(?:f|ves)|sometimes)\b", re.IGNORECASE)
_ANSWER = re.compile(r".*\b(?:final )?answer\W{0,4}(?:is|:|=)\s*(?P<what>.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Knights(Replay):
    """Problem: what the inhabitants of an island say, each of whom always tells the truth or always lies, and perhaps
    plain facts about them. Steps say who is what, suppose it, or find a contradiction. "Us" and "them" are all of them.

    truthful, lying: words for the two kinds, in the singular.
    """

    truthful: tuple[str, ...] = ("knight", "truth-teller", "truthteller", "truth teller")
    lying: tuple[str, ...] = ("knave", "liar")

    def __post_init__(self) -> None:
        super().__post_init__()
        words = [word.lower() for word in (*self.truthful, *self.lying)]
        if not self.truthful or not self.lying or len(set(words)) < len(words) or not all(words):
            raise ValueError(
                f"truthful, lying: got {self.truthful!r}, {self.lying!r}, expected different words for each"
            )

    def start(self, problem: str) -> Puzzle:
        return _Island(problem, Plain(self.truthful, self.lying))


class _Island(Proof):
    """said: what each one said. asked: whose kinds are the answer. told: what the steps concluded so far."""

    def __init__(self, problem: str, plain: Plain) -> None:
        if len(problem) > _LONGEST:
            raise UnreadError("too long")
        if other := _OTHER_KINDS.search(problem):
            raise UnreadError(f"{other[0]} is neither of the two kinds")
        self.plain = plain
        self.quotes = Quotes()
        text = self.quotes.aside(problem)
        names = inhabitants(self.quotes.back(text), text, plain)
        if not 0 < len(names) <= MOST_PEOPLE:
            raise UnreadError(f"{len(names)} inhabitants, expected 1 to {MOST_PEOPLE}")
        self.clauses = Clauses(names, plain)
        name = rf"(?<![\w'-])(?P<name>{any_of(names)})"
        self.statement = re.compile(
            rf"{name} {SAYS}[,:]?(?: that\b)?[,:]?\s*"
            rf"|(?:[Aa]ccording to|[Ii]n the words of) {name.replace('name', 'source')},? "
            rf"|(?:[Ii]n|[Aa]s) {name.replace('name', 'words')}(?:'s words| puts? it)[,:]? "
            rf"|{name.replace('name', 'label')}(?:'s (?:statement|claim)(?: is)?)?: (?={QUOTED})"
        )
        self.said_by = re.compile(rf"(?P<what>{QUOTED}),? (?:{SAYS} {name}|{name.replace('name', 'before')} {SAYS})")
        self.speaks = re.compile(
            rf"(?<![\w'-])(?:{'|'.join(re.escape(n) for n in names if n != 'A') or '(?!)'})(?![\w-])"
            r"|(?<![\w'-])A(?='|, |:|$| (?:is|and|or|says?|said|must|can|could|would|claim|tell|lie|has|cannot)\b)"
            if "A" in names  # which may be an article
            else rf"(?<![\w'-])(?:{'|'.join(map(re.escape, names))})(?![\w-])"
        )
        self.said: dict[str, list[Formula]] = {}
        facts: list[Formula] = []
        questions: list[str] = []
        for sentence in sentences(text):
            found = self._statements(sentence)
            for speaker, what in found:
                self.said.setdefault(speaker, []).append(self._read_statement(speaker, what))
            if found:
                continue
            if sentence.endswith("?") or re.match(
                r"\W*(?:who|what|which|determine|find|identify|can you|tell)\b", sentence, re.I
            ):
                questions.append(sentence)
            else:
                facts.extend(self._fact(sentence))
        if not self.said and not facts:
            raise UnreadError("nobody says anything")
        mentioned = {m[0] for q in questions for m in self.speaks.finditer(q)}
        self.asked = [n for n in names if n in mentioned] or names
        self.told: list[Formula] = []
        super().__init__(Theory([*facts, *(Iff(knight(n), f) for n, said in self.said.items() for f in said)]))

    def _statements(self, sentence: str) -> list[tuple[str, str]]:
        """Who says what."""
        if by := self.said_by.search(sentence):
            return [(by["name"] or by["before"], by["what"])]
        starts = list(self.statement.finditer(sentence))
        if not starts:
            return []
        ends = [m.start() for m in starts[1:]] + [len(sentence)]
        found = [
            (str(next(filter(None, m.groups()))), sentence[m.end() : end]) for m, end in zip(starts, ends, strict=True)
        ]
        return [(name, re.sub(r"[\s,;.]*(?:\b(?:and|while|but|whereas))?[\s,;.]*$", "", what)) for name, what in found]

    def _read_statement(self, speaker: str, what: str) -> Formula:
        """In quotes "I" is the speaker; in indirect speech "he" is."""
        self.clauses.last = speaker
        quote = re.search(QUOTED, what)
        return self.clauses.read(self.quotes.back(quote[0]) if quote else what, speaker)

    def _fact(self, sentence: str) -> list[Formula]:
        """A sentence that no one says; introductions are no facts."""
        try:
            return [self.clauses.read(sentence)]
        except UnreadError:
            text = self.plain(sentence)
            introduces = re.search(r"\b(?:inhabit|island|meet|encounter|either)", text) or not re.search(
                r"kn(?:ight|ave)", text
            )
            if introduces or not (
                self.speaks.search(text) or re.search(r"\b(?:of them|among|exactly|at least)\b", text)
            ):
                return []
            raise

    def sentences(self, text: str) -> list[str]:
        if len(self.quotes.texts) > 1000:
            self.quotes.texts.clear()
        return sentences(self.quotes.aside(text))

    def formulas(self, text: str) -> list[Formula]:
        found = self._statements(text)
        if found and not re.match(r"if\b", text, re.IGNORECASE):
            for speaker, what in found:
                self._check_quote(speaker, what)
            return []
        return [self.clauses.read(text)]

    def _check_quote(self, speaker: str, what: str) -> None:
        claimed = self._read_statement(speaker, what)
        if not any(self.nothing.judge(Iff(claimed, said)) == "follows" for said in self.said.get(speaker, [])):
            raise WrongError(f"{speaker} does not say so: {self.quotes.back(what)[:80]}")

    def speaks_of_puzzle(self, text: str) -> bool:
        """A name with a kind: other talk claims nothing."""
        plain = self.plain(text)
        return self.speaks.search(plain) is not None and re.search(r"\bkn(?:ight|ave)s?\b", plain) is not None

    def answer_in(self, text: str) -> str | None:
        said = _ANSWER.fullmatch(text)
        return said["what"] if said and not self._statements(text) else None

    def check_answer(self, text: str) -> None:
        for formula in self._answer(text):
            self._check(formula, [])
        self.answered = True

    def _answer(self, text: str) -> list[Formula]:
        """Names with kinds; one kind alone is that of the only one asked for."""
        alone = re.fullmatch(rf"{ROLE}", self.plain(text).lower())
        if alone and len(self.asked) == 1:
            return [knight(self.asked[0]) if alone["role"] == "knight" else Not(knight(self.asked[0]))]
        return [self.clauses.read(text)]

    def agrees(self, answer: str) -> bool:
        try:
            return all(self.theory.judge(formula) == "follows" for formula in self._answer(answer))
        except UnreadError:
            return False

    def claimed(self, claim: Formula) -> None:
        """Answered when what was concluded settles everyone who is asked for."""
        if self.answered or claim in self.told:
            return
        self.told.append(claim)
        settled = (self.nothing.judge(knight(name), self.told) != "open" for name in self.asked)
        self.answered = all(settled)
