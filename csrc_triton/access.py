"""Where a row, its token and its blocks lie, and how they are loaded.

Where rows start anywhere (`WORK.peeled`), columns are counted from the last multiple of VECTOR up to a row's start,
which is its column `shift`. Between a row's two ends are whole vectors; of the ends a lane takes one column.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .maths import expm1
from .objective import TokenInputs
from .softmax import Statistics, capped


class Slice(NamedTuple):
    """A program's columns of a row: `start` to `stop`; of whole vectors are `first` to `last`."""

    start: tl.tensor
    stop: tl.tensor
    first: tl.tensor
    last: tl.tensor


@triton.jit
def which_token(tokens, row, WORK: tl.constexpr):
    """The token a row belongs to and its flags."""
    token = row
    if WORK.indexed:
        token = tl.load(tokens.rows_ptr + row)
    return token, tl.load(tokens.flags_ptr + token)


@triton.jit
def target_column(tokens, token, vocabulary, wanted, shift=0):
    """That of the token's id; -1 where it is not wanted or no id of this vocabulary, which is never read."""
    target = tl.load(tokens.ids_ptr + token, mask=wanted, other=-1)
    return tl.where((target >= 0) & (target < vocabulary), target + shift, -1).to(tl.int32)


@triton.jit
def row_offset(matrix, row, length):
    """length: rows a sequence. All in 64 bits: rows times columns passes 2^31."""
    return (row // length) * matrix.per_sequence + (row % length) * matrix.per_token


@triton.jit
def row_shift(matrix, row, length, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """The column at which a row starts."""
    shift = 0
    if WORK.peeled:
        shift = (row_offset(matrix, row, length) % VECTOR).to(tl.int32)
    return shift


@triton.jit
def vector_pointer(matrix, row, length, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """To a row's column 0."""
    if WORK.peeled:
        pointer = matrix.ptr + row_offset(matrix, row, length) // VECTOR * VECTOR
    else:
        pointer = row_pointer(matrix, row, length, WORK, VECTOR)
    return pointer


@triton.jit
def row_pointer(matrix, row, length, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """To a row's start."""
    offset = row_offset(matrix, row, length)
    if WORK.aligned:
        offset = tl.multiple_of(offset, VECTOR)
    return matrix.ptr + offset


@triton.jit
def slice_of(part, span, vocabulary, shift, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """The `part`-th `span` columns of a row, none behind its end. span: a multiple of VECTOR, or all."""
    start = part * span + shift
    stop = tl.minimum(part * span + span, vocabulary) + shift
    first, last = start, stop
    if WORK.peeled:
        first = tl.cdiv(start, VECTOR) * VECTOR
        last = tl.maximum(first, stop // VECTOR * VECTOR)
    return Slice(start, stop, first, last)


@triton.jit
def block_columns(LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def end_columns(columns, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Those of a slice's ends, one a lane; -1 for the other lanes."""
    at = tl.arange(0, LANES) - VECTOR
    cols = at + tl.where(at < 0, columns.first, columns.last)
    return tl.where((cols >= columns.start) & (cols < columns.stop), cols, -1)


@triton.jit
def load_ends(row_ptr, cols):
    return tl.load(row_ptr + cols, mask=cols >= 0, other=float("-inf")).to(tl.float32)


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
