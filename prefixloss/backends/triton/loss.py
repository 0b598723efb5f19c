"""backend="triton": the loss and its gradient by Triton kernels, on any device that Triton compiles for.

As in `prefixloss.backends.torch`, a token's gradient is made in the same pass as its logits where its coefficient is
known by then, and in two stages where it is not. Nothing here waits for the device, except to count the tokens that
enter the products, once, where the caller has not said how many there are at most. For the same reason a token whose
ratio turned out clipped stays in the products of its chunk, as a row of zeros.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from prefixloss._kernels.problem import LEARNING
from prefixloss.backends import two_stages
from prefixloss.backends.autograd import wants_gradient
from prefixloss.backends.columns import Shard
from prefixloss.backends.problem import HeadLoss, HeadStatistics, LogitLoss
from prefixloss.backends.triton import from_head, from_logits, sharded
from prefixloss.backends.triton.problems import in_kernels
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues


def head_loss(asked: HeadLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`."""
    batch, config = asked.batch, asked.config
    if two_stages.needed_by(config, batch):
        return two_stages.loss(lambda wanted: head_statistics(asked.statistics(wanted)), batch, config)
    given, recorded = _given(batch)
    needs = [wants_gradient(t) for t in asked.head]
    make = partial(sharded.linear_loss, asked.columns) if isinstance(asked.columns, Shard) else from_head.linear_loss
    total, stats, terms, *_, left_out = make(
        *_tensors(asked), batch.tokens, _flags(batch), given, recorded, config.encoded, _bound(asked), needs
    )
    asked.left_out.copy_(left_out.detach())
    return total, _values(stats, terms)


def head_statistics(asked: HeadStatistics) -> Statistics:
    """See `prefixloss.backends.problem.Backend`."""
    config = asked.config
    hidden_alone = [wants_gradient(t) for t in asked.head] == [True, False, False]
    # with a frozen head and only logp to follow, one product now saves two later
    slope = hidden_alone and config.entropy_coef == 0 and asked.reference is None and config.row_tolerance == 0
    flags, left_out = asked.wanted.to(torch.uint8), None
    if config.tolerant:
        if torch.compiler.is_compiling():
            asked.left_out.fill_(math.nan)  # the backward of a graph tells nobody outside
        else:
            left_out = asked.left_out
    split = isinstance(asked.columns, Shard)
    make = partial(sharded.linear_statistics, asked.columns) if split else from_head.linear_statistics
    stats, _ = make(*_tensors(asked), asked.tokens, flags, config.encoded, _bound(asked), slope, left_out)
    return _statistics(stats, config)


def logit_loss(asked: LogitLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`. With `inplace` the logits are overwritten from now on."""
    batch, config, logits = asked.batch, asked.config, _by_rows(asked.logits)
    follows = wants_gradient(logits)
    # under compilation, which may not overwrite what it was given, the permission is not used
    inplace = asked.inplace and follows and not torch.compiler.is_compiling()
    tensors = (logits, None if asked.reference is None else _by_rows(asked.reference), batch.tokens)
    if (asked.gradient_later and follows) or not in_kernels(config) or two_stages.needed_by(config, batch):
        make = from_logits.LogitStatisticsInPlace.apply if inplace else from_logits.logit_statistics

        def statistics(wanted: Tensor) -> Statistics:
            return _statistics(make(*tensors, wanted.to(torch.uint8), config.encoded), config)

        return two_stages.loss(statistics, batch, config)
    given, recorded = _given(batch)
    made_of = (*tensors, _flags(batch), given, recorded[0], config.encoded)
    if inplace:
        total, stats, terms = from_logits.LogitLossInPlace.apply(*made_of)
    else:
        total, stats, terms, _ = from_logits.logit_loss(*made_of, follows)
    return total, _values(stats, terms)


def _tensors(asked: HeadLoss | HeadStatistics) -> tuple[Tensor | None, ...]:
    return *asked.head, *(asked.reference or (None, None, None))


def _bound(asked: HeadLoss | HeadStatistics) -> int:
    return -1 if asked.most is None else asked.most


def _by_rows(x: Tensor) -> Tensor:
    """As it is if every row is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flags(batch: Batch) -> Tensor:
    # True is the bit COMPUTED
    return torch.add(batch.computed.view(torch.uint8), batch.learning.view(torch.uint8), alpha=LEARNING.value)


def _given(batch: Batch) -> tuple[Tensor, list[bool]]:
    """`TokenInputs` of the kernels, float32 [5, N], and whether old, sampler's and reference log-probs are known."""
    g = batch.given
    weights = batch.weights / batch.denominator
    columns = (g.advantages, weights, g.old_logps, g.sampler_logps, g.ref_logps)
    # the kernels do not look at what was not given
    stacked = torch.stack([weights if c is None else c for c in columns])
    return stacked, [c is not None for c in columns[2:]]


def _statistics(stats: Tensor, config: LossConfig) -> Statistics:
    return Statistics(stats[0], stats[1], stats[2] if config.exact_kl else None)


def _values(stats: Tensor, terms: Tensor) -> TokenValues:
    logp, entropy, *_ = stats.detach().unbind()
    loss, ratio, kl, *_ = terms.detach().unbind()
    return TokenValues(loss, logp, entropy, kl, ratio)
