"""backend="torch": the loss and its gradient in plain torch on any device, paying only for the tokens that learn.

Two ways through:
- Fused. A token's coefficients follow from its own logits, so a chunk goes from logits to gradients in one pass: three
  matrix products, nothing recomputed, and one buffer of [chunk, V].
- Two stages, where coefficients are known only later: a ratio over the whole response, a tolerance relative to the
  largest gradient, per-token losses that the caller weights, log-probs for somebody else's loss. The forward makes the
  statistics (one product); the backward makes logits again for the rows whose coefficients are not 0 (three more). With
  a frozen head the forward keeps d logp / d hidden instead, and the backward only scales it (two products in all).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixloss.backends import two_stages
from prefixloss.backends.autograd import first_order, graph_is_kept, wants_gradient
from prefixloss.backends.problem import HeadLoss, HeadStatistics, LogitLoss, by_rows
from prefixloss.backends.torch.passes import (
    Source,
    fused_pass,
    gradient_pass,
    linear_source,
    logit_source,
    statistics_pass,
)
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues
from prefixloss.maths.softmax import Coefficients, RowStats


def head_loss(asked: HeadLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`."""
    if two_stages.needed_by(asked.config, asked.batch):
        return two_stages.loss(lambda wanted: head_statistics(asked.statistics(wanted)), asked.batch, asked.config)
    source = linear_source(asked.reference, asked.config, asked.batch.tokens, asked.columns, asked.left_out)
    return _fused(source, asked.batch, asked.config, asked.head)


def head_statistics(asked: HeadStatistics) -> Statistics:
    """See `prefixloss.backends.problem.Backend`."""
    source = linear_source(asked.reference, asked.config, asked.tokens, asked.columns, asked.left_out)
    return _statistics(source, asked.wanted, asked.config, asked.head)


def logit_loss(asked: LogitLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`."""
    config, tensors = asked.config, (by_rows(asked.logits),)
    reference = None if asked.reference is None else by_rows(asked.reference)
    source = logit_source(reference, asked.inplace, config, asked.batch.tokens, asked.columns, asked.left_out)
    # what overwrites logits waits for the backward
    if asked.inplace or asked.gradient_later or two_stages.needed_by(config, asked.batch):
        return two_stages.loss(lambda wanted: _statistics(source, wanted, config, tensors), asked.batch, config)
    return _fused(source, asked.batch, config, tensors)


# --- the loss, with the gradients made in the forward and scaled in the backward


def _fused(source: Source, batch: Batch, config: LossConfig, tensors: tuple[Any, ...]) -> tuple[Tensor, TokenValues]:
    needs = tuple(wants_gradient(t) for t in tensors)
    total, *values = _FusedLoss.apply(source, batch, config, needs, *tensors)
    return total, TokenValues(*values)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: Source, batch: Batch, config: LossConfig, grads: tuple[bool, ...], *tensors: Any
    ) -> Any:
        total, values, gradients = fused_pass(source, batch, config, grads, tensors)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*values)
        return (total, *values)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        factor = grad.item()
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        out = (None if saved is None else _times(saved, factor).to(dtype) for saved, dtype in made)
        return (None, None, None, None, *out)


def _times(saved: Tensor, factor: float) -> Tensor:
    """saved times factor: the memory of `saved` where nobody can ask for it again, else a copy."""
    if graph_is_kept():
        return saved * factor
    # the usual backward() comes with 1
    return saved if factor == 1 else saved.mul_(factor)


# --- log-probs, entropies and KLs, with the gradient made in the backward


def _statistics(source: Source, wanted: Tensor, config: LossConfig, tensors: tuple[Any, ...]) -> Statistics:
    """Of the tokens in wanted [N], 0 elsewhere. The entropy carries a gradient where it has a coefficient."""
    rows = wanted.nonzero().squeeze(1)
    needs = tuple(wants_gradient(t) for t in tensors)
    made = _RowStatistics.apply(source, rows, needs, config.entropy_coef != 0, config.row_tolerance, *tensors)
    by_token = [None if x is None else x.new_zeros(len(wanted)).index_copy(0, rows, x) for x in made]
    return Statistics(*by_token)  # type: ignore[arg-type]


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Source,
        rows: Tensor,
        grads: tuple[bool, ...],
        entropy_grad: bool,
        row_tolerance: float,
        *tensors: Any,
    ) -> Any:
        # with only the hidden states to learn and only logp to follow, one product now saves two later; a tolerance
        # leaves rows out of the products that are saved
        hidden_alone = grads == (True, False, False) and not entropy_grad and source.reference is None
        follow_hidden = hidden_alone and row_tolerance == 0
        stats, slope = statistics_pass(source, rows, tensors, follow_hidden)
        ctx.source, ctx.rows, ctx.grads, ctx.row_tolerance = source, rows, grads, row_tolerance
        # all that the backward reads again, so that autograd notices if any of it was changed in between
        ctx.save_for_backward(*tensors, slope, *stats, source.tokens, *source.reference_tensors)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(stats.entropy)
        return stats.logp, stats.entropy, stats.kl

    @staticmethod
    @first_order
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        source, rows, grads = ctx.source, ctx.rows, ctx.grads
        saved = iter(ctx.saved_tensors)
        tensors = tuple(next(saved) for _ in grads)
        slope = next(saved)
        stats = RowStats(*(next(saved) for _ in RowStats._fields))
        d_logp, d_entropy, d_kl = incoming
        coefficients = Coefficients(torch.zeros_like(stats.logp) if d_logp is None else d_logp, d_entropy, d_kl)
        none: tuple[None, ...] = (None,) * 5
        if slope is not None:
            hidden = tensors[0]
            d_hidden = torch.zeros_like(hidden)
            d_hidden.index_copy_(0, rows, (slope * coefficients.logp[:, None]).to(hidden.dtype))
            return (*none, d_hidden, None, None)
        made = gradient_pass(source, rows, grads, tensors, stats, coefficients, ctx.row_tolerance)
        return (*none, *(None if g is None else g.to(t.dtype) for g, t in zip(made, tensors, strict=True)))
