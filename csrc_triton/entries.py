"""The few entries of a row's gradient that are worth a product, and the products of these.

    leaves a row: its smallest entries, as many as have squares that add up to no more than a budget

`measure_kernel` reads one logit a row and stores the square of its target's gradient. `select_kernel` reads a row of b
bytes a logit once and writes 8 bytes for each entry that stays. `gather_kernel` reads a row of the head for each of
them, `scatter_kernel` one of the hidden states; neither has two programs that write to one place.

A row's bound is easy before its gradient is known. The sizes of all entries but the target's add up to at most the
`tail`, so the squares of those below a bound add up to no more than bound * tail, and to no more than V bound^2; and no
entry above the root of the budget can leave. What lies above the easy bound is a short list, of which the smallest
entries leave once the squares of the rest are known. A row whose list has no room says so by its count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .access import (
    block_columns,
    load_statistics,
    load_target,
    load_with_reference,
    row_pointer,
    target_column,
    which_token,
)
from .launch import next_power_of_two, on_device, options
from .objective import Coefficients
from .problem import Problem
from .rows import PER_TOKEN
from .second_pass import gradient_with_target, has_gradient
from .softmax import target_gradient

# a row's list: as many entries as a program can hold in its registers
CAPACITY = 1024
# elements of a row of a matrix that one program of a product takes: at least one for each of its threads, or several
# would add to the same
_NARROWEST, _WIDEST = 128, 1024
_NUM_WARPS = 2


@on_device
def launch_measure(problem: Problem, stats: torch.Tensor, coefficients: torch.Tensor, sizes: torch.Tensor) -> None:
    """sizes [2, rows]: the square of the target's gradient, and 1 for a row that has a gradient, else 0."""
    measure_kernel[(problem.rows,)](
        problem.matrix(problem.logits), problem.matrix(problem.ref), problem.tokens, stats, coefficients, sizes,
        problem.count, problem.length, problem.vocabulary, problem.rows, problem.transform, problem.work,
        problem.launch.vector, **options(1),
    )  # fmt: skip


@on_device
def launch_select(
    problem: Problem,
    stats: torch.Tensor,
    coefficients: torch.Tensor,
    budget: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """budget: 0-d, the squares that may leave a row. columns (int32) and values (float32) [rows, CAPACITY], of which
    the first counts [rows] (int32) are written, in the order of the columns; a count above CAPACITY says that there
    were too many, or that the budget is not above 0. sums [3, rows]: the squares of what leaves, the squares of all
    there is, and what leaves."""
    # half of what other kernels have in registers: the places of a block's entries are there too
    lanes, vector = max(32, problem.launch.lanes // 2), problem.launch.vector
    num_warps = min(problem.launch.num_warps, max(1, lanes // 64))
    select_kernel[(problem.rows,)](
        problem.matrix(problem.logits), problem.matrix(problem.ref), problem.tokens, stats, coefficients, budget,
        columns, values, counts, sums, problem.count, problem.length, problem.vocabulary, problem.rows,
        problem.transform, problem.work, columns.shape[1], lanes, vector, **options(num_warps),
    )  # fmt: skip


@on_device
def launch_gather(
    columns: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> None:
    """out [rows, D], float32 = the lists of `launch_select` times weight [V, D]; 0 for a row without a list."""
    rows, width = out.shape
    block = _block(width)
    gather_kernel[(rows, triton.cdiv(width, block))](
        columns, values, counts, weight, out, weight.stride(0), weight.stride(1), width, columns.shape[1], block,
        **options(_NUM_WARPS),
    )  # fmt: skip


@on_device
def launch_scatter(
    columns: torch.Tensor,
    ends: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    matrix: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """total [V, D] += the entries' values times their rows of matrix [n, D], summed in float32 and rounded once.

    The entries [m] are in the order of their columns; ends: where the entries of the same column end."""
    width = total.shape[1]
    block = _block(width)
    scatter_kernel[(len(columns), triton.cdiv(width, block))](
        columns,
        ends,
        rows,
        values,
        matrix,
        total,
        matrix.stride(0),
        total.stride(0),
        width,
        block,
        **options(_NUM_WARPS),
    )


def _block(width: int) -> int:
    return max(_NARROWEST, min(_WIDEST, next_power_of_two(width)))


@triton.jit
def load_row(tokens, stats_ptr, coefficients_ptr, row, count, vocabulary, WORK: tl.constexpr):
    """A row's statistics [7, N] and coefficients [3, N], its target, and whether it has a gradient."""
    token, _ = which_token(tokens, row, WORK)
    at = coefficients_ptr + token
    step = count.to(tl.int64)
    coefficients = Coefficients(tl.load(at), tl.load(at + step), tl.load(at + 2 * step))
    live = has_gradient(coefficients)
    stats = load_statistics(stats_ptr, token, step, live)
    return stats, coefficients, target_column(tokens, token, vocabulary, live), live


@triton.jit
def gradient_at_target(logits_row, ref_row, target, stats, coefficients, transform, WORK: tl.constexpr):
    z = load_target(logits_row, target, transform, WORK)
    ref = z
    if WORK.reference:
        ref = load_target(ref_row, target, transform, WORK)
    return target_gradient(z, ref, stats, coefficients, transform, WORK.softcap, WORK.penalty, WORK.reference)


@triton.jit(do_not_specialize=["count", "length", "rows"], do_not_specialize_on_alignment=PER_TOKEN)
def measure_kernel(
    logits, ref, tokens, stats_ptr, coefficients_ptr, sizes_ptr, count, length, vocabulary, rows, transform,
    WORK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stats, coefficients, target, live = load_row(tokens, stats_ptr, coefficients_ptr, row, count, vocabulary, WORK)
    grad = gradient_at_target(
        row_pointer(logits, row, length, WORK, VECTOR), row_pointer(ref, row, length, WORK, VECTOR), target,
        stats, coefficients, transform, WORK,
    )  # fmt: skip
    tl.store(sizes_ptr + row, tl.where(live, grad * grad, 0.0))
    tl.store(sizes_ptr + rows + row, live.to(tl.float32))


@triton.jit
def load_gradient(
    logits_row, ref_row, at, stop, target, at_target, stats, coefficients, transform,
    WORK: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of the block that starts at column `at`, 0 behind the end."""
    cols = block_columns(LANES, VECTOR)
    x, ref = load_with_reference(logits_row, ref_row, at, cols, stop, transform, WORK, LAST)
    grads = gradient_with_target(x, ref, at, cols, target, at_target, stats, coefficients, transform, WORK)
    return tl.where(at + cols < stop, grads, 0.0)


@triton.jit
def tail_of(
    logits_row, ref_row, stop, root, target, at_target, stats, coefficients, transform,
    WORK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What the sizes of the entries that may leave add up to at most, without the target's."""
    tail = tl.abs(coefficients.logp) * stats.others * transform.slope
    if WORK.penalty:
        sums = tl.zeros([LANES], tl.float32)
        at = 0
        for _ in range(0, tl.cdiv(stop, LANES * VECTOR)):
            sizes = tl.abs(
                load_gradient(
                    logits_row, ref_row, at, stop, target, at_target, stats, coefficients, transform,
                    WORK, True, LANES, VECTOR,
                )
            )  # fmt: skip
            sums += tl.sum(tl.where(sizes > root, 0.0, sizes), 1)
            at += LANES * VECTOR
        tail = tl.sum(sums, 0)
    return tail


@triton.jit
def list_block(grads, above, at, found, columns_row, values_row, ROOM: tl.constexpr, LANES: tl.constexpr,
               VECTOR: tl.constexpr):  # fmt: skip
    """Appends the entries `above` of a block to the row's list, which has `found` so far; how many it has then."""
    chosen = above.to(tl.int32)
    of_lane = tl.sum(chosen, 1)
    before = tl.cumsum(of_lane, 0) - of_lane
    place = found + before[:, None] + tl.cumsum(chosen, 1) - chosen
    fits = above & (place < ROOM)
    tl.store(columns_row + place, at + block_columns(LANES, VECTOR), mask=fits)
    tl.store(values_row + place, grads, mask=fits)
    return found + tl.sum(of_lane, 0)


@triton.jit
def shorten_list(columns_row, values_row, found, rest, budget, ROOM: tl.constexpr):
    """The smallest entries of the list leave, as many as the budget allows beside the squares of the `rest`; how many
    stay, the squares of all that leaves, and the sum of what leaves the list."""
    slots = tl.arange(0, ROOM)
    used = slots < found
    # what other threads have written
    tl.debug_barrier()
    columns = tl.load(columns_row + slots)  # those behind the list's end go nowhere
    values = tl.load(values_row + slots, mask=used, other=0.0)
    # nobody stores before all have loaded; where Triton exchanges the values it has barriers of its own, else not
    tl.debug_barrier()
    # positive floats are in the order of their bits, of which the largest number that keeps the budget is made
    sizes, squares = tl.abs(values).to(tl.int32, bitcast=True), values * values
    low, step = tl.full([], 0, tl.int32), tl.full([], 1 << 30, tl.int32)
    for _ in range(0, 31):
        leaves = rest + tl.sum(tl.where(sizes < low + step, squares, 0.0), 0) <= budget
        low = tl.where(leaves, low + step, low)
        step = step >> 1
    stays = (used & (sizes >= low)).to(tl.int32)
    place = tl.cumsum(stays, 0) - stays
    tl.store(columns_row + place, columns, mask=stays != 0)
    tl.store(values_row + place, values, mask=stays != 0)
    leaving = tl.where(stays != 0, 0.0, values)
    return tl.sum(stays, 0), rest + tl.sum(leaving * leaving, 0), tl.sum(leaving, 0)


@triton.jit(do_not_specialize=["count", "length", "rows"], do_not_specialize_on_alignment=PER_TOKEN)
def select_kernel(
    logits, ref, tokens, stats_ptr, coefficients_ptr, budget_ptr, columns_ptr, values_ptr, counts_ptr, sums_ptr,
    count, length, vocabulary, rows, transform,
    WORK: tl.constexpr, ROOM: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    stats, coefficients, target, live = load_row(tokens, stats_ptr, coefficients_ptr, row, count, vocabulary, WORK)
    logits_row = row_pointer(logits, row, length, WORK, VECTOR)
    ref_row = row_pointer(ref, row, length, WORK, VECTOR)
    columns_row, values_row = columns_ptr + row * ROOM, values_ptr + row * ROOM
    budget = tl.load(budget_ptr)
    usable = live & (budget > 0)
    stop = tl.where(usable, vocabulary, 0)
    own = gradient_at_target(logits_row, ref_row, target, stats, coefficients, transform, WORK)
    root = tl.sqrt(budget)
    tail = tail_of(logits_row, ref_row, stop, root, target, own, stats, coefficients, transform, WORK, LANES, VECTOR)
    # 1 column is a constant, which has no type
    entries = tl.zeros([], tl.float32) + vocabulary
    bound = tl.maximum(tl.minimum(budget / tail, root), root / tl.sqrt(entries))
    found = tl.where(live & (budget > 0), 0, tl.where(live, ROOM + 1, 0))
    rest, whole, small = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    at = 0
    for _ in range(0, tl.cdiv(stop, LANES * VECTOR)):
        grads = load_gradient(
            logits_row, ref_row, at, stop, target, own, stats, coefficients, transform, WORK, True, LANES, VECTOR
        )
        # NaN stays
        above = ((tl.abs(grads) < bound) == 0) | (block_columns(LANES, VECTOR) == target - at)
        low = tl.where(above, 0.0, grads)
        rest += tl.sum(low * low, 1)
        small += tl.sum(low, 1)
        whole += tl.sum(grads * grads, 1)
        if tl.sum(tl.sum(above.to(tl.int32), 1), 0) > 0:
            found = list_block(grads, above, at, found, columns_row, values_row, ROOM, LANES, VECTOR)
        at += LANES * VECTOR
    left, left_sum = tl.sum(rest, 0), tl.sum(small, 0)
    if found > ROOM:
        left, left_sum = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    elif usable:
        found, left, shortened = shorten_list(columns_row, values_row, found, left, budget, ROOM)
        left_sum += shortened
    tl.store(counts_ptr + row, found)
    tl.store(sums_ptr + row, left)
    tl.store(sums_ptr + rows + row, tl.sum(whole, 0))
    tl.store(sums_ptr + 2 * rows + row, left_sum)


@triton.jit
def gather_kernel(
    columns_ptr, values_ptr, counts_ptr, weight_ptr, out_ptr, per_row, per_column, width,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK elements of a row: the entries' rows of the matrix one after the other."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, tl.where(count > ROOM, 0, count)):
        column = tl.load(columns_ptr + row * ROOM + at).to(tl.int64)
        value = tl.load(values_ptr + row * ROOM + at)
        part = tl.load(weight_ptr + column * per_row + cols * per_column, mask=cols < width, other=0.0)
        total += value * part.to(tl.float32)
    tl.store(out_ptr + row * width + cols, total, mask=cols < width)


@triton.jit
def scatter_kernel(
    columns_ptr, ends_ptr, rows_ptr, values_ptr, matrix_ptr, total_ptr, per_row, total_per_row, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK elements of a column's row of the total: that of its first entry; those of others end."""
    first = tl.program_id(0)
    column = tl.load(columns_ptr + first).to(tl.int64)
    before = tl.load(columns_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if before != column:
        cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at_total = total_ptr + column * total_per_row + cols
        total = tl.load(at_total, mask=cols < width, other=0.0).to(tl.float32)
        for at in range(first, tl.load(ends_ptr + first).to(tl.int32)):
            row = tl.load(rows_ptr + at).to(tl.int64)
            part = tl.load(matrix_ptr + row * per_row + cols, mask=cols < width, other=0.0)
            total += tl.load(values_ptr + at) * part.to(tl.float32)
        tl.store(at_total, total, mask=cols < width)
