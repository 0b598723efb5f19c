"""Divergences of a student's distribution p from a teacher's q, and their slopes, for every form of teacher.

Over classes j, with a = log p, b = log q and the mixture m = beta q + (1 - beta) p:
    reverse       KL(p || q) = sum p (a - b)
    forward       KL(q || p) = sum q (b - a)
    jsd           beta KL(q || m) + (1 - beta) KL(p || m)      generalised Jensen-Shannon, of GKD: arXiv 2306.13649
    skew-forward  KL(q || m)                                   of DistiLLM: arXiv 2402.03898
    skew-reverse  KL(p || m)                                   the same
Each is a sum of terms. With w_j = p_j dD/dp_j, less what is the same multiple of p_j in every class, and W = sum w,
    dD / ds_j = w_j - p_j W                                    for scores s with p = softmax(s).
    reverse       w = p (a - b)
    forward       w = -q
    jsd           w = (1 - beta) p (a - log m)
    skew-forward  w = -(1 - beta) p q / m
    skew-reverse  w = p (a - log m) - (1 - beta) p p / m
A class that neither can have adds nothing; one that only the first argument of a KL can have makes it infinite. Of an
infinite divergence there is no slope: its gradient is 0.

The classes are the vocabulary, or the ids that a teacher lists, or those that both have where they share a vocabulary
in part, and all others together, the tail: a row's gradient with respect to the tail's score is shared out by the
others' own probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Slope(NamedTuple):
    """Of n rows: the divergence [n], w [n, C], and w's row sums [n]."""

    value: Tensor
    w: Tensor
    total: Tensor


@dataclass(frozen=True)
class Classes:
    """log p, log q, p and q [n, C]. banned: whether any class is impossible, or too improbable to be a number; what is
    of none of these has the same bits either way."""

    a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor
    banned: bool = False

    def kl(self, log_p: Tensor, log_q: Tensor, p: Tensor) -> Tensor:
        """p (log p - log q), class by class."""
        terms = (log_p - log_q).mul_(p)
        if self.banned:
            impossible = log_p == -math.inf
            terms.masked_fill_((log_q == -math.inf) & ~impossible, math.inf).masked_fill_(impossible, 0)
        return terms

    def log_mixture(self, beta: float) -> Tensor:
        m = torch.lerp(self.p, self.q, beta)
        if not self.banned:
            return m.log_()
        nothing = m == 0
        in_logs = torch.logaddexp(self.b + math.log(beta), self.a + math.log1p(-beta))
        return torch.where(nothing, in_logs, m.log_())


def _share(log_part: Tensor, log_whole: Tensor) -> Tensor:
    """exp(log_part - log_whole), 0 where both are -inf."""
    return torch.where(log_part == -math.inf, 0.0, (log_part - log_whole).exp())


def _reverse(x: Classes, beta: float) -> Slope:
    terms = x.kl(x.a, x.b, x.p)
    value = terms.sum(1)
    return Slope(value, terms, value)


def _forward(x: Classes, beta: float) -> Slope:
    w = x.q.neg()
    return Slope(x.kl(x.b, x.a, x.q).sum(1), w, w.sum(1))


def _jsd(x: Classes, beta: float) -> Slope:
    log_m = x.log_mixture(beta)
    w = x.kl(x.a, log_m, x.p).mul_(1 - beta)
    total = w.sum(1)
    return Slope(x.kl(x.b, log_m, x.q).sum(1).mul_(beta).add_(total), w, total)


def _skew_forward(x: Classes, beta: float) -> Slope:
    log_m = x.log_mixture(beta)
    w = _share(x.a, log_m).mul_(x.q).mul_(beta - 1)
    return Slope(x.kl(x.b, log_m, x.q).sum(1), w, w.sum(1))


def _skew_reverse(x: Classes, beta: float) -> Slope:
    log_m = x.log_mixture(beta)
    terms = x.kl(x.a, log_m, x.p)
    w = terms - _share(x.a, log_m).mul_(x.p).mul_(1 - beta)
    return Slope(terms.sum(1), w, w.sum(1))


# classes and beta to the divergence and its slope
BY_NAME: dict[str, Callable[[Classes, float], Slope]] = {
    "reverse": _reverse,
    "forward": _forward,
    "jsd": _jsd,
    "skew-forward": _skew_forward,
    "skew-reverse": _skew_reverse,
}


class Parts:
    """How the parts of a row make the whole: here there is one, all of the vocabulary. Of one that is split over
    processes, from `first` on, what each knows is combined."""

    first = 0

    def logsumexp(self, logs: Tensor) -> Tensor:
        """logs [..]: the log of each process's sum; the log of all of them."""
        return logs

    def sum(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Divergence:
    """One of `BY_NAME` with its beta."""

    name: str
    beta: float

    def rows(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """log p, log q, p and q [n, C] -> the divergence [n] and its gradient by the scores [n, C] that `a` is made
        of."""
        slope = BY_NAME[self.name](Classes(a, b, p, q), self.beta)
        # most rows ban nothing: what it takes is done where infinities and NaN show that one does
        if not math.isfinite(float(slope.value.sum())):
            slope = BY_NAME[self.name](Classes(a, b, p, q, banned=True), self.beta)
        value, total = parts.sum(torch.stack([slope.value, slope.total]))
        gradient = slope.w.addcmul_(p, total[:, None], value=-1)
        infinite = value == math.inf
        return value, gradient.masked_fill_(infinite[:, None], 0) if bool(infinite.any()) else gradient

    def whole(self, scores: Tensor, teacher_scores: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """From scores [n, V] of both: the divergence [n] and d / d scores [n, V]."""
        a, p = _normalised(scores, parts)
        b, q = _normalised(teacher_scores, parts)
        return self.rows(a, b, p, q, parts)

    def listed(self, scores: Tensor, teacher: Listed, parts: Parts) -> tuple[Tensor, Tensor]:
        """From scores [n, V] and a teacher that lists ids: the divergence [n] and d / d scores [n, V]."""
        place = _Places.of(teacher.ids, parts.first, scores.shape[1])
        at_listed = parts.sum(torch.where(place.here, scores.gather(1, place.at), 0.0))
        at_listed = at_listed.masked_fill_(teacher.ids < 0, -math.inf)
        others = place.put(scores.clone(), torch.full_like(at_listed, -math.inf))
        log_others = parts.logsumexp(others.logsumexp(1))[:, None]
        # every process has all of the classes
        a, p = _normalised(torch.cat([at_listed, log_others], 1), Parts())
        b = torch.cat([teacher.logps, teacher.tail[:, None]], 1)
        value, gradient = self.rows(a, b, p, b.exp(), Parts())
        shares = _shares(others, log_others).mul_(gradient[:, -1:])
        return value, place.put(shares, gradient[:, :-1])

    def shared(self, scores: Tensor, teacher_scores: Tensor, ids: Shared) -> tuple[Tensor, Tensor]:
        """From scores [n, V] and [n, V_t]: the divergence [n] over the ids that both have and one class for each side's
        rest, and d / d scores [n, V]."""
        (a, p), others, log_others = _with_rest(scores, ids.own)
        (b, q), _, _ = _with_rest(teacher_scores, ids.theirs)
        value, gradient = self.rows(a, b, p, q, Parts())
        shares = _shares(others, log_others).mul_(gradient[:, -1:])
        return value, shares.index_copy_(1, ids.own, gradient[:, :-1])


def _normalised(scores: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """The log-probs and probabilities [n, V] of scores [n, V]."""
    top = scores.amax(1, keepdim=True)
    # torch.softmax is fast, but its running sum loses up to 5 digits over a large vocabulary: sum() is pairwise
    p = torch.softmax(scores, 1)
    total = p.sum(1, keepdim=True)
    here = top - (p.amax(1, keepdim=True) / total).log_()
    nothing = top == -math.inf  # a part that is all banned
    if bool(nothing.any()):
        p.masked_fill_(nothing, 0)
        here.masked_fill_(nothing, -math.inf)
        total.masked_fill_(nothing, 1)
    log_sums = parts.logsumexp(here.squeeze(1))[:, None]
    return scores - log_sums, p.mul_((here - log_sums).exp_().div_(total))


def _with_rest(scores: Tensor, chosen: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The log-probs and probabilities [n, K + 1] of the chosen columns [K] and of all others together; the others'
    scores, -inf at the chosen, and log-sums [n, 1]."""
    others = scores.index_fill(1, chosen, -math.inf)
    log_others = others.logsumexp(1, keepdim=True)
    return _normalised(torch.cat([scores[:, chosen], log_others], 1), Parts()), others, log_others


def _shares(others: Tensor, log_others: Tensor) -> Tensor:
    """Each one's share of all others, in their memory; 0 where none of them is possible: exp(-inf - -inf)."""
    return others.sub_(log_others.masked_fill(log_others == -math.inf, 0)).exp_()


class Shared(NamedTuple):
    """The student's ids [K] that the teacher has too, and the teacher's for them."""

    own: Tensor
    theirs: Tensor

    @classmethod
    def of(cls, vocabulary: Tensor) -> Shared:
        """vocabulary: the teacher's ids for the student's [V], -1 for none."""
        own = (vocabulary >= 0).nonzero().squeeze(1)
        return cls(own, vocabulary[own])


# what others have of 1 at least: the rounding of a float64 sum next to it
LEAST_LEFT = 2.0**-53


class Listed(NamedTuple):
    """What a teacher says of n rows: ids int64 [n, K], -1 where unused; logps [n, K], -inf there; tail [n], the log of
    all that is left."""

    ids: Tensor
    logps: Tensor
    tail: Tensor

    @classmethod
    def of(cls, ids: Tensor, logps: Tensor, dtype: torch.dtype, vocabulary: int, rounding: float) -> Listed:
        """logps: anything where unused. rounding: how far from 1 the probabilities of all ids may add up.

        1 - sum p keeps its digits near 0: 1 - p of the largest is -expm1(log p). Rounded log-probs may leave less than
        nothing to others, which are not impossible for that, or a little to nobody, where all ids are listed.
        """
        logps = logps.double().masked_fill(ids < 0, -math.inf)
        if ids.shape[1] == 0:
            return cls(ids, logps.to(dtype), logps.new_zeros(len(ids), dtype=dtype))
        top, at = logps.max(1, keepdim=True)
        left = -torch.expm1(top.squeeze(1)) - logps.exp().scatter_(1, at, 0).sum(1)
        nobody = ((ids >= 0).sum(1) >= vocabulary) & (left <= rounding)
        tail = torch.where(left > 0, left, LEAST_LEFT).log().masked_fill(nobody, -math.inf)
        return cls(ids, logps.to(dtype), tail.to(dtype))


class _Places(NamedTuple):
    """Where the listed ids stand among some columns: at int64 [n, K], a real column everywhere; here bool [n, K]."""

    at: Tensor
    here: Tensor

    @classmethod
    def of(cls, ids: Tensor, first: int, columns: int) -> _Places:
        index = ids - first
        here = (ids >= 0) & (index >= 0) & (index < columns)
        if ids.shape[1] == 0:
            return cls(index, here)
        # what is not here is written over a place that is, with the same value
        stand_in = index.gather(1, here.long().argmax(1, keepdim=True))
        index = torch.where(here, index, stand_in)
        return cls(torch.where(here.any(1, keepdim=True), index, 0), here)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """values [n, K] into x [n, V], in place."""
        if self.at.shape[1] == 0:
            return x
        stand_in = values.gather(1, self.here.long().argmax(1, keepdim=True))
        stand_in = torch.where(self.here.any(1, keepdim=True), stand_in, x.gather(1, self.at))
        return x.scatter_(1, self.at, torch.where(self.here, values, stand_in))
