"""The kernels as `torch.library` operators, so that `torch.compile` sees whole calls and no Python inside them.

An operator takes tensors, numbers and strings only: `options` is `LossConfig.encoded`. Letters: N tokens, D hidden
size, V vocabulary. Common arguments:
    logits, ref: [B, T, V] or [N, V], rows contiguous. hidden [N, D], weight [V, D], bias [V]; ref_... likewise.
    ids: int64 [N]. flags: uint8 [N], see `prefixloss._kernels.problem`. given: float32 [5, N], see `TokenInputs`
    in `prefixloss._kernels.objective`; its weights have the reduction's denominator in them.
    most: an upper bound on the tokens to compute, -1 for none; with it nothing waits for the device.
    needs: which of hidden, weight and bias want a gradient.
Common results, float32: stats [7, N] and terms [6, N], see `STATS` and `TERMS` there, 0 where not computed; and
gradients, empty where not wanted, of the loss as if its own gradient were 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prefixloss._kernels import launch, rows, tune
from prefixloss._kernels.objective import ObjectiveKind, Options, TokenInputs
from prefixloss._kernels.problem import LEARNING as LEARNING_BIT
from prefixloss._kernels.problem import STATS, TERMS, Problem, Tokens, Work
from prefixloss._kernels.scale import launch_scale
from prefixloss._kernels.softmax import LogitScaling
from prefixloss.backends.autograd import first_order, graph_is_kept
from prefixloss.backends.triton.chunks import Head, HeadChunks, Rows
from prefixloss.config import LossConfig
from prefixloss.maths.precision import storage_dtype
from prefixloss.maths.softmax import Coefficients, RowStats, Transform, live_rows

LEARNING = LEARNING_BIT.value
# elements of half precision turned into float32 at a time: 16 MiB
_UPCAST = 2**22


@lru_cache(maxsize=256)
def _decoded(options: str) -> LossConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given once already, where the caller made the options
        return LossConfig.decoded(options)


def transform_of(config: LossConfig) -> LogitScaling:
    slope = config.logit_scale / config.temperature
    if config.softcap is None:
        return LogitScaling(1.0, 1.0, float(slope), float(slope))
    return LogitScaling(*map(float, (config.logit_scale, config.softcap, 1 / config.temperature, slope)))


def _objective(config: LossConfig, off_policy: bool) -> tuple[ObjectiveKind, Options]:
    kind = ObjectiveKind(
        policy=config.objective,
        off_policy=off_policy,
        ratio_cap=config.ratio_cap is not None,
        dual_clip=config.dual_clip is not None,
        sampler=config.sampler_correction or "",
        kl=config.kl or "",
        kl_penalty=config.penalises_kl,
        kl_importance=config.kl_importance,
        entropy_bonus=config.entropy_coef != 0,
    )
    # "cispo" caps the ratio itself at clip_high
    high = config.clip_high if config.objective == "cispo" else 1 + config.clip_high
    options = Options(
        clip_low=1 - config.clip_low,
        clip_high=high,
        ratio_cap=config.ratio_cap or 0.0,
        dual_clip=config.dual_clip or 0.0,
        tau_positive=config.sapo_tau[0],
        tau_other=config.sapo_tau[1],
        sampler_low=config.sampler_bounds[0],
        sampler_high=config.sampler_bounds[1],
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
    )
    return kind, Options(*map(float, options))


def problem_of(
    config: LossConfig,
    logits: Tensor,
    ref: Tensor | None,
    tokens: Tokens,
    off_policy: bool,
    grads: torch.dtype,
    **work: Any,
) -> Problem:
    kind, options = _objective(config, off_policy)
    ref = ref if config.kl == "full" else None
    dtypes = (logits.dtype, grads) if ref is None else (logits.dtype, ref.dtype, grads)
    vector = launch.vector_of(*dtypes)
    strides = [stride for x in (logits, ref) if x is not None for stride in x.stride()[:-1]]
    aligned = all(stride % vector == 0 for stride in strides)
    penalty = config.entropy_coef != 0 or (config.kl == "full" and config.penalises_kl)
    given: dict[str, Any] = {
        "aligned": aligned,
        "softcap": config.softcap is not None,
        "reference": ref is not None,
        "penalty": penalty,
    }
    problem = Problem(
        logits,
        logits if ref is None else ref,
        tokens,
        transform_of(config),
        options,
        Work(**{**given, **work}),
        kind,
        launch.launch_for(logits.shape[-1], *dtypes, heavy=ref is not None, aligned=aligned),
    )
    return replace(problem, launch=tune.best_launch(problem, grads)) if tune.wanted() else problem


def _run(problem: Problem, stats: Tensor, terms: Tensor, grads: Tensor, scales: Tensor, splits: int) -> None:
    """Statistics and, as the problem's work says, terms and gradient: in one launch, or several programs a row."""
    if problem.rows == 0:
        return
    if splits == 1:
        rows.launch_rows(problem, stats, terms, grads, scales)
        return
    sums = stats.new_empty(6, problem.rows, splits)
    rows.launch_slices(problem, sums)
    rows.launch_combine(problem, sums, stats, terms)
    if problem.work.gradient:
        rows.launch_gradient(problem, stats, terms[3:], grads, scales, splits)


def _splits_of_logits(problem: Problem, config: LossConfig) -> int:
    """By the rows that there are; with chunk_tokens by those of a chunk, so that no row's bits depend on the batch."""
    return _splits(problem, config.chunk_tokens or problem.rows)


def _splits(problem: Problem, programs: int) -> int:
    return launch.splits_for(programs, problem.vocabulary, problem.launch.block, problem.logits.device)


def _rooms(given: Tensor) -> tuple[Tensor, Tensor]:
    """stats and terms of no token yet."""
    count = given.shape[1]
    return given.new_zeros(len(STATS), count), given.new_zeros(len(TERMS), count)


def _total(terms: Tensor, given: Tensor, flags: Tensor, most: int) -> Tensor:
    """The reduced loss; NaN if more tokens were wanted than `most`, which nothing could report without waiting."""
    total = torch.where(flags != 0, terms[0] * given[1], 0.0).sum()
    return total if most < 0 else torch.where((flags != 0).sum() > most, torch.nan, total)


# --- from logits


def _from_logits(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, off_policy: bool, options: str,
    grads: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    config = _decoded(options)
    stats, terms = _rooms(given)
    tokens = Tokens(ids, flags, given, ids)
    work = {"terms": True, "gradient": grads is not None, "clear": True}
    problem = problem_of(config, logits, ref, tokens, off_policy, logits.dtype, **work)
    _run(problem, stats, terms, logits if grads is None else grads, stats, _splits_of_logits(problem, config))
    return _total(terms, given, flags, -1), stats, terms


@torch.library.custom_op("prefixloss::logit_loss", mutates_args=())
def logit_loss(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, off_policy: bool, options: str,
    needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (0-d), stats, terms and the gradient of the logits."""
    grads = torch.empty(logits.shape if needs else (0,), dtype=logits.dtype, device=logits.device)
    return *_from_logits(logits, ref, ids, flags, given, off_policy, options, grads if needs else None), grads


@logit_loss.register_fake
def _(
    logits: Tensor, ref: Any, ids: Any, flags: Any, given: Tensor, off_policy: bool, options: str, needs: bool
) -> Any:
    return given.new_empty(()), *_rooms(given), logits.new_empty(logits.shape if needs else (0,))


@torch.library.custom_op("prefixloss::logit_loss_", mutates_args={"logits"})
def logit_loss_(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, off_policy: bool, options: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`logit_loss` with the gradient written over the logits."""
    return _from_logits(logits, ref, ids, flags, given, off_policy, options, logits)


@logit_loss_.register_fake
def _(logits: Any, ref: Any, ids: Any, flags: Any, given: Tensor, off_policy: bool, options: str) -> Any:
    return given.new_empty(()), *_rooms(given)


@torch.library.custom_op("prefixloss::logit_statistics", mutates_args=())
def logit_statistics(logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, options: str) -> Tensor:
    """stats alone."""
    stats = _no_stats(ids)
    tokens = Tokens(ids, flags, stats, ids)
    config = _decoded(options)
    problem = problem_of(config, logits, ref, tokens, False, logits.dtype)
    _run(problem, stats, stats, logits, stats, _splits_of_logits(problem, config))
    return stats


@logit_statistics.register_fake
def _(logits: Any, ref: Any, ids: Tensor, flags: Any, options: str) -> Any:
    return _no_stats(ids)


def _no_stats(ids: Tensor) -> Tensor:
    return torch.zeros(len(STATS), ids.shape[0], device=ids.device)


def _logit_gradient(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, stats: Tensor, coefficients: Tensor, options: str,
    grads: Tensor,
) -> None:  # fmt: skip
    tokens = Tokens(ids, flags, stats, ids)
    config = _decoded(options)
    problem = problem_of(config, logits, ref, tokens, False, grads.dtype, gradient=True, clear=True)
    if problem.rows:
        splits = _splits_of_logits(problem, config)
        rows.launch_gradient(problem, stats, coefficients, grads, stats, splits)


@torch.library.custom_op("prefixloss::logit_gradient", mutates_args=())
def logit_gradient(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, stats: Tensor, coefficients: Tensor, options: str
) -> Tensor:  # fmt: skip
    """The gradient of the logits from coefficients [3, N] of log-prob, entropy and KL."""
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _logit_gradient(logits, ref, ids, flags, stats, coefficients, options, grads)
    return grads


@logit_gradient.register_fake
def _(logits: Tensor, ref: Any, ids: Any, flags: Any, stats: Any, coefficients: Any, options: str) -> Any:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("prefixloss::logit_gradient_", mutates_args={"logits"})
def logit_gradient_(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, stats: Tensor, coefficients: Tensor, options: str
) -> None:  # fmt: skip
    """`logit_gradient` written over the logits."""
    _logit_gradient(logits, ref, ids, flags, stats, coefficients, options, logits)


# --- from hidden states


def _head(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Head | None:
    return None if hidden is None or weight is None else Head(hidden, weight, bias)


def _chunk_problems(
    chunks: HeadChunks, config: LossConfig, tokens: Tokens, off_policy: bool, **work: Any
) -> Iterator[tuple[Problem, Tensor, int]]:
    """Each chunk's problem, room [size, V] for its gradients, and how many programs share a row."""
    if chunks.size == 0:
        return
    narrow = chunks.grads_dtype != torch.float32
    work |= {"indexed": True, "clear": True, "rescaled": chunks.scales is not None}
    whole = problem_of(config, chunks.logits, chunks.reference_logits, tokens, off_policy, chunks.grads_dtype, **work)
    # the size of whole chunks decides, so that every row is summed the same way
    splits = _splits(whole, chunks.size)
    grads = chunks.gradient_room(apart=narrow and splits > 1)
    in_place = whole.work._replace(narrowed=narrow and splits == 1)
    for chunk in chunks:
        ref = chunk.logits if chunk.reference is None else chunk.reference
        here = tokens._replace(rows_ptr=chunk.rows)
        yield replace(whole, logits=chunk.logits, ref=ref, tokens=here, work=in_place), grads, splits


@torch.library.custom_op("prefixloss::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, off_policy: bool, options: str, most: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (0-d), stats, terms and the gradients of hidden, weight and bias."""
    config = _decoded(options)
    head, reference = Head(hidden, weight, bias), _head(ref_hidden, ref_weight, ref_bias)
    stats, terms = _rooms(given)
    tokens = Tokens(ids, flags, given, ids)

    def run(which: Rows, needs: list[bool]) -> HeadChunks:
        chunks = HeadChunks(head, reference, which, config.chunk_tokens, needs)
        work = {"terms": True, "gradient": any(needs)}
        for problem, grads, splits in _chunk_problems(chunks, config, tokens, off_policy, **work):
            _run(problem, stats, terms, grads[: problem.rows], _or(chunks.scales, stats), splits)
            if any(needs):
                chunks.add_gradient(problem.tokens.rows_ptr, grads)
        return chunks

    if most >= 0:
        which = Rows.where(flags != 0, most)
    elif not config.shows_every_scored or not any(needs):
        which = Rows.where(flags != 0, None)
    else:
        which, without_gradient = Rows.split((flags & LEARNING) != 0, flags != 0)
        run(without_gradient, [False, False, False])
    d_hidden, d_weight, d_bias = (_or(g, hidden.new_empty(0)) for g in run(which, needs).gradients())
    return _total(terms, given, flags, most), stats, terms, d_hidden, d_weight, d_bias


@linear_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Any, ref_weight: Any, ref_bias: Any, ids: Any,
    flags: Any, given: Tensor, off_policy: bool, options: str, most: int, needs: list[bool],
) -> Any:  # fmt: skip
    return given.new_empty(()), *_rooms(given), *_like_gradients((hidden, weight, bias), needs)


@torch.library.custom_op("prefixloss::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, flags: Tensor, options: str, most: int, slope: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """stats, and with `slope` d logp / d hidden, float32 [N, D], which is all that a frozen head's backward needs."""
    config = _decoded(options)
    if slope:
        # A = -1 and nothing else in the loss: d loss / d logp = 1
        flags = flags | (flags != 0) * LEARNING
        config = replace(config, objective="reinforce", sampler_correction=None, kl=None, kl_coef=0.0, entropy_coef=0.0)
    head, reference = Head(hidden, weight, bias), _head(ref_hidden, ref_weight, ref_bias)
    stats = _no_stats(ids)
    slopes = hidden.new_zeros(hidden.shape if slope else (0,), dtype=torch.float32)
    given = stats.new_zeros(len(TokenInputs._fields), len(ids))
    given[0], given[1] = -1.0, 1.0  # advantage and weight
    terms = stats.new_empty(len(TERMS), len(ids)) if slope else stats
    tokens = Tokens(ids, flags, given, ids)
    which = Rows.where(flags != 0, None if most < 0 else most)
    chunks = HeadChunks(head, reference, which, config.chunk_tokens)
    for problem, grads, splits in _chunk_problems(chunks, config, tokens, False, terms=slope, gradient=slope):
        _run(problem, stats, terms, grads[: problem.rows], _or(chunks.scales, stats), splits)
        if slope:
            grads[problem.rows :] = 0
            slopes.index_copy_(0, problem.tokens.rows_ptr, chunks.hidden_gradient(grads, problem.rows))
    if most >= 0:
        stats = torch.where((flags != 0).sum() > most, torch.nan, stats)
    return stats, slopes


@linear_statistics.register_fake
def _(
    hidden: Tensor, weight: Any, bias: Any, ref_hidden: Any, ref_weight: Any, ref_bias: Any, ids: Tensor, flags: Any,
    options: str, most: int, slope: bool,
) -> Any:  # fmt: skip
    return _no_stats(ids), hidden.new_empty(hidden.shape if slope else (0,), dtype=torch.float32)


@torch.library.custom_op("prefixloss::linear_gradient", mutates_args=())
def linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, flags: Tensor, stats: Tensor, coefficients: Tensor, options: str,
    most: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias from coefficients [3, N] of log-prob, entropy and KL.

    Tokens whose coefficients are 0 enter no product."""
    config = _decoded(options)
    tokens = Tokens(ids, flags, stats, ids)
    which = Rows.where((coefficients != 0).any(0), None if most < 0 else most)
    head, reference = Head(hidden, weight, bias), _head(ref_hidden, ref_weight, ref_bias)
    chunks = HeadChunks(head, reference, which, config.chunk_tokens, needs)
    for problem, grads, splits in _chunk_problems(chunks, config, tokens, False, gradient=True):
        scales = _or(chunks.scales, stats)
        rows.launch_gradient(problem, stats, coefficients, grads[: problem.rows], scales, splits)
        chunks.add_gradient(problem.tokens.rows_ptr, grads)
    d_hidden, d_weight, d_bias = (_or(g, hidden.new_empty(0)) for g in chunks.gradients())
    return d_hidden, d_weight, d_bias


@linear_gradient.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Any, ref_weight: Any, ref_bias: Any, ids: Any,
    flags: Any, stats: Any, coefficients: Any, options: str, most: int, needs: list[bool],
) -> Any:  # fmt: skip
    return _like_gradients((hidden, weight, bias), needs)


def _like_gradients(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    hidden = tensors[0]
    assert hidden is not None
    return tuple(
        t.new_empty(t.shape, dtype=storage_dtype(t.dtype)) if t is not None and need else hidden.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def _or(x: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if x is None else x


# --- autograd


@torch.library.custom_op("prefixloss::scale_", mutates_args={"x"})
def scale_(x: Tensor, factor: Tensor) -> None:
    """x times the float32 0-d factor, in place; untouched where it is 1."""
    if x.is_contiguous():
        launch_scale(x, factor)
    elif x.dtype == torch.float32:
        x.mul_(factor)
    else:
        # torch would round the factor to x's dtype first
        for matrix in x if x.dim() > 2 else (x,):
            for rows_ in matrix.split(max(1, _UPCAST // x.shape[-1])):
                rows_.copy_(rows_.float().mul_(factor))


@scale_.register_fake
def _(x: Any, factor: Any) -> None:
    return None


def _times(saved: Tensor, factor: Tensor) -> Tensor:
    """saved times the float32 0-d factor: the memory of `saved` where nobody can ask for it again, else a copy."""
    if type(saved) is not Tensor:  # a compiler's, which decides itself what may be overwritten
        return (saved.float() * factor).to(saved.dtype)
    scaled = saved.clone() if graph_is_kept() else saved
    scale_(scaled, factor)
    return scaled


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For an operator that returns the loss, stats, terms and the gradients of its first inputs."""
    gradients = output[3:]
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs[: len(gradients)]]
    ctx.others = len(inputs) - len(gradients)
    ctx.mark_non_differentiable(*output[1:])


@first_order
def _scaled_gradients(ctx: Any, factor: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients made in the forward times the loss's own."""
    factor = factor.float()
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    out = [_times(saved, factor).to(dtype) if needed else None for saved, dtype, needed in made]
    return *out, *(None,) * ctx.others


logit_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)
linear_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)


class LogitLossInPlace(torch.autograd.Function):
    """`logit_loss_` as a function of the logits, which it overwrites: nobody else may need their values."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *rest: Any) -> Any:
        total, stats, terms = logit_loss_(logits, *rest)
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(stats, terms)
        ctx.others = len(rest)
        return total, stats, terms

    @staticmethod
    @first_order
    def backward(ctx: Any, factor: Tensor, *_: Any) -> Any:
        (grads,) = ctx.saved_tensors
        return _times(grads.detach(), factor.float()), *(None,) * ctx.others


def _coefficients(config: LossConfig, flags: Tensor, stats: Tensor, grad: Tensor) -> Tensor:
    """The incoming gradients of log-prob, entropy and KL, [3, N]; 0 for rows that `row_tolerance` drops and for those
    that were not computed."""
    coefficients = torch.where(flags != 0, grad[:3], 0.0)
    if config.row_tolerance == 0:
        return coefficients
    transform = transform_of(config)
    by_name = RowStats(
        logp=stats[0],
        lse=stats[3] * transform.kappa + torch.log(stats[4].where(stats[4] > 0, 1.0)),
        total=torch.ones_like(stats[4]),
        entropy=stats[1],
        kl=stats[2],
        ref_lse=None,
    )
    cap = Transform.of(config.temperature, config.softcap, config.logit_scale)
    live = live_rows(Coefficients(*coefficients), by_name, cap, config.row_tolerance)
    return torch.where(live, coefficients, 0.0)


def _save_for_logit_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.options = inputs
    ctx.save_for_backward(*tensors, output)


@first_order
def _logit_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, stats = ctx.saved_tensors
    coefficients = _coefficients(_decoded(ctx.options), tensors[-1], stats, grad)
    return logit_gradient(*tensors, stats, coefficients, ctx.options), None, None, None, None


logit_statistics.register_autograd(_logit_gradients, setup_context=_save_for_logit_gradient)


class LogitStatisticsInPlace(torch.autograd.Function):
    """`logit_statistics`, whose last backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        stats = logit_statistics(*inputs)
        _save_for_logit_gradient(ctx, inputs, stats)
        return stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, *rest, stats = ctx.saved_tensors
        logits = logits.detach()
        made_of = (logits, *rest, stats, _coefficients(_decoded(ctx.options), rest[-1], stats, grad), ctx.options)
        if graph_is_kept():
            logits = logit_gradient(*made_of)
        else:
            logit_gradient_(*made_of)
        return logits, None, None, None, None


def _save_for_linear_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.options, ctx.most, ctx.slope = inputs
    stats, slopes = output
    ctx.mark_non_differentiable(slopes)
    ctx.save_for_backward(*tensors, stats, slopes)


@first_order
def _linear_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, stats, slopes = ctx.saved_tensors
    coefficients = _coefficients(_decoded(ctx.options), tensors[-1], stats, grad)
    none: tuple[None, ...] = (None,) * 8
    if ctx.slope:
        d_hidden = torch.where(coefficients[0, :, None] == 0, 0.0, slopes * coefficients[0, :, None])
        return d_hidden.to(tensors[0].dtype), None, None, *none
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_gradient(*tensors, stats, coefficients, ctx.options, ctx.most, needs)
    given = (g.to(t.dtype) if need else None for g, t, need in zip(gradients, tensors, needs, strict=False))
    return *given, *none


linear_statistics.register_autograd(_linear_gradients, setup_context=_save_for_linear_gradient)
