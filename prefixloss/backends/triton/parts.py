"""A row of logits in parts on several processes: the kernels' sums of each, by one collective, are one row's slices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefixloss._kernels import launch, rows
from prefixloss._kernels.problem import Problem
from prefixloss._kernels.softmax import LOWEST
from prefixloss.backends.columns import Columns, Shard
from prefixloss.backends.triton.problems import run


def run_columns(
    columns: Columns, ids: Tensor, problem: Problem, stats: Tensor, terms: Tensor, grads: Tensor, scales: Tensor,
    splits: int,
) -> None:  # fmt: skip
    """As `run`, of logits that are `columns` of the vocabulary.

    ids: int64 [N], in the whole vocabulary; the problem's own are columns of this process.
    """
    if not isinstance(columns, Shard):
        run(problem, stats, terms, grads, scales, splits)
        return
    if problem.rows == 0:
        return
    sums = stats.new_empty(6, problem.rows, 1)
    rows.launch_slices(problem, sums)
    own = torch.stack([_of_target(problem, problem.logits), _of_target(problem, problem.ref)])
    parts = columns.gathered(torch.cat([sums.squeeze(2), own])).permute(1, 2, 0)
    own = parts[6:].sum(2, keepdim=True)
    rows.launch_combine(_targets_alone(problem, own, ids, columns), _as_slices(parts[:6]), stats, terms)
    if problem.work.gradient:
        rows.launch_gradient(problem, stats, terms[3:], grads, scales, splits)


def _of_target(problem: Problem, logits: Tensor) -> Tensor:
    """Each row's logit of its target, [n]; 0 where another process has it."""
    column = problem.tokens.ids_ptr[problem.tokens.rows_ptr]
    return torch.where(column < 0, 0.0, logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1))


def _targets_alone(problem: Problem, own: Tensor, ids: Tensor, columns: Columns) -> Problem:
    """The problem as its combination reads it: of each row nothing but the target, own [2, n, 1]."""
    known = (ids >= 0) & (ids < columns.vocabulary)
    tokens = problem.tokens._replace(ids_ptr=torch.where(known, 0, -1))
    return replace(problem, logits=own[0], ref=own[1], tokens=tokens, work=problem.work._replace(aligned=False))


def _as_slices(parts: Tensor) -> Tensor:
    """parts [6, n, processes] as the sums of slices, a power of two of them: those behind the last hold nothing."""
    kinds, count, size = parts.shape
    sums = parts.new_zeros(kinds, count, launch.next_power_of_two(size))
    # the largest of no score
    sums[0], sums[4] = LOWEST.value, LOWEST.value
    sums[..., :size] = parts
    return sums
