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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixloss.backends import two_stages
from prefixloss.backends.autograd import first_order, graph_is_kept
from prefixloss.backends.torch.heads import LinearRows, LogitRows, Rows
from prefixloss.backends.torch.sharded import Shard, Whole
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues
from prefixloss.maths.objective import Terms, token_terms
from prefixloss.maths.softmax import Coefficients, RowStats, Transform, keep_rows_, live_rows


@dataclass(frozen=True)
class Source:
    """What makes the rows of logits: `open(tensors, needs)` for the policy, `reference` for the exact KL.

    columns: all of the vocabulary, or this process's part of it.
    """

    open: Callable[[tuple[Any, ...], tuple[bool, ...]], Rows]
    transform: Transform
    reference: Rows | None
    reference_tensors: tuple[Tensor | None, ...]
    tokens: Tensor
    chunk_tokens: int | None
    columns: Whole


def linear_source(
    reference: tuple[Tensor, Tensor, Tensor | None] | None, config: LossConfig, tokens: Tensor, columns: Whole
) -> Source:
    """Rows from hidden states [N, D], a head [V, D] and a bias; `reference` likewise, for the exact KL."""
    buffers, transform = 1 if reference is None else 2, _transform(config)
    share, chosen = isinstance(columns, Shard), config.chunk_tokens
    return Source(
        lambda tensors, needs: LinearRows(tensors, transform, needs, buffers, share, chosen),
        transform,
        None if reference is None else LinearRows(reference, transform, chosen=chosen),
        () if reference is None else reference,
        tokens,
        config.chunk_tokens or columns.rows_at_once,
        columns,
    )


def logit_source(
    ref_logits: Tensor | None, inplace: bool, config: LossConfig, tokens: Tensor, columns: Whole
) -> Source:
    """Rows that are logits [N, V] already; with `inplace` the last gradient asked for overwrites them."""
    transform, chunk_tokens = _transform(config), config.chunk_tokens or columns.rows_at_once

    def open_rows(tensors: tuple[Tensor], needs: tuple[bool, ...]) -> Rows:
        overwritten = inplace and any(needs) and not graph_is_kept()
        return LogitRows(tensors[0], transform, needs, into=tensors[0] if overwritten else None)

    if ref_logits is None:
        return Source(open_rows, transform, None, (), tokens, chunk_tokens, columns)
    reference = LogitRows(ref_logits, transform)
    return Source(open_rows, transform, reference, (ref_logits,), tokens, chunk_tokens, columns)


def _transform(config: LossConfig) -> Transform:
    return Transform.of(config.temperature, config.softcap, config.logit_scale)


def loss(
    source: Source, batch: Batch, config: LossConfig, tensors: tuple[Any, ...], gradient_later: bool = False
) -> tuple[Tensor, TokenValues]:
    """The reduced loss (per token [N] for "none") and the per-token results.

    gradient_later: the caller wants the gradient made in the backward (logits overwritten in place, for one).
    """
    if gradient_later or two_stages.needed_by(config):
        return two_stages.loss(lambda needed: _statistics(source, batch, config, tensors, needed), batch, config)
    grads = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    total, *values = _FusedLoss.apply(source, batch, config, grads, *tensors)
    return total, TokenValues(*values)


def fused_loss(
    source: Source, batch: Batch, config: LossConfig, grads: tuple[bool, ...], tensors: tuple[Any, ...]
) -> tuple[Tensor, TokenValues, tuple[Tensor | None, ...]]:
    """The loss, the per-token results and, in the same pass, the gradients of the tensors that want one."""
    policy = source.open(tensors, grads)
    values = TokenValues.zeros(len(batch.tokens), batch.weights)
    scale = 1.0 / batch.denominator.item() if any(grads) else 0.0
    for learning, wanted in ((True, batch.learning), (False, batch.computed & ~batch.learning)):
        for rows in policy.chunks(wanted.nonzero().squeeze(1), source.chunk_tokens):
            scores, ref_scores = _scores(source, policy, rows)
            probs = policy.room(rows, learning)
            stats = source.columns.stats(scores, batch.tokens[rows], probs, ref_scores)
            given = batch.given.at(rows)
            terms = token_terms(config, given, stats.logp, stats.entropy, stats.kl, derivatives=learning and any(grads))
            values.put(rows, TokenValues(terms.loss, stats.logp, stats.entropy, terms.kl, terms.ratio))
            if learning and any(grads):
                coefficients = _coefficients(terms, batch.weights[rows])
                _add_gradient(source, policy, rows, probs, ref_scores, stats, coefficients, scale)
    total = (values.loss * batch.weights).sum() / batch.denominator
    return total, values, _gradients(source, policy)


class _FusedLoss(torch.autograd.Function):
    """The loss, with the gradients made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, source: Source, batch: Batch, config: LossConfig, grads: tuple[bool, ...], *tensors: Any
    ) -> Any:
        total, values, gradients = fused_loss(source, batch, config, grads, tensors)
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


def _statistics(
    source: Source, batch: Batch, config: LossConfig, tensors: tuple[Any, ...], needed: Tensor
) -> two_stages.Statistics:
    """Log-prob, entropy and exact KL of the tokens in needed [N], 0 elsewhere."""
    rows = needed.nonzero().squeeze(1)
    stats = row_statistics(
        source, rows, tensors, entropy_grad=config.entropy_coef != 0, row_tolerance=config.row_tolerance
    )
    by_token = [None if x is None else x.new_zeros(len(needed)).index_copy(0, rows, x) for x in stats]
    return two_stages.Statistics(*by_token)  # type: ignore[arg-type]


def row_statistics(
    source: Source, rows: Tensor, tensors: tuple[Any, ...], *, entropy_grad: bool, row_tolerance: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy and exact KL (None without a reference) of the tokens `rows` [n], each [n] and differentiable.

    entropy_grad: whether the entropy carries a gradient. row_tolerance: as in LossConfig.
    """
    grads = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    return _RowStatistics.apply(source, rows, grads, entropy_grad, row_tolerance, *tensors)


def made_statistics(
    source: Source, rows: Tensor, tensors: tuple[Any, ...], follow_hidden: bool
) -> tuple[RowStats, Tensor | None]:
    """The statistics of the tokens `rows` [n] and, with `follow_hidden`, d logp / d hidden [n, D]."""
    policy = source.open(tensors, (False,) * len(tensors))
    like = tensors[0].new_empty(0, dtype=policy.dtype)
    stats = RowStats.empty(len(rows), like, source.reference is not None)
    slope = like.new_empty(len(rows), tensors[0].shape[1]) if follow_hidden else None
    start = 0
    for chunk in policy.chunks(rows, source.chunk_tokens):
        here = slice(start, start + len(chunk))
        start += len(chunk)
        scores, ref_scores = _scores(source, policy, chunk)
        probs, tokens = policy.room(chunk, learning=False), source.tokens[chunk]
        part = source.columns.stats(scores, tokens, probs, ref_scores)
        stats.put(here, part)
        if slope is not None and isinstance(policy, LinearRows):
            ones = Coefficients(torch.ones_like(part.logp), None, None)
            source.columns.gradient_(probs, tokens, part, ones, source.transform)
            slope[here] = policy.hidden_gradient(probs, 1.0)
    source.columns.sum_(slope)
    return stats, slope


def statistics_gradient(
    source: Source,
    rows: Tensor,
    grads: tuple[bool, ...],
    tensors: tuple[Any, ...],
    stats: RowStats,
    coefficients: Coefficients,
    row_tolerance: float,
) -> tuple[Tensor | None, ...]:
    """What the gradients of the statistics, `coefficients` [n], become for the tensors that want one."""
    policy = source.open(tensors, grads)
    live = live_rows(coefficients, stats, source.transform, row_tolerance).nonzero().squeeze(1)
    start = 0
    for chunk in policy.chunks(rows[live], source.chunk_tokens):
        index = live[start : start + len(chunk)]
        start += len(chunk)
        scores, ref_scores = _scores(source, policy, chunk)
        probs = policy.room(chunk, learning=True)
        source.columns.probabilities(scores, source.tokens[chunk], probs)
        _add_gradient(source, policy, chunk, probs, ref_scores, stats.at(index), coefficients.at(index), 1.0)
    policy.clear_except(rows[live])
    return _gradients(source, policy)


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
        stats, slope = made_statistics(source, rows, tensors, follow_hidden)
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
        made = statistics_gradient(source, rows, grads, tensors, stats, coefficients, ctx.row_tolerance)
        return (*none, *(None if g is None else g.to(t.dtype) for g, t in zip(made, tensors, strict=True)))


def _gradients(source: Source, policy: Rows) -> tuple[Tensor | None, ...]:
    """One for each tensor the rows were made of; hidden states, which all processes have, get all of their gradient."""
    gradients = policy.gradients()
    if isinstance(policy, LinearRows):
        source.columns.sum_(gradients[0])
    return gradients


def _scores(source: Source, policy: Rows, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    reference = source.reference
    return policy.scores(rows), None if reference is None else reference.scores(rows)


def _coefficients(terms: Terms, weights: Tensor) -> Coefficients:
    def weighted(value: Tensor | None) -> Tensor | None:
        return None if value is None else value * weights

    return Coefficients(terms.d_logp * weights, weighted(terms.d_entropy), weighted(terms.d_kl))


def _add_gradient(
    source: Source,
    policy: Rows,
    rows: Tensor,
    probs: Tensor,
    ref_scores: Tensor | None,
    stats: RowStats,
    coefficients: Coefficients,
    scale: float,
) -> None:
    """Turns a chunk's probabilities into the gradient and hands it on; rows without gradient leave the products."""
    if policy.multiplies:
        keep = coefficients.live().nonzero().squeeze(1)
        if len(keep) == 0:
            return
        if len(keep) < len(rows):
            rows, stats, coefficients = rows[keep], stats.at(keep), coefficients.at(keep)
            probs = keep_rows_(probs, keep)
            ref_scores = None if ref_scores is None else keep_rows_(ref_scores, keep)
    else:
        coefficients = coefficients.times(policy.transform.before * scale)
    tokens = source.tokens[rows]
    source.columns.gradient_(probs, tokens, stats, coefficients, source.transform, ref_scores)
    policy.add_gradient(rows, probs, scale)
