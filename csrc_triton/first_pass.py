"""The first pass over a row: its statistics and, from them, its loss and coefficients."""

import triton
import triton.language as tl

from .access import block_columns, end_columns, load_capped, load_ends, load_given, load_target
from .objective import Coefficients, token_terms
from .softmax import add_block, capped, finish, no_lanes


@triton.jit
def read_slice(
    logits_row, ref_row, target, columns, computed, transform,
    WORK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The running sums over a slice's columns without the target's (the reference's sums with it)."""
    lanes = no_lanes(LANES)
    if WORK.peeled:
        cols = tl.where(computed, end_columns(columns, LANES, VECTOR), -1)
        lanes = read_ends(lanes, logits_row, ref_row, cols, target, transform, WORK)
    at, stop = columns.first, tl.where(computed, columns.last, columns.first)
    for _ in range(0, (stop - at) // (LANES * VECTOR)):
        lanes = read_block(lanes, logits_row, ref_row, at, stop, target, transform, WORK, False, LANES, VECTOR)
        at += LANES * VECTOR
    return read_block(lanes, logits_row, ref_row, at, stop, target, transform, WORK, True, LANES, VECTOR)


@triton.jit
def read_block(
    lanes, logits_row, ref_row, at, stop, target, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    cols = block_columns(LANES, VECTOR)
    z = load_capped(logits_row, at, cols, stop, transform, WORK, LAST)
    if (target >= at) & (target < at + LANES * VECTOR):
        z = tl.where(cols == target - at, float("-inf"), z)
    ref = z
    if WORK.reference:
        ref = load_capped(ref_row, at, cols, stop, transform, WORK, LAST)
    return add_block(lanes, z, ref, transform.kappa, WORK.reference)


@triton.jit
def read_ends(lanes, logits_row, ref_row, cols, target, transform, WORK: tl.constexpr):
    z = tl.where(cols == target, float("-inf"), capped(load_ends(logits_row, cols), transform, WORK.softcap))
    ref = z
    if WORK.reference:
        ref = capped(load_ends(ref_row, cols), transform, WORK.softcap)
    return add_block(lanes, z[:, None], ref[:, None], transform.kappa, WORK.reference)


@triton.jit
def finish_row(
    lane, logits_row, ref_row, tokens, stats_ptr, terms_ptr, token, target, computed, learning, count, transform,
    objective, WORK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A row's statistics, loss and weighted coefficients, stored and returned."""
    z = load_target(logits_row, target, transform, WORK)
    ref = z
    if WORK.reference:
        ref = load_target(ref_row, target, transform, WORK)
    stats = finish(lane, z, ref, transform.kappa, WORK.reference)
    step = count.to(tl.int64)
    at = stats_ptr + token
    tl.store(at, stats.logp, mask=computed)
    tl.store(at + step, stats.entropy, mask=computed)
    tl.store(at + 2 * step, stats.kl, mask=computed)
    tl.store(at + 3 * step, stats.top, mask=computed)
    tl.store(at + 4 * step, stats.total, mask=computed)
    tl.store(at + 5 * step, stats.shift, mask=computed)
    tl.store(at + 6 * step, stats.gap, mask=computed)
    zero = tl.full([], 0.0, tl.float32)
    coefficients = Coefficients(zero, zero, zero)
    if WORK.terms:
        given = load_given(tokens, token, step, computed)
        loss, each, ratio, kl = token_terms(given, stats.logp, stats.entropy, stats.kl, objective, KIND)
        coefficients = Coefficients(
            tl.where(learning, each.logp * given.weight, 0.0),
            tl.where(learning, each.entropy * given.weight, 0.0),
            tl.where(learning, each.kl * given.weight, 0.0),
        )
        at = terms_ptr + token
        tl.store(at, loss, mask=computed)
        tl.store(at + step, ratio, mask=computed)
        tl.store(at + 2 * step, kl, mask=computed)
        tl.store(at + 3 * step, coefficients.logp, mask=computed)
        tl.store(at + 4 * step, coefficients.entropy, mask=computed)
        tl.store(at + 5 * step, coefficients.kl, mask=computed)
    return stats, coefficients
