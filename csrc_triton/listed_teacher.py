"""A student's row beside a teacher that lists K ids with their log-probs: all others are one class, the tail.

The online pass over the row leaves the listed ids out, so that the tail's probability is a sum and no difference. The
ids come in increasing order, those unused behind the vocabulary: each block looks at its own alone. The listed logits
are one tile, which stays in registers until their gradient is written, over the tail's share of it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .access import block_columns, load_capped
from .divergence import class_terms
from .maths import LOG2_E, LOG_ZERO
from .online import add_exponentials, merge_exponentials
from .softmax import LOWEST, cap_slope, capped


class Listed(NamedTuple):
    """int32 [rows, K] ids and float32 [rows, K] log-probs, and float32 [rows] the log of all that is left."""

    ids_ptr: tl.tensor
    logps_ptr: tl.tensor
    tail_ptr: tl.tensor


class Classes(NamedTuple):
    """A row's results: the divergence; of the listed ids [TILE] themselves, their z and d D / d s; of the tail its top,
    and share e = d D / d s_j of each of its tokens, with e relative to that top."""

    value: tl.tensor
    ids: tl.tensor
    z: tl.tensor
    gradient: tl.tensor
    top: tl.tensor
    share: tl.tensor


@triton.jit
def read_classes(
    logits_row, listed, row, count, vocabulary, transform, numbers,
    WORK: tl.constexpr, NAME: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    k = transform.kappa * LOG2_E
    top, total = read_tail(logits_row, listed.ids_ptr + row * count, count, vocabulary, transform, WORK, LANES, VECTOR)
    place = tl.arange(0, TILE)
    ids = tl.load(listed.ids_ptr + row * count + place, mask=place < count, other=vocabulary)
    z = load_listed(logits_row, ids, vocabulary, transform, WORK)
    b = tl.load(listed.logps_ptr + row * count + place, mask=ids < vocabulary, other=float("-inf"))
    tail_b = tl.load(listed.tail_ptr + row)

    highest = tl.maximum(top, tl.max(z, 0))
    e = tl.exp2(tl.maximum((z - highest) * k, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL))
    log_total = tl.log(tl.sum(e, 0) + total * tl.exp2(tl.maximum((top - highest) * k, LOG_ZERO)))
    a = (z - highest) * transform.kappa - log_total
    tail_a = (top - highest) * transform.kappa + tl.log(total) - log_total
    terms, slope, p = class_terms(a, b, numbers.beta, NAME)
    tail_terms, tail_slope, tail_p = class_terms(tail_a, tail_b, numbers.beta, NAME)
    used = ids < vocabulary
    value = tl.sum(tl.where(used, terms, 0.0), 0) + tail_terms
    # the choice stands between product and sum, as in `total_of`
    slopes = tl.sum(tl.where(used, slope, 0.0), 0) + tail_slope
    # of a tail without any token nobody reads its share
    share = (tail_slope - tail_p * slopes) / total
    return Classes(value, ids, z, slope - p * slopes, top, share)


@triton.jit
def load_listed(logits_row, ids, vocabulary, transform, WORK: tl.constexpr):
    """The listed ids' z [TILE]; -inf for those unused."""
    x = tl.load(logits_row + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    return capped(x, transform, WORK.softcap)


@triton.jit
def read_tail(
    logits_row, ids_ptr, count, vocabulary, transform, WORK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """The largest z of the tail and its sum of e."""
    tops, totals = tl.zeros([LANES], tl.float32) + LOWEST, tl.zeros([LANES], tl.float32)
    at = 0
    place = 0
    for _ in range(0, vocabulary // (LANES * VECTOR)):
        tops, totals, place = add_tail(
            tops, totals, logits_row, ids_ptr, place, count, at, vocabulary, transform, WORK, False, LANES, VECTOR
        )
        at += LANES * VECTOR
    tops, totals, place = add_tail(
        tops, totals, logits_row, ids_ptr, place, count, at, vocabulary, transform, WORK, True, LANES, VECTOR
    )
    top, total, _ = merge_exponentials(tops, totals, transform.kappa)
    return top, total


@triton.jit
def add_tail(
    tops, totals, logits_row, ids_ptr, place, count, at, stop, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A block without its listed ids, which are those from `place` on, into the sums."""
    cols = block_columns(LANES, VECTOR)
    z = load_capped(logits_row, at, cols, stop, transform, WORK, LAST)
    end = tl.minimum(at + LANES * VECTOR, stop)
    following = tl.load(ids_ptr + place, mask=place < count, other=stop)
    while following < end:
        z = tl.where(cols == following - at, float("-inf"), z)
        place += 1
        following = tl.load(ids_ptr + place, mask=place < count, other=stop)
    tops, totals, _, _ = add_exponentials(tops, totals, z, transform.kappa)
    return tops, totals, place


@triton.jit
def tail_gradient(classes, z, transform):
    """d D / d s for a block of z, as if all of it were tail."""
    e = tl.exp2((z - classes.top) * (transform.kappa * LOG2_E))
    return tl.where(e == 0, 0.0, e * classes.share)


@triton.jit
def write_listed(grads_row, classes, factor, stop, transform, SOFTCAP: tl.constexpr):
    """The listed ids' gradient, over what stands in their places."""
    grads = classes.gradient * factor
    if SOFTCAP:
        grads = tl.where(classes.z == float("-inf"), 0.0, grads * cap_slope(classes.z, transform))
    tl.store(grads_row + classes.ids, grads.to(grads_row.dtype.element_ty), mask=classes.ids < stop)
