"""backend="triton": the loss and its gradient by Triton kernels, on any device that Triton compiles for.

As in `prefixloss.backends.torch`, a token's gradient is made in the same pass as its logits where its coefficient is
known by then, and in two stages where it is not. Nothing here waits for the device, except to count the tokens that
enter the products, once, where the caller has not said how many there are at most. For the same reason a token whose
ratio turned out clipped stays in the products of its chunk, as a row of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss._kernels.problem import COMPUTED, LEARNING
from prefixloss.backends import two_stages
from prefixloss.backends.triton import operators
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues

Head = tuple[Tensor, Tensor, Tensor | None]


def linear_loss(
    head: Head, reference: Head | None, batch: Batch, config: LossConfig, most: int | None
) -> tuple[Tensor, TokenValues]:
    """From hidden [N, D], weight [V, D] and bias [V]: the loss and the per-token results.

    most: an upper bound on the tokens that are computed.
    """
    bound = -1 if most is None else most
    tensors = (*head, *(reference or (None, None, None)), batch.tokens)
    if two_stages.needed_by(config):

        def statistics(needed: Tensor) -> two_stages.Statistics:
            return linear_statistics(tensors, needed, config, bound)

        return two_stages.loss(statistics, batch, config)
    given, off_policy = _given(batch)
    needs = [_wants_gradient(t) for t in head]
    total, stats, terms, *_ = operators.linear_loss(
        *tensors, _flags(batch), given, off_policy, config.encoded, bound, needs
    )
    return total, _values(stats, terms)


def linear_statistics(
    tensors: tuple[Tensor | None, ...], needed: Tensor, config: LossConfig, bound: int
) -> two_stages.Statistics:
    """Log-prob, entropy (differentiable if config.entropy_coef is not 0) and exact KL of the tokens in needed [N].

    tensors: hidden, weight, bias, the reference's three, and tokens [N].
    """
    hidden_alone = [_wants_gradient(t) for t in tensors[:3]] == [True, False, False]
    # with a frozen head and only logp to follow, one product now saves two later
    slope = hidden_alone and config.entropy_coef == 0 and tensors[3] is None and config.row_tolerance == 0
    flags = needed.to(torch.uint8)
    stats, _ = operators.linear_statistics(*tensors, flags, config.encoded, bound, slope)
    return _statistics(stats, config)


def logit_loss(
    logits: Tensor, ref_logits: Tensor | None, batch: Batch, config: LossConfig, inplace: bool
) -> tuple[Tensor, TokenValues]:
    """From logits [B, T, V] or [N, V]. inplace: the gradient may overwrite them, from now on."""
    wants_gradient = _wants_gradient(logits)
    # under compilation, which may not overwrite what it was given, the permission is not used
    inplace = inplace and wants_gradient and not torch.compiler.is_compiling()
    logits = _by_rows(logits)
    tensors = (logits, None if ref_logits is None else _by_rows(ref_logits), batch.tokens)
    # float16 gradients are made once the incoming scale is known, or small ones would underflow before it
    later = logits.dtype == torch.float16 and wants_gradient
    if later or two_stages.needed_by(config):
        make = operators.LogitStatisticsInPlace.apply if inplace else operators.logit_statistics

        def statistics(needed: Tensor) -> two_stages.Statistics:
            return _statistics(make(*tensors, needed.to(torch.uint8), config.encoded), config)

        return two_stages.loss(statistics, batch, config)
    given, off_policy = _given(batch)
    if inplace:
        total, stats, terms = operators.LogitLossInPlace.apply(
            *tensors, _flags(batch), given, off_policy, config.encoded
        )
    else:
        total, stats, terms, _ = operators.logit_loss(
            *tensors, _flags(batch), given, off_policy, config.encoded, wants_gradient
        )
    return total, _values(stats, terms)


def _wants_gradient(x: Tensor | None) -> bool:
    return torch.is_grad_enabled() and x is not None and x.requires_grad


def _by_rows(x: Tensor) -> Tensor:
    """As it is if every row is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flags(batch: Batch) -> Tensor:
    computed = batch.computed.to(torch.uint8) * COMPUTED.value
    return computed | batch.learning.to(torch.uint8) * LEARNING.value


def _given(batch: Batch) -> tuple[Tensor, bool]:
    """`TokenInputs` of the kernels, float32 [5, N], and whether old log-probs are part of it."""
    g = batch.given
    weights = batch.weights / batch.denominator
    columns = (g.advantages, weights, g.old_logps, g.sampler_logps, g.ref_logps)
    stacked = torch.stack([torch.zeros_like(weights) if c is None else c for c in columns])
    return stacked, g.old_logps is not None


def _statistics(stats: Tensor, config: LossConfig) -> two_stages.Statistics:
    return two_stages.Statistics(stats[0], stats[1], stats[2] if config.kl == "full" else None)


def _values(stats: Tensor, terms: Tensor) -> TokenValues:
    stats, terms = stats.detach(), terms.detach()
    return TokenValues(loss=terms[0], logp=stats[0], entropy=stats[1], kl=terms[2], ratio=terms[1])
