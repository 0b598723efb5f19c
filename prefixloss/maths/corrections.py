"""Weights for a sampler whose log-probs differ from the trainer's: q = exp(old_logp - sampler_logp), a constant."""

from __future__ import annotations

import torch
from torch import Tensor


def tis(q: Tensor, low: float, high: float) -> Tensor:
    """min(q, high): truncated importance sampling."""
    return q.clamp(max=high)


def icepop(q: Tensor, low: float, high: float) -> Tensor:
    """q inside [low, high], else 0: IcePop."""
    return torch.where((q >= low) & (q <= high), q, 0.0)


BY_NAME = {"tis": tis, "icepop": icepop}
