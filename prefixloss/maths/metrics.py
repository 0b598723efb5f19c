"""What a trainer logs about a call, as 0-d tensors: nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues
from prefixloss.maths.objective import clipped


def metrics(config: LossConfig, batch: Batch, values: TokenValues, total: Tensor) -> dict[str, Tensor]:
    """Counts, and means over the computed tokens (the learning ones, or the scored ones with stats="scored").

    scored_tokens, learning_tokens, prefix_tokens: how many tokens are in the mask, may have a gradient, lie in a good
    prefix. loss: the reduced loss; for reduction="none" the mean of its entries over the scored tokens.
    ratio_mean, ratio_max, kl, entropy: over the computed tokens. clip_low, clip_high: shares of the learning tokens
    whose ratio lies beyond the clip on the side where their advantage makes it act (ratio_cap and dual_clip apart).
    logp_prefix, logp_suffix: mean log-prob of the computed tokens inside and outside good prefixes.
    A mean over no token is 0.
    """
    computed, learning = batch.computed, batch.learning
    scored_tokens = batch.layout.scored.sum()

    def mean(of: Tensor, where: Tensor) -> Tensor:
        return of.where(where, 0.0).sum() / where.sum().clamp(min=1)

    low, high = clipped(config, batch.given.advantages, values.ratio)
    return {
        "scored_tokens": scored_tokens,
        "learning_tokens": learning.sum(),
        "prefix_tokens": batch.in_prefix.sum(),
        "loss": total.sum() / scored_tokens.clamp(min=1) if config.reduction == "none" else total,
        "ratio_mean": mean(values.ratio, computed),
        "ratio_max": torch.cat([values.ratio.where(computed, 0.0), values.ratio.new_zeros(1)]).max(),
        "clip_low": (low & learning).sum() / learning.sum().clamp(min=1),
        "clip_high": (high & learning).sum() / learning.sum().clamp(min=1),
        "kl": mean(values.kl, computed),
        "entropy": mean(values.entropy, computed),
        "logp_prefix": mean(values.logp, computed & batch.in_prefix),
        "logp_suffix": mean(values.logp, computed & ~batch.in_prefix),
    }
