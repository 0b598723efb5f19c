"""Weights and masks of the policy term for a sampler that is not the policy; constants all of them.

q = exp(old_logp - sampler_logp) of a token, or of its response: exp of the sum of the differences ("sequence"), or of
their mean ("geometric"). To add a weight, write it here and put it into `BY_NAME`, and into `LEVELS` if it is of a
response.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tis(q: Tensor, low: float, high: float) -> Tensor:
    """min(q, high): truncated importance sampling (fengyao.notion.site/off-policy-rl; Ionides, 2008)."""
    return q.clamp(max=high)


def truncate(q: Tensor, low: float, high: float) -> Tensor:
    """max(min(q, high), low): TRL's "token_truncate" and "sequence_truncate", where low is 0 unless set."""
    return q.clamp(low, high)


def icepop(q: Tensor, low: float, high: float) -> Tensor:
    """q inside [low, high], else 0: IcePop (2510.18855), masked importance sampling, TRL's "token_mask"."""
    return torch.where((q >= low) & (q <= high), q, 0.0)


BY_NAME = {
    "tis": tis,
    "icepop": icepop,
    "token_truncate": truncate,
    "sequence_truncate": truncate,
    "sequence_mask": icepop,
    "geometric_truncate": truncate,
    "geometric_mask": icepop,
}
# those of a response; q of all others is a token's
LEVELS = {
    "sequence_truncate": "sequence",
    "sequence_mask": "sequence",
    "geometric_truncate": "geometric",
    "geometric_mask": "geometric",
}


def near_enough(advantages: Tensor, mean_difference: Tensor, threshold: float) -> Tensor:
    """Off-policy sequence masking (DeepSeek-V3.2, 2512.02556): False for a token with A < 0 whose response's mean of
    sampler_logp - logp is above the threshold, the response being one that the policy would no longer write."""
    return (advantages >= 0) | (mean_difference <= threshold)
