"""backend="triton" of distillation: the kernel of `prefixloss._kernels.distill` as `torch.library` operators, each with
its autograd.

An operator takes tensors, numbers and strings only. Letters: N tokens, D hidden size, V vocabulary. Common arguments:
    hidden [N, D], weight [V, D], bias [V]; logits [N, V], rows contiguous.
    t_..., ids, logps, offsets: the teacher, see `prefixloss.inputs.distillation.Teacher`.
    wanted: bool [N], the tokens to compute. coefficients: float32 [N], what each divergence's gradient is times.
    name, beta, student, teacher: the divergence, and `LossConfig.encoded` of both models' scores.
    needs: which of the student's tensors want a gradient.
Common results: the divergences, float32 [N], 0 where not wanted; and gradients, empty where not wanted, of
sum(coefficients * divergences).

A token's gradient is made in the same pass as its logits where its coefficient is known by then; where it is not, the
backward makes that pass once more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss._kernels import divergence as device_form
from prefixloss._kernels import launch
from prefixloss._kernels.distill import DistillProblem, Numbers, Rows, Work, launch_distill
from prefixloss._kernels.listed_teacher import Listed
from prefixloss.backends import memory
from prefixloss.backends.autograd import first_order, wants_gradient
from prefixloss.backends.library import decoded, gradients_like
from prefixloss.backends.problem import Distil, Head
from prefixloss.backends.triton.chunks import HeadChunks, Wanted
from prefixloss.backends.triton.problems import device_transform
from prefixloss.backends.triton.scaling import scaled_gradients
from prefixloss.inputs.distillation import Teacher

# what a listed id takes while it is sorted and read, in bytes, rounded up
_PER_ID = 64


def distillation(asked: Distil) -> tuple[Tensor, Tensor]:
    """See `prefixloss.backends.problem.Distil`."""
    batch, settings = asked.batch, asked.settings
    coefficients = batch.weights / batch.denominator
    kind = (
        settings.divergence.name, settings.divergence.beta, settings.student.encoded, settings.teacher.encoded
    )  # fmt: skip
    needs = [wants_gradient(t) for t in asked.student]
    reduced = settings.student.reduction != "none"
    fused = reduced and not asked.gradient_later
    if len(asked.student) == 1:
        teacher = None if asked.teacher.first is None else _by_rows(asked.teacher.first)
        tensors: tuple[Any, ...] = (_by_rows(asked.student[0]), teacher, *asked.teacher[3:], batch.learning)
        loss, divergences = logit_distillation, logit_divergences
    else:
        tensors = (*asked.student, *asked.teacher, batch.learning)
        loss, divergences = linear_distillation, linear_divergences
    if fused:
        total, values, *_ = loss(*tensors, coefficients, *kind, needs)
        return total, values.detach()
    values = divergences(*tensors, *kind, needs)
    losses = torch.where(batch.learning, coefficients * values, 0.0)
    return losses.sum() if reduced else losses, values.detach()


def _by_rows(x: Tensor) -> Tensor:
    """As it is if every row is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# --- what the kernel is given


class _Kind(NamedTuple):
    """An operator's arguments that say what is computed."""

    name: str
    beta: float
    student: str
    teacher: str


def _problem(
    kind: _Kind, logits: Tensor, teacher: Tensor | None, rows: Rows, grads: torch.dtype, **work: bool
) -> DistillProblem:
    """For all chunks. Where the teacher is None each brings what is listed for its rows."""
    transform, softcap = device_transform(decoded(kind.student)), decoded(kind.student).softcap
    read = (logits,) if teacher is None else (logits, teacher)
    dtypes = (*(x.dtype for x in read), grads)
    strides = [x.stride(0) for x in read]
    if not work.get("chunk"):
        strides.append(logits.shape[1])  # rows of a new gradient, whatever lies between those of the logits
    aligned = all(stride % launch.vector_of(*dtypes) == 0 for stride in strides)
    mixed = kind.name not in device_form.UNMIXED
    cut = launch.launch_for(logits.shape[1], *dtypes, heavy=teacher is not None, aligned=aligned)
    if teacher is not None and aligned and not mixed and logits.itemsize < 4 and launch.warp_size() == 32:
        # with 16 logits of each model a thread, some of NVIDIA's compilers spill to fit two programs
        cut = cut._replace(lanes=max(32, cut.lanes // 2))
    nothing = logits.new_empty(0)
    numbers = Numbers(
        kind.beta, device_transform(decoded(kind.teacher)).kappa, device_form.largest_slope(kind.name, kind.beta)
    )
    return DistillProblem(
        logits=logits,
        teacher=logits if teacher is None else teacher,
        listed=Listed(nothing, nothing, nothing),
        count=0,
        rows=rows,
        transform=transform,
        numbers=numbers,
        name=kind.name,
        work=Work(
            aligned=aligned,
            softcap=softcap is not None,
            mixed=mixed,
            listed=teacher is None,
            **work,
        ),
        launch=cut,
    )


def _listed(teacher: Teacher, rows: Tensor, vocabulary: int) -> tuple[Listed, int]:
    """What is listed for the tokens `rows`, in the order the kernel reads it; and K."""
    said = teacher.listed(rows, torch.float32, vocabulary)
    ids, order = torch.where(said.ids < 0, vocabulary, said.ids).to(torch.int32).sort(1)
    return Listed(ids, said.logps.gather(1, order), said.tail), ids.shape[1]


def _no_values(wanted: Tensor) -> Tensor:
    return torch.zeros(wanted.shape, device=wanted.device)


def _total(values: Tensor, wanted: Tensor, coefficients: Tensor) -> Tensor:
    return torch.where(wanted, coefficients * values, 0.0).sum()


def _from_head(
    student: Head, teacher: Teacher, wanted: Tensor, coefficients: Tensor, kind: _Kind, needs: list[bool]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The divergences and the gradients of hidden, weight and bias."""
    values = _no_values(wanted)
    beside = None if teacher.first is None or teacher.weight is None else Head(*teacher[:3])  # type: ignore[arg-type]
    chunks = HeadChunks(student, beside, Wanted.where(wanted, None), None, needs)
    if chunks.size == 0:
        return values, chunks.gradients()
    room, narrow = chunks.rooms[0], chunks.grads_dtype != torch.float32
    grads = chunks.gradient_over(room.logits)
    work = {"chunk": True, "gradient": any(needs), "narrowed": narrow, "rescaled": chunks.scaled}
    rows = Rows(values, values, coefficients)
    whole = _problem(kind, room.logits, room.reference_logits, rows, chunks.grads_dtype, **work)
    for chunk in chunks:
        listed, count = (whole.listed, 0) if beside else _listed(teacher, chunk.rows, chunks.vocabulary)
        here = replace(whole, listed=listed, count=count, rows=rows._replace(token_ptr=chunk.rows))
        launch_distill(here, grads, values if room.scales is None else room.scales)
        if any(needs):
            chunks.add_gradient(chunk, grads)
    return values, chunks.gradients()


def _from_logits(
    logits: Tensor, teacher: Teacher, wanted: Tensor, coefficients: Tensor, kind: _Kind, needs: bool
) -> tuple[Tensor, Tensor]:
    """The divergences and the gradient of the logits."""
    values, tokens = _no_values(wanted), wanted.nonzero().squeeze(1)
    grads = torch.empty(logits.shape if needs else (0, 0), dtype=logits.dtype, device=logits.device)
    if needs and len(tokens) < len(wanted):
        grads.index_fill_(0, (~wanted).nonzero().squeeze(1), 0)
    if len(tokens) == 0:
        return values, grads
    whole = _problem(kind, logits, teacher.first, Rows(tokens, values, coefficients), logits.dtype, gradient=needs)
    if teacher.first is not None:
        launch_distill(whole, grads, values)
        return values, grads
    assert teacher.ids is not None
    a_row = -(-teacher.ids.numel() // len(wanted))
    for rows in tokens.split(memory.rows_in_budget(len(wanted), _PER_ID * max(1, a_row), logits.device)):
        listed, count = _listed(teacher, rows, logits.shape[1])
        here = replace(whole, listed=listed, count=count, rows=whole.rows._replace(token_ptr=rows))
        launch_distill(here, grads, values)
    return values, grads


# --- from hidden states


@torch.library.custom_op("prefixloss::linear_distillation", mutates_args=())
def linear_distillation(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, t_hidden: Tensor | None, t_weight: Tensor | None,
    t_bias: Tensor | None, ids: Tensor | None, logps: Tensor | None, offsets: Tensor | None, wanted: Tensor,
    coefficients: Tensor, name: str, beta: float, student: str, teacher: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sum(coefficients * divergences), the divergences, and the gradients of hidden, weight and bias."""
    given, kind = Teacher(t_hidden, t_weight, t_bias, ids, logps, offsets), _Kind(name, beta, student, teacher)
    values, gradients = _from_head(Head(hidden, weight, bias), given, wanted, coefficients, kind, needs)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return _total(values, wanted, coefficients), values, d_hidden, d_weight, d_bias


@linear_distillation.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, t_hidden: Any, t_weight: Any, t_bias: Any, ids: Any,
    logps: Any, offsets: Any, wanted: Tensor, coefficients: Tensor, name: str, beta: float, student: str, teacher: str,
    needs: list[bool],
) -> Any:  # fmt: skip
    return coefficients.new_empty(()), _no_values(wanted), *gradients_like((hidden, weight, bias), needs)


@torch.library.custom_op("prefixloss::linear_divergences", mutates_args=())
def linear_divergences(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, t_hidden: Tensor | None, t_weight: Tensor | None,
    t_bias: Tensor | None, ids: Tensor | None, logps: Tensor | None, offsets: Tensor | None, wanted: Tensor,
    name: str, beta: float, student: str, teacher: str, needs: list[bool],
) -> Tensor:  # fmt: skip
    """The divergences; needs: of the backward."""
    given, kind = Teacher(t_hidden, t_weight, t_bias, ids, logps, offsets), _Kind(name, beta, student, teacher)
    return _from_head(Head(hidden, weight, bias), given, wanted, _no_values(wanted), kind, [False] * 3)[0]


@linear_divergences.register_fake
def _(
    hidden: Any, weight: Any, bias: Any, t_hidden: Any, t_weight: Any, t_bias: Any, ids: Any, logps: Any, offsets: Any,
    wanted: Tensor, name: str, beta: float, student: str, teacher: str, needs: list[bool],
) -> Any:  # fmt: skip
    return _no_values(wanted)


# --- from logits


@torch.library.custom_op("prefixloss::logit_distillation", mutates_args=())
def logit_distillation(
    logits: Tensor, t_logits: Tensor | None, ids: Tensor | None, logps: Tensor | None, offsets: Tensor | None,
    wanted: Tensor, coefficients: Tensor, name: str, beta: float, student: str, teacher: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """sum(coefficients * divergences), the divergences, and the gradient of the logits."""
    given, kind = Teacher(t_logits, ids=ids, logps=logps, offsets=offsets), _Kind(name, beta, student, teacher)
    values, grads = _from_logits(logits, given, wanted, coefficients, kind, needs[0])
    return _total(values, wanted, coefficients), values, grads


@logit_distillation.register_fake
def _(
    logits: Tensor, t_logits: Any, ids: Any, logps: Any, offsets: Any, wanted: Tensor, coefficients: Tensor, name: str,
    beta: float, student: str, teacher: str, needs: list[bool],
) -> Any:  # fmt: skip
    return coefficients.new_empty(()), _no_values(wanted), logits.new_empty(logits.shape if needs[0] else (0, 0))


@torch.library.custom_op("prefixloss::logit_divergences", mutates_args=())
def logit_divergences(
    logits: Tensor, t_logits: Tensor | None, ids: Tensor | None, logps: Tensor | None, offsets: Tensor | None,
    wanted: Tensor, name: str, beta: float, student: str, teacher: str, needs: list[bool],
) -> Tensor:  # fmt: skip
    """The divergences; needs: of the backward."""
    given, kind = Teacher(t_logits, ids=ids, logps=logps, offsets=offsets), _Kind(name, beta, student, teacher)
    return _from_logits(logits, given, wanted, _no_values(wanted), kind, False)[0]


@logit_divergences.register_fake
def _(
    logits: Any, t_logits: Any, ids: Any, logps: Any, offsets: Any, wanted: Tensor, name: str, beta: float,
    student: str, teacher: str, needs: list[bool],
) -> Any:  # fmt: skip
    return _no_values(wanted)


# --- their autograd


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gradients = output[2:]
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs[: len(gradients)]]
    ctx.others = len(inputs) - len(gradients)
    ctx.mark_non_differentiable(*output[1:])


for fused in (linear_distillation, logit_distillation):
    fused.register_autograd(scaled_gradients, setup_context=_save_gradients)


def _save_tensors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # all that the backward reads again, so that autograd notices if any of it was changed in between
    ctx.kind, ctx.needs = inputs[-5:-1], inputs[-1]
    ctx.save_for_backward(*inputs[:-5])


@first_order
def _later(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, wanted = ctx.saved_tensors
    operator = linear_distillation if len(ctx.needs) == 3 else logit_distillation
    coefficients = torch.where(wanted, grad, 0.0)
    made = operator(*tensors, wanted & (coefficients != 0), coefficients, *ctx.kind, ctx.needs)[2:]
    wants = zip(made, tensors, ctx.needs, strict=False)
    out = [g.to(t.dtype) if need else None for g, t, need in wants]
    # the tensors, the tokens wanted, five options
    return *out, *(None,) * (len(tensors) + 6 - len(out))


for two_passes in (linear_divergences, logit_divergences):
    two_passes.register_autograd(_later, setup_context=_save_tensors)
