"""The kernels from hidden states as `torch.library` operators, so that `torch.compile` sees whole calls; each with its
autograd.

An operator takes tensors, numbers and strings only: `options` is `LossConfig.encoded`. Letters: N tokens, D hidden
size, V vocabulary. Common arguments:
    hidden [N, D], weight [V, D], bias [V]; ref_... likewise.
    ids: int64 [N]. flags: uint8 [N], see `prefixloss._kernels.problem`. given: float32 [5, N], see `TokenInputs`
    in `prefixloss._kernels.objective`; its weights have the reduction's denominator in them.
    most: an upper bound on the tokens to compute, -1 for none; with it nothing waits for the device.
    needs: which of hidden, weight and bias want a gradient.
Common results, float32: stats [7, N] and terms [6, N], see `STATS` and `TERMS` there, 0 where not computed; and
gradients, empty where not wanted, of the loss as if its own gradient were 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss._kernels import rows
from prefixloss._kernels.objective import TokenInputs
from prefixloss._kernels.problem import LEARNING as LEARNING_BIT
from prefixloss._kernels.problem import TERMS, Problem, Tokens
from prefixloss.backends.autograd import first_order
from prefixloss.backends.columns import Columns
from prefixloss.backends.library import decoded, gradients_like
from prefixloss.backends.problem import Head
from prefixloss.backends.triton import parts
from prefixloss.backends.triton.chunks import Chunk, HeadChunks, Wanted
from prefixloss.backends.triton.problems import (
    in_kernels,
    live_coefficients,
    no_stats,
    problem_of,
    put_terms,
    rooms,
    splits_of,
    total_of,
)
from prefixloss.backends.triton.scaling import save_gradients, scaled_gradients
from prefixloss.backends.triton.sparse import SparseProducts
from prefixloss.config import LossConfig

LEARNING = LEARNING_BIT.value


def _or(x: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if x is None else x


def head_of(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Head | None:
    return None if hidden is None or weight is None else Head(hidden, weight, bias)


class _Piece(NamedTuple):
    """A chunk as the kernels take it. grads: room [size, V] for its gradients. splits: programs that share a row."""

    chunk: Chunk
    problem: Problem
    grads: Tensor
    scales: Tensor
    splits: int


def _pieces(chunks: HeadChunks, config: LossConfig, tokens: Tokens, off_policy: bool, **work: Any) -> Iterator[_Piece]:
    if chunks.size == 0:
        return
    narrow, room = chunks.grads_dtype != torch.float32, chunks.rooms[0]
    work |= {"indexed": True, "clear": True, "rescaled": chunks.scaled}
    whole = problem_of(config, room.logits, room.reference_logits, tokens, off_policy, chunks.grads_dtype, **work)
    # the size of whole chunks decides, so that every row is summed the same way
    splits = splits_of(whole, chunks.size)
    apart = chunks.gradient_apart() if narrow and splits > 1 else None
    in_place = whole.work._replace(narrowed=narrow and apart is None)
    for chunk in chunks:
        ref = chunk.logits if chunk.reference is None else chunk.reference
        here = tokens._replace(rows_ptr=chunk.rows)
        problem = replace(whole, logits=chunk.logits, ref=ref, tokens=here, work=in_place)
        grads = chunks.gradient_over(chunk.room.logits) if apart is None else apart
        yield _Piece(chunk, problem, grads, _or(chunk.room.scales, chunk.logits), splits)


# --- the loss, with the gradients made in the same pass


@torch.library.custom_op("prefixloss::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, flags: Tensor, given: Tensor, recorded: list[bool], options: str,
    most: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (0-d), stats, terms, the gradients of hidden, weight and bias, and left_out. recorded: whether old,
    sampler's and reference log-probs are given."""
    head, reference = Head(hidden, weight, bias), head_of(ref_hidden, ref_weight, ref_bias)
    columns = Columns(len(weight))
    return fused_loss(head, reference, columns, ids, flags, given, recorded, decoded(options), most, needs)


def fused_loss(
    head: Head, reference: Head | None, columns: Columns, ids: Tensor, flags: Tensor, given: Tensor,
    recorded: list[bool], config: LossConfig, most: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `linear_loss`, of a head that is `columns` of the vocabulary."""
    known = in_kernels(config)
    stats, terms = rooms(given)
    tokens = Tokens(columns.local(ids), flags, given, ids)

    def passed(which: Wanted, needs: list[bool]) -> tuple[HeadChunks, Tensor]:
        chunks = HeadChunks(head, reference, which, config.chunk_tokens, needs, columns)
        sparse = SparseProducts.wanted(chunks, config, needs, most < 0)
        work = {"terms": known, "gradient": known and any(needs) and sparse is None}
        for piece, sums in parts.ahead(columns, _pieces(chunks, config, tokens, recorded[0], **work)):
            chunk, problem, grads, scales, splits = piece
            parts.run(sums, problem, ids, stats, terms, grads[: problem.rows], scales, splits)
            if not known:
                put_terms(config, stats, terms, given, recorded, flags, chunk.rows)
            if sparse is not None:
                sparse.add_gradient(chunk, problem, stats, terms[3:], grads, splits)
            elif any(needs):
                if not known:
                    rows.launch_gradient(problem, stats, terms[3:], grads[: problem.rows], scales, splits)
                chunks.add_gradient(chunk, grads)
        return chunks, given.new_zeros(()) if sparse is None else sparse.finish()

    if most >= 0:
        which = Wanted.where(flags != 0, most)
    elif not config.shows_every_scored or not any(needs):
        which = Wanted.where(flags != 0, None)
    else:
        which, without_gradient = Wanted.split((flags & LEARNING) != 0, flags != 0)
        passed(without_gradient, [False, False, False])
    chunks, left_out = passed(which, needs)
    d_hidden, d_weight, d_bias = (_or(g, head.hidden.new_empty(0)) for g in chunks.gradients())
    return total_of(terms, given, flags, most), stats, terms, d_hidden, d_weight, d_bias, left_out


@linear_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Any, ref_weight: Any, ref_bias: Any, ids: Any,
    flags: Any, given: Tensor, recorded: list[bool], options: str, most: int, needs: list[bool],
) -> Any:  # fmt: skip
    return given.new_empty(()), *rooms(given), *gradients_like((hidden, weight, bias), needs), given.new_empty(())


linear_loss.register_autograd(scaled_gradients, setup_context=save_gradients)


# --- the gradient from coefficients that come later


@torch.library.custom_op("prefixloss::linear_gradient", mutates_args=())
def linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, flags: Tensor, stats: Tensor, coefficients: Tensor, options: str,
    most: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias from coefficients [3, N] of log-prob, entropy and KL; and left_out.

    Tokens whose coefficients are 0 enter no product."""
    head, reference = Head(hidden, weight, bias), head_of(ref_hidden, ref_weight, ref_bias)
    columns = Columns(len(weight))
    return gradient_of(head, reference, columns, ids, flags, stats, coefficients, decoded(options), most, needs)


def gradient_of(
    head: Head, reference: Head | None, columns: Columns, ids: Tensor, flags: Tensor, stats: Tensor,
    coefficients: Tensor, config: LossConfig, most: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `linear_gradient`, of a head that is `columns` of the vocabulary."""
    tokens = Tokens(columns.local(ids), flags, stats, ids)
    which = Wanted.where((coefficients != 0).any(0), None if most < 0 else most)
    chunks = HeadChunks(head, reference, which, config.chunk_tokens, needs, columns)
    sparse = SparseProducts.wanted(chunks, config, needs, most < 0)
    for chunk, problem, grads, scales, splits in _pieces(chunks, config, tokens, False, gradient=True):
        if sparse is not None:
            sparse.add_gradient(chunk, problem, stats, coefficients, grads, splits)
            continue
        rows.launch_gradient(problem, stats, coefficients, grads[: problem.rows], scales, splits)
        chunks.add_gradient(chunk, grads)
    left_out = stats.new_zeros(()) if sparse is None else sparse.finish()
    d_hidden, d_weight, d_bias = (_or(g, head.hidden.new_empty(0)) for g in chunks.gradients())
    return d_hidden, d_weight, d_bias, left_out


@linear_gradient.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Any, ref_weight: Any, ref_bias: Any, ids: Any,
    flags: Any, stats: Any, coefficients: Any, options: str, most: int, needs: list[bool],
) -> Any:  # fmt: skip
    return *gradients_like((hidden, weight, bias), needs), stats.new_empty(())


# --- statistics, whose gradient that is


@torch.library.custom_op("prefixloss::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    ref_bias: Tensor | None, ids: Tensor, flags: Tensor, options: str, most: int, slope: bool,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """stats, and with `slope` d logp / d hidden, float32 [N, D], which is all that a frozen head's backward needs.

    left_out: where the backward writes that share, if anyone wants to know."""
    head, reference = Head(hidden, weight, bias), head_of(ref_hidden, ref_weight, ref_bias)
    return statistics_of(head, reference, Columns(len(weight)), ids, flags, decoded(options), most, slope)


def statistics_of(
    head: Head, reference: Head | None, columns: Columns, ids: Tensor, flags: Tensor, config: LossConfig, most: int,
    slope: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `linear_statistics`, of a head that is `columns` of the vocabulary."""
    if slope:
        # A = -1 and nothing else in the loss: d loss / d logp = 1
        flags = flags | (flags != 0) * LEARNING
        config = replace(config, objective="reinforce", sampler_correction=None, kl=None, kl_coef=0.0, entropy_coef=0.0)
    stats = no_stats(ids)
    slopes = head.hidden.new_zeros(head.hidden.shape if slope else (0,), dtype=torch.float32)
    given = stats.new_zeros(len(TokenInputs._fields), len(ids))
    given[0], given[1] = -1.0, 1.0  # advantage and weight
    terms = stats.new_empty(len(TERMS), len(ids)) if slope else stats
    tokens = Tokens(columns.local(ids), flags, given, ids)
    which = Wanted.where(flags != 0, None if most < 0 else most)
    chunks = HeadChunks(head, reference, which, config.chunk_tokens, columns=columns)
    pieces = _pieces(chunks, config, tokens, False, terms=slope, gradient=slope)
    for (chunk, problem, grads, scales, splits), sums in parts.ahead(columns, pieces):
        parts.run(sums, problem, ids, stats, terms, grads[: problem.rows], scales, splits)
        if slope:
            grads[problem.rows :] = 0
            chunks.put_summed(slopes, chunk.rows, chunks.hidden_gradient(grads, problem.rows, chunk.room.scales))
    chunks.finish()
    if most >= 0:
        stats = torch.where((flags != 0).sum() > most, torch.nan, stats)
    return stats, slopes


@linear_statistics.register_fake
def _(
    hidden: Tensor, weight: Any, bias: Any, ref_hidden: Any, ref_weight: Any, ref_bias: Any, ids: Tensor, flags: Any,
    options: str, most: int, slope: bool, left_out: Any,
) -> Any:  # fmt: skip
    return no_stats(ids), hidden.new_empty(hidden.shape if slope else (0,), dtype=torch.float32)


def save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.options, ctx.most, ctx.slope, ctx.left_out = inputs
    stats, slopes = output
    ctx.mark_non_differentiable(slopes)
    ctx.save_for_backward(*tensors, stats, slopes)


@first_order
def _linear_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return gradients_later(ctx, grad, linear_gradient)


def gradients_later(ctx: Any, grad: Tensor, gradient: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """The backward of statistics, by `gradient`, which is called as `linear_gradient` is."""
    *tensors, stats, slopes = ctx.saved_tensors
    coefficients = live_coefficients(decoded(ctx.options), tensors[-1], stats, grad)
    none: tuple[None, ...] = (None,) * 9
    if ctx.slope:
        d_hidden = torch.where(coefficients[0, :, None] == 0, 0.0, slopes * coefficients[0, :, None])
        return d_hidden.to(tensors[0].dtype), None, None, *none
    needs = list(ctx.needs_input_grad[:3])
    *gradients, left_out = gradient(*tensors, stats, coefficients, ctx.options, ctx.most, needs)
    if ctx.left_out is not None:
        ctx.left_out.copy_(left_out)
    given = (g.to(t.dtype) if need else None for g, t, need in zip(gradients, tensors, needs, strict=False))
    return *given, *none


linear_statistics.register_autograd(_linear_gradients, setup_context=save_for_gradient)
