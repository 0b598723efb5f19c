"""The kernel of distillation over rows of logits [rows, V]: the divergence from a teacher, and the student's gradient.

One program a row. It reads the row once for the divergence (with a mixture in it twice), and once more from the last
block back to the first for the gradient, which may lie over the student's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .access import block_columns, load_capped, row_pointer, store_block
from .launch import Launch, next_power_of_two, on_device, options
from .listed_teacher import Listed, read_classes, tail_gradient, write_listed
from .maths import power_of_two
from .problem import Matrix
from .softmax import LogitScaling, cap_slope
from .whole_teacher import pair_gradient, read_pair

# ids a tile at least, so that lists of nearly every length are one kernel
_LEAST_TILE = 32


class Work(NamedTuple):
    """What the kernel is compiled for, besides the divergence."""

    aligned: bool = False  # every row starts at a multiple of VECTOR
    softcap: bool = False
    mixed: bool = False  # the divergence needs the mixture of both distributions
    listed: bool = False  # the teacher lists ids
    chunk: bool = False  # row i is of the i-th token in `rows`, not at its own place among all tokens
    gradient: bool = False
    narrowed: bool = False  # gradients of half the logits' width lie in the upper half of the logits' own rows
    rescaled: bool = False  # each row's gradient comes times a power of two, for float16


class Rows(NamedTuple):
    """int64 [rows], the token of each row; float32 [N], of each token the divergence and what its gradient is times."""

    token_ptr: torch.Tensor
    values_ptr: torch.Tensor
    coefficients_ptr: torch.Tensor


class Numbers(NamedTuple):
    """A change compiles nothing. bound: see `divergence.largest_slope`."""

    beta: float
    teacher_kappa: float
    bound: float


@dataclass(frozen=True)
class DistillProblem:
    """logits: [rows or N, V], rows contiguous. teacher: likewise, not read where it is listed. count: K, ids a row."""

    logits: torch.Tensor
    teacher: torch.Tensor
    listed: Listed
    count: int
    rows: Rows
    transform: LogitScaling
    numbers: Numbers
    name: str
    work: Work
    launch: Launch


@on_device
def launch_distill(problem: DistillProblem, grads: torch.Tensor, scales: torch.Tensor) -> None:
    """The divergences to `rows.values_ptr` and, as `work` says, grads like the logits and scales [rows]."""
    lanes, vector, num_warps = problem.launch
    tile = max(_LEAST_TILE, next_power_of_two(problem.count)) if problem.work.listed else 1
    logits, teacher, out = (Matrix(x, 0, x.stride(0)) for x in (problem.logits, problem.teacher, grads))
    distill_kernel[(len(problem.rows.token_ptr),)](
        logits, teacher, problem.listed, problem.rows, out, scales, problem.count, len(problem.rows.values_ptr),
        problem.logits.shape[1], problem.transform, problem.numbers, problem.work, problem.name, tile, lanes, vector,
        **options(num_warps),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "length"], do_not_specialize_on_alignment=["listed", "rows", "scales_ptr"])
def distill_kernel(
    logits, teacher, listed, rows, grads, scales_ptr, count, length, vocabulary, transform, numbers,
    WORK: tl.constexpr, NAME: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(rows.token_ptr + row)
    place = token
    if WORK.chunk:
        place = row
    length = tl.maximum(length, 1)
    logits_row = row_pointer(logits, place, length, WORK, VECTOR)
    teacher_row = row_pointer(teacher, place, length, WORK, VECTOR)
    if WORK.listed:
        found = read_classes(
            logits_row, listed, row, count, vocabulary, transform, numbers, WORK, NAME, TILE, LANES, VECTOR
        )
    else:
        found = read_pair(logits_row, teacher_row, vocabulary, transform, numbers, WORK, NAME, LANES, VECTOR)
    tl.store(rows.values_ptr + token, found.value)
    if WORK.gradient:
        coefficient = tl.load(rows.coefficients_ptr + token)
        # an infinite divergence has no slope; NaN has one: it must show
        live = (coefficient != 0) & (found.value != float("inf"))
        scale = row_scale(found.value, coefficient, transform, numbers, live, scales_ptr, row, WORK, NAME)
        grads_row = row_pointer(grads, place, length, WORK, VECTOR)
        write_row(
            logits_row, teacher_row, grads_row, vocabulary, live, found, coefficient * scale * transform.slope,
            transform, numbers, WORK, NAME, LANES, VECTOR,
        )  # fmt: skip


@triton.jit
def row_scale(value, coefficient, transform, numbers, live, scales_ptr, row, WORK: tl.constexpr, NAME: tl.constexpr):
    """The power of two that brings the row's largest possible gradient to 2^13..2^14 (float16 ends at 2^16), or 1."""
    scale = tl.full([], 1.0, tl.float32)
    if WORK.rescaled:
        largest = scale * numbers.bound
        if NAME == "reverse":
            largest += 2.0 * value
        exponent = 14.0 - tl.ceil(tl.log2(largest * tl.abs(coefficient) * transform.slope))
        exponent = tl.minimum(exponent, 120.0, propagate_nan=tl.PropagateNan.ALL)
        scale = power_of_two(tl.where(live, exponent, 120.0))
        tl.store(scales_ptr + row, scale)
    return scale


@triton.jit
def write_row(
    logits_row, teacher_row, grads_row, vocabulary, live, found, factor, transform, numbers,
    WORK: tl.constexpr, NAME: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """factor times d D / d s, from the last block back to the first; 0 where the row has none."""
    block: tl.constexpr = LANES * VECTOR
    if WORK.listed and not WORK.narrowed:
        # in place, another warp may be about to overwrite a listed logit; narrowed, each block has a barrier
        tl.debug_barrier()
    whole = vocabulary // block
    at = whole * block
    end = tl.where(live, vocabulary, 0)
    write_block(
        logits_row, teacher_row, grads_row, at, end, found, factor, transform, numbers, WORK, NAME, True, LANES, VECTOR
    )
    for _ in range(0, tl.where(live, whole, 0)):
        at -= block
        write_block(
            logits_row, teacher_row, grads_row, at, end, found, factor, transform, numbers, WORK, NAME, False,
            LANES, VECTOR,
        )  # fmt: skip
    if WORK.listed:
        # over the tail's share, which other threads wrote there
        tl.debug_barrier()
        write_listed(grads_row, found, factor, end, transform, WORK.softcap)
    nothing = tl.zeros([LANES, VECTOR], grads_row.dtype.element_ty)
    cols = block_columns(LANES, VECTOR)
    at = 0
    for _ in range(0, tl.where(live, 0, tl.cdiv(vocabulary, block))):
        store_block(grads_row, at, cols, nothing, vocabulary, WORK.chunk, True)
        at += block


@triton.jit
def write_block(
    logits_row, teacher_row, grads_row, at, stop, found, factor, transform, numbers,
    WORK: tl.constexpr, NAME: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    cols = block_columns(LANES, VECTOR)
    z = load_capped(logits_row, at, cols, stop, transform, WORK, LAST)
    r = z
    if not WORK.listed:
        r = load_capped(teacher_row, at, cols, stop, transform, WORK, LAST)
    if WORK.narrowed:
        # a block's gradients lie over logits of this block or later ones: all threads have to have read it
        tl.debug_barrier()
    if WORK.listed:
        grads = tail_gradient(found, z, transform) * factor
    else:
        grads = pair_gradient(found, z, r, transform, numbers, NAME) * factor
    if WORK.softcap:
        grads = tl.where(z == float("-inf"), 0.0, grads * cap_slope(z, transform))
    store_block(grads_row, at, cols, grads, stop, WORK.chunk, LAST)
