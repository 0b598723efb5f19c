"""Where a row, its token and its blocks lie, and how they are loaded.

Columns are counted from the row's first whole vector. Where rows start or end anywhere (`WORK.peeled`), the few columns
before it are -1, -2, ..., and with those behind the last whole vector they are the row's two ends, which go apart.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .maths import expm1
from .objective import TokenInputs
from .softmax import Statistics, capped

# below every column, those of a row's ends too
NO_COLUMN: tl.constexpr = tl.constexpr(-(2**30))


class Slice(NamedTuple):
    """A program's columns of a row: start to stop, and its ends: from `low` up to 0, and from `tail` up to `high`."""

    start: tl.tensor
    stop: tl.tensor
    low: tl.tensor
    tail: tl.tensor
    high: tl.tensor


@triton.jit
def which_token(tokens, row, WORK: tl.constexpr):
    """The token a row belongs to and its flags."""
    token = row
    if WORK.indexed:
        token = tl.load(tokens.rows_ptr + row)
    return token, tl.load(tokens.flags_ptr + token)


@triton.jit
def target_column(tokens, token, vocabulary, head, wanted):
    """The column of the token's id; NO_COLUMN where it is not wanted or no id of this vocabulary: it is never read."""
    target = tl.load(tokens.ids_ptr + token, mask=wanted, other=-1)
    return tl.where((target >= 0) & (target < vocabulary), target - head, NO_COLUMN).to(tl.int32)


@triton.jit
def row_offset(matrix, row, length):
    """length: rows a sequence. All in 64 bits: rows times columns passes 2^31."""
    return (row // length) * matrix.per_sequence + (row % length) * matrix.per_token


@triton.jit
def columns_before(matrix, row, length, vocabulary, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """How many columns lie before a row's first whole vector."""
    head = 0
    if WORK.peeled and not WORK.aligned:
        past = (row_offset(matrix, row, length) % VECTOR).to(tl.int32)
        head = tl.minimum((VECTOR - past) % VECTOR, vocabulary)
    return head


@triton.jit
def row_pointer(matrix, row, length, head, WHOLE: tl.constexpr, VECTOR: tl.constexpr):
    """To the row's column 0. WHOLE: a whole vector starts there."""
    offset = row_offset(matrix, row, length) + head
    if WHOLE:
        offset = tl.multiple_of(offset, VECTOR)
    return matrix.ptr + offset


@triton.jit
def slice_of(part, span, vocabulary, head, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """The `part`-th `span` columns; the ends are the first part's."""
    start = part * span
    tail = vocabulary - head
    low = 0
    high = tail
    if WORK.peeled:
        low = tl.where(part == 0, -head, 0)
        tail = tl.multiple_of(tail // VECTOR * VECTOR, VECTOR)
        high = tl.where(part == 0, high, tail)
    return Slice(start, tl.minimum(start + span, tail), low, tail, high)


@triton.jit
def stop_where(columns, wanted, WORK: tl.constexpr, VECTOR: tl.constexpr):
    """Where a slice ends that has nothing unless it is wanted."""
    stop = tl.where(wanted, columns.stop, columns.start)
    if WORK.peeled:
        stop = tl.multiple_of(stop, VECTOR)
    return stop


@triton.jit
def block_columns(LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def end_columns(columns, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a slice's ends, which are at most 2 VECTOR of SIZE; NO_COLUMN for the others."""
    at = tl.arange(0, SIZE)
    cols = tl.where(at < VECTOR, at, columns.tail + at) - VECTOR
    inside = (cols >= columns.low) & ((at < VECTOR) | (cols >= columns.tail)) & (cols < columns.high)
    return tl.where(inside, cols, NO_COLUMN)


@triton.jit
def load_block(row_ptr, at, cols, stop, LAST: tl.constexpr):
    """The block that starts at column `at`. Only a slice's last one needs a mask."""
    if LAST:
        logits = tl.load(row_ptr + at + cols, mask=at + cols < stop, other=float("-inf"))
    else:
        logits = tl.load(row_ptr + at + cols)
    return logits.to(tl.float32)


@triton.jit
def load_ends(row_ptr, cols):
    return tl.load(row_ptr + cols, mask=cols != NO_COLUMN, other=float("-inf")).to(tl.float32)


@triton.jit
def load_target(row_ptr, target, transform, WORK: tl.constexpr):
    """The target's own z; NaN for an id outside the vocabulary."""
    x = tl.load(row_ptr + target, mask=target != NO_COLUMN, other=float("nan")).to(tl.float32)
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
