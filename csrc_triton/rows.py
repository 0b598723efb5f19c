"""The kernels over rows of logits [rows, V]: statistics, loss and coefficient, gradient.

A row's statistics need all of it, its gradient needs them: two passes. `row_kernel` makes both in one program, the
second from the last block back to the first, so that it begins with what the cache still holds; with the row in the
cache, a logit of b bytes costs b bytes read and b written. With few rows, `slice_kernel`, `combine_kernel` and
`gradient_kernel` do the same with several programs a row, and sum in a fixed order. `gradient_kernel` is also the
backward of statistics that somebody else turned into coefficients.

Rows that are not computed are not read; where they have room for a gradient it is filled with 0 if `work.clear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .access import load_statistics, row_shift, slice_of, target_column, vector_pointer, which_token
from .first_pass import finish_row, read_slice
from .launch import on_device, options
from .objective import Coefficients
from .problem import COMPUTED, LEARNING, Problem
from .second_pass import has_gradient, row_scale, write_slice
from .softmax import Lanes, merge_lanes

# read one number at a time: no kernel is made for where in a batch they begin
PER_TOKEN = ["tokens", "stats_ptr", "terms_ptr", "coefficients_ptr", "scales_ptr"]


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
    shift = row_shift(logits, row, length, WORK, VECTOR)
    target = target_column(tokens, token, vocabulary, computed, shift)
    columns = slice_of(0, vocabulary, vocabulary, shift, WORK, VECTOR)
    logits_row = vector_pointer(logits, row, length, WORK, VECTOR)
    ref_row = vector_pointer(ref, row, length, WORK, VECTOR)
    lanes = read_slice(logits_row, ref_row, target, columns, computed, transform, WORK, LANES, VECTOR)
    stats, coefficients = finish_row(
        merge_lanes(lanes, transform.kappa), logits_row, ref_row, tokens, stats_ptr, terms_ptr,
        token, target, computed, learning, count, transform, objective, WORK, KIND,
    )  # fmt: skip
    if WORK.gradient:
        grads_row = vector_pointer(grads, row, length, WORK, VECTOR)
        live = learning & has_gradient(coefficients)
        scale = row_scale(stats, coefficients, transform, live, scales_ptr, row, True, WORK)
        write_slice(
            logits_row, ref_row, grads_row, target, columns, live, stats, coefficients, scale, transform,
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
    shift = row_shift(logits, row, length, WORK, VECTOR)
    target = target_column(tokens, token, vocabulary, computed, shift)
    columns = slice_of(part, span, vocabulary, shift, WORK, VECTOR)
    logits_row = vector_pointer(logits, row, length, WORK, VECTOR)
    ref_row = vector_pointer(ref, row, length, WORK, VECTOR)
    lanes = read_slice(logits_row, ref_row, target, columns, computed, transform, WORK, LANES, VECTOR)
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
    target = target_column(tokens, token, vocabulary, computed, row_shift(logits, row, length, WORK, VECTOR))
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
        merge_lanes(lanes, transform.kappa), vector_pointer(logits, row, length, WORK, VECTOR),
        vector_pointer(ref, row, length, WORK, VECTOR), tokens, stats_ptr, terms_ptr,
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
    shift = row_shift(logits, row, length, WORK, VECTOR)
    target = target_column(tokens, token, vocabulary, live, shift)
    columns = slice_of(part, span, vocabulary, shift, WORK, VECTOR)
    # in place, another slice's target may be overwritten by its own program at any time: it is not read
    target = tl.where((target >= columns.start) & (target < columns.stop), target, -1)
    scale = row_scale(stats, coefficients, transform, live, scales_ptr, row, part == 0, WORK)
    write_slice(
        vector_pointer(logits, row, length, WORK, VECTOR), vector_pointer(ref, row, length, WORK, VECTOR),
        vector_pointer(grads, row, length, WORK, VECTOR), target, columns, live, stats, coefficients, scale,
        transform, WORK, LANES, VECTOR,
    )  # fmt: skip
