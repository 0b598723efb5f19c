"""Knights and knaves: who always tells the truth and who always lies, found from what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from prefixloss.detect.puzzles.logic import And, Atom, Formula, Iff, Implies, Not, Theory, conjunction, disjunction
from prefixloss.detect.puzzles.proof import Proof, sentences, tidy
from prefixloss.detect.puzzles.replay import Puzzle, Replay, UnreadError, WrongError

_LONGEST = 20_000  # characters of a problem
_LONGEST_CLAUSE = 500
_MOST_PEOPLE = 12
_DEEPEST = 12  # clauses inside clauses
_SAYS = (
    r"(?:(?:once |then |also |only |just )?(?:says?|said|(?:tells?|told) (?:you|us|me)|repl(?:y|ies|ied)"
    r"|was heard saying"
    r"|(?:claim|assert|remark|respond|answer|comment|add|insist|mention|proclaim|whisper)(?:s|ed)?"
    r"|express(?:es|ed)|(?:state|declare|note|announce)[sd]?))\b"
)
_NOT_NAMES = frozenset(
    [
        "I",
        "You",
        "They",
        "He",
        "She",
        "It",
        "We",
        "Everyone",
        "Everybody",
        "Someone",
        "Who",
        "What",
        "Which",
        "Each",
        "One",
        "There",
        "This",
        "That",
        "The",
        "Both",
        "Neither",
        "All",
        "Nobody",
        "None",
        "Two",
        "Three",
        "Four",
        "If",
        "So",
        "Then",
        "But",
        "And",
        "Or",
        "Not",
        "Also",
        "Now",
        "Suppose",
        "Assume",
        "Since",
        "Because",
        "Knights",
        "Knaves",
        "Knight",
        "Knave",
    ]
)
_OTHER_KINDS = re.compile(r"\b(?:spy|spies|normals?|jokers?|alternators?|werewol(?:f|ves)|sometimes)\b", re.IGNORECASE)
_NAMES_LIST = re.compile(
    r"(?:[a-z]:|\b(?:meet|encounter|named|called|inhabitants|people|islanders)),? "
    r"(?P<list>(?:[A-Z][\w-]*(?:, and |, | and )?)+)"
)
_QUOTE = re.compile(r"\"(?P<double>[^\"]{1,400})\"|(?<!\w)'(?P<single>(?=\w)[^\"]{1,400}?)'(?!\w)")
_FIRST_QUOTE = 0xE000  # quotes are kept aside, each behind one character of the private use area
_QUOTED = "[\ue000-\uf8ff]"
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6} | {
    str(n): n for n in range(1, _MOST_PEOPLE + 1)
}
_ROLE = r"(?:an? |the )?(?P<role>knight|knave)s?"
_SAME = r"(?:the same(?: (?:kind|type|sort|role|group))?|alike|identical)"
_DIFFERENT = r"(?:(?:an? |the )?(?:different|opposite|distinct)(?: (?:kind|type|sort|role|group)s?)?)"
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
        return _Island(problem, _Plain(self.truthful, self.lying))


def knight(name: str) -> Atom:
    return Atom("knight", name)


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


class _Plain:
    """Text to fewer words: "B must be lying" to "B is a knave"."""

    def __init__(self, truthful: Sequence[str], lying: Sequence[str]) -> None:
        words = [("knight", truthful), ("knave", lying)]
        subs = [(rf"\b(?:{_any_of(kinds)})(s)?\b", rf"{one}\1") for one, kinds in words]
        says = r"(?:(?:statement|claim|assertion|remark)s?|words)"
        subs += [
            (r"\bI'm\b", "I am"),
            (r"\b(he|she|it|that)'s\b", r"\1 is"),
            (r"\b(we|they|you)'re\b", r"\1 are"),
            (r"'s (?=(?:an? |not an? )?(?:knight|knave))", " is "),
            (r"\b(?:therefore|thus|indeed|definitely|actually|really|certainly|necessarily|in fact|also|hence|always"
             r"|again|consequently|likewise|instead)\b,? ", ""),
            (r"\b(?:cannot|can't|(?:can|could|must|would|will|should) not|(?:could|would|wo)n't) be\b", "is not"),
            (r"\b(?:isn't|aren't|wasn't|weren't|is never)\b", "is not"),
            (r"\b(?:must|has to|have to|would|will|should|would have to|can only|needs to)(?: both| all)? be\b", "is"),
            (r"\b(?:was|were|am|are|be)\b", "is"),
            (rf"\b(?:his|her|their|this|that|the) {says}(?: {_QUOTED})?(?: is| are)", "it's claim is"),
            (rf"\b(?:the )?{says} (?:of|by|made by|from) ([\w-]+)(?: is| are)", r"\1's claim is"),
            (r"\bwhat (\w+) (?:says?|said|claims?|claimed) is", r"\1's claim is"),
            (rf"'s {says}(?: {_QUOTED},?)?(?: (?:that|about) [^,]{{1,60}}?)? is", "'s claim is"),
            (r"'s claim is (not )?(?:true|truthful|the truth|correct)\b", r" is \1a knight"),
            (r"'s claim is (not )?(?:false|a lie|untrue|untruthful|incorrect)\b", r" is \1a knave"),
            (r"\bdo(?:es)?(?: not|n't) (?:tell|speak) the truth\b", "is a knave"),
            (r"\bdo(?:es)?(?: not|n't) lie\b|\b(?:can ?not|can't) lie\b", "is a knight"),
            (r"\b(?:must (?:tell|be telling)|tells?|told|speaks?|is telling|is speaking) the truth\b", "is a knight"),
            (r"\bis (not )?(?:telling the truth|truthful|honest)\b", r"is \1a knight"),
            (r"\bis (not )?(?:lying|dishonest|untruthful)\b", r"is \1a knave"),
            (r"\b(?:lies|lied|must lie)\b(?! in\b)", "is a knave"),
        ]  # fmt: skip
        self.subs = [(re.compile(pattern, re.IGNORECASE), to) for pattern, to in subs]

    def __call__(self, text: str) -> str:
        text = tidy(text)
        for pattern, to in self.subs:
            text = pattern.sub(to, text)
        return re.sub(r"\s+", " ", text)


class _Quotes:
    """What stands in quotes, kept aside so that its full stops end no sentence."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def aside(self, text: str) -> str:
        return _QUOTE.sub(self._keep, re.sub(_QUOTED, "", text))

    def _keep(self, match: re.Match[str]) -> str:
        said = match["double"] or match["single"]
        self.texts.append(said)
        ends = said.rstrip()[-1:] in (".", "!", "?") and re.match(
            r"\s+[\"'A-Z]|\s*$|\n", match.string[match.end() :][:20]
        )
        return chr(_FIRST_QUOTE + len(self.texts) - 1) + ("." if ends else "")

    def back(self, text: str) -> str:
        return re.sub(_QUOTED, lambda m: self.texts[ord(m[0]) - _FIRST_QUOTE], text)


class _Clauses:
    """Clauses about who is what, to formulas. last: whom "he" or "she" means."""

    def __init__(self, names: Sequence[str], plain: _Plain) -> None:
        self.names = list(names)
        self.plain = plain
        self.last: str | None = None
        one = rf"(?:{_any_of(names)}|I|me|myself|he|him|she|her|it|himself|herself)"
        self.one = re.compile(rf"(?<![\w'-]){one}(?![\w-])")
        people = rf"(?:both |either )?(?<![\w'-]){one}(?:(?:, and |, or |, | and | or ){one})*(?![\w'-])"
        several = rf"{people}|[Ww]e|[Tt]hey"
        group = rf"(?:us|them|these|you|the (?:\w+ )?(?:\w+)|{people})"
        self.patterns = [
            (re.compile(pattern, re.IGNORECASE if "(?P<who>" not in pattern else 0), handle)
            for pattern, handle in (
                (rf"(?P<who>{several}) is (?P<not>not )?(?P<how>both |all |each |either )?{_ROLE}", self._are),
                (rf"(?P<who>{people})(?::| =| -| \u2013)? {_ROLE}", self._are),
                (rf"[Nn]either (?P<who>{one} nor {one}) is {_ROLE}", self._neither),
                (rf"[Tt]he (?:only )?{_ROLE} is (?P<who>{people})", self._the),
                (rf"(?P<who>{several}) is (?P<not>not )?(?:both |all )?(?:of |from )?"
                 rf"(?:(?P<same>{_SAME})|{_DIFFERENT})", self._alike),
                (rf"(?P<who>{one}) is (?P<not>not )?(?:of |from )?(?:(?P<same>{_SAME}) (?:as|with)|"
                 rf"{_DIFFERENT} (?:from|than|to|of)) (?P<other>{one})", self._alike),
                (rf"(?P<who>{several}) is (?:either )?both knights,? or (?:they is |is )?both knaves", self._both_same),
                (rf"(?:[Tt]here is )?(?P<count>[Aa]t (?:least|most) |[Ee]xactly |[Oo]nly |[Nn]o more than )?"
                 rf"(?P<number>\w+)(?: of (?P<who>{group}))?(?: is)? {_ROLE}"
                 r"(?: here| (?:among|of|in) (?:us|them|this group|the \w+))?",
                 self._count),
            )
        ]  # fmt: skip
        self.would_say = re.compile(
            rf"(?P<name>{one}) (?:would|could|can|might) (?P<not>not |never )?"
            r"(?:say|claim|tell you|state|answer)(?: that)?,? (?P<what>.+)"
        )

    def read(self, text: str, speaker: str | None = None) -> Formula:
        """Raises UnreadError."""
        if len(text) > _LONGEST_CLAUSE:
            raise UnreadError("a sentence too long")
        return self._read(self.plain(text), speaker, 0)

    def _read(self, text: str, speaker: str | None, depth: int) -> Formula:
        text = re.sub(r"^(?:and|but|that|both (?=.* is .* and .* is )) ", "", text.strip(" ,;:.\"'"))
        if depth > _DEEPEST:
            raise UnreadError("clauses too deep")
        for pattern, handle in self.patterns:
            if match := pattern.fullmatch(text):
                return handle(match, speaker)
        return self._compound(text, speaker, depth + 1)

    def _compound(self, text: str, speaker: str | None, deeper: int) -> Formula:
        if denied := re.fullmatch(r"(?:it is (?:not|false)(?: the case| true)? that|not:?) (.+)", text, re.IGNORECASE):
            return Not(self._read(denied[1], speaker, deeper))
        if would := self.would_say.fullmatch(text):
            name = self._person(would["name"], speaker)
            said = Iff(knight(name), self._read(would["what"], speaker or name, deeper))
            return Not(said) if would["not"] else said
        if condition := re.fullmatch(r"if (.+?)(?:,? then,? |, )(.+)", text, re.IGNORECASE):
            return Implies(self._read(condition[1], speaker, deeper), self._read(condition[2], speaker, deeper))
        for joint in (r",? if and only if |,? iff |,? exactly when ", r" only if |,? implies (?:that )?", r",? if "):
            sides = re.split(joint, text, maxsplit=1)
            if len(sides) == 2:
                left, right = (self._read(side, speaker, deeper) for side in sides)
                return (
                    Iff(left, right)
                    if "iff" in joint
                    else Implies(left, right)
                    if "only" in joint
                    else Implies(right, left)
                )
        exclusive = re.fullmatch(r"either (.+?),? or (.+?),? but not both", text, re.IGNORECASE)
        if exclusive:
            return Not(Iff(self._read(exclusive[1], speaker, deeper), self._read(exclusive[2], speaker, deeper)))
        return self._joined(re.sub(r"^either ", "", text, flags=re.IGNORECASE), speaker, deeper)

    def _joined(self, text: str, speaker: str | None, depth: int) -> Formula:
        """Clauses with "or" between them, and closer ones with "and". A clause may leave out its subject."""
        for joint, join in ((r",? or ", disjunction), (r",? (?:and|but|while|whereas) |, ", conjunction)):
            parts = [part for part in re.split(joint, text) if part]
            if len(parts) > 1:
                return join(self._read(part, speaker, depth) for part in self._whole(parts))
        raise UnreadError(text[:80])

    def _whole(self, parts: list[str]) -> list[str]:
        """Subjects that wait for a verb ("A", "B is a knave") stay together, verbs without a subject get the last one,
        and "C is not" gets what the one before it is."""
        whole: list[str] = []
        subject, role, waiting = "", "", ""
        for part in parts:
            if self.one.fullmatch(part):
                waiting += part + " and "
                continue
            text = waiting + part
            waiting = ""
            if short := re.fullmatch(rf"(?P<be>is )?(?P<not>not )?{_ROLE}", text):
                text = f"{subject} is {short['not'] or ''}{short[0][short.start('role') :]}"
            elif re.fullmatch(rf"{self.one.pattern} is(?: not)?", text):
                text = f"{text} a {role}"
            if (named := self.one.match(text)) is not None:
                subject = named[0]
            if (said := re.search(r"\b(knight|knave)s?\b", text)) is not None:
                role = said[1]
            whole.append(text)
        return whole + ([waiting] if waiting else [])

    def _person(self, word: str, speaker: str | None) -> str:
        if word in self.names and not (word == "I" and speaker):
            self.last = word
            return word
        meant = speaker if word in ("I", "me", "myself") else self.last
        if meant is None:
            raise UnreadError(f"who {word} is")
        return meant

    def _people(self, words: str, speaker: str | None) -> list[str]:
        if words.lower() in ("we", "us", "they", "them", "these", "you") or words.startswith("the "):
            return self.names
        return list(dict.fromkeys(self._person(m[0], speaker) for m in self.one.finditer(words)))

    @staticmethod
    def _role(match: re.Match[str], name: str) -> Formula:
        return knight(name) if match["role"].lower() == "knight" else Not(knight(name))

    def _are(self, match: re.Match[str], speaker: str | None) -> Formula:
        groups = match.groupdict()
        how, negated = (groups.get("how") or "").strip(), bool(groups.get("not"))
        people = self._people(match["who"], speaker)
        if (how == "both" and len(people) != 2) or (match["who"].lower() == "they" and not how):
            raise UnreadError(match[0][:80])
        formulas = [self._role(match, name) for name in people]
        if negated and how in ("both", "all"):
            return Not(conjunction(formulas))
        formulas = [Not(f) if negated else f for f in formulas]
        return disjunction(formulas) if " or " in match["who"] else conjunction(formulas)

    def _neither(self, match: re.Match[str], speaker: str | None) -> Formula:
        return conjunction(Not(self._role(match, name)) for name in self._people(match["who"], speaker))

    def _the(self, match: re.Match[str], speaker: str | None) -> Formula:
        """ "The knave is B", "the knights are A and C": and nobody else."""
        people = self._people(match["who"], speaker)
        others = [name for name in self.names if name not in people]
        return conjunction([*(self._role(match, n) for n in people), *(Not(self._role(match, n)) for n in others)])

    def _alike(self, match: re.Match[str], speaker: str | None) -> Formula:
        groups = match.groupdict()
        people = self._people(match["who"], speaker) + (
            [self._person(match["other"], speaker)] if groups.get("other") else []
        )
        if len(people) < 2:
            raise UnreadError(match[0][:80])
        alike = conjunction(Iff(knight(people[0]), knight(name)) for name in people[1:])
        if groups["same"] is None and len(people) > 2:
            raise UnreadError(match[0][:80])
        return alike if (groups["same"] is not None) != bool(groups["not"]) else Not(alike)

    def _both_same(self, match: re.Match[str], speaker: str | None) -> Formula:
        one, *others = self._people(match["who"], speaker)
        if len(others) != 1:
            raise UnreadError(match[0][:80])
        return Iff(knight(one), knight(others[0]))

    def _count(self, match: re.Match[str], speaker: str | None) -> Formula:
        people = self._people(match["who"], speaker) if match["who"] else self.names
        formulas = [self._role(match, name) for name in people]
        word, count = match["number"].lower(), (match["count"] or "").strip().lower()
        if not count and word in ("all", "each", "everyone", "everybody", "both"):
            if word == "both" and len(people) != 2:
                raise UnreadError(match[0][:80])
            return conjunction(formulas)
        if not count and word in ("none", "neither", "nobody", "no"):
            return conjunction(Not(f) for f in formulas)
        number = _NUMBERS.get(word)
        if number is None or not count:  # "one of us is a knave" may leave it open whether more are
            raise UnreadError(match[0][:80])
        if count == "at least":
            return _at_least(number, formulas)
        at_most = Not(_at_least(number + 1, formulas))
        return at_most if count in ("at most", "no more than") else And(_at_least(number, formulas), at_most)


def _at_least(number: int, formulas: Sequence[Formula]) -> Formula:
    """Never true where there are fewer."""
    if number > len(formulas):
        return And(formulas[0], Not(formulas[0]))
    return disjunction(conjunction(some) for some in combinations(formulas, number))


class _Island(Proof):
    """said: what each one said. asked: whose kinds are the answer. told: what the steps concluded so far."""

    def __init__(self, problem: str, plain: _Plain) -> None:
        if len(problem) > _LONGEST:
            raise UnreadError("too long")
        if other := _OTHER_KINDS.search(problem):
            raise UnreadError(f"{other[0]} is neither of the two kinds")
        self.plain = plain
        self.quotes = _Quotes()
        text = self.quotes.aside(problem)
        names = _names(self.quotes.back(text), text, plain)
        if not 0 < len(names) <= _MOST_PEOPLE:
            raise UnreadError(f"{len(names)} inhabitants, expected 1 to {_MOST_PEOPLE}")
        self.clauses = _Clauses(names, plain)
        name = rf"(?<![\w'-])(?P<name>{_any_of(names)})"
        self.statement = re.compile(
            rf"{name} {_SAYS}[,:]?(?: that\b)?[,:]?\s*"
            rf"|(?:[Aa]ccording to|[Ii]n the words of) {name.replace('name', 'source')},? "
            rf"|(?:[Ii]n|[Aa]s) {name.replace('name', 'words')}(?:'s words| puts? it)[,:]? "
            rf"|{name.replace('name', 'label')}(?:'s (?:statement|claim)(?: is)?)?: (?={_QUOTED})"
        )
        self.said_by = re.compile(rf"(?P<what>{_QUOTED}),? (?:{_SAYS} {name}|{name.replace('name', 'before')} {_SAYS})")
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
        quote = re.search(_QUOTED, what)
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
        alone = re.fullmatch(rf"{_ROLE}", self.plain(text).lower())
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


def _names(whole: str, masked: str, plain: _Plain) -> list[str]:
    """Those who say something, are said to be something, or are listed, in the order of the text."""
    name = r"(?<![\w'-])([A-Z][\w-]*)"
    found: list[str] = re.findall(rf"{name} {_SAYS}", masked) + re.findall(rf"[Aa]ccording to {name}", masked)
    found += re.findall(rf"{_QUOTED},? {_SAYS} {name}", masked) + re.findall(
        rf"{name}(?:'s (?:statement|claim))?: {_QUOTED}", masked
    )
    found += re.findall(rf"(?:[Ii]n|[Aa]s) {name}(?:'s words| puts? it)", masked)
    for listed in _NAMES_LIST.finditer(masked):
        found += re.findall(name, listed["list"])
    text = plain(whole)
    found += re.findall(
        rf"{name} (?:is )?(?:not )?(?:an? )?(?:knight|knave)\b(?!s? (?:is|always|can|never|says))", text
    )
    joined = rf"{name}(?=(?:, and |, | and | or | nor ){name}(?:, and |, | and | is\b))"
    found += [part for pair in re.findall(joined, text) for part in pair]
    named = (word for word in dict.fromkeys(found) if word not in _NOT_NAMES)
    return sorted(named, key=lambda word: _first_place(word, whole))


def _first_place(word: str, text: str) -> int:
    found = re.search(rf"\b{re.escape(word)}\b", text)
    return found.start() if found else len(text)
