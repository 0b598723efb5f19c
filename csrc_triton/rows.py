"""The kernels over rows of logits [rows, V]: statistics, loss and coefficient, gradient.

A row's statistics need all of it, its gradient needs them: two passes. `row_kernel` makes both in one program, the
second from the last block back to the first, so that it begins with what the cache still holds; with the row in the
cache, a logit of b bytes costs b bytes read and b written. With few rows, `slice_kernel`, `combine_kernel` and
`gradient_kernel` do the same with several programs a row, and sum in a fixed order. `gradient_kernel` is also the
backward of statistics that somebody else turned into coefficients.

Rows that are not computed are not read; where they have room for a gradient it is filled with 0 if `work.clear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch, on_device, options
from .maths import expm1, power_of_two
from .objective import Coefficients, Given, Objective, Options, token_terms
from .softmax import (
    Lanes,
    Statistics,
    Transform,
    add_block,
    block_gradient,
    capped,
    finish,
    merge_lanes,
    no_lanes,
    target_gradient,
)

# read one number at a time: no kernel is made for where in a batch they begin
PER_TOKEN = ["tokens", "stats_ptr", "terms_ptr", "coefficients_ptr", "scales_ptr"]

# bits of `flags`
COMPUTED: tl.constexpr = tl.constexpr(1)  # its statistics are wanted
LEARNING: tl.constexpr = tl.constexpr(2)  # it may have a gradient

# rows of `stats` [7, N] and `terms` [6, N], in the order of the named tuples
STATS = ("logp", "entropy", "kl", "top", "total", "shift", "gap")
TERMS = ("loss", "ratio", "kl", "d_logp", "d_entropy", "d_kl")


class Matrix(NamedTuple):
    """[B, T, V] of which a row is contiguous: element (b, t, v) is at b * per_sequence + t * per_token + v."""

    ptr: torch.Tensor
    per_sequence: int
    per_token: int


class Tokens(NamedTuple):
    """Per token, [N]: ids, flags (uint8), and `Given` [5, N]; and with `work.indexed`, which token each row belongs to
    (int64)."""

    ids_ptr: torch.Tensor
    flags_ptr: torch.Tensor
    given_ptr: torch.Tensor
    rows_ptr: torch.Tensor


class Work(NamedTuple):
    """What the kernels are compiled for, besides the objective."""

    aligned: bool = False  # every row starts at a multiple of VECTOR
    softcap: bool = False
    reference: bool = False  # the exact KL is wanted: both models are read together
    penalty: bool = False  # entropy or KL have coefficients
    indexed: bool = False  # rows belong to the tokens in `rows`, not to token 0, 1, 2, ...
    terms: bool = False  # the objective is evaluated
    gradient: bool = False
    clear: bool = False  # rows without gradient get 0
    narrowed: bool = False  # gradients of half the logits' width lie in the upper half of the logits' own rows
    rescaled: bool = False  # each row's gradient comes times a power of two, for float16


@dataclass(frozen=True)
class Problem:
    """What the launchers need besides their outputs: logits and reference logits ([B, T, V] or [rows, V], rows
    contiguous; the reference is not read without `work.reference`), and how to work on them."""

    logits: torch.Tensor
    ref: torch.Tensor
    tokens: Tokens
    transform: Transform
    options: Options
    work: Work
    kind: Objective
    launch: Launch

    @property
    def rows(self) -> int:
        return self.logits.numel() // self.vocabulary

    @property
    def length(self) -> int:
        """Rows a sequence: all of them where they are equally far apart, so that no kernel is made for one stride."""
        if all(x.dim() == 2 or x.stride(0) == x.shape[1] * x.stride(1) for x in (self.logits, self.ref)):
            return max(1, self.rows)
        return self.logits.shape[-2]

    def matrix(self, x: torch.Tensor) -> Matrix:
        """x: logits, reference or gradients."""
        return Matrix(x, 0 if self.length >= self.rows else x.stride(0), x.stride(-2))

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    @property
    def count(self) -> int:
        """N."""
        return len(self.tokens.ids_ptr)

    def span(self, splits: int) -> int:
        """Columns a slice: whole blocks."""
        return triton.cdiv(triton.cdiv(self.vocabulary, self.launch.block), splits) * self.launch.block


@on_device
def launch_rows(
    problem: Problem, stats: torch.Tensor, terms: torch.Tensor, grads: torch.Tensor, scales: torch.Tensor
) -> None:
    """stats [7, N], terms [6, N] (float32) and, as `work` says, grads like the logits and scales [rows]."""
    lanes, vector, num_warps = problem.launch
    row_kernel[(problem.rows,)](
        problem.matrix(problem.logits), problem.matrix(problem.ref), problem.tokens, stats, terms,
        problem.matrix(grads), scales, problem.count, problem.length, problem.vocabulary, problem.transform,
        problem.options, problem.work, problem.kind, lanes, vector, **options(num_warps),
    )  # fmt: skip


@on_device
def launch_slices(problem: Problem, sums: torch.Tensor) -> None:
    """sums: float32 [6, rows, splits]."""
    lanes, vector, num_warps = problem.launch
    splits = sums.shape[2]
    slice_kernel[(problem.rows * splits,)](
        problem.matrix(problem.logits), problem.matrix(problem.ref), problem.tokens, sums,
        problem.length, problem.vocabulary, problem.rows, problem.span(splits), problem.transform,
        problem.work, splits, lanes, vector, **options(num_warps),
    )  # fmt: skip


@on_device
def launch_combine(problem: Problem, sums: torch.Tensor, stats: torch.Tensor, terms: torch.Tensor) -> None:
    """From `launch_slices`' sums to stats [7, N] and terms [6, N]."""
    combine_kernel[(problem.rows,)](
        problem.matrix(problem.logits), problem.matrix(problem.ref), problem.tokens, sums, stats, terms,
        problem.count, problem.length, problem.vocabulary, problem.rows, problem.transform, problem.options,
        problem.work, problem.kind, sums.shape[2], problem.launch.vector, **options(1),
    )  # fmt: skip


@on_device
def launch_gradient(
    problem: Problem,
    stats: torch.Tensor,
    coefficients: torch.Tensor,
    grads: torch.Tensor,
    scales: torch.Tensor,
    splits: int,
) -> None:
    """grads like the logits (and scales [rows]) from stats [7, N] and coefficients [3, N]."""
    lanes, vector, num_warps = problem.launch
    gradient_kernel[(problem.rows * splits,)](
        problem.matrix(problem.logits), problem.matrix(problem.ref), problem.tokens, stats, coefficients,
        problem.matrix(grads), scales, problem.count, problem.length, problem.vocabulary, problem.span(splits),
        problem.transform, problem.work, splits, lanes, vector, **options(num_warps),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "length"], do_not_specialize_on_alignment=PER_TOKEN)
def row_kernel(
    logits, ref, tokens, stats_ptr, terms_ptr, grads, scales_ptr, count, length, vocabulary, transform, objective,
    WORK: tl.constexpr, KIND: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program a row: all of it."""
    row = tl.program_id(0).to(tl.int64)
    token, flags = which_token(tokens, row, WORK)
    computed, learning = (flags & COMPUTED) != 0, (flags & LEARNING) != 0
    target = target_column(tokens, token, vocabulary, computed)
    logits_row = row_pointer(logits, row, length, WORK, VECTOR)
    ref_row = row_pointer(ref, row, length, WORK, VECTOR)
    stop = tl.where(computed, vocabulary, 0)
    lanes = read_slice(logits_row, ref_row, target, 0, stop, transform, WORK, LANES, VECTOR)
    stats, coefficients = finish_row(
        merge_lanes(lanes, transform.kappa), logits_row, ref_row, tokens, stats_ptr, terms_ptr,
        token, target, computed, learning, count, transform, objective, WORK, KIND,
    )  # fmt: skip
    if WORK.gradient:
        grads_row = row_pointer(grads, row, length, WORK, VECTOR)
        live = learning & has_gradient(coefficients)
        scale = row_scale(stats, coefficients, transform, live, scales_ptr, row, True, WORK)
        write_slice(
            logits_row, ref_row, grads_row, target, 0, vocabulary, live, stats, coefficients, scale, transform,
            WORK, LANES, VECTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "rows"], do_not_specialize_on_alignment=PER_TOKEN)
def slice_kernel(
    logits, ref, tokens, sums_ptr, length, vocabulary, rows, span, transform,
    WORK: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The sums of one slice of `span` columns of a row, to sums [6, rows, SPLITS]."""
    row, part = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    token, flags = which_token(tokens, row, WORK)
    computed = (flags & COMPUTED) != 0
    target = target_column(tokens, token, vocabulary, computed)
    start = part * span
    stop = tl.where(computed, tl.minimum(start + span, vocabulary), start)
    logits_row = row_pointer(logits, row, length, WORK, VECTOR)
    ref_row = row_pointer(ref, row, length, WORK, VECTOR)
    lanes = read_slice(logits_row, ref_row, target, start, stop, transform, WORK, LANES, VECTOR)
    lane = merge_lanes(lanes, transform.kappa)
    at = sums_ptr + row * SPLITS + part
    step = rows.to(tl.int64) * SPLITS
    tl.store(at, lane.top)
    tl.store(at + step, lane.total)
    tl.store(at + 2 * step, lane.shift)
    tl.store(at + 3 * step, lane.gap)
    tl.store(at + 4 * step, lane.ref_top)
    tl.store(at + 5 * step, lane.ref_total)


@triton.jit(do_not_specialize=["count", "length", "rows"], do_not_specialize_on_alignment=PER_TOKEN)
def combine_kernel(
    logits, ref, tokens, sums_ptr, stats_ptr, terms_ptr, count, length, vocabulary, rows, transform, objective,
    WORK: tl.constexpr, KIND: tl.constexpr, SPLITS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The slices of a row, in their order, to its statistics, loss and coefficients."""
    row = tl.program_id(0).to(tl.int64)
    token, flags = which_token(tokens, row, WORK)
    computed, learning = (flags & COMPUTED) != 0, (flags & LEARNING) != 0
    target = target_column(tokens, token, vocabulary, computed)
    at = sums_ptr + row * SPLITS + tl.arange(0, SPLITS)
    step = rows.to(tl.int64) * SPLITS
    lanes = Lanes(
        tl.load(at),
        tl.load(at + step),
        tl.load(at + 2 * step),
        tl.load(at + 3 * step),
        tl.load(at + 4 * step),
        tl.load(at + 5 * step),
    )
    finish_row(
        merge_lanes(lanes, transform.kappa), row_pointer(logits, row, length, WORK, VECTOR),
        row_pointer(ref, row, length, WORK, VECTOR), tokens, stats_ptr, terms_ptr,
        token, target, computed, learning, count, transform, objective, WORK, KIND,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "length"], do_not_specialize_on_alignment=PER_TOKEN)
def gradient_kernel(
    logits, ref, tokens, stats_ptr, coefficients_ptr, grads, scales_ptr, count, length, vocabulary, span, transform,
    WORK: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of a slice of `span` columns of a row, from stored statistics [7, N] and coefficients [3, N]."""
    row, part = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    token, _ = which_token(tokens, row, WORK)
    at = coefficients_ptr + token
    step = count.to(tl.int64)
    coefficients = Coefficients(tl.load(at), tl.load(at + step), tl.load(at + 2 * step))
    live = has_gradient(coefficients)
    stats = load_statistics(stats_ptr, token, step, live)
    target = target_column(tokens, token, vocabulary, live)
    start = part * span
    # in place, another slice's target may be overwritten by its own program at any time: it is not read
    target = tl.where((target >= start) & (target < start + span), target, -1)
    scale = row_scale(stats, coefficients, transform, live, scales_ptr, row, part == 0, WORK)
    write_slice(
        row_pointer(logits, row, length, WORK, VECTOR), row_pointer(ref, row, length, WORK, VECTOR),
        row_pointer(grads, row, length, WORK, VECTOR), target, start, tl.minimum(start + span, vocabulary), live,
        stats, coefficients, scale, transform, WORK, LANES, VECTOR,
    )  # fmt: skip


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
def read_slice(
    logits_row, ref_row, target, start, stop, transform,
    WORK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The running sums over columns start to stop without the target's (the reference's sums with it)."""
    lanes = no_lanes(LANES)
    at = start
    for _ in range(0, (stop - start) // (LANES * VECTOR)):
        lanes = read_block(lanes, logits_row, ref_row, at, stop, target, transform, WORK, False, LANES, VECTOR)
        at += LANES * VECTOR
    return read_block(lanes, logits_row, ref_row, at, stop, target, transform, WORK, True, LANES, VECTOR)


@triton.jit
def read_block(
    lanes, logits_row, ref_row, at, stop, target, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    cols = block_columns(LANES, VECTOR)
    z = capped(load_block(logits_row, at, cols, stop, LAST), transform, WORK.softcap)
    if (target >= at) & (target < at + LANES * VECTOR):
        z = tl.where(cols == target - at, float("-inf"), z)
    ref = z
    if WORK.reference:
        ref = capped(load_block(ref_row, at, cols, stop, LAST), transform, WORK.softcap)
    return add_block(lanes, z, ref, transform.kappa, WORK.reference)


@triton.jit
def load_block(row_ptr, at, cols, stop, LAST: tl.constexpr):
    """The block that starts at column `at`. Only a slice's last one needs a mask."""
    if LAST:
        logits = tl.load(row_ptr + at + cols, mask=at + cols < stop, other=float("-inf"))
    else:
        logits = tl.load(row_ptr + at + cols)
    return logits.to(tl.float32)


@triton.jit
def load_target(row_ptr, target, transform, WORK: tl.constexpr):
    """The target's own z; NaN for an id outside the vocabulary."""
    x = tl.load(row_ptr + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    return capped(x, transform, WORK.softcap)


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


@triton.jit
def load_given(tokens, token, step, wanted):
    at = tokens.given_ptr + token
    return Given(
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
def write_slice(
    logits_row, ref_row, grads_row, target, start, stop, live, stats, coefficients, scale, transform,
    WORK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of columns start to stop, from the last block back to the first; 0 where the row has none."""
    block: tl.constexpr = LANES * VECTOR
    scaled = Coefficients(coefficients.logp * scale, coefficients.entropy * scale, coefficients.kl * scale)
    z = load_target(logits_row, tl.where(live, target, -1), transform, WORK)
    ref = z
    if WORK.reference:
        ref = load_target(ref_row, tl.where(live, target, -1), transform, WORK)
    at_target = target_gradient(z, ref, stats, scaled, transform, WORK.softcap, WORK.penalty, WORK.reference)
    if not WORK.narrowed:
        # in place, another warp may be about to overwrite the target's logit; narrowed, each block has a barrier
        tl.debug_barrier()

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
            tl.store(grads_row + at + cols, nothing, mask=at + cols < stop)
            at += block


@triton.jit
def write_block(
    logits_row, ref_row, grads_row, at, stop, target, at_target, stats, coefficients, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    cols = block_columns(LANES, VECTOR)
    x = load_block(logits_row, at, cols, stop, LAST)
    ref = x
    if WORK.reference:
        ref = capped(load_block(ref_row, at, cols, stop, LAST), transform, WORK.softcap)
    if WORK.narrowed:
        # a block's gradients lie over logits of this block or later ones: all threads have to have read it
        tl.debug_barrier()
    grads = block_gradient(x, ref, stats, coefficients, transform, WORK.softcap, WORK.penalty, WORK.reference)
    if (target >= at) & (target < at + LANES * VECTOR):
        grads = tl.where(cols == target - at, at_target, grads)
    grads = grads.to(grads_row.dtype.element_ty)
    if LAST:
        tl.store(grads_row + at + cols, grads, mask=at + cols < stop)
    else:
        tl.store(grads_row + at + cols, grads)
