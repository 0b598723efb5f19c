"""How the tokens' losses become one number: a weight for each token and one denominator for all."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss.config import LossConfig, unknown
from prefixloss.inputs.layout import Layout


def token_weights(
    config: LossConfig,
    layout: Layout,
    group_ids: Tensor | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weights [N] and the 0-d denominator: loss = sum(weights * token losses) / denominator.

    The denominator counts what the batch has of the reduction's units: scored tokens ("token-mean"), groups
    ("group-token-mean"), responses ("seq-mean-*"), B * max_length ("constant"), or 1 ("none"). `normalizer` replaces
    it, so that micro-batches and ranks, each passing the count of the whole batch, add up to the whole batch's loss.
    """
    reduction = config.reduction
    argument = f'reduction="{reduction}"'
    weights = layout.scored.to(dtype)
    denominator: Tensor | float
    if reduction == "token-mean":
        denominator = layout.scored_tokens().clamp(min=1)
    elif reduction == "group-token-mean":
        assert group_ids is not None
        group, groups = _groups(group_ids)
        # counts are whole numbers, so their sum does not depend on its order
        tokens = torch.zeros_like(group).index_add_(0, group, layout.lengths(argument))
        weights = weights / tokens.clamp(min=1)[group][layout.response_of_token(argument)]
        denominator = groups
    elif reduction in ("seq-mean-token-mean", "seq-mean-token-sum", "constant"):
        if reduction == "seq-mean-token-mean":
            weights = weights / layout.lengths(argument).clamp(min=1)[layout.response_of_token(argument)]
        # not asked for where it is given: packed tokens may come without their responses
        denominator = 1.0 if normalizer is not None else max(1, layout.responses(argument))
        if reduction == "constant" and normalizer is None:
            assert config.max_length is not None
            denominator = denominator * config.max_length
    elif reduction == "none":
        denominator = 1.0
    else:
        unknown("reduction", reduction)
    if normalizer is not None:
        denominator = normalizer.detach() if isinstance(normalizer, Tensor) else float(normalizer)
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
