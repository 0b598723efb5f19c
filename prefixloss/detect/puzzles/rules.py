"""Propositional and Horn rules: a step has to follow from the premises and the right steps before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefixloss.detect.puzzles.logic import (
    ANY,
    SYMBOL,
    Atom,
    Formula,
    Not,
    Outcome,
    Theory,
    atoms,
    ground,
)
from prefixloss.detect.puzzles.proof import Proof, sentences, tidy, without_lead
from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError
from prefixloss.detect.puzzles.rules_english import English

_LONGEST_PROBLEM = 20_000  # characters
_MOST_GROUND = 5000  # rules, once for each name
_VERDICTS = {
    "true": "true", "yes": "true", "correct": "true", "proved": "true", "false": "false", "no": "false",
    "incorrect": "false", "disproved": "false", "unknown": "unknown", "uncertain": "unknown", "undetermined": "unknown",
}  # fmt: skip
_NOBODY_KNOWS = r"(?:(?:it|this|that) )?(?:can ?not|can't) be (?:determined|known|decided|proved)"
_VERDICT = rf"(?:(?P<verdict>{'|'.join(_VERDICTS)})|(?P<nobody_knows>{_NOBODY_KNOWS}))"
_SAID_ANSWER = re.compile(r".*\banswer\W{0,4}(?:is|:|=)\W*(?P<what>.+)", re.IGNORECASE | re.DOTALL)
_SAID_VERDICT = re.compile(
    rf"(?:.*\b(?:statement|query|question|claim|conclusion|hypothesis|proposition)\b.{{0,120}}?"
    rf"(?:(?:is|must be)(?: therefore| thus| indeed)? |(?=can)))?(?P<what>{_VERDICT})\W*",
    re.IGNORECASE | re.DOTALL,
)
_ASKS = re.compile(
    r"(?:^|.*?\b)(?:true or false|true, false,? or \w+|is it (?:true|false|the case|correct) that|does it follow that"
    r"|can (?:we|you|it be) (?:conclude|conclude[d]|infer|inferred|deduced?) that|whether)\b[:,?]?\s*(?P<asked>.*)"
    r"|(?:query|question|hypothesis|statement|prove(?: or disprove)?|claim)\s*:\s*(?P<label>.*)|prove(?: that)? "
    r"(?P<goal>.*)",
    re.IGNORECASE | re.DOTALL,
)
_IS_IT = re.compile(r"(?P<is>is|are|does) (?P<subject>the \w+|[A-Z][\w'-]*) (?P<rest>.+)\?", re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"(?=.*\b(?:following|below|above|facts|rules|statements|premises|question|questions|step)\b)"
    r"(?:given|consider|read|use|answer|here|you|based|below|the following|determine|decide|think|please|these"
    r"|there)\b",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\(?\b([A-E])[).:]\s*(true|false|unknown|uncertain|yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rules(Replay):
    """Problem: premises, one a sentence, in symbols or in the English of ProofWriter and PrOntoQA, then a question
    ("True or false: Max is a cat."). Each claim of a step must follow from the premises and from what it supposes.
    "Either A or B" leaves both open. A premise that cannot be read leaves the whole problem unread.

    world: "closed" counts what does not follow about a name as false, "open" as unknown.
    """

    world: Literal["open", "closed"] = "open"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world not in ("open", "closed"):
            raise ValueError(f"world: got {self.world!r}, expected 'open' | 'closed'")

    def start(self, problem: str) -> Puzzle:
        return _RuleProof(problem, self.world == "closed")


class _RuleProof(Proof):
    """asked: the formula in question, None if there is none; verdict: whether it is "true", "false" or "unknown"."""

    def __init__(self, problem: str, closed: bool) -> None:
        if len(problem) > _LONGEST_PROBLEM:
            raise UnreadError("too long")
        self.english = English()
        self.english.note_names(problem)
        premises, self.asked = self._read_problem(problem)
        known = [atom for formula in [*premises, *([self.asked] if self.asked else [])] for atom in atoms(formula)]
        self.names = {atom.of for atom in known}
        self.properties = {atom.name for atom in known}
        self.vocabulary = {word for name in (*self.properties, *self.names) for word in name.split()}
        self.vocabulary -= {"the", ANY}
        names = sorted(self.names - {"", ANY})
        if any("$" in sentence or re.search(r"\b\d", sentence) for sentence in sentences(problem)):
            raise UnreadError("numbers: no puzzle of rules alone")
        rules = [p for p in premises if any(atom.of == ANY for atom in atoms(p))]
        if len(rules) * len(names) > _MOST_GROUND:
            raise UnreadError("too many rules for as many names")
        super().__init__(Theory([*premises, *(ground(rule, name) for rule in rules for name in names)]))
        if closed:
            self._close(names)
        verdicts: dict[Outcome, str] = {"follows": "true", "refuted": "false", "open": "unknown"}
        self.verdict = verdicts[self.theory.judge(self.asked)] if self.asked else None
        self.options = {m[1].upper(): _VERDICTS[m[2].lower()] for m in _OPTION.finditer(problem)}

    def _read_problem(self, problem: str) -> tuple[list[Formula], Formula | None]:
        premises: list[Formula] = []
        asking = False
        for sentence in sentences(problem):
            question = _ASKS.fullmatch(sentence)
            asking = asking or question is not None or sentence.endswith("?")
            if asking:
                asked = self._question(next(filter(None, question.groups()), "") if question else sentence)
                if asked is not None:
                    return premises, asked
            elif not (sentence.endswith(":") or _INSTRUCTION.match(sentence)):
                premises.extend(self.claims(sentence))
        if not premises:
            raise UnreadError("no premises")
        return premises, None

    def _question(self, text: str) -> Formula | None:
        if asked := _IS_IT.fullmatch(text.strip()):
            text = f"{asked['subject']} {asked['is'].lower()} {asked['rest']}"
        try:
            return self.english.sentence(text)
        except UnreadError:
            return None

    def _close(self, names: Sequence[str]) -> None:
        every = {Atom(p, n) for p in self.properties for n in names} | {
            Atom(p) for p in self.properties if "" in self.names
        }
        if len(every) > _MOST_GROUND // 2:
            raise UnreadError("too many names for as many properties")
        unknown = [atom for atom in sorted(every, key=str) if self.theory.judge(atom) == "open"]
        for atom in unknown:
            self.theory.add(Not(atom))
        if self.theory.contradicts():
            raise UnreadError("what does not follow cannot all be false")

    def claims(self, text: str) -> list[Formula]:
        """One sentence, or several joined by "and"."""
        try:
            return [self.english.sentence(text)]
        except UnreadError:
            for cut in list(re.finditer(r",? (?:and|but) |, ", text))[:8]:
                try:
                    return [self.english.sentence(text[: cut.start()]), *self.claims(text[cut.end() :])]
                except UnreadError:
                    continue
            raise

    def formulas(self, text: str) -> list[Formula]:
        found = self.claims(text)
        for formula in found:
            for atom in atoms(formula):
                if atom.of not in self.names and atom.of != ANY:
                    raise UnreadError(text)
                if atom.name not in self.properties and (atom.of == ANY or " " in atom.name or not _is_plain(text)):
                    raise UnreadError(text)
        return found

    def speaks_of_puzzle(self, text: str) -> bool:
        return any(
            self.english.words.known.get(word, word) in self.vocabulary for word in re.findall(r"\w+", text.lower())
        )

    def answer_in(self, text: str) -> str | None:
        said = _SAID_ANSWER.fullmatch(text) or _SAID_VERDICT.fullmatch(without_lead(tidy(text)))
        return said["what"] if said else None

    def check_answer(self, text: str) -> None:
        verdict = self._verdict_in(text)
        if verdict is None:
            for formula in self.formulas(text):
                self._check(formula, [])
        elif self.verdict is None:
            raise UnreadError("a verdict on no question")
        elif verdict != self.verdict:
            raise WrongError(f"the answer is {self.verdict}, not {verdict}")
        self.answered = True

    def _verdict_in(self, text: str) -> str | None:
        text = tidy(text)
        if letter := re.match(r"\(?([A-E])\b(?! \w+ )", text):
            return self.options.get(letter[1])
        said = re.match(rf"{_VERDICT}\b(?! that)", text, re.IGNORECASE)
        if said is None:
            return None
        return "unknown" if said["nobody_knows"] else _VERDICTS[said["verdict"].lower()]

    def agrees(self, answer: str) -> bool:
        verdict = self._verdict_in(answer)
        if verdict is not None:
            return verdict == self.verdict
        try:
            return all(self.theory.judge(formula) == "follows" for formula in self.formulas(answer))
        except UnreadError:
            return False

    def claimed(self, claim: Formula) -> None:
        if self.asked is not None and (self.asked in (claim, Not(claim)) or claim == Not(self.asked)):
            self.answered = True


def _is_plain(text: str) -> bool:
    """Whether a text says what something is: other verbs with words that are new may be about anything."""
    return re.search(r"\b(?:is|are)\b", text) is not None or SYMBOL.search(text) is not None
