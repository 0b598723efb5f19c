"""Responses read in batches of about equal length: what cannot be read, or fails, says so and costs no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from prefixloss.detect.base import FirstError
from prefixloss.detect.models.reading import Marked

Rewards = Callable[[Sequence[Marked]], list[list[float]]]


def failed(error: Exception) -> FirstError:
    return FirstError(None, f"failed: {type(error).__name__}: {error}"[:200], 0.0)


def readable(steps: Sequence[str], read: Callable[[], Marked], most: int) -> Marked | FirstError:
    """A response as tokens, or why it cannot be read. most: how many tokens the model takes."""
    if not steps:
        return FirstError(None, "no steps", 0.0)
    try:
        marked = read()
    except Exception as error:  # a batch goes on without this response
        return failed(error)
    if len(marked.ids) > most:
        return FirstError(None, f"{len(marked.ids)} tokens, the model takes {most}", 0.0)
    return marked


def judged(
    inputs: Sequence[Marked | FirstError],
    batch_size: int,
    rewards: Rewards,
    verdict: Callable[[Sequence[float]], FirstError],
) -> list[FirstError]:
    """One result an input. rewards: a number for each step of each input of a batch; verdict: what they amount to."""
    results = {i: one for i, one in enumerate(inputs) if isinstance(one, FirstError)}
    marked = {i: one for i, one in enumerate(inputs) if isinstance(one, Marked)}
    by_length = sorted(marked, key=lambda i: len(marked[i].ids))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        found = _judge([marked[i] for i in batch], rewards, verdict)
        results.update(zip(batch, found, strict=True))
    return [results[i] for i in range(len(results))]


def _judge(
    batch: Sequence[Marked], rewards: Rewards, verdict: Callable[[Sequence[float]], FirstError]
) -> list[FirstError]:
    """A batch that fails is tried again one by one, so that only the responses at fault are lost."""
    try:
        return [verdict(r) for r in rewards(batch)]
    except Exception as error:
        if len(batch) == 1:
            return [failed(error)]
    return [_judge([one], rewards, verdict)[0] for one in batch]


def first_below(rewards: Sequence[float], threshold: float) -> FirstError:
    """The first step whose reward is strictly below the threshold; confidence is 1 - reward, else the lowest reward."""
    if not all(map(math.isfinite, rewards)):
        return FirstError(None, "failed: the rewards are not finite", 0.0)
    for step, reward in enumerate(rewards):
        if reward < threshold:
            return FirstError(step, f"reward {reward:.4g} is below {threshold:g}", 1 - reward)
    return FirstError(None, f"every reward is at least {min(rewards):.4g}", min(rewards))
