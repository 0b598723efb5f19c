"""Where a row, its token and its blocks lie, and how they are loaded."""

import triton
import triton.language as tl

from .maths import expm1
from .objective import TokenInputs
from .softmax import Statistics, capped


@triton.jit
def which_token(tokens, row, WORK: tl.constexpr):
    """The token a row belongs to and its flags."""
    token = row
    if WORK.indexed:
        token = tl.load(tokens.rows_ptr + row)
    return token, tl.load(tokens.flags_ptr + token)


@triton.jit
def target_column(tokens, token, vocabulary, wanted):
    """The token's id; -1 where it is not wanted or no id of this vocabulary, which is never read."""
    target = tl.load(tokens.ids_ptr + token, mask=wanted, other=-1)
    return tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)


@triton.jit
def row_pointer(matrix, row, length, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """length: rows a sequence. All in 64 bits: rows times columns passes 2^31."""
    offset = (row // length) * matrix.per_sequence + (row % length) * matrix.per_token
    if WORK.aligned:
        offset = tl.multiple_of(offset, VECTOR)
    return matrix.ptr + offset


@triton.jit
def block_columns(LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_block(row_ptr, at, cols, stop, LAST: tl.constexpr):
    """The block that starts at column `at`. Only a slice's last one needs a mask."""
    if LAST:
        logits = tl.load(row_ptr + at + cols, mask=at + cols < stop, other=float("-inf"))
    else:
        logits = tl.load(row_ptr + at + cols)
    return logits.to(tl.float32)


@triton.jit
def store_block(row_ptr, at, cols, grads, stop, READ_NEXT: tl.constexpr, LAST: tl.constexpr):
    """A block's gradient. Where no product reads it next it is the first to leave the cache: other rows' logits, which
    are still to be read a second time, had better stay."""
    modifier: tl.constexpr = "" if READ_NEXT else ".cs"
    grads = grads.to(row_ptr.dtype.element_ty)
    if LAST:
        tl.store(row_ptr + at + cols, grads, mask=at + cols < stop, cache_modifier=modifier)
    else:
        tl.store(row_ptr + at + cols, grads, cache_modifier=modifier)


@triton.jit
def load_capped(row_ptr, at, cols, stop, transform, WORK: tl.constexpr, LAST: tl.constexpr):
    """A block's z."""
    return capped(load_block(row_ptr, at, cols, stop, LAST), transform, WORK.softcap)


@triton.jit
def load_with_reference(logits_row, ref_row, at, cols, stop, transform, WORK: tl.constexpr, LAST: tl.constexpr):
    """A block's logits as they are and the reference's z, which is not looked at where there is none."""
    x = load_block(logits_row, at, cols, stop, LAST)
    ref = x
    if WORK.reference:
        ref = load_capped(ref_row, at, cols, stop, transform, WORK, LAST)
    return x, ref


@triton.jit
def load_target(row_ptr, target, transform, WORK: tl.constexpr):
    """The target's own z; NaN for an id outside the vocabulary."""
    x = tl.load(row_ptr + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    return capped(x, transform, WORK.softcap)


@triton.jit
def load_given(tokens, token, step, wanted):
    at = tokens.given_ptr + token
    return TokenInputs(
        tl.load(at, mask=wanted, other=0.0),
        tl.load(at + step, mask=wanted, other=0.0),
        tl.load(at + 2 * step, mask=wanted, other=0.0),
        tl.load(at + 3 * step, mask=wanted, other=0.0),
        tl.load(at + 4 * step, mask=wanted, other=0.0),
    )


@triton.jit
def load_statistics(stats_ptr, token, step, wanted):
    at = stats_ptr + token
    logp = tl.load(at, mask=wanted, other=0.0)
    return Statistics(
        logp,
        tl.load(at + step, mask=wanted, other=0.0),
        tl.load(at + 2 * step, mask=wanted, other=0.0),
        tl.load(at + 3 * step, mask=wanted, other=0.0),
        tl.load(at + 4 * step, mask=wanted, other=1.0),
        tl.load(at + 5 * step, mask=wanted, other=0.0),
        tl.load(at + 6 * step, mask=wanted, other=0.0),
        -expm1(logp),
    )
