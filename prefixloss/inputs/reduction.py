"""How the tokens' losses become one number: a weight for each token and one denominator for all."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss.config import LossConfig
from prefixloss.inputs.layout import Layout


def token_weights(
    config: LossConfig,
    layout: Layout,
    group_ids: Tensor | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weights [N] and the 0-d denominator: loss = sum(weights * token losses) / denominator.

    The denominator counts what the batch has of the reduction's units (`prefixloss.maths.reductions`). `normalizer`
    replaces it, so that micro-batches and ranks, each passing the count of the whole batch, add up to the whole batch's
    loss.
    """
    denominator: Tensor | float
    reduction, argument = config.summed, f'reduction="{config.reduction}"'
    weights = layout.scored.to(dtype)
    if reduction.per_group:
        assert group_ids is not None
        group, groups = _groups(group_ids)
    if reduction.mean_within == "group":
        # counts are whole numbers, so their sum does not depend on its order
        tokens = torch.zeros_like(group).index_add_(0, group, layout.lengths(argument))
        weights = weights / layout.spread(tokens.clamp(min=1)[group], argument)
    elif reduction.mean_within == "response":
        weights = weights / layout.spread(layout.lengths(argument).clamp(min=1), argument)
    if normalizer is not None:
        # nothing is counted: packed tokens may come without their responses
        denominator = normalizer.detach() if isinstance(normalizer, Tensor) else float(normalizer)
    elif reduction.per == "tokens":
        denominator = layout.scored_tokens().clamp(min=1)
    elif reduction.per == "groups":
        denominator = groups
    else:
        denominator = 1.0 if reduction.per is None else max(1, layout.responses(argument))
    if reduction.times_max_length and normalizer is None:
        assert config.max_length is not None
        denominator = denominator * config.max_length
    if not isinstance(denominator, Tensor):
        # filled on the device: a copy from the host would have to wait
        return weights, torch.full((), denominator, dtype=dtype, device=weights.device)
    return weights, denominator.to(device=weights.device, dtype=dtype)


def _groups(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [B] as numbers 0 to G - 1, and G (0-d, at least 1): `torch.unique` without waiting for the device."""
    ordered, order = labels.sort()
    number = torch.nn.functional.pad((ordered.diff() != 0).long().cumsum(0), (1, 0))[: len(labels)]
    groups = torch.cat([number[-1:] + 1, number.new_ones(1)]).max()
    return torch.empty_like(number).index_copy_(0, order, number), groups
