"""Distillation in plain torch on any device: a chunk of the student's logits beside the teacher's, then its gradient.

A token's weight is known before its logits are made, so its gradient is made in the same pass: three products for the
student, one for a teacher with a head, a gather for one that lists ids, and never a tensor of [N, V]. Where the weight
is known only later (reduction="none"; float16 logits, whose gradient waits for the loss scale) the backward makes that
pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefixloss.backends.autograd import first_order, graph_is_kept, wants_gradient
from prefixloss.backends.columns import Shard
from prefixloss.backends.problem import Distil, Head
from prefixloss.backends.torch.rows import LinearRows, LogitRows, Rows
from prefixloss.inputs.distillation import DistillBatch
from prefixloss.maths.divergence import Parts, Shared
from prefixloss.maths.softmax import blocks, transform_of

Tensors = tuple[Any, ...]
# scores a block on a CPU: 1 MiB of float32, since both models' and what is made of them are six tensors at a time
_IN_CACHE = 2**18
# the arguments of the functions below that are no tensor of the student's
_OTHERS = (None, None)


def distillation(asked: Distil) -> tuple[Tensor, Tensor]:
    """See `prefixloss.backends.problem.Distil`."""
    needs = tuple(wants_gradient(t) for t in asked.student)
    reduced = asked.settings.student.reduction != "none"
    if reduced and not asked.gradient_later:
        total, values = _FusedLoss.apply(asked, needs, *asked.student)
        return total, values
    losses, values = _TokenLosses.apply(asked, needs, *asked.student)
    return (losses.sum() if reduced else losses), values


class _SharedParts(Parts):
    """Columns of a vocabulary that is split over the processes of a group, combined in the order of their ranks."""

    def __init__(self, shard: Shard) -> None:
        self.group, self.first = shard.group, shard.first

    def logsumexp(self, logs: Tensor) -> Tensor:
        return self._of_all(logs).logsumexp(0)

    def sum(self, values: Tensor) -> Tensor:
        return self._of_all(values).sum(0)

    def _of_all(self, values: Tensor) -> Tensor:
        """Every process's values, by an all-reduce in which each fills a place of its own."""
        rank, size = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        places = values.new_zeros(size, *values.shape)
        places[rank] = values
        torch.distributed.all_reduce(places, group=self.group)
        return places


def _parts(asked: Distil) -> tuple[Parts, int]:
    """How parts are combined; and the columns of the process that has most: all of them cut their blocks alike."""
    columns = asked.columns
    return (_SharedParts(columns), max(columns.counts)) if isinstance(columns, Shard) else (Parts(), columns.columns)


def _student_rows(asked: Distil, tensors: Tensors, needs: tuple[bool, ...]) -> Rows:
    transform = transform_of(asked.settings.student)
    if len(tensors) == 1:
        return LogitRows(tensors[0], transform, needs)
    weight = asked.teacher.weight
    buffers = 1 if weight is None else 1 + -(-len(weight) // max(1, len(tensors[1])))
    return LinearRows(Head(*tensors), transform, needs, buffers, asked.columns)


def _teacher_rows(asked: Distil) -> Rows | None:
    """None for one that lists ids."""
    teacher, transform = asked.teacher, transform_of(asked.settings.teacher)
    if teacher.first is None:
        return None
    if teacher.weight is None:
        return LogitRows(teacher.first, transform)
    return LinearRows(Head(teacher.first, teacher.weight, teacher.bias), transform)


def one_pass(
    asked: Distil, tensors: Tensors, wanted: Tensor, coefficients: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The divergences [N] of the tokens in wanted [N], and the gradients of sum(coefficients [N] * divergences)."""
    student, teacher = _student_rows(asked, tensors, needs), _teacher_rows(asked)
    parts, widest = _parts(asked)
    shared = None if asked.vocabulary is None else Shared.of(asked.vocabulary)
    values = torch.zeros(len(wanted), dtype=student.dtype, device=wanted.device)
    for rows in student.chunks(wanted.nonzero().squeeze(1), asked.columns.rows_at_once):
        scores = student.scores(rows)
        teacher_scores = None if teacher is None else teacher.scores(rows)
        gradient = student.room(rows, learning=any(needs))
        for block in _blocks(len(rows), widest, wanted.device):
            here = rows[block]
            beside = None if teacher_scores is None else teacher_scores[block]
            values[here] = _block(
                asked, parts, shared, scores[block], beside, here, student, coefficients, gradient[block]
            )
        student.add_gradient(rows, gradient, 1.0)
    gradients = student.gradients()
    if len(gradients) > 1:
        asked.columns.sum_(gradients[0])
    return values, gradients


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Of rows that are worked on together."""
    if device.type != "cpu":
        return blocks(rows, columns)
    # torch.softmax gives a row to one thread
    step = max(torch.get_num_threads(), _IN_CACHE // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _block(
    asked: Distil, parts: Parts, shared: Shared | None, scores: Tensor, teacher_scores: Tensor | None, rows: Tensor,
    student: Rows, coefficients: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """The divergences of some rows; their gradients, times the coefficients, go to `out`, which may be the scores."""
    divergence, transform, dtype = asked.settings.divergence, student.transform, scores.dtype
    if teacher_scores is None:
        said = asked.teacher.listed(rows, dtype, asked.columns.vocabulary)
        value, gradient = divergence.listed(scores, said, parts)
    elif shared is not None:
        value, gradient = divergence.shared(scores, teacher_scores.to(dtype), shared)
    else:
        value, gradient = divergence.whole(scores, teacher_scores.to(dtype), parts)
    if transform.softcap is not None:
        gradient.mul_(transform.slope(scores))
    factor = coefficients[rows] * (1.0 if student.multiplies else transform.before)
    torch.mul(gradient, factor[:, None], out=out)
    return value


class _FusedLoss(torch.autograd.Function):
    """The loss, with the gradients made in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, asked: Distil, needs: tuple[bool, ...], *tensors: Any) -> Any:
        batch = asked.batch
        values, gradients = one_pass(asked, tensors, batch.learning, batch.weights / batch.denominator, needs)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values)
        return _weighted(values, batch).sum() / batch.denominator, values

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # the memory of the saved gradient becomes the handed on, where nobody can ask for it again
        kept = graph_is_kept()
        out = (None if g is None else (g * grad if kept else g.mul_(grad)).to(dtype) for g, dtype in made)
        return (*_OTHERS, *out)


class _TokenLosses(torch.autograd.Function):
    """Each token's share of the loss [N], with the gradients made in the backward."""

    @staticmethod
    def forward(ctx: Any, asked: Distil, needs: tuple[bool, ...], *tensors: Any) -> Any:
        batch = asked.batch
        values, _ = one_pass(asked, tensors, batch.learning, batch.weights, (False,) * len(tensors))
        ctx.asked, ctx.needs = asked, needs
        # all that the backward reads again, so that autograd notices if any of it was changed in between
        ctx.save_for_backward(*tensors, *asked.teacher, asked.vocabulary)
        ctx.mark_non_differentiable(values)
        return _weighted(values, batch) / batch.denominator, values

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        batch, tensors = ctx.asked.batch, tuple(ctx.saved_tensors[: len(ctx.needs)])
        coefficients = grad * batch.weights / batch.denominator
        wanted = batch.learning & (coefficients != 0)
        made = one_pass(ctx.asked, tensors, wanted, coefficients, ctx.needs)[1]
        return (*_OTHERS, *(None if g is None else g.to(t.dtype) for g, t in zip(made, tensors, strict=True)))


def _weighted(values: Tensor, batch: DistillBatch) -> Tensor:
    """weights * values, 0 where a divergence was not computed."""
    return torch.where(batch.learning, batch.weights * values, 0.0)
