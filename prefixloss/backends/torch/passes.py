"""What backend="torch" does to rows of logits: the fused pass, the statistics alone, and the gradient from them.

Nothing here knows autograd: `prefixloss.backends.torch.eager` and `.operators` call these with what they were given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixloss.backends.autograd import graph_is_kept
from prefixloss.backends.columns import Columns
from prefixloss.backends.problem import Head
from prefixloss.backends.torch.rows import LinearRows, LogitRows, Rows
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues
from prefixloss.maths.objective import Terms, token_terms
from prefixloss.maths.softmax import Coefficients, RowStats, Transform, keep_rows_, live_rows, transform_of


@dataclass(frozen=True)
class Source:
    """What makes the rows of logits: `open(tensors, needs)` for the policy, `reference` for the exact KL.

    columns: all of the vocabulary, or this process's part of it. left_out: 0-d, what is written there once a gradient
    is made: which share of the logits' gradient was left out of it.
    """

    open: Callable[[tuple[Any, ...], tuple[bool, ...]], Rows]
    transform: Transform
    reference: Rows | None
    reference_tensors: tuple[Tensor | None, ...]
    tokens: Tensor
    chunk_tokens: int | None
    columns: Columns
    left_out: Tensor


def linear_source(
    reference: Head | None, config: LossConfig, tokens: Tensor, columns: Columns, left_out: Tensor
) -> Source:
    """Rows from hidden states [N, D], a head [V, D] and a bias; `reference` likewise, for the exact KL."""
    buffers, transform = 1 if reference is None else 2, transform_of(config)
    tolerances, chosen = (config.gradient_tolerance, config.head_gradient_tolerance), config.chunk_tokens
    return Source(
        lambda tensors, needs: LinearRows(tensors, transform, needs, buffers, columns, tolerances, chosen),
        transform,
        None if reference is None else LinearRows(reference, transform, chosen=chosen),
        () if reference is None else reference,
        tokens,
        config.chunk_tokens or columns.rows_at_once,
        columns,
        left_out,
    )


def logit_source(
    ref_logits: Tensor | None, inplace: bool, config: LossConfig, tokens: Tensor, columns: Columns, left_out: Tensor
) -> Source:
    """Rows that are logits [N, V] already; with `inplace` the last gradient asked for overwrites them."""
    transform, chunk_tokens = transform_of(config), config.chunk_tokens or columns.rows_at_once

    def open_rows(tensors: tuple[Tensor], needs: tuple[bool, ...]) -> Rows:
        overwritten = inplace and any(needs) and not graph_is_kept()
        return LogitRows(tensors[0], transform, needs, into=tensors[0] if overwritten else None)

    if ref_logits is None:
        return Source(open_rows, transform, None, (), tokens, chunk_tokens, columns, left_out)
    reference = LogitRows(ref_logits, transform)
    return Source(open_rows, transform, reference, (ref_logits,), tokens, chunk_tokens, columns, left_out)


def fused_pass(
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


def statistics_pass(
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


def gradient_pass(
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


def _gradients(source: Source, policy: Rows) -> tuple[Tensor | None, ...]:
    """One for each tensor the rows were made of; hidden states, which all processes have, get all of their gradient."""
    source.left_out.fill_(policy.left_out())
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
