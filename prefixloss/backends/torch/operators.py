"""backend="torch" as `torch.library` operators: whole calls, in whose graph nobody looks at values.

An operator takes tensors, numbers and strings only: `options` is `LossConfig.encoded`. Letters: N tokens, V vocabulary.
Common arguments:
    first, weight, bias: hidden states [N, D] with a head [V, D] and its bias [V] or None; or logits [N, V], without
    weight. ref_...: the reference's, for the exact KL. ids: int64 [N]. wanted: bool [N], tokens to compute.
    needs: which of first, weight and bias want a gradient; the gradients of the others come back empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixloss.backends.autograd import first_order
from prefixloss.backends.columns import Columns
from prefixloss.backends.library import decoded, gradients_like
from prefixloss.backends.problem import Head
from prefixloss.backends.torch.passes import (
    Source,
    fused_pass,
    gradient_pass,
    linear_source,
    logit_source,
    statistics_pass,
)
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, Given, TokenValues
from prefixloss.inputs.layout import Layout
from prefixloss.maths.precision import accumulation_dtype, storage_dtype
from prefixloss.maths.softmax import Coefficients, RowStats

# hidden states, head and bias; or logits alone
Tensors = tuple[Tensor, Tensor | None, Tensor | None]


def _opened(
    tensors: Tensors, reference: tuple[Tensor | None, ...], ids: Tensor, config: LossConfig
) -> tuple[Source, Any]:
    """Where the rows come from, and the tensors that they are made of."""
    first, weight, _ = tensors
    left_out = first.new_zeros((), dtype=_dtype(first, weight))
    if weight is None:
        return logit_source(reference[0], False, config, ids, Columns(first.shape[1]), left_out), (first,)
    ref_first, ref_weight, ref_bias = reference
    head = None if ref_first is None or ref_weight is None else Head(ref_first, ref_weight, ref_bias)
    return linear_source(head, config, ids, Columns(len(weight)), left_out), tensors


def _returned(gradients: tuple[Tensor | None, ...], tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Three gradients, float32 for float16 inputs, empty where there is none."""
    made = (*gradients, None, None)[:3]
    g, h, i = (
        tensors[0].new_empty(0) if x is None or t is None else x.to(storage_dtype(t.dtype))
        for x, t in zip(made, tensors, strict=True)
    )
    return g, h, i


def _dtype(first: Tensor, weight: Tensor | None) -> torch.dtype:
    return accumulation_dtype(first) if weight is None else accumulation_dtype(first, weight)


@torch.library.custom_op("prefixloss::torch_loss", mutates_args=())
def fused_loss(
    first: Tensor, weight: Tensor | None, bias: Tensor | None, ref_first: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, learning: Tensor, computed: Tensor, advantages: Tensor,
    old_logps: Tensor | None, sampler_logps: Tensor | None, ref_logps: Tensor | None, weights: Tensor,
    denominator: Tensor, options: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (0-d), the fields of `TokenValues` [5, N], the gradients of first, weight and bias, and which share of
    the logits' gradient was left out of them (0-d)."""
    config, tensors = decoded(options), (first, weight, bias)
    source, policy = _opened(tensors, (ref_first, ref_weight, ref_bias), ids, config)
    given = Given(advantages, old_logps, sampler_logps, ref_logps)
    nowhere = torch.zeros_like(learning)
    batch = Batch(Layout(computed, None), ids, given, weights, denominator, None, learning, computed, nowhere)
    total, values, gradients = fused_pass(source, batch, config, tuple(needs), policy)
    return total, torch.stack(values), *_returned(gradients, tensors), source.left_out


@fused_loss.register_fake
def _(
    first: Tensor, weight: Tensor | None, bias: Tensor | None, ref_first: Any, ref_weight: Any, ref_bias: Any, ids: Any,
    learning: Any, computed: Any, advantages: Any, old_logps: Any, sampler_logps: Any, ref_logps: Any, weights: Tensor,
    denominator: Any, options: str, needs: list[bool],
) -> Any:  # fmt: skip
    made = weights.new_empty(()), weights.new_empty(len(TokenValues._fields), weights.shape[0])
    return *made, *gradients_like((first, weight, bias), needs), weights.new_empty((), dtype=_dtype(first, weight))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:5])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.others = len(inputs) - 3
    ctx.mark_non_differentiable(*output[1:])


@first_order
def _scaled_gradients(ctx: Any, factor: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    # in the factor's dtype: half precision would round it first
    out = [(saved.to(factor.dtype) * factor).to(dtype) if needed else None for saved, dtype, needed in made]
    return *out, *(None,) * ctx.others


fused_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)


@torch.library.custom_op("prefixloss::torch_statistics", mutates_args=())
def token_statistics(
    first: Tensor, weight: Tensor | None, bias: Tensor | None, ref_first: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, wanted: Tensor, options: str, needs: list[bool],
) -> Tensor:  # fmt: skip
    """The fields of `RowStats` [6, N], 0 for tokens that are not wanted and for what is not known."""
    source, policy = _opened((first, weight, bias), (ref_first, ref_weight, ref_bias), ids, decoded(options))
    rows = wanted.nonzero().squeeze(1)
    made, _ = statistics_pass(source, rows, policy, follow_hidden=False)
    stats = first.new_zeros(len(RowStats._fields), len(ids), dtype=_dtype(first, weight))
    for field, values in zip(stats, made, strict=True):
        if values is not None:
            field[rows] = values
    return stats


@token_statistics.register_fake
def _(
    first: Tensor, weight: Any, bias: Any, ref_first: Any, ref_weight: Any, ref_bias: Any, ids: Tensor, wanted: Any,
    options: str, needs: list[bool],
) -> Any:  # fmt: skip
    return first.new_empty(len(RowStats._fields), ids.shape[0], dtype=_dtype(first, weight))


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.options, ctx.needs = inputs
    ctx.save_for_backward(*tensors, output)


@first_order
def _statistics_gradients(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, stats = ctx.saved_tensors
    made = token_gradient(*inputs, stats, incoming, ctx.options, ctx.needs)
    given = zip(made, inputs, ctx.needs, strict=False)
    others: tuple[None, ...] = (None,) * 7
    return *(g.to(t.dtype) if need else None for g, t, need in given), *others


token_statistics.register_autograd(_statistics_gradients, setup_context=_save_statistics)


@torch.library.custom_op("prefixloss::torch_gradient", mutates_args=())
def token_gradient(
    first: Tensor, weight: Tensor | None, bias: Tensor | None, ref_first: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, wanted: Tensor, stats: Tensor, incoming: Tensor, options: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of first, weight and bias from `token_statistics` and their gradients, [6, N] both."""
    config, tensors = decoded(options), (first, weight, bias)
    source, policy = _opened(tensors, (ref_first, ref_weight, ref_bias), ids, config)
    rows = wanted.nonzero().squeeze(1)
    exact = ref_first is not None
    logp, lse, total, entropy, kl, ref_lse = stats[:, rows].unbind()
    d_logp, _, _, d_entropy, d_kl, _ = incoming[:, rows].unbind()
    coefficients = Coefficients(d_logp, d_entropy if config.entropy_coef != 0 else None, d_kl if exact else None)
    at_rows = RowStats(logp, lse, total, entropy, kl if exact else None, ref_lse if exact else None)
    gradients = gradient_pass(source, rows, tuple(needs), policy, at_rows, coefficients, config.row_tolerance)
    return _returned(gradients, tensors)


@token_gradient.register_fake
def _(
    first: Tensor, weight: Tensor | None, bias: Tensor | None, ref_first: Any, ref_weight: Any, ref_bias: Any, ids: Any,
    wanted: Any, stats: Any, incoming: Any, options: str, needs: list[bool],
) -> Any:  # fmt: skip
    return gradients_like((first, weight, bias), needs)
