"""Several detectors as one: the first that can say something, the earliest error that any finds, or a vote."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixloss import check
from prefixloss.detect.base import BatchDetector, Detector, FirstError


@dataclass(frozen=True)
class _Combined(BatchDetector):
    """Members get whole batches and keep their own time limits; `seconds` is not used. A verdict is a result with a
    confidence above 0: without one, nothing can be said, and the reason gives the members'.
    """

    detectors: Sequence[Detector]
    seconds: float = field(default=5.0, kw_only=True)

    def __post_init__(self) -> None:
        given = self.detectors
        if not isinstance(given, Sequence) or not given or not all(isinstance(d, Detector) for d in given):
            raise ValueError(f"detectors: got {check.describe(given)}, expected at least one Detector")
        object.__setattr__(self, "detectors", tuple(given))  # hashable, and nobody else's list

    def load(self) -> None:
        for detector in self.detectors:
            detector.load()

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        by_detector = [d.detect_batch(problems, steps, answers) for d in self.detectors]
        return [self._combine(results) for results in zip(*by_detector, strict=True)]

    @abstractmethod
    def _combine(self, results: Sequence[FirstError]) -> FirstError:
        """What one response's results, one a member, amount to."""


@dataclass(frozen=True)
class FirstOf(_Combined):
    """The first member's verdict, in order; the next ones see only the responses that are still undecided. Cheap and
    sure detectors go first, learned ones last.
    """

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        known = answers if answers is not None else [None] * len(problems)
        responses = list(zip(problems, steps, known, strict=True))
        results: list[list[FirstError]] = [[] for _ in responses]
        undecided = list(range(len(responses)))
        for detector in self.detectors:
            if not undecided:
                break
            batch = [responses[i] for i in undecided]
            found = detector.detect_batch([b[0] for b in batch], [b[1] for b in batch], [b[2] for b in batch])
            for i, result in zip(undecided, found, strict=True):
                results[i].append(result)
            undecided = [i for i in undecided if results[i][-1].confidence <= 0]
        return [self._combine(r) for r in results]

    def _combine(self, results: Sequence[FirstError]) -> FirstError:
        return results[-1] if results[-1].confidence > 0 else _undecided(results)


@dataclass(frozen=True)
class Earliest(_Combined):
    """The earliest step that any member's verdict claims; else the surest verdict that there is no error."""

    def _combine(self, results: Sequence[FirstError]) -> FirstError:
        verdicts = [r for r in results if r.confidence > 0]
        return min(verdicts, key=lambda v: (_place(v.step), -v.confidence)) if verdicts else _undecided(results)


@dataclass(frozen=True)
class Vote(_Combined):
    """The step, or no error, with the most weight behind it; of equal ones the earlier. Confidence is the mean of the
    voters', by weight, where those of another opinion count 0.

    weights: one a member, above 0; None counts every member the same.
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None:
            return
        given, count = self.weights, len(self.detectors)
        if (
            not isinstance(given, Sequence)
            or len(given) != count
            or not all(check.is_number(w) and w > 0 for w in given)
        ):
            raise ValueError(f"weights: got {check.describe(given)}, expected {count} finite numbers above 0")
        object.__setattr__(self, "weights", tuple(given))

    def _combine(self, results: Sequence[FirstError]) -> FirstError:
        weights = self.weights or [1.0] * len(results)
        votes = [(weight, result) for weight, result in zip(weights, results, strict=True) if result.confidence > 0]
        if not votes:
            return _undecided(results)
        behind = {step: math.fsum(w for w, v in votes if v.step == step) for _, (step, _, _) in votes}
        most = max(behind.values())
        # 0.1 + 0.2 is as much as 0.3
        winner = min((step for step, weight in behind.items() if math.isclose(weight, most)), key=_place)
        supporters = [(weight, vote) for weight, vote in votes if vote.step == winner]
        total = math.fsum(weight for weight, _ in votes)
        reason = max(supporters, key=lambda s: s[0])[1].reason
        confidence = math.fsum(weight * vote.confidence for weight, vote in supporters) / total
        return FirstError(winner, f"{behind[winner] / total:.0%} of the vote: {reason}", min(confidence, 1.0))


def _place(step: int | None) -> float:
    """Steps in their order; no error comes after them all."""
    return math.inf if step is None else step


def _undecided(results: Sequence[FirstError]) -> FirstError:
    reasons = list(dict.fromkeys(r.reason for r in results))
    # that a problem is of another kind says nothing of the response
    of_response = [reason for reason in reasons if not reason.startswith("problem: ")]
    return FirstError(None, "; ".join(of_response or reasons)[:200], 0.0)
