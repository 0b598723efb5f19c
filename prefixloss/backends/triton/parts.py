"""A row of logits in parts on several processes: the kernels' sums of each, by one collective, are one row's slices.

While a chunk's sums are on their way the next one's logits are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from prefixloss._kernels import launch, rows
from prefixloss._kernels.problem import Problem
from prefixloss._kernels.softmax import LOWEST
from prefixloss.backends.columns import Collective, Columns, Shard
from prefixloss.backends.triton import problems


class _HasProblem(Protocol):
    @property
    def problem(self) -> Problem: ...


P = TypeVar("P", bound=_HasProblem)


class Sums(NamedTuple):
    """Of a chunk, on their way: [processes, 8, n], the six of `launch_slices` and the target's two logits."""

    columns: Shard
    sums: Collective


def ahead(columns: Columns, pieces: Iterable[P]) -> Iterator[tuple[P, Sums | None]]:
    """Each chunk's piece with its sums, after the next one's are on their way; None on one process."""
    if not isinstance(columns, Shard):
        yield from ((piece, None) for piece in pieces)
        return
    before: list[tuple[P, Sums | None]] = []
    for piece in pieces:
        begun = piece, _begin(columns, piece.problem)
        yield from before
        before = [begun]
    yield from before


def run(
    sums: Sums | None, problem: Problem, ids: Tensor, stats: Tensor, terms: Tensor, grads: Tensor, scales: Tensor,
    splits: int,
) -> None:  # fmt: skip
    """As `problems.run`, of logits of which other processes have columns too, if there are `sums`.

    ids: int64 [N], in the whole vocabulary; the problem's own are columns of this process.
    """
    if sums is None:
        problems.run(problem, stats, terms, grads, scales, splits)
        return
    combine(problem, sums.sums.wait(), (ids >= 0) & (ids < sums.columns.vocabulary), stats, terms)
    if problem.work.gradient:
        rows.launch_gradient(problem, stats, terms[3:], grads, scales, splits)


def _begin(columns: Shard, problem: Problem) -> Sums:
    return Sums(columns, columns.begin_gather(slices(problem)))


def slices(problem: Problem) -> Tensor:
    """[8, n] of this process."""
    sums = problem.logits.new_empty(6, problem.rows, 1)
    rows.launch_slices(problem, sums)
    own = torch.stack([_of_target(problem, problem.logits), _of_target(problem, problem.ref)])
    return torch.cat([sums.squeeze(2), own])


def combine(problem: Problem, sums: Tensor, known: Tensor, stats: Tensor, terms: Tensor) -> None:
    """sums: [processes, 8, n], which are slices of a row that has nothing but its target. known: bool [N], tokens whose
    target some process has."""
    parts = sums.permute(1, 2, 0)
    own = parts[6:].sum(2, keepdim=True)
    tokens = problem.tokens._replace(ids_ptr=torch.where(known, 0, -1))
    work = problem.work._replace(aligned=False)
    targets = replace(problem, logits=own[0], ref=own[1], tokens=tokens, work=work)
    rows.launch_combine(targets, _as_slices(parts[:6]), stats, terms)


def _of_target(problem: Problem, logits: Tensor) -> Tensor:
    """Each row's logit of its target, [n]; 0 where another process has it."""
    column = problem.tokens.ids_ptr[problem.tokens.rows_ptr]
    return torch.where(column < 0, 0.0, logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1))


def _as_slices(parts: Tensor) -> Tensor:
    """parts [6, n, processes] as the sums of slices, a power of two of them: those behind the last hold nothing."""
    kinds, count, size = parts.shape
    sums = parts.new_zeros(kinds, count, launch.next_power_of_two(size))
    # the largest of no score
    sums[0], sums[4] = LOWEST.value, LOWEST.value
    sums[..., :size] = parts
    return sums
