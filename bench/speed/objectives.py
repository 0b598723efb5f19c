"""The loss with a function of the caller's own, and over the sets that a sampler kept, beside the built-in one.

The floor of a kept set is its memory alone: a head's gradient of zeros, and K rows read a token for each of the three
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from prefixloss import LossConfig
from prefixloss.maths.objectives import View

from . import turns
from .clock import Clock
from .from_hidden import ours
from .inputs import Linear
from .step import Result, Step

BASE = "whole vocabulary"
KEPT = (20, 1000)


def clipped(logp: Tensor, given: View) -> Tensor:
    """The built-in's maths as a user writes it."""
    ratio, a = given.ratio, given.advantages
    return -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)


@torch.no_grad()
def kept_by_top_k(data: Linear, size: int) -> Tensor:
    """int64 [N, size]: the likeliest ids, and the token."""
    found = []
    for hidden, ids in zip(data.hidden.split(256), data.tokens.split(256), strict=True):
        logits = (hidden @ data.weight.T).float().scatter_(1, ids[:, None], torch.inf)
        found.append(logits.topk(size).indices)
    return torch.cat(found)


def memory_alone(data: Linear, size: int) -> Step:
    ids, weight = kept_by_top_k(data, size), data.weight.detach()

    def forward() -> Result:
        torch.zeros_like(weight)
        for _ in range(3):
            embedding_bag(ids, weight, mode="sum")
        return Result()

    return Step(forward, (), lambda _: None)


def of_kept(size: int) -> dict[str, Callable[[Linear], Step]]:
    return {
        f"{size:,} kept ids": lambda data: ours(data, kept_ids=kept_by_top_k(data, size)),
        f"floor of {size:,} kept ids": lambda data: memory_alone(data, size),
    }


METHODS: dict[str, Callable[[Linear], Step]] = {
    BASE: ours,
    "a user's function": lambda data: ours(data, config=LossConfig(objective=clipped)),
}
for _size in KEPT:
    METHODS |= of_kept(_size)


def measure(data: Linear, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """A row a method beside the first, see `turns.measure`."""
    return turns.measure(METHODS, BASE, data, rounds, clock)
