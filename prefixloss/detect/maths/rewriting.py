"""Expressions and equations that are rewritten, functions and all: whether what comes out is the same.

By a second reading of the text, with names for what has no value (`atoms`): nothing is solved, sides are only compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.atoms import Atoms
from prefixloss.detect.maths.derive import ARROW, CONCLUDING, LINKING, REWRITING
from prefixloss.detect.maths.expressions import (
    BINARY,
    UNARY,
    Expression,
    NoValueError,
    Rational,
    close,
    names,
    value,
)
from prefixloss.detect.maths.identities import misses
from prefixloss.detect.maths.polynomials import Terms, difference, order
from prefixloss.detect.maths.reader import Chain, Run, read
from prefixloss.detect.maths.text import UnreadableError, words

MAX_CHECKS = 120  # of whether two sides are the same, in a response
MAX_SLIPS = 40  # of whether two equations differ in one term
MIN_TERMS = 3
NEAR = 10  # words before a claim
_SAME = words(
    "identity identities rewrite rewritten write written factor factored factoring factors factorize factorized "
    "factorizing expand expanded expanding expands simplify simplifying simplified simplifies fractions like express "
    "expressed distribute distributing square"
)
_OTHER = words(
    "equation equations set substitute substituting equate inequality case cases condition system solution solutions"
)
_ALL = REWRITING | CONCLUDING | LINKING | {ARROW}
_JOINING = words("and or")
_POINTS: tuple[tuple[Rational, ...], ...] = (
    (7, 11, 13, 17, 19, 23),
    (2, 3, 5, 4, 6, 9),
    (3, 2, 7, 5, 11, 4),
    (5, 9, 2, 3, 4, 8),
    tuple(Fraction(1, n) for n in (7, 9, 4, 5, 11, 3)),
    tuple(Fraction(2, n) for n in (7, 11, 9, 13, 5, 15)),
)


def differ(left: Expression, right: Expression) -> bool | None:
    """Whether two sides have different values for most values of their names; None where they have none."""
    free = sorted(names(left) | names(right))
    found = []
    for point in _POINTS:
        at = {name: point[n % len(point)] + n // len(point) for n, name in enumerate(free)}
        try:
            found.append(not close(value(left, at), value(right, at)))
        except NoValueError:
            continue
    return 2 * sum(found) > len(found) if len(found) > 1 else None


class _Claim(NamedTuple):
    """One equality of a chain, the place-th, in a step."""

    left: Run
    right: Run
    chain: Chain
    place: int
    step: int

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names


class Rewriting:
    """What a response said so far, and whether a step rewrites it wrongly."""

    def __init__(self, problem: str, steps: Sequence[str], declared: Collection[str]) -> None:
        self.atoms = Atoms("\n".join((problem, *steps)))
        self.declared = declared
        self.alone: set[Expression] = set()  # expressions that nothing was said of but that they are there
        self.partners: dict[Expression, set[Expression]] = {}  # of a side: what it was said to be
        self.bound: list[frozenset[str]] = []  # the names of each equation that is no identity
        self.before: _Claim | None = None  # the first equality of the chain right before
        self.checks = self.slips = 0
        for chain in self._chains(problem):
            for _ in self._claims(chain, -1):
                pass

    def wrong(self, step: int, text: str) -> str | None:
        """The first thing in the next step that is not the same as what it is rewritten from, as a reason."""
        for chain in self._chains(text):
            for claim in self._claims(chain, step):
                if not chain.supposed and chain.tail != "?" and (reason := self._wrong(claim)):
                    return reason
        return None

    def _chains(self, text: str) -> list[Chain]:
        spelled = self.atoms.spelled(text)
        try:
            return read(spelled, {*self.declared, *self.atoms.names.values()}).chains
        except UnreadableError:
            return []

    def _claims(self, chain: Chain, step: int) -> Iterator[_Claim]:
        """The equalities of a chain that can be read; each is noted once it was looked at."""
        runs = chain.runs
        if len(runs) == 1 and runs[0].names and not runs[0].partial and len(runs[0].expression) > 2:
            self.alone.add(runs[0].expression)
        for n, relation in enumerate(chain.relations):
            claim = _Claim(runs[n], runs[n + 1], chain, n, step)
            if relation != "=" or runs[n].partial or runs[n + 1].partial:
                self.before = None
            elif claim.names and "i" not in claim.names:
                yield claim
                self._note(claim)

    def _note(self, claim: _Claim) -> None:
        left, right = claim.left, claim.right
        self.partners.setdefault(left.expression, set()).add(right.expression)
        self.partners.setdefault(right.expression, set()).add(left.expression)
        defines = claim.place == 0 and left.name and left.name not in right.names
        if not defines and self._differ(left.expression, right.expression) is not False:
            self.bound.append(claim.names)
        if claim.place == 0:
            self.before = claim

    def _differ(self, left: Expression, right: Expression) -> bool | None:
        self.checks += 1
        return differ(left, right) if self.checks <= MAX_CHECKS else None

    # ---- rules

    def _wrong(self, claim: _Claim) -> str | None:
        left, right, _, place, _ = claim
        alike = left.names == right.names and len(left.expression) > 1 and len(right.expression) > 1
        if alike and self._differ(left.expression, right.expression):
            if place == 0 and self._says_the_same(claim):
                return "what is written in another way is not the same"
            if place and not self._bound(claim.names) and _skeleton(left) != _skeleton(right):
                return "two sides of a chain that are not the same"
            if misses(left.expression, right.expression):
                return "an expansion that is not the same"
        if place == 0 and self.before and claim.step - self.before.step <= 1:
            return self._rewritten(self.before, claim)
        return None

    def _bound(self, used: frozenset[str]) -> bool:
        return any(names <= used for names in self.bound)

    def _says_the_same(self, claim: _Claim) -> bool:
        """Whether a side is told to be another spelling of an expression that stands before."""
        left, right, near = claim.left.expression, claim.right.expression, claim.chain.between[-NEAR:]
        known = left in self.alone or left in self.partners
        if not known or right in self.partners.get(left, ()) or self._bound(claim.names):
            return False
        return bool(_SAME.intersection(near)) and not _OTHER.intersection(near)

    def _rewritten(self, before: _Claim, claim: _Claim) -> str | None:
        """Whether an equation is the one before it, written in another way, and is not."""
        said, near = _rewrites(before, claim), before.step == claim.step and not claim.chain.between
        right, new = before.right, claim.right
        same_side = before.left.expression == claim.left.expression and right.names == new.names
        if said and same_side and new.names and not new.name and self._differ(right.expression, new.expression):
            return "the same side is rewritten into something else"
        if (said or near) and before.names == claim.names and len(claim.names) > 1 and self._slips(before, claim):
            return "this is the equation right before, but for one term"
        return None

    def _slips(self, before: _Claim, claim: _Claim) -> bool:
        self.slips += 1
        given = before.left, before.right
        unchanged = any(old.expression == new.expression for old, new in zip(given, claim[:2], strict=True))
        if self.slips > MAX_SLIPS or unchanged or any(side.name for side in given):
            return False
        sides = before.left.expression, before.right.expression, claim.left.expression, claim.right.expression
        try:
            used = order(*sides)
            a, b = difference(*sides[:2], used), difference(*sides[2:], used)
        except NoValueError:
            return False
        return _one_off(a, b)


def _rewrites(before: _Claim, claim: _Claim) -> bool:
    """Whether the words between two equations say that the one is the other, rewritten."""
    between = claim.chain.between
    listed = before.chain.between and _JOINING.issuperset(before.chain.between)  # it stands beside one before
    if listed or "or" in between or _OTHER.intersection(between):
        return False
    only = before.step == claim.step and _ALL.issuperset(between) and not claim.left.name
    return bool((REWRITING | {ARROW} | (CONCLUDING if only else set())).intersection(between))


def _skeleton(run: Run) -> list[str]:
    return [str(item) for item in run.expression if item in BINARY or item in UNARY]


def _one_off(a: Terms, b: Terms) -> bool:
    """Whether one polynomial is a multiple of the other but for one of several terms."""
    every = a.keys() | b.keys()
    factors = {b[term] / a[term] for term in a.keys() & b.keys()}
    off = [sum(a.get(term, 0) * factor != b.get(term, 0) for term in every) for factor in factors]
    return len(every) >= MIN_TERMS and min(off, default=0) == 1
