"""Estimators of KL(policy || reference) from one sampled token: d = ref_logp - logp.

Schulman's three (joschu.net/blog/kl-approx.html). Each has its derivative with respect to logp beside it: of k3,
autograd would take the difference of two numbers near 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# the exact sum over the vocabulary of p (log p - log p_ref), which needs all logits: no estimator
FULL = "full"


class Estimator(NamedTuple):
    """value and slope = d value / d logp, as functions of d [n]."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


BY_NAME = {
    "k1": Estimator(lambda d: -d, torch.ones_like),
    "k2": Estimator(lambda d: d * d / 2, lambda d: -d),
    "k3": Estimator(lambda d: torch.expm1(d) - d, lambda d: -torch.expm1(d)),
}
