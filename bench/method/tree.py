"""A tree of H layers with two actions a node and one correct path (Theorem 1 of arXiv 2601.18984): how many samples a
softmax policy needs to find and learn the path, from the outcome alone and from the first error.

Only the nodes of the correct path matter: off it every reward is 0 and nothing leads back. So a policy is H
probabilities of the right action, all 1/2 at the start, and a sample is the number of right actions before the first
wrong one. A run ends when the path has probability 1 - EPSILON.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixloss import advantages

ETA, ALPHA, EPSILON, GROUP = 0.5, 0.5, 0.1, 8
DEPTHS = tuple(range(2, 17, 2))
# what a sample's tokens are worth: the bare rewards of the theorem, or the advantages of a group
SIGNALS = ("outcome", "first error", "outcome, groups", "first error, groups")


def rewards(right: np.ndarray, depth: int, first_error: bool) -> np.ndarray:
    """Raw token values [runs, H] of samples with `right` [runs] right actions before the first wrong one."""
    solved = (right == depth)[:, None]
    good = np.arange(depth) < right[:, None]
    return np.where(solved, 1.0, ALPHA * first_error * good)


def group_advantages(right: np.ndarray, depth: int, first_error: bool) -> np.ndarray:
    """The package's advantages [runs * GROUP, H]: VPPO, or GRPO without the standard deviation."""
    steps = torch.from_numpy(right)
    groups = torch.arange(len(right)) // GROUP
    solved = steps == depth
    if not first_error:
        return advantages.grpo(solved.float(), groups, std=False)[:, None].expand(-1, depth).numpy()
    lengths = torch.full_like(steps, depth)
    error = torch.where(solved, -1, steps)
    spread = advantages.vppo(solved, lengths, error, groups, alpha=ALPHA, shorten=0)
    mask: Tensor = torch.ones(len(right), depth, dtype=torch.bool)
    return spread.per_token(mask, mask).numpy()


def samples_needed(depth: int, signal: str, runs: int, seed: int, most: int = 2**22) -> list[int]:
    """Samples until the path has probability 1 - EPSILON, of `runs` independent runs; `most` where it took longer.

    A step is theta += ETA * (mean over the samples of) value * gradient of the log-probability.
    """
    rng = np.random.default_rng([seed, depth, SIGNALS.index(signal)])
    first_error, grouped = signal.startswith("first error"), signal.endswith("groups")
    size = GROUP if grouped else 1
    theta = np.zeros((runs, depth))
    needed = np.full(runs, most)
    active = np.arange(runs)
    for taken in range(size, most + 1, size):
        p = 1 / (1 + np.exp(-theta[active]))
        took_right = rng.random((len(active), size, depth)) < p[:, None]
        right = np.where(took_right.all(-1), depth, np.argmin(took_right, -1)).reshape(-1)
        value = (group_advantages if grouped else rewards)(right, depth, first_error)
        layer = np.arange(depth)
        # d log pi / d theta: 1 - p for a right action, -p for the first wrong one, nothing behind it
        p = np.repeat(p, size, 0)
        slope = np.where(layer < right[:, None], 1 - p, np.where(layer == right[:, None], -p, 0.0))
        theta[active] += ETA * (value * slope).reshape(-1, size, depth).mean(1)
        done = (1 / (1 + np.exp(-theta[active]))).prod(1) >= 1 - EPSILON
        needed[active[done]] = taken
        active = active[~done]
        if len(active) == 0:
            break
    return needed.tolist()


def lower_bound(depth: int) -> float:
    """Of the order of what the outcome needs."""
    return 2**depth / (ETA * depth)


def upper_bound(depth: int) -> float:
    """Of the order of what the first error needs at most."""
    return depth / (ETA * ALPHA) * math.log(depth / EPSILON)


def measure(runs: int, depths: tuple[int, ...] = DEPTHS) -> dict[str, Any]:
    """Samples needed for every signal and depth, and how they grow."""
    needed = {signal: {str(h): samples_needed(h, signal, runs, seed=0) for h in depths} for signal in SIGNALS}
    return {
        "eta": ETA, "alpha": ALPHA, "epsilon": EPSILON, "group": GROUP, "runs": runs,
        "needed": needed, "growth": {signal: growth(by_depth) for signal, by_depth in needed.items()},
    }  # fmt: skip


def growth(by_depth: dict[str, list[int]]) -> dict[str, float]:
    """How the mean grows over the upper half of the depths: doublings a layer, and the power of the depth."""
    depths = np.array([int(h) for h in by_depth])
    upper = depths >= np.median(depths)
    means = np.log2([np.mean(by_depth[str(h)]) for h in depths[upper]])
    return {
        "doublings_a_layer": float(np.polyfit(depths[upper], means, 1)[0]),
        "power_of_depth": float(np.polyfit(np.log2(depths[upper]), means, 1)[0]),
    }
