"""Expressions and equations that are rewritten, functions and all: whether what comes out is the same.

By a second reading of the text, with names for what has no value (`atoms`): nothing is solved, sides are only compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from prefixloss.detect.maths.atoms import Atoms
from prefixloss.detect.maths.calls import Functions
from prefixloss.detect.maths.expressions import BINARY, UNARY, Expression, names
from prefixloss.detect.maths.identities import factors, misses, repeats
from prefixloss.detect.maths.neighbours import OTHERS, Claim, wrong_after
from prefixloss.detect.maths.reader import SUPPOSING, Chain, Reading, Run, read
from prefixloss.detect.maths.same import differ
from prefixloss.detect.maths.text import UnreadableError, words

MAX_CLAIMS = 150  # that are compared, of a response
NEAR = 10  # words before a claim that tell what it is
_SAME = words(
    "identity identities rewrite rewritten write written factor factored factoring factors factorize factorized "
    "factorizing expand expanded expanding expands simplify simplifying simplified simplifies fractions like express "
    "expressed distribute distributing square"
)


class Rewriting:
    """What a response said so far, and whether a step rewrites it wrongly."""

    def __init__(self, problem: str, steps: Sequence[str], declared: Collection[str]) -> None:
        self.atoms = Atoms("\n".join((problem, *steps)))
        self.declared = declared
        self.functions = Functions()
        self.alone: set[Expression] = set()  # expressions that nothing was said of but that they are there
        self.partners: dict[Expression, set[Expression]] = {}  # of a side: what it was said to be
        self.bound: list[frozenset[str]] = []  # the names of each equation that is no identity
        self.before: Claim | None = None  # the first equality of the chain right before
        self.claims = 0
        for chain in self._chains(problem):
            for claim in self._claims(chain, -1):
                self._note(claim)

    def wrong(self, step: int, text: str, reading: Reading) -> str | None:
        """The first thing in the next step that is not the same as what it is rewritten from, as a reason. reading: of
        the text as it stands."""
        for chain in self._chains(text, reading):
            told = not SUPPOSING.intersection(chain.lead) and chain.tail != "?"
            for claim in self._claims(chain, step):
                if told and (reason := self._wrong(claim)):
                    return reason
                self._note(claim)
        return None

    def _chains(self, text: str, reading: Reading | None = None) -> list[Chain]:
        spelled = self.atoms.spelled(text)
        if reading and spelled == text and self.atoms.letters.issubset(self.declared):
            return reading.chains  # nothing is read in another way
        try:
            return read(spelled, {*self.declared, *self.atoms.letters, *self.atoms.names.values()}).chains
        except UnreadableError:
            return []

    def _claims(self, chain: Chain, step: int) -> Iterator[Claim]:
        """The equalities of a chain that can be read."""
        runs = chain.runs
        if len(runs) == 1 and runs[0].names and not runs[0].partial and len(runs[0].expression) > 2:
            self.alone.add(runs[0].expression)
        for n, relation in enumerate(chain.relations):
            claim = Claim(runs[n], runs[n + 1], chain, n, step)
            if relation != "=" or runs[n].partial or runs[n + 1].partial:
                self.before = None
            elif claim.names and not _has_constants(claim) and self.claims < MAX_CLAIMS:
                self.claims += 1
                yield claim

    def _note(self, claim: Claim) -> None:
        left, right = claim.left, claim.right
        self.partners.setdefault(left.expression, set()).add(right.expression)
        self.partners.setdefault(right.expression, set()).add(left.expression)
        defines = claim.place == 0 and left.name and left.name not in right.names
        if not defines and differ(left.expression, right.expression) is not False:
            self.bound.append(claim.names)
        if claim.place == 0:
            self.before = claim
            self.functions.define(self.atoms.spelling(left.name), right.expression)

    # ---- rules

    def _wrong(self, claim: Claim) -> str | None:
        left, right = claim.left, claim.right
        alike = left.names == right.names and len(left.expression) > 1 and len(right.expression) > 1
        if alike and differ(left.expression, right.expression) and (reason := self._not_the_same(claim)):
            return reason
        if claim.place:
            return None
        called = None if claim.chain.supposed else self.functions.value(self.atoms.spelling(left.name))
        if called and names(called) == right.names and right.names and differ(called, right.expression):
            return "not the value of the function"
        near = self.before is not None and claim.step - self.before.step <= 1
        return wrong_after(self.before, claim) if self.before and near else None

    def _not_the_same(self, claim: Claim) -> str | None:
        """Why two sides that are not the same have to be."""
        left, right = claim.left, claim.right
        if claim.place == 0 and self._says_the_same(claim):
            return "what is written in another way is not the same"
        if claim.place and not self._bound(claim.names) and _signs(left) != _signs(right):  # no two sums of one shape
            return "two sides of a chain that are not the same"
        return "an expansion that is not the same" if misses(left.expression, right.expression) else None

    def _bound(self, used: frozenset[str]) -> bool:
        """Whether an equation holds between some of the names alone."""
        return any(equation <= used for equation in self.bound)

    def _says_the_same(self, claim: Claim) -> bool:
        """Whether a side is told to be another spelling of an expression that stands before."""
        left, right, near = claim.left.expression, claim.right.expression, claim.chain.between[-NEAR:]
        partners = self.partners.get(left, set())
        if claim.chain.supposed or right in partners or OTHERS.intersection(near):
            return False
        known = left in self.alone or left in self.partners
        if near[-1:] == ("identity",) or (known and partners <= {(0,)} and factors(left, right)):
            return True
        shortens = repeats(left) and len(right) < len(left)
        return (known or shortens) and not self._bound(claim.names) and bool(_SAME.intersection(near))


def _has_constants(claim: Claim) -> bool:
    """Whether a name may be the imaginary unit, or the base of the natural logarithm."""
    return "i" in claim.names or ("e" in claim.names and "ln" in claim.left.expression + claim.right.expression)


def _signs(run: Run) -> list[str]:
    return [str(item) for item in run.expression if item in BINARY or item in UNARY]
