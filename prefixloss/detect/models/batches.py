"""Responses read in batches of about equal length: what cannot be read, or fails, says so and costs no other."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from prefixloss.detect.base import BatchDetector, FirstError
from prefixloss.detect.models.reading import Marked

Rewards = Callable[[Sequence[Marked]], list[list[float]]]
Verdict = Callable[[Sequence[float]], FirstError]


class Judging(NamedTuple):
    """What a loaded model does. read: a problem and its steps as tokens, at most most_tokens of them; rewards: a number
    for each step of each input of a batch; verdict: what a response's numbers amount to."""

    read: Callable[[str, Sequence[str]], Marked]
    most_tokens: int
    rewards: Rewards
    verdict: Verdict


class ModelDetector(BatchDetector):
    """One whose model, in this process, reads whole responses and gives each step a number."""

    model: str
    batch_size: int
    max_tokens: int | None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: got '', expected a directory or the name of a model")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected at least 1")

    @abstractmethod
    def _judging(self) -> Judging:
        """Loads the model at the first call; may raise."""

    def load(self) -> None:
        """Loads the model and checks the settings against it. ValueError names the one that does not fit."""
        self._judging()

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        self.load()
        return super().find(problem, steps, answer)

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        """One result a response, in order. There is no time limit a response; the right answers are not used."""
        try:
            judging = self._judging()
        except Exception as error:
            return [failed(error)] * len(problems)
        most = min(self.max_tokens or judging.most_tokens, judging.most_tokens)
        inputs = [
            readable(response, partial(judging.read, problem, response), most)
            for problem, response in zip(problems, steps, strict=True)
        ]
        return judged(inputs, self.batch_size, judging.rewards, judging.verdict)


def check_marks(separator: str, threshold: float | None, positive_label: int) -> None:
    """The settings of a process reward model, wherever it runs."""
    if not separator:
        raise ValueError("separator: got '', expected one token")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected 0 < threshold <= 1")
    if positive_label < 0:
        raise ValueError(f"positive_label: got {positive_label}, expected a label's index")


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


def by_length(
    inputs: Sequence[Marked | FirstError], batch_size: int
) -> tuple[dict[int, FirstError], list[dict[int, Marked]]]:
    """By their index: the inputs that have their result already, and the others in batches of about equal length."""
    results = {i: one for i, one in enumerate(inputs) if isinstance(one, FirstError)}
    marked = {i: one for i, one in enumerate(inputs) if isinstance(one, Marked)}
    order = sorted(marked, key=lambda i: len(marked[i].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return results, [{i: marked[i] for i in batch} for batch in batches]


def judged(
    inputs: Sequence[Marked | FirstError], batch_size: int, rewards: Rewards, verdict: Verdict
) -> list[FirstError]:
    """One result an input. rewards, verdict: as in `Judging`."""
    results, batches = by_length(inputs, batch_size)
    for batch in batches:
        results.update(zip(batch, _judge(list(batch.values()), rewards, verdict), strict=True))
    return [results[i] for i in range(len(results))]


def _judge(batch: Sequence[Marked], rewards: Rewards, verdict: Verdict) -> list[FirstError]:
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
