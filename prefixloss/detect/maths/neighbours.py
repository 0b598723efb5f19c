"""An equation that is said to be the one right before it, written in another way, and is not: for any names and
functions, without solving either."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from prefixloss.detect.maths.derive import ALL, REWRITING, announced
from prefixloss.detect.maths.expressions import NoValueError
from prefixloss.detect.maths.polynomials import Terms, difference, order
from prefixloss.detect.maths.reader import Chain, Run
from prefixloss.detect.maths.same import differ
from prefixloss.detect.maths.text import words

MIN_TERMS = 3
_JOINING = words("and or")
_SQUARING = words("squaring square squared")
_ON_BOTH_SIDES = words(
    "add adding cross-multiplying divide dividing isolate isolating multiply multiplying squaring subtract subtracting"
)
_RESPELLING = REWRITING - _ON_BOTH_SIDES
OTHERS = words(
    "equation equations set substitute substituting equate inequality case cases condition system solution solutions"
)  # what comes then takes more in


class Claim(NamedTuple):
    """One equality of a chain, the place-th, in a step."""

    left: Run
    right: Run
    chain: Chain
    place: int
    step: int

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names


def wrong_after(before: Claim, claim: Claim) -> str | None:
    """What is wrong with an equation as another spelling of the one before, as a reason."""
    between, alike = claim.chain.between, before.names == claim.names
    near = before.step == claim.step and not between
    if not near and not _follows(before, claim):
        return None
    only = ALL.issuperset(between)
    if alike and _SQUARING.intersection(between) and _squares_wrongly(before, claim):
        return "only one side is the square of what it was"
    respelled = not near and not _ON_BOTH_SIDES.intersection(between) and (only or before.step == claim.step)
    if respelled and _one_side_changes(before, claim):
        return "one side is rewritten into something else"
    shrinks = near and claim.names < before.names  # a name that falls out of it did so by the slip
    if (alike or shrinks) and (only or _RESPELLING.intersection(between)) and _slips(before, claim):
        return "this is the equation right before, but for one term"
    return None


def _follows(before: Claim, claim: Claim) -> bool:
    """Whether the words between two equations say that the one is the other, rewritten."""
    between = claim.chain.between
    listed = before.chain.between and _JOINING.issuperset(before.chain.between)  # it stands beside one before
    if listed or "or" in between or OTHERS.intersection(between):
        return False
    concludes = before.step == claim.step and ALL.issuperset(between) and not claim.left.name
    return announced(between, concluding=concludes)


def _squares_wrongly(before: Claim, claim: Claim) -> bool:
    sides = (before.left, claim.left), (before.right, claim.right)
    return {differ((*old.expression, 2, "^"), new.expression) for old, new in sides} == {True, False}


def _one_side_changes(before: Claim, claim: Claim) -> bool:
    left, right = (before.left, claim.left), (before.right, claim.right)
    return (_stays(*left) and _changes(*right)) or (_stays(*right) and _changes(*left))


def _stays(old: Run, new: Run) -> bool:
    """0 says nothing: what equals it may be multiplied."""
    if old.expression == new.expression:
        return old.expression != (0,)
    sampled = old.names and old.names == new.names and "sqrt" not in old.expression  # roots have few values
    return bool(sampled) and differ(old.expression, new.expression) is False


def _changes(old: Run, new: Run) -> bool:
    alone = not new.names or old.name is not None or new.name is not None
    rounded = any(isinstance(item, Fraction) for item in new.expression)  # decimals may be
    same_names = old.names == new.names and not alone and not rounded
    return same_names and differ(old.expression, new.expression) is True


def _slips(before: Claim, claim: Claim) -> bool:
    """Whether both sides were rewritten, and the equations are the same but for one term."""
    pairs = (before.left, claim.left), (before.right, claim.right)
    if any(old.name or old.expression == new.expression for old, new in pairs):
        return False
    (left, new_left), (right, new_right) = ((old.expression, new.expression) for old, new in pairs)
    try:
        used = order(left, right, new_left, new_right)
        return len(used) > 1 and _one_off(difference(left, right, used), difference(new_left, new_right, used))
    except NoValueError:
        return False


def _one_off(a: Terms, b: Terms) -> bool:
    """Whether one polynomial is a multiple of the other but for one of several terms."""
    every = a.keys() | b.keys()
    factors = {b[term] / a[term] for term in a.keys() & b.keys()}
    off = [sum(a.get(term, 0) * factor != b.get(term, 0) for term in every) for factor in factors]
    return len(every) >= MIN_TERMS and min(off, default=0) == 1
