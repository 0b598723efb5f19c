"""The kernels from logits as `torch.library` operators, so that `torch.compile` sees whole calls; each with its
autograd.

An operator takes tensors, numbers and strings only: `options` is `LossConfig.encoded`. Letters: N tokens, D hidden
size, V vocabulary. Common arguments:
    logits, ref: [B, T, V] or [N, V], rows contiguous.
    ids: int64 [N]. flags: uint8 [N], see `prefixloss._kernels.problem`. given: float32 [5, N], see `TokenInputs`
    in `prefixloss._kernels.objective`; its weights have the reduction's denominator in them.
Common results, float32: stats [7, N] and terms [6, N], see `STATS` and `TERMS` there, 0 where not computed; and
gradients, empty where not wanted, of the loss as if its own gradient were 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixloss._kernels import rows
from prefixloss._kernels.problem import Tokens
from prefixloss.backends.autograd import first_order, graph_is_kept
from prefixloss.backends.library import decoded
from prefixloss.backends.triton.problems import (
    live_coefficients,
    no_stats,
    problem_of,
    rooms,
    run,
    splits_of_logits,
    total_of,
)
from prefixloss.backends.triton.scaling import save_gradients, scaled_gradients, times

# --- the loss, with the gradient made in the same launch


def _from_logits(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, off_policy: bool, options: str,
    grads: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    config = decoded(options)
    stats, terms = rooms(given)
    tokens = Tokens(ids, flags, given, ids)
    work = {"terms": True, "gradient": grads is not None, "clear": True}
    problem = problem_of(config, logits, ref, tokens, off_policy, logits.dtype, **work)
    run(problem, stats, terms, logits if grads is None else grads, stats, splits_of_logits(problem, config))
    return total_of(terms, given, flags, -1), stats, terms


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
    return given.new_empty(()), *rooms(given), logits.new_empty(logits.shape if needs else (0,))


logit_loss.register_autograd(scaled_gradients, setup_context=save_gradients)


@torch.library.custom_op("prefixloss::logit_loss_", mutates_args={"logits"})
def logit_loss_(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, off_policy: bool, options: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`logit_loss` with the gradient written over the logits."""
    return _from_logits(logits, ref, ids, flags, given, off_policy, options, logits)


@logit_loss_.register_fake
def _(logits: Any, ref: Any, ids: Any, flags: Any, given: Tensor, off_policy: bool, options: str) -> Any:
    return given.new_empty(()), *rooms(given)


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
        return times(grads.detach(), factor.float()), *(None,) * ctx.others


# --- the gradient from coefficients that come later


def _logit_gradient(
    logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, stats: Tensor, coefficients: Tensor, options: str,
    grads: Tensor,
) -> None:  # fmt: skip
    tokens = Tokens(ids, flags, stats, ids)
    config = decoded(options)
    problem = problem_of(config, logits, ref, tokens, False, grads.dtype, gradient=True, clear=True)
    if problem.rows:
        splits = splits_of_logits(problem, config)
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


# --- statistics, whose gradient that is


@torch.library.custom_op("prefixloss::logit_statistics", mutates_args=())
def logit_statistics(logits: Tensor, ref: Tensor | None, ids: Tensor, flags: Tensor, options: str) -> Tensor:
    """stats alone."""
    stats = no_stats(ids)
    tokens = Tokens(ids, flags, stats, ids)
    config = decoded(options)
    problem = problem_of(config, logits, ref, tokens, False, logits.dtype)
    run(problem, stats, stats, logits, stats, splits_of_logits(problem, config))
    return stats


@logit_statistics.register_fake
def _(logits: Any, ref: Any, ids: Tensor, flags: Any, options: str) -> Any:
    return no_stats(ids)


def _save_for_logit_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.options = inputs
    ctx.save_for_backward(*tensors, output)


@first_order
def _logit_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, stats = ctx.saved_tensors
    coefficients = live_coefficients(decoded(ctx.options), tensors[-1], stats, grad)
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
        made_of = (logits, *rest, stats, live_coefficients(decoded(ctx.options), rest[-1], stats, grad), ctx.options)
        if graph_is_kept():
            logits = logit_gradient(*made_of)
        else:
            logit_gradient_(*made_of)
        return logits, None, None, None, None
