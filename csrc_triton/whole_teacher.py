"""A student's row beside a teacher's over the whole vocabulary: the divergence, and its gradient block by block.

With student scores s and teacher scores t, p = softmax(s) and q = softmax(t):
    reverse  KL(p || q) = mean_p(s - t) - log sum exp(s) + log sum exp(t)
    forward  KL(q || p) = mean_q(t - s) - log sum exp(t) + log sum exp(s)
both from one online pass, as the exact KL of `softmax`. The others need the mixture of p and q, so both normalisers
first: a second pass adds up their terms.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .access import block_columns, load_capped
from .divergence import class_terms
from .online import add_exponentials, merge_exponentials
from .softmax import LOWEST, total_of


class Lanes(NamedTuple):
    """Running sums of each lane over z and the teacher's r, each relative to its lane's top: sums of e; the sum of
    e d with d the difference of scores, e and d those of the KL's first distribution; the largest d."""

    top: tl.tensor
    total: tl.tensor
    teacher_top: tl.tensor
    teacher_total: tl.tensor
    gap: tl.tensor
    widest: tl.tensor


class Pair(NamedTuple):
    """A row's results: log p = kappa (z - top) - log_total, and log q likewise; the divergence; sum w."""

    top: tl.tensor
    log_total: tl.tensor
    teacher_top: tl.tensor
    teacher_log_total: tl.tensor
    value: tl.tensor
    slope: tl.tensor


@triton.jit
def read_pair(
    logits_row, teacher_row, vocabulary, transform, numbers,
    WORK: tl.constexpr, NAME: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The statistics of a row and its teacher's; vocabulary: 0 where nobody wants them."""
    zero = tl.zeros([LANES], tl.float32)
    lanes = Lanes(zero + LOWEST, zero, zero + LOWEST, zero, zero, zero + LOWEST)
    at = 0
    for _ in range(0, vocabulary // (LANES * VECTOR)):
        z, r = load_pair(logits_row, teacher_row, at, vocabulary, transform, WORK, False, LANES, VECTOR)
        lanes = add_pair(lanes, z, r, transform.kappa, numbers.teacher_kappa, NAME)
        at += LANES * VECTOR
    z, r = load_pair(logits_row, teacher_row, at, vocabulary, transform, WORK, True, LANES, VECTOR)
    lanes = add_pair(lanes, z, r, transform.kappa, numbers.teacher_kappa, NAME)
    pair = merged(lanes, transform.kappa, numbers.teacher_kappa, WORK, NAME)
    if WORK.mixed:
        value, slope = sum_terms(
            pair, logits_row, teacher_row, vocabulary, transform, numbers, WORK, NAME, LANES, VECTOR
        )
        pair = Pair(pair.top, pair.log_total, pair.teacher_top, pair.teacher_log_total, value, slope)
    return pair


@triton.jit
def load_pair(
    logits_row, teacher_row, at, stop, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A block of z and of the teacher's."""
    cols = block_columns(LANES, VECTOR)
    z = load_capped(logits_row, at, cols, stop, transform, WORK, LAST)
    return z, load_capped(teacher_row, at, cols, stop, transform, WORK, LAST)


@triton.jit
def add_pair(lanes, z, r, kappa, teacher_kappa, NAME: tl.constexpr):
    gap, widest = lanes.gap, lanes.widest
    if NAME == "reverse":
        # the one whose exponentials weigh nothing first: fewer numbers are in registers together
        teacher_top, teacher_total, _, _ = add_exponentials(lanes.teacher_top, lanes.teacher_total, r, teacher_kappa)
        d = z * kappa - r * teacher_kappa
        top, total, e, shrink = add_exponentials(lanes.top, lanes.total, z, kappa)
        gap, widest = add_gap(gap, widest, d, e, shrink)
    else:
        top, total, _, _ = add_exponentials(lanes.top, lanes.total, z, kappa)
        d = r * teacher_kappa - z * kappa
        teacher_top, teacher_total, e, shrink = add_exponentials(
            lanes.teacher_top, lanes.teacher_total, r, teacher_kappa
        )
        if NAME == "forward":
            gap, widest = add_gap(gap, widest, d, e, shrink)
    return Lanes(top, total, teacher_top, teacher_total, gap, widest)


@triton.jit
def add_gap(gap, widest, d, e, shrink):
    gap = gap * shrink + tl.sum(tl.where(e == 0, 0.0, e * d), 1)
    # infinite where the first distribution has a token that the second has not; NaN, which is dropped, if neither has
    return gap, tl.maximum(widest, tl.max(d, 1))


@triton.jit
def merged(lanes, kappa, teacher_kappa, WORK: tl.constexpr, NAME: tl.constexpr):
    """The lanes' sums as a row's statistics (scalars), as far as one pass knows them."""
    top, total, shrink = merge_exponentials(lanes.top, lanes.total, kappa)
    teacher_top, teacher_total, teacher_shrink = merge_exponentials(
        lanes.teacher_top, lanes.teacher_total, teacher_kappa
    )
    log_total, teacher_log_total = tl.log(total), tl.log(teacher_total)
    value, slope = tl.full([], 0.0, tl.float32), tl.full([], -1.0, tl.float32)
    if not WORK.mixed:
        # of the whole row's log sums
        ahead = (top * kappa + log_total) - (teacher_top * teacher_kappa + teacher_log_total)
        if NAME == "reverse":
            value = total_of(lanes.gap * shrink, lanes.total) / total - ahead
        else:
            value = total_of(lanes.gap * teacher_shrink, lanes.teacher_total) / teacher_total + ahead
        value = tl.where(tl.max(lanes.widest, 0) == float("inf"), float("inf"), value)
        if NAME == "reverse":
            slope = value
    return Pair(top, log_total, teacher_top, teacher_log_total, value, slope)


@triton.jit
def log_probs(pair, z, r, kappa, teacher_kappa):
    a = (z - pair.top) * kappa - pair.log_total
    return a, (r - pair.teacher_top) * teacher_kappa - pair.teacher_log_total


@triton.jit
def sum_terms(
    pair, logits_row, teacher_row, vocabulary, transform, numbers,
    WORK: tl.constexpr, NAME: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The divergence and sum w."""
    values, slopes = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    at = 0
    for _ in range(0, vocabulary // (LANES * VECTOR)):
        z, r = load_pair(logits_row, teacher_row, at, vocabulary, transform, WORK, False, LANES, VECTOR)
        a, b = log_probs(pair, z, r, transform.kappa, numbers.teacher_kappa)
        terms, slope, _ = class_terms(a, b, numbers.beta, NAME)
        values += tl.sum(terms, 1)
        slopes += tl.sum(slope, 1)
        at += LANES * VECTOR
    z, r = load_pair(logits_row, teacher_row, at, vocabulary, transform, WORK, True, LANES, VECTOR)
    a, b = log_probs(pair, z, r, transform.kappa, numbers.teacher_kappa)
    terms, slope, _ = class_terms(a, b, numbers.beta, NAME)
    return tl.sum(values + tl.sum(terms, 1), 0), tl.sum(slopes + tl.sum(slope, 1), 0)


@triton.jit
def pair_gradient(pair, z, r, transform, numbers, NAME: tl.constexpr):
    """d D / d s for a block of z and the teacher's r."""
    a, b = log_probs(pair, z, r, transform.kappa, numbers.teacher_kappa)
    _, slope, p = class_terms(a, b, numbers.beta, NAME)
    return slope - p * pair.slope
