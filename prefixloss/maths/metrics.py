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
    A mean over no token is 0. All come from two sums over [k, N]: a call of few tokens waits for the host's launches.
    """
    computed, learning, in_prefix = batch.computed, batch.learning, batch.in_prefix
    within = computed & in_prefix
    low, high = clipped(config, batch.given.advantages, values.ratio)
    # a row each; behind the first four those that the means below are over, in their order
    over = (learning, learning, computed, computed, computed, within, computed ^ within)
    tokens = torch.stack([batch.layout.scored, in_prefix, low & learning, high & learning, *over])
    counts = tokens.sum(1)
    numbers = torch.stack([values.ratio, values.kl, values.entropy, values.logp, values.logp])
    numbers = torch.where(tokens[6:], numbers, 0.0)
    means = torch.cat([counts[2:4], numbers.sum(1)]) / counts[4:].clamp(min=1)
    scored_tokens, prefix_tokens, _, _, learning_tokens, *_ = counts.unbind()
    clip_low, clip_high, ratio_mean, kl, entropy, logp_prefix, logp_suffix = means.unbind()
    return {
        "scored_tokens": scored_tokens,
        "learning_tokens": learning_tokens,
        "prefix_tokens": prefix_tokens,
        "loss": total.sum() / scored_tokens.clamp(min=1) if config.reduction == "none" else total,
        "ratio_mean": ratio_mean,
        "ratio_max": numbers[0].max() if computed.shape[0] else means.new_zeros(()),
        "clip_low": clip_low,
        "clip_high": clip_high,
        "kl": kl,
        "entropy": entropy,
        "logp_prefix": logp_prefix,
        "logp_suffix": logp_suffix,
    }
