"""backend="torch" inside `torch.compile`: the same passes behind operators, of which a graph sees whole calls."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from prefixloss.backends import two_stages
from prefixloss.backends.autograd import wants_gradient
from prefixloss.backends.problem import HeadLoss, HeadStatistics, LogitLoss, by_rows
from prefixloss.backends.torch import operators
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues


def head_loss(asked: HeadLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`."""
    if two_stages.needed_by(asked.config, asked.batch):
        return two_stages.loss(lambda wanted: head_statistics(asked.statistics(wanted)), asked.batch, asked.config)
    total, values, left_out = _fused(asked.head, asked.reference, asked.batch, asked.config)
    asked.left_out.copy_(left_out)
    return total, values


def head_statistics(asked: HeadStatistics) -> Statistics:
    """See `prefixloss.backends.problem.Backend`. What a backward inside a graph leaves out nobody outside hears of."""
    if asked.config.tolerant:
        asked.left_out.fill_(math.nan)
    return _statistics(asked.head, asked.reference, asked.tokens, asked.wanted, asked.config)


def logit_loss(asked: LogitLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`. Of inplace=True no use is made."""
    batch, config, tensors = asked.batch, asked.config, (by_rows(asked.logits),)
    reference = None if asked.reference is None else (by_rows(asked.reference),)
    if asked.gradient_later or two_stages.needed_by(config, batch):
        return two_stages.loss(
            lambda wanted: _statistics(tensors, reference, batch.tokens, wanted, config), batch, config
        )
    return _fused(tensors, reference, batch, config)[:2]


def _fused(tensors: Any, reference: Any, batch: Batch, config: LossConfig) -> tuple[Tensor, TokenValues, Tensor]:
    """tensors, reference: hidden states, head and bias, or logits alone; reference or None."""
    g = batch.given
    recorded = (g.advantages, g.old_logps, g.sampler_logps, g.ref_logps)
    total, values, *_, left_out = operators.fused_loss(
        *_three(tensors), *_three(reference), batch.tokens, batch.learning, batch.computed, *recorded, batch.weights,
        batch.denominator, config.encoded, _needs(tensors),
    )  # fmt: skip
    return total, TokenValues(*values.detach().unbind()), left_out.detach()


def _statistics(tensors: Any, reference: Any, tokens: Tensor, wanted: Tensor, config: LossConfig) -> Statistics:
    stats = operators.token_statistics(
        *_three(tensors), *_three(reference), tokens, wanted, config.encoded, _needs(tensors)
    )
    logp, _, _, entropy, kl, _ = stats.unbind()
    if config.entropy_coef == 0:
        entropy = entropy.detach()
    return Statistics(logp, entropy, None if reference is None else kl)


def _three(tensors: Any) -> operators.Tensors:
    return (*(tensors or ()), None, None, None)[:3]


def _needs(tensors: Any) -> list[bool]:
    return [wants_gradient(t) for t in _three(tensors)]
