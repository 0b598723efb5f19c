"""The second pass over a row: its gradient, from the last block back to the first."""

import triton
import triton.language as tl

from .access import block_columns, end_columns, load_ends, load_target, load_with_reference, store_block
from .maths import power_of_two
from .objective import Coefficients
from .softmax import block_gradient, capped, target_gradient


@triton.jit
def has_gradient(coefficients):
    """NaN has one: it must show."""
    return (coefficients.logp != 0) | (coefficients.entropy != 0) | (coefficients.kl != 0)


@triton.jit
def row_scale(stats, coefficients, transform, live, scales_ptr, row, stored, WORK: tl.constexpr):
    """The power of two that brings the row's largest possible gradient to 2^13..2^14 (float16 ends at 2^16), or 1.

    |p (log p + H)| <= 1 + H, and |p (log p - log q - K)| <= 1 + 2 K.
    """
    scale = tl.full([], 1.0, tl.float32)
    if WORK.rescaled:
        largest = tl.abs(coefficients.logp) + tl.abs(coefficients.entropy) * (1.0 + stats.entropy)
        largest = (largest + tl.abs(coefficients.kl) * (1.0 + 2.0 * stats.kl)) * transform.slope
        exponent = tl.minimum(14.0 - tl.ceil(tl.log2(largest)), 120.0, propagate_nan=tl.PropagateNan.ALL)
        scale = power_of_two(tl.where(live, exponent, 120.0))
        tl.store(scales_ptr + row, scale, mask=stored)
    return scale


@triton.jit
def gradient_with_target(
    x, ref, at, cols, target, at_target, stats, coefficients, transform, WORK: tl.constexpr
):  # fmt: skip
    """That of a block of logits which starts at column `at`."""
    grads = block_gradient(x, ref, stats, coefficients, transform, WORK.softcap, WORK.penalty, WORK.reference)
    if (target >= at) & (target < at + cols.shape[0] * cols.shape[1]):
        grads = tl.where(cols == target - at, at_target, grads)
    return grads


@triton.jit
def write_slice(
    logits_row, ref_row, grads_row, target, columns, live, stats, coefficients, scale, transform,
    WORK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of a slice's columns, from the last block back to the first; 0 where the row has none."""
    block: tl.constexpr = LANES * VECTOR
    start, stop = columns.first, columns.last
    scaled = Coefficients(coefficients.logp * scale, coefficients.entropy * scale, coefficients.kl * scale)
    z = load_target(logits_row, tl.where(live, target, -1), transform, WORK)
    ref = z
    if WORK.reference:
        ref = load_target(ref_row, tl.where(live, target, -1), transform, WORK)
    at_target = target_gradient(z, ref, stats, scaled, transform, WORK.softcap, WORK.penalty, WORK.reference)
    if not WORK.narrowed:
        # in place, another warp may be about to overwrite the target's logit; narrowed, each block has a barrier
        tl.debug_barrier()
    if WORK.peeled:
        cols = end_columns(columns, LANES, VECTOR)
        write_ends(logits_row, ref_row, grads_row, cols, target, at_target, live, stats, scaled, transform, WORK)

    # a slice may begin behind the end of its row
    whole = tl.maximum(stop - start, 0) // block
    at = start + whole * block
    end = tl.where(live, stop, start)
    write_block(
        logits_row, ref_row, grads_row, at, end, target, at_target, stats, scaled, transform, WORK, True, LANES, VECTOR
    )
    for _ in range(0, tl.where(live, whole, 0)):
        at -= block
        write_block(
            logits_row, ref_row, grads_row, at, end, target, at_target, stats, scaled, transform, WORK, False,
            LANES, VECTOR,
        )  # fmt: skip
    if WORK.clear:
        nothing = tl.zeros([LANES, VECTOR], grads_row.dtype.element_ty)
        cols = block_columns(LANES, VECTOR)
        at = start
        for _ in range(0, tl.where(live, 0, tl.cdiv(stop - start, block))):
            store_block(grads_row, at, cols, nothing, stop, WORK.indexed, True)
            at += block


@triton.jit
def write_ends(
    logits_row, ref_row, grads_row, cols, target, at_target, live, stats, coefficients, transform, WORK: tl.constexpr
):  # fmt: skip
    """A lane, and so a thread, has a column for itself: in place, nobody else reads what it overwrites."""
    read = tl.where(live, cols, -1)
    x = load_ends(logits_row, read)
    ref = x
    if WORK.reference:
        ref = capped(load_ends(ref_row, read), transform, WORK.softcap)
    grads = block_gradient(x, ref, stats, coefficients, transform, WORK.softcap, WORK.penalty, WORK.reference)
    grads = tl.where(cols == target, at_target, grads)
    written = read
    if WORK.clear:
        grads, written = tl.where(live, grads, 0.0), cols
    tl.store(grads_row + written, grads.to(grads_row.dtype.element_ty), mask=written >= 0)


@triton.jit
def write_block(
    logits_row, ref_row, grads_row, at, stop, target, at_target, stats, coefficients, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    cols = block_columns(LANES, VECTOR)
    x, ref = load_with_reference(logits_row, ref_row, at, cols, stop, transform, WORK, LAST)
    if WORK.narrowed:
        # a block's gradients lie over logits of this block or later ones: all threads have to have read it
        tl.debug_barrier()
    grads = gradient_with_target(x, ref, at, cols, target, at_target, stats, coefficients, transform, WORK)
    store_block(grads_row, at, cols, grads, stop, WORK.indexed, LAST)
