"""The kernels that choose a row's few large entries and multiply them, against float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from test_kernels import ALL, PENALTIES, PLAIN, SOFTCAP, exact, make, name_of, on_device, random_logits
from torch import Tensor

from prefixloss import LossConfig
from prefixloss._kernels import entries, rows
from prefixloss._kernels.problem import Problem

NAN = math.nan


class Selected(NamedTuple):
    """What the kernel wrote, on the CPU, and the dense gradient [n, V] of the other kernels."""

    columns: Tensor
    values: Tensor
    counts: Tensor
    sums: Tensor
    dense: Tensor


def statistics(problem: Problem, coefficients: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """stats [7, N] and coefficients [3, N]."""
    stats, terms = problem.logits.new_zeros(7, problem.count), problem.logits.new_zeros(6, problem.count)
    alone = make_alone(problem, gradient=False)
    rows.launch_rows(alone, stats, terms, problem.logits, stats)
    return stats, terms[3:] if coefficients is None else coefficients


def make_alone(problem: Problem, **work: bool) -> Problem:
    return Problem(**{**vars(problem), "work": problem.work._replace(**work)})


def select(problem: Problem, budget: float, room: int = 64, coefficients: Tensor | None = None) -> Selected:
    stats, coefficients = statistics(problem, coefficients)
    count = problem.rows
    columns = on_device(torch.full((count, room), -7), torch.int32)
    values = on_device(torch.full((count, room), NAN))
    counts, sums = on_device(torch.full((count,), -1), torch.int32), on_device(torch.full((3, count), NAN))
    entries.launch_select(problem, stats, coefficients, on_device(budget), columns, values, counts, sums)
    dense = torch.zeros_like(problem.logits)
    rows.launch_gradient(problem, stats, coefficients, dense, stats, 1)
    return Selected(*(x.cpu() for x in (columns, values, counts, sums, dense)))


def kept(made: Selected, row: int) -> Tensor:
    """The row's list as a row of the matrix."""
    count = int(made.counts[row])
    columns = made.columns[row, :count].long()
    assert bool((columns.diff() > 0).all())
    return torch.zeros_like(made.dense[row]).index_put_((columns,), made.values[row, :count])


@pytest.mark.parametrize("vocabulary", [1, 130, 300])
@pytest.mark.parametrize("config", [PLAIN, SOFTCAP, PENALTIES, ALL], ids=name_of)
def test_what_leaves_a_row_is_the_smallest_and_all_that_the_budget_allows(config: LossConfig, vocabulary: int) -> None:
    logits = random_logits(3, vocabulary)
    logits[1] *= 4
    problem = make(logits, config, ref=random_logits(3, vocabulary, 1), ids=[0, vocabulary // 2, vocabulary - 1])
    wanted = exact(problem, config)[1]
    for share in (0.02, 0.3, 2.0):
        budget = max(1e-20, (share * float(wanted.norm(dim=1).mean())) ** 2)
        made = select(problem, budget, 1024)
        for row, of_all in enumerate(made.dense):
            stays = kept(made, row)
            assert torch.equal(stays[stays != 0], of_all[stays != 0])
            left = torch.where(stays == 0, of_all, 0.0).double()
            # of float32 sums over the row
            assert float(left.square().sum()) <= budget * (1 + 1e-5)
            assert float(made.sums[0, row]) == pytest.approx(float(left.square().sum()), rel=1e-5, abs=1e-30)
            assert float(made.sums[1, row]) == pytest.approx(float(of_all.double().square().sum()), rel=1e-5)
            # each of V float32 terms may be off by a few units of its own
            assert float(made.sums[2, row]) == pytest.approx(float(left.sum()), abs=1e-5 * float(left.abs().sum()))
            if int(made.counts[row]) > 0:
                smallest = float(stays[stays != 0].abs().min())
                assert float(left.abs().max()) <= smallest
                assert float(left.square().sum()) + smallest**2 > budget * (1 - 1e-5)


def test_entries_of_the_same_size_stay_together() -> None:
    problem = make(on_device(torch.zeros(2, 300)), ids=[5, 299])
    # each of the others has 1 / 300
    made = select(problem, 100 / 300**2, 512)
    assert made.counts.tolist() == [300, 300]
    assert select(problem, 300 / 300**2, 512).counts.tolist() == [1, 1]


def test_a_list_without_room_says_so_and_writes_nothing_behind_its_own() -> None:
    problem = make(on_device(torch.stack([torch.zeros(300), 30.0 * (torch.arange(300) == 7)])), ids=[5, 9])
    made = select(problem, 1e-8, 16)
    assert int(made.counts[0]) > 16
    assert made.sums[::2, 0].tolist() == [0.0, 0.0]  # all of it stays
    assert made.counts[1] == 2
    assert made.columns[1, :2].tolist() == [7, 9]
    assert made.columns[1, 2:].tolist() == [-7] * 14


@pytest.mark.parametrize("budget", [0.0, -1.0, NAN])
def test_without_a_budget_every_list_is_too_long(budget: float) -> None:
    made = select(make(random_logits(2, 130)), budget)
    assert bool((made.counts > 64).all())
    assert made.sums[0].tolist() == made.sums[2].tolist() == [0.0, 0.0]
    assert bool((made.columns == -7).all())


def test_rows_without_coefficients_are_never_read_and_have_no_entries() -> None:
    logits = random_logits(3, 130)
    coefficients = on_device(torch.zeros(3, 3))
    coefficients[0, 2] = 1.0
    problem = make(logits)
    stats, _ = statistics(problem)
    logits[:2] = NAN
    sizes = on_device(torch.full((2, 3), NAN))
    entries.launch_measure(problem, stats, coefficients, sizes)
    assert sizes[0, :2].tolist() == [0.0, 0.0]
    assert sizes[1].tolist() == [0.0, 0.0, 1.0]
    made = select(problem, 1e-6, 256, coefficients)
    assert made.counts[:2].tolist() == [0, 0]
    assert int(made.counts[2]) > 0
    assert made.sums[:, :2].tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("config", [PLAIN, ALL], ids=name_of)
def test_a_measure_is_the_square_of_the_targets_gradient(config: LossConfig) -> None:
    problem = make(random_logits(3, 130), config, ref=random_logits(3, 130, 1), ids=[0, 64, 129])
    stats, coefficients = statistics(problem)
    sizes = on_device(torch.full((2, 3), NAN))
    entries.launch_measure(problem, stats, coefficients, sizes)
    wanted = exact(problem, config)[1].gather(1, torch.tensor([[0], [64], [129]])).squeeze(1)
    torch.testing.assert_close(sizes[0].cpu().double(), wanted.square(), rtol=1e-4, atol=1e-9)


def test_a_nan_in_a_row_stays_in_its_list() -> None:
    logits = random_logits(2, 130)
    logits[1, 70] = NAN
    made = select(make(logits), 1e-3, 256)
    assert made.counts[1] == 130
    assert bool(made.values[1, :130].isnan().all())
    assert not bool(made.values[0, : int(made.counts[0])].isnan().any())


def lists(matrix: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a matrix as the kernel writes them, with rubbish behind them."""
    counts = (matrix != 0).sum(1)
    columns, values = torch.full((len(matrix), room), 10**6), torch.full((len(matrix), room), NAN)
    for row, count in enumerate(counts.tolist()):
        if count <= room:
            columns[row, :count] = matrix[row].nonzero().squeeze(1)
            values[row, :count] = matrix[row][matrix[row] != 0]
    return on_device(columns, torch.int32), on_device(values), on_device(counts, torch.int32)


@pytest.mark.parametrize("width", [1, 5, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_lists_are_those_of_their_matrix(width: int, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 11, generator=generator)
    gradient[gradient.abs() < 0.8] = 0
    gradient[2] = 0
    gradient[4] = 1.0  # no room
    weight, hidden = (torch.randn(n, width, generator=generator).to(dtype) for n in (11, 6))
    columns, values, counts = lists(gradient, 8)
    fitting = torch.where((torch.arange(6) == 4)[:, None], 0.0, gradient)
    for turned in (False, True):
        given = on_device(weight, dtype)
        given = given.t().contiguous().t() if turned else given
        out = on_device(torch.full((6, width), NAN))
        entries.launch_gather(columns, values, counts, given, out)
        # a handful of products of size 1 in another order
        torch.testing.assert_close(out.cpu(), fitting @ weight.float(), rtol=1e-6, atol=2e-6)
    column, row = fitting.t().nonzero().unbind(1)
    for kept in (torch.float32, dtype):
        total = on_device(torch.ones(11, width), kept)
        entries.launch_scatter(
            on_device(column, torch.int32), on_device(torch.searchsorted(column, column, right=True), torch.int64),
            on_device(row, torch.int64), on_device(fitting[row, column]), on_device(hidden, dtype), total,
        )  # fmt: skip
        # rounded once; Triton's interpreter cuts bfloat16 off, by up to a unit in the last place
        rounding = 0.0 if kept == torch.float32 else torch.finfo(kept).eps
        wanted = 1 + fitting.T @ hidden.float()
        torch.testing.assert_close(total.cpu().float(), wanted, rtol=1e-6 + rounding, atol=2e-6)
        untouched = fitting.abs().sum(0) == 0
        assert torch.equal(total.cpu()[untouched], torch.ones(int(untouched.sum()), width, dtype=kept))
