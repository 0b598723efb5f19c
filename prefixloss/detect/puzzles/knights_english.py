"""English for knights and knaves: who says what, and clauses about who is which of the two, as formulas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import combinations

from prefixloss.detect.puzzles.logic import And, Atom, Formula, Iff, Implies, Not, conjunction, disjunction
from prefixloss.detect.puzzles.proof import tidy
from prefixloss.detect.puzzles.replay import UnreadError

MOST_PEOPLE = 12
_LONGEST_CLAUSE = 500
_DEEPEST = 12  # clauses inside clauses
SAYS = (
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
_NAMES_LIST = re.compile(
    r"(?:[a-z]:|\b(?:meet|encounter|named|called|inhabitants|people|islanders)),? "
    r"(?P<list>(?:[A-Z][\w-]*(?:, and |, | and )?)+)"
)
_QUOTE = re.compile(r"\"(?P<double>[^\"]{1,400})\"|(?<!\w)'(?P<single>(?=\w)[^\"]{1,400}?)'(?!\w)")
_FIRST_QUOTE = 0xE000  # quotes are kept aside, each behind one character of the private use area
QUOTED = "[\ue000-\uf8ff]"
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6} | {
    str(n): n for n in range(1, MOST_PEOPLE + 1)
}
ROLE = r"(?:an? |the )?(?P<role>knight|knave)s?"
_SAME = r"(?:the same(?: (?:kind|type|sort|role|group))?|alike|identical)"
_DIFFERENT = r"(?:(?:an? |the )?(?:different|opposite|distinct)(?: (?:kind|type|sort|role|group)s?)?)"


def knight(name: str) -> Atom:
    return Atom("knight", name)


def any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


class Plain:
    """Text to fewer words: "B must be lying" to "B is a knave"."""

    def __init__(self, truthful: Sequence[str], lying: Sequence[str]) -> None:
        words = [("knight", truthful), ("knave", lying)]
        subs = [(rf"\b(?:{any_of(kinds)})(s)?\b", rf"{one}\1") for one, kinds in words]
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
            (rf"\b(?:his|her|their|this|that|the) {says}(?: {QUOTED})?(?: is| are)", "it's claim is"),
            (rf"\b(?:the )?{says} (?:of|by|made by|from) ([\w-]+)(?: is| are)", r"\1's claim is"),
            (r"\bwhat (\w+) (?:says?|said|claims?|claimed) is", r"\1's claim is"),
            (rf"'s {says}(?: {QUOTED},?)?(?: (?:that|about) [^,]{{1,60}}?)? is", "'s claim is"),
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


class Quotes:
    """What stands in quotes, kept aside so that its full stops end no sentence."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def aside(self, text: str) -> str:
        return _QUOTE.sub(self._keep, re.sub(QUOTED, "", text))

    def _keep(self, match: re.Match[str]) -> str:
        said = match["double"] or match["single"]
        self.texts.append(said)
        ends = said.rstrip()[-1:] in (".", "!", "?") and re.match(
            r"\s+[\"'A-Z]|\s*$|\n", match.string[match.end() :][:20]
        )
        return chr(_FIRST_QUOTE + len(self.texts) - 1) + ("." if ends else "")

    def back(self, text: str) -> str:
        return re.sub(QUOTED, lambda m: self.texts[ord(m[0]) - _FIRST_QUOTE], text)


class Clauses:
    """Clauses about who is what, to formulas. last: whom "he" or "she" means."""

    def __init__(self, names: Sequence[str], plain: Plain) -> None:
        self.names = list(names)
        self.plain = plain
        self.last: str | None = None
        one = rf"(?:{any_of(names)}|I|me|myself|he|him|she|her|it|himself|herself)"
        self.one = re.compile(rf"(?<![\w'-]){one}(?![\w-])")
        people = rf"(?:both |either )?(?<![\w'-]){one}(?:(?:, and |, or |, | and | or ){one})*(?![\w'-])"
        several = rf"{people}|[Ww]e|[Tt]hey"
        group = rf"(?:us|them|these|you|the (?:\w+ )?(?:\w+)|{people})"
        self.patterns = [
            (re.compile(pattern, re.IGNORECASE if "(?P<who>" not in pattern else 0), handle)
            for pattern, handle in (
                (rf"(?P<who>{several}) is (?P<not>not )?(?P<how>both |all |each |either )?{ROLE}", self._are),
                (rf"(?P<who>{people})(?::| =| -| \u2013)? {ROLE}", self._are),
                (rf"[Nn]either (?P<who>{one} nor {one}) is {ROLE}", self._neither),
                (rf"[Tt]he (?:only )?{ROLE} is (?P<who>{people})", self._the),
                (rf"(?P<who>{several}) is (?P<not>not )?(?:both |all )?(?:of |from )?"
                 rf"(?:(?P<same>{_SAME})|{_DIFFERENT})", self._alike),
                (rf"(?P<who>{one}) is (?P<not>not )?(?:of |from )?(?:(?P<same>{_SAME}) (?:as|with)|"
                 rf"{_DIFFERENT} (?:from|than|to|of)) (?P<other>{one})", self._alike),
                (rf"(?P<who>{several}) is (?:either )?both knights,? or (?:they is |is )?both knaves", self._both_same),
                (rf"(?:[Tt]here is )?(?P<count>[Aa]t (?:least|most) |[Ee]xactly |[Oo]nly |[Nn]o more than )?"
                 rf"(?P<number>\w+)(?: of (?P<who>{group}))?(?: is)? {ROLE}"
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
            if short := re.fullmatch(rf"(?P<be>is )?(?P<not>not )?{ROLE}", text):
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


def inhabitants(whole: str, masked: str, plain: Plain) -> list[str]:
    """Those who say something, are said to be something, or are listed, in the order of the text."""
    name = r"(?<![\w'-])([A-Z][\w-]*)"
    found: list[str] = re.findall(rf"{name} {SAYS}", masked) + re.findall(rf"[Aa]ccording to {name}", masked)
    found += re.findall(rf"{QUOTED},? {SAYS} {name}", masked) + re.findall(
        rf"{name}(?:'s (?:statement|claim))?: {QUOTED}", masked
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
