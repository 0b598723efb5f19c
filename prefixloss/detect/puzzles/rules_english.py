"""English for Horn rules: "Max is a cat", "all cats are mammals", "if something is big then it is not young"."""

from __future__ import annotations

import re

from prefixloss.detect.puzzles.logic import (
    ANY,
    SYMBOL,
    Atom,
    Formula,
    Iff,
    Implies,
    Not,
    atoms,
    conjunction,
    disjunction,
    symbols,
)
from prefixloss.detect.puzzles.proof import LONGEST_SENTENCE, tidy
from prefixloss.detect.puzzles.replay import UnreadError

_IRREGULAR = {"mouse": "mice", "man": "men", "woman": "women", "child": "children", "person": "people",
              "goose": "geese", "wolf": "wolves", "is": "are", "has": "have", "does": "do"}  # fmt: skip
_SOMETHING = r"(?:something|someone|somebody|anything|anyone|anybody|an? (?:thing|person|animal))"
_IT = r"(?:it|they|he|she|(?:the|that|this) (?:thing|person))"
_THINGS = r"(?:things?|people|persons?|ones?)"
_SUBJECT = rf"(?:(?i:{_SOMETHING}|{_IT}|the \w+)|(?!The\b)[A-Z][\w'-]*)(?!\w)"
_BE = r"(?:is|are|was|were|be)"
_MUST = r"(?:(?:must|will|has to|have to|would)(?: also| then| therefore| thus)? be)"
_CANNOT = r"(?:(?:can ?not|can't|must not|will not|won't) be|isn't|aren't|wasn't|weren't)"
_ADVERBS = r"(?:\b(?:also|both|then|therefore|thus|hence|still|indeed|either|now|definitely|necessarily)\s+)*"
_IS_CLAUSE = re.compile(
    rf"(?:(?P<subject>{_SUBJECT})\s+)?{_ADVERBS}(?:(?P<negated>{_CANNOT})|{_MUST}|{_BE})\s+{_ADVERBS}"
    rf"(?P<not>not\s+)?{_ADVERBS}(?P<rest>.+)"
)
_DOES_NOT = re.compile(
    rf"(?:(?P<subject>{_SUBJECT})\s+)?(?:does not|do not|doesn't|don't|did not|didn't|cannot)\s+(?P<rest>.+)"
)
_DOES = re.compile(rf"(?:(?P<subject>{_SUBJECT})\s+)?{_ADVERBS}(?P<rest>[a-z]+(?: .+)?)")
_NOT_THAT = re.compile(r"(?:it is (?:not|false)|it's (?:not|false))(?: the case| true)? that (.+)", re.IGNORECASE)
_TRUTH = re.compile(
    r"(?P<what>.+?) (?:is|must be)(?P<not> not)? (?P<value>true|false)|(?P<held>\w+) (?P<fails>does not hold|holds)",
    re.IGNORECASE,
)
# words that a predicate cannot hold: it would say more than a name for a property
_STRANGE = frozenset(
    [
        "who",
        "which",
        "that",
        "what",
        "because",
        "since",
        "so",
        "than",
        "most",
        "some",
        "many",
        "few",
        "usually",
        "sometimes",
        "often",
        "maybe",
        "perhaps",
        "probably",
        "might",
        "may",
        "can",
        "could",
        "would",
        "should",
        "must",
        "if",
        "then",
        "when",
        "unless",
        "until",
        "every",
        "each",
        "all",
        "any",
        "no",
        "none",
        "nothing",
        "both",
        "either",
        "neither",
        "exactly",
        "only",
        "same",
        "different",
        "whether",
        "not",
        "is",
        "are",
        "implies",
        "other",
        "another",
        "true",
        "false",
        "if",
        "this",
        "that",
        "these",
        "those",
        "there",
        "here",
        "we",
        "i",
        "you",
        "our",
        "my",
        "it",
        "they",
        "let",
        "us",
    ]
)
_MANY_WORDS = 6
_JOINT = re.compile(r"\s*,?\s*\b(and|or|but)\s+|\s*,\s*")

_THAT = r"(?: that| who| which)?"
_EVERYTHING = re.compile(
    rf"(?:(?:every|any)(?:thing|one|body)|what(?:so)?ever|whoever|(?:(?:all|any|every|each) )?{_THINGS}){_THAT} "
    rf"(?P<if>{_BE}\b.+|(?:that|who|which) .+)",
    re.IGNORECASE,
)
_NOTHING = re.compile(rf"(?:nothing|no one|nobody|no {_THINGS}){_THAT} (?P<if>{_BE}\b.+)", re.IGNORECASE)
_KIND = re.compile(
    rf"(?P<how>(?:every|each|any|all|no|an?|only)\s+)?(?P<kind>[\w' ,-]+?)\s+"
    rf"(?P<then>(?:{_CANNOT}|{_MUST}|{_BE})\s.+|(?:do not|does not|don't|doesn't) .+)",
    re.IGNORECASE,
)


class Words:
    """Forms of a word are one word: "cats" is "cat", "likes" is "like". The form that came first stands for all."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def __call__(self, word: str) -> str:
        forms = (word, self._plural(word))
        found = next((self.known[form] for form in forms if form in self.known), None)
        if found is None:
            self.known.update((form, word) for form in forms)
        return found or word

    @staticmethod
    def _plural(word: str) -> str:
        if word in _IRREGULAR:
            return _IRREGULAR[word]
        if re.search(r"[^aeiou]y$", word):
            return word[:-1] + "ies"
        return word + ("es" if re.search(r"(?:s|x|z|ch|sh|o)$", word) else "s")


class English:
    """Sentences to formulas. A rule about anything is a formula about ANY.

    names: of single things ("max", "the cat"). subject: whom "it" means, which was named last.
    """

    def __init__(self) -> None:
        self.words = Words()
        self.names: dict[str, None] = {}
        self.propositions: set[str] = set()
        self.subject = ""
        self._last: tuple[str, str, bool] | None = None  # subject, verb, whether negated: what an "and" may leave out

    def sentence(self, text: str) -> Formula:
        """Raises UnreadError."""
        text = tidy(text)
        if not text or len(text) > LONGEST_SENTENCE:
            raise UnreadError(text[:80] or "nothing")
        if self.subject == ANY:
            self.subject = ""
        try:
            return symbols(text) if SYMBOL.search(text) else self._one_name(text)
        except UnreadError:
            pass
        if denied := _NOT_THAT.fullmatch(text):
            inner = self.sentence(denied[1])
            if any(atom.of == ANY for atom in atoms(inner)):
                raise UnreadError(text)
            return Not(inner)
        return self._rule(text)

    def _one_name(self, text: str) -> Formula:
        """ "P", "P and Q": letters that were seen among symbols, or look like it."""
        formula = symbols(text)
        if all(re.fullmatch(r"[A-Z]\d?|.*\(.*", a.name) or a.name in self.propositions for a in atoms(formula)):
            return formula
        raise UnreadError(text)

    def _rule(self, text: str) -> Formula:
        if condition := re.fullmatch(r"(?:if|whenever|when) (.+)", text, re.IGNORECASE):
            return self._if(condition[1])
        for joint, operator in ((r",? if and only if | iff ", Iff), (r" only if | implies (?:that )?", Implies)):
            sides = re.split(joint, text)
            if len(sides) == 2:
                return operator(self._clause(sides[0]), self._clause(sides[1]))
        sides = re.split(r",? (?:if|whenever) ", text)
        if len(sides) == 2:
            then, condition_text = sides
            return Implies(self._clause(condition_text), self._clause(then))
        return self._quantified(text) or self._clause(text)

    def _if(self, text: str) -> Formula:
        """ "A then B", or "A, B" at the first comma that parts two clauses."""
        cut = re.search(r",? then,? ", text, re.IGNORECASE)
        cuts = [cut] if cut else list(re.finditer(r", ", text))[:8]
        for cut in cuts:
            try:
                condition = self._clause(text[: cut.start()], something=True)
                return Implies(condition, self._clause(text[cut.end() :]))
            except UnreadError:
                continue
        raise UnreadError(text)

    def _quantified(self, text: str) -> Formula | None:
        if match := _EVERYTHING.fullmatch(text) or _NOTHING.fullmatch(text):
            return self._everything(match["if"], negated=match.re is _NOTHING)
        match = _KIND.fullmatch(text)
        if match is None:
            return None
        how, kind = (match["how"] or "").strip().lower(), match["kind"]
        if not how and (
            self._is_named(kind) or not re.match(r"are\b|do\b|don't|aren't|(?:must|cannot|can't)", match["then"])
        ):
            return None
        if how == "no":
            return self._kind(kind, match["then"], negated=True)
        if how == "only":
            rule = self._kind(kind, match["then"])
            return Implies(rule.right, rule.left)
        return self._kind(kind, match["then"])

    def _everything(self, text: str, negated: bool) -> Formula:
        """ "is X is Y", "who likes X is Y": parted before some verb."""
        text = re.sub(r"^(?:that|who|which) ", "", text)
        verb = re.compile(rf",? (?={_CANNOT}|{_MUST}|{_BE}\b|(?:does|do) not|doesn't|don't|[a-z]+s\b)")
        for cut in list(verb.finditer(text))[:12]:
            try:
                condition = self._clause(f"something {text[: cut.start()]}", something=True)
                then = self._clause(f"it {text[cut.end() :]}")
            except UnreadError:
                continue
            return Implies(condition, Not(then) if negated else then)
        raise UnreadError(text)

    def _kind(self, kind: str, then: str, negated: bool = False) -> Implies:
        """ "big, red people" are both; "cats and dogs" are one or the other."""
        if adjectives := re.fullmatch(rf"(.+) {_THINGS}", kind, re.IGNORECASE):
            parts = [p for p in re.split(r",? and |, ", adjectives[1]) if p]
            condition = conjunction(Atom(self._property(part), ANY) for part in parts)
        else:
            parts = [p for p in re.split(r",? (?:and|or) (?:all |every |an? )?|, ", kind) if p]
            condition = disjunction(Atom(self._property(part), ANY) for part in parts)
        self.subject = ANY
        conclusion = self._clause(f"it {then}")
        return Implies(condition, Not(conclusion) if negated else conclusion)

    def _is_named(self, subjects: str) -> bool:
        parts = [p.strip().lower() for p in re.split(r",? and |, ", subjects)]
        return all(part in self.names or part in ("it", "they", "he", "she") for part in parts)

    def note_names(self, text: str) -> None:
        """Capital letters that do not start a sentence, and what is said to be or not to be something."""
        seen = re.findall(r"(?<=[a-z,;:] )[A-Z][\w'-]*|\b[A-Z][\w'-]*(?= (?:is|isn't|was|does|doesn't|has)\b)", text)
        for name in [*seen, *re.findall(r"\b[Tt]he \w+(?= (?:is|isn't|does|doesn't|\w+s the)\b)", text)]:
            self.names.setdefault(name.lower())

    def _clause(self, text: str, something: bool = False) -> Formula:
        """Pieces joined by "and" and "or"; "and" binds closer. A piece may leave out what the one before it has.

        something: whether "something" means anything, as after "if".
        """
        text = re.sub(r"\b(?:either|both)\s+", "", text.strip(" ,;:.")).removesuffix(", but not both")
        try:
            return self._one_name(text)
        except UnreadError:
            pass
        cuts = list(_JOINT.finditer(text))
        texts = [
            text[a:b]
            for a, b in zip([0, *(c.end() for c in cuts)], [*(c.start() for c in cuts), len(text)], strict=True)
        ]
        joints = [cut[1] for cut in cuts]
        for k in reversed(range(len(joints))):  # a comma joins as the next word does
            joints[k] = joints[k] or (joints[k + 1] if k + 1 < len(joints) else "and")
        self._last = None
        waiting: list[str] = []  # subjects without a verb yet
        groups: list[list[Formula]] = [[]]
        for k, piece in enumerate(texts):
            if k > 0 and joints[k - 1] == "or" and groups[-1]:
                groups.append([])
            if self._last is None and piece.lower() in self.names:
                waiting.append(piece.lower())
                continue
            formula = self._piece(piece, something)
            groups[-1].append(formula)
            if waiting and self._last is not None:
                others = [_about(formula, self._last[0], name) for name in waiting]
                groups[-1].extend(others)
                waiting = []
        if waiting or not groups[-1]:
            raise UnreadError(text)
        return disjunction(conjunction(group) for group in groups)

    def _piece(self, text: str, something: bool) -> Formula:
        """One clause about one subject."""
        if denied := re.fullmatch(r"not (.+)", text, re.IGNORECASE):
            return self._negation(denied[1], something)
        if denied := _NOT_THAT.fullmatch(text):
            return Not(self._piece(denied[1], something))
        if truth := _TRUTH.fullmatch(text):
            what = self._one_name(truth["what"] or truth["held"])
            negative = (
                bool(truth["not"]) != ((truth["value"] or "").lower() == "false") or truth["fails"] == "does not hold"
            )
            return Not(what) if negative else what
        try:
            return self._one_name(text)
        except UnreadError:
            pass
        for pattern, verb in ((_IS_CLAUSE, "is"), (_DOES_NOT, "not"), (_DOES, "does")):
            match = pattern.fullmatch(text)
            if match is None or (match["subject"] is None and self._last is None):
                continue
            if verb == "does" and match["subject"] is None and not self._is_verb(match["rest"]):
                continue
            subject = self._whom(match["subject"], something)
            negated = verb == "not" or (verb == "is" and bool(match["negated"]) != bool(match["not"]))
            self._last = (subject, "" if verb == "is" else match["rest"].split(" ")[0], negated)
            return self._literal(subject, match["rest"], negated)
        return self._negation(text, something, keep=True)

    def _negation(self, text: str, something: bool, keep: bool = False) -> Formula:
        """A piece without a verb of its own. keep: not negated, unless the piece before it was, with the same verb."""
        if self._last is None:
            if keep:
                raise UnreadError(text)
            return Not(self._piece(text, something))
        subject, verb, negated = self._last
        if keep and negated:
            raise UnreadError(f"how far 'not' reaches: {text}")
        rest = f"{verb} {text}" if verb else text
        return self._literal(subject, rest, not keep)

    def _is_verb(self, rest: str) -> bool:
        return re.match(r"[a-z]+s (?:the |[A-Z])", rest) is not None

    def _literal(self, subject: str, rest: str, negated: bool) -> Formula:
        atom = Atom(self._property(rest), subject)
        return Not(atom) if negated else atom

    def _whom(self, subject: str | None, something: bool) -> str:
        if subject is None:
            assert self._last is not None
            return self._last[0]
        if re.fullmatch(_SOMETHING, subject, re.IGNORECASE):
            if not something:
                raise UnreadError(f"{subject} is someone unknown")
            self.subject = ANY
        elif not re.fullmatch(_IT, subject, re.IGNORECASE):
            self.names.setdefault(subject.lower())
            if self.subject != ANY:  # in a rule about anything, "it" is that
                self.subject = subject.lower()
            return subject.lower()
        return self.subject or "it"

    def _property(self, text: str) -> str:
        """The name of a property: without articles, verbs and nouns in one form."""
        words = re.sub(r"^(?:an?|the) ", "", tidy(text).lower()).split()
        if not 0 < len(words) <= _MANY_WORDS or not all(
            re.fullmatch(r"[\w'-]+", w) and w not in _STRANGE for w in words
        ):
            raise UnreadError(text)
        return " ".join(self.words(word) if k in (0, len(words) - 1) else word for k, word in enumerate(words))


def _about(formula: Formula, subject: str, name: str) -> Formula:
    """The same of another subject."""
    if isinstance(formula, Atom):
        return Atom(formula.name, name) if formula.of == subject else formula
    if isinstance(formula, Not):
        return Not(_about(formula.inner, subject, name))
    return type(formula)(_about(formula.left, subject, name), _about(formula.right, subject, name))
