"""Steps of a proof: claims, suppositions, cases and contradictions, each checked against what is known by then."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prefixloss.detect.puzzles.logic import Formula, Implies, Not, Theory, conjunction
from prefixloss.detect.puzzles.replay import Puzzle, UnreadError, WrongError

_LONGEST_STEP = 4_000
LONGEST_SENTENCE = 500
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\s*\n\s*")
_LABEL = re.compile(
    r"^[\s>#-]*(?:\(?\d{1,3}[.):]\s+|(?:step|fact|rule|premise|sent|triple)s?\s*\d{0,3}\s*[:.]\s*"
    r"|(?:facts|rules|premises|context|theory|given)\s*:\s*)+",
    re.IGNORECASE,
)
_OPEN = 0.85  # confidence in a claim that neither follows nor is refuted: a premise may have been misread


class Said(NamedTuple):
    """One thing that a step says. kind:

    "claim", "if" (A, then B: what comes "then" in the step may hold only under A), "then", "suppose", "instead"
    (supposes another case), "contradiction", "consistent" (claims that there is none), "conclude" (nothing is supposed
    any more), "answer" (text: what it is), "unread" (text).
    """

    kind: str
    formula: Formula | None = None
    text: str = ""


_TALK = re.compile(
    r"(?:(?:so|now|first|next|then|and|okay|ok)\W+)*(?:(?:we|i|you)(?:'ll| will| can| could| should| must| now| first)*"
    r" (?:need|want|try|start|begin|look|check|determine|examine|consider|analy[sz]e|test|find out|prove|show"
    r"|use|apply)\b"
    r"|let'?s?(?: us)? (?!assume|suppose|say)\w+|to (?:determine|prove|show|check|find|answer|see|solve|reach|derive)\b"
    r"|(?:the|our) (?:question|goal|task|query) (?:is|asks)\b|(?:what|who|which|is|does|are) .*\?)",
    re.IGNORECASE,
)
_FOUND = re.compile(r"\b(?:we (?:get|find|have|conclude|know|see)|therefore|it follows)\b", re.IGNORECASE)
_CONCLUDE = re.compile(
    r"\W*(?:in conclusion|in summary|to (?:conclude|summarize|sum up)|conclusion|overall|in (?:both|all|either) cases?"
    r"|the (?:only )?solution is)\b",
    re.IGNORECASE,
)
_SUPPOSE = re.compile(
    r"(?:(?:so|now|first|next|then|and|but|(?P<instead>on the other hand|alternatively|instead|case \w+)),?:? )*"
    r"(?:(?:let us|let's|we|if we|i)(?: now| first| can)? )?(?:suppose|assume|imagine|let's say|supposing|say)"
    r"(?:,? (?:further|also|now|first|hypothetically|for (?:the sake of )?(?:a )?contradiction|to the contrary"
    r"|for the sake of argument|towards? (?:a )?contradiction)(?=[, ]))*,?(?: that| instead that)? (?P<what>.+)",
    re.IGNORECASE,
)
_CASE = re.compile(
    r"\W*(?:case|scenario|option|possibility) \w{1,9}\s*[:.,)-]\s*(?!if\b|suppose\b|assume\b)(?P<what>.+)",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"\W*(?:but |and |so )?(?:then|in (?:that|this|which) case)\b|\b(?:would|'d)\b", re.IGNORECASE)
_THEREFORE = re.compile(r"\W*(?:so|therefore|thus|hence|consequently|in conclusion|finally)\b", re.IGNORECASE)
_PART = re.compile(
    r";\s*|,?\s+(?:(?:and |but )?(?:so|therefore|thus|hence|consequently)|which (?:means|implies)"
    r"(?: that)?|meaning(?: that)?"
    r"|implying(?: that)?|because|since)\b(?!\s+(?:far|on)\b),?\s*|,\s+(?:(?:but|and|which) )?(?=(?:which |but "
    r"|and )?(?:this |that |it )?"
    r"(?:is |would be |leads to |yields |gives )?(?:an? |the )?(?:contradict|impossib|absurd|inconsisten))|,?\s+"
    r"(?=which contradicts)",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:(?:so|therefore|thus|hence|then|and|but|now|finally|also|next|first|firstly|secondly|second|lastly"
    r"|again|however"
    r"|moreover|furthermore|additionally|in addition|consequently|as a result|accordingly|in (?:conclusion"
    r"|summary|both cases"
    r"|all cases|either case|that case|this case|which case)|overall|conclusion|likewise|similarly|clearly"
    r"|indeed|which|this"
    r"|that) ?(?:,|:|(?<= )(?=\S))\s*(?<!this )(?<!that )(?<!which )"
    r"|(?:(?:we|i)(?: (?:also|now|then|can|already))* (?:know|have|get|see|conclude|find|deduce|infer|obtain"
    r"|are (?:given|told)"
    r"|start with(?: the fact)?)|(?:it|this) (?:follows|is (?:given|known|stated)|must be)|(?:this|that|which)"
    r"(?: also)?"
    r" (?:means?|implies|shows|gives|tells us|proves)|(?:the )?(?:\w+ )?(?:rule|premise|fact)(?: \d+)? (?:says"
    r"|states|tells us)"
    r"|note|recall|remember|given|it must be|the (?:only )?solution is)(?: that\b|,|:)\s*"
    r"|(?:we|i)(?: (?:also|now|then|can))* (?:know|have|get|see|conclude|find|deduce|infer|obtain) "
    r"|(?:by|from|using|applying|per|according to|with) (?:the )?(?:(?:first|second|third|last|same|previous|next) )?"
    r"(?:rules?|facts?|premises?|steps?|statements?|this|that|these|modus \w+|contradiction)(?: ?[\d#]+(?: and "
    r"(?:\w+ )?\d+)?)?[,:] )+",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"\s*[(\[](?:by|from|using|rule|premise|given|step|fact|modus|since|as|via|assumption|hypothesis)\b[^()\[\]]*[)\]]",
    re.IGNORECASE,
)
_SINCE = re.compile(r"(?:since|because|as|given that|from|given|combining|knowing that) (.+)", re.IGNORECASE)
_IMPOSSIBLE = r"(?:contradict|impossib|absurd|inconsisten|not possible|can ?not be the case)"
_IF_IMPOSSIBLE = re.compile(
    rf"if (.+?), (?:then )?(?:we|there|this|that|it|which)\b[^,]*{_IMPOSSIBLE}.*", re.IGNORECASE
)
_CONTRADICTION = re.compile(rf"\b{_IMPOSSIBLE}", re.IGNORECASE)
_NO_CONTRADICTION = re.compile(
    r"\b(?:no|not a|without(?: any| a)?|isn't a|not lead to (?:a|any)) contradiction|\b(?:not|n't) contradict"
    r"|(?<!in)(?<!not )\bconsistent\b|\bnot (?:impossible|inconsistent)\b",
    re.IGNORECASE,
)


def without_lead(text: str) -> str:
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead else text


class Proof(Puzzle, ABC):
    """Premises, and what is supposed besides them while the steps are read."""

    def __init__(self, theory: Theory) -> None:
        if theory.contradicts():
            raise UnreadError("the premises contradict each other")
        self.theory = theory
        self.nothing = Theory()  # no premises: logic alone
        self.supposed: list[Formula] = []
        self.condition: list[Formula] = []  # of the last "if" in the step
        self.denied: list[Formula] = []  # suppositions that the last claims were against

    @abstractmethod
    def formulas(self, text: str) -> list[Formula]:
        """What a clause claims, as several formulas where it is a list. Raises UnreadError."""

    @abstractmethod
    def speaks_of_puzzle(self, text: str) -> bool:
        """Whether a text that could not be read may claim something."""

    @abstractmethod
    def answer_in(self, text: str) -> str | None:
        """The final answer, if a sentence states it."""

    @abstractmethod
    def check_answer(self, text: str) -> None:
        """Raises WrongError, or UnreadError."""

    def claimed(self, claim: Formula) -> None:
        """A claim was found right, and holds without anything supposed."""

    def sentences(self, text: str) -> list[str]:
        return sentences(text)

    def says(self, step: str) -> Iterator[Said]:
        """What a step says, in order."""
        if len(step) > _LONGEST_STEP:
            yield Said("unread", text="a step too long")
            return
        for sentence in self.sentences(step):
            if len(sentence) > LONGEST_SENTENCE:
                yield Said("unread", text="a sentence too long")
            elif (answer := self.answer_in(sentence)) is not None:
                yield Said("answer", text=answer)
            elif not (_TALK.match(sentence) and not _FOUND.search(sentence)):
                yield from self._sentence(sentence)

    def _sentence(self, sentence: str) -> Iterator[Said]:
        sentence = _ASIDE.sub("", sentence)
        if _CONCLUDE.match(sentence):
            yield Said("conclude")
        if case := _CASE.fullmatch(tidy(sentence)):
            yield from self._read_as("instead", case["what"])
            return
        if supposed := _SUPPOSE.fullmatch(tidy(sentence)):
            yield from self._read_as("instead" if supposed["instead"] else "suppose", supposed["what"])
            return
        goes_on = _GOES_ON.search(sentence) is not None or not _THEREFORE.match(sentence)
        for part in _PART.split(sentence):
            for said in self._part(part, goes_on):
                yield said
                goes_on = goes_on or said.kind == "if"

    def _part(self, part: str, goes_on: bool) -> Iterator[Said]:
        text = without_lead(tidy(part))
        if not text:
            return
        if impossible := _IF_IMPOSSIBLE.fullmatch(text):
            try:
                yield Said("claim", Not(conjunction(self.formulas(impossible[1]))))
            except UnreadError:
                yield Said("unread", text=text)
        elif _NO_CONTRADICTION.search(text):
            yield Said("consistent")
        elif _CONTRADICTION.search(text):
            yield Said("contradiction")
        elif since := _SINCE.fullmatch(text):
            yield from self._since(since[1], goes_on)
        else:
            kind = "if" if re.match(r"(?:if|when)\b", text, re.IGNORECASE) else "then" if goes_on else "claim"
            yield from self._read_as(kind, text)

    def _since(self, text: str, goes_on: bool) -> Iterator[Said]:
        """ "A, B": both are claims, parted at the first comma that leaves two."""
        for cut in list(re.finditer(r",(?: then| we (?:get|have|know|conclude)(?: that)?| it follows that)? ", text))[
            :8
        ]:
            try:
                found = [*self.formulas(text[: cut.start()]), *self.formulas(without_lead(text[cut.end() :]))]
            except UnreadError:
                continue
            yield from (Said("then" if goes_on else "claim", formula) for formula in found)
            return
        yield from self._read_as("then" if goes_on else "claim", text)

    def _read_as(self, kind: str, text: str) -> Iterator[Said]:
        try:
            found = self.formulas(text)
        except UnreadError:
            if self.speaks_of_puzzle(text):
                yield Said("unread", text=text)
            return
        if kind in ("suppose", "instead"):
            yield Said(kind, conjunction(found))
        else:
            yield from (Said(kind, formula) for formula in found)

    def read(self, step: str) -> None:
        unread = ""
        self.condition = []
        for kind, formula, text in self.says(step):
            if kind == "unread":
                unread = unread or text
            elif kind == "answer":
                self.supposed = []
                self.check_answer(text)
            elif kind == "conclude":
                self.supposed = []
            elif kind == "contradiction":
                self._check_contradiction()
            elif kind == "consistent":
                self._check_consistent()
            elif formula is not None:
                self._follow(kind, formula)
        if unread:
            raise UnreadError(unread[:80])

    def _follow(self, kind: str, formula: Formula) -> None:
        if kind in ("suppose", "instead"):
            self._suppose(formula, instead=kind == "instead")
            return
        if kind == "if" and isinstance(formula, Implies):
            self.condition = [formula.left]
        elif kind == "claim":
            self.condition = []
        self._check(formula, self.condition if kind == "then" else [])

    def _suppose(self, formula: Formula, instead: bool) -> None:
        """Another case takes the place of those it excludes."""
        while self.supposed and (instead or self.nothing.contradicts(*self.supposed, formula)):
            self.supposed.pop()
        self.supposed.append(formula)
        self.denied = []

    def _check(self, claim: Formula, condition: Sequence[Formula]) -> None:
        """A claim against what is supposed ends the supposition, as after a contradiction."""
        if condition and self.theory.judge(claim, self.supposed) == "follows":
            condition = []
        if not condition and not self.nothing.contradicts(claim):
            while self.supposed and self.nothing.contradicts(*self.supposed, claim):
                self.denied.append(self.supposed.pop())
        outcome = self.theory.judge(claim, [*self.supposed, *condition])
        if outcome == "open":
            raise WrongError(f"does not follow: {claim}", _OPEN)
        if outcome == "refuted":
            raise WrongError(f"is refuted: {claim}")
        if self.theory.judge(claim) == "follows":
            self.claimed(claim)

    def _check_contradiction(self) -> None:
        """Ends the innermost supposition, or the condition of an "if"."""
        if not self.theory.contradicts(*self.supposed, *self.denied, *self.condition):
            raise WrongError("there is no contradiction")
        if self.condition:
            self.condition = []
        elif not self.denied:
            self.supposed = self.supposed[:-1]
        self.denied = []

    def _check_consistent(self) -> None:
        if self.theory.contradicts(*self.supposed, *self.condition):
            raise WrongError("there is a contradiction")


def tidy(text: str) -> str:
    """Without markup, runs of white space, and the full stop."""
    return re.sub(r"\s+", " ", text.replace("*", "").replace("`", "")).strip(" .!?;:,\"'$")


def sentences(text: str) -> list[str]:
    found = (_LABEL.sub("", sentence).strip() for sentence in _SENTENCE_END.split(text))
    return [sentence for sentence in found if re.search(r"\w", sentence)]
