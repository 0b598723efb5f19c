"""Detectors against human labels: how often the first wrong step is found, how the rest goes wrong, at what cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.cost import Cost, spent
from prefixloss.detect.records import Record

KINDS = ("exact", "earlier", "later", "none found", "false alarm")
BINS = 10  # of confidence, equally wide


def kind_of(label: int, found: int | None) -> str:
    """One of `KINDS`; label: -1 for a response without an error."""
    if label == (-1 if found is None else found):
        return "exact"
    if found is None:
        return "none found"
    return "false alarm" if label < 0 else "earlier" if found < label else "later"


class Bin(NamedTuple):
    """Verdicts with a confidence from low to below high: how many, how many of them are right, their mean confidence.
    f1: ProcessBench's, where finds below `low` count as none."""

    low: float
    high: float
    verdicts: int
    right: int
    confidence: float
    f1: float | None


@dataclass(frozen=True)
class Scores:
    """labels: the first wrong step of each response, -1 for none. found: what the detector says of each. steps: how
    many there are in all. threshold: finds with less confidence count as none."""

    labels: Sequence[int]
    found: Sequence[FirstError]
    steps: int
    seconds: float
    cost: Cost = field(default_factory=Cost)
    threshold: float = 0.0

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """For each response the labelled and the found step, -1 for none."""
        kept = [result.at_least(self.threshold).step for result in self.found]
        return [(label, -1 if step is None else step) for label, step in zip(self.labels, kept, strict=True)]

    @property
    def unsure(self) -> int:
        """Responses of which nothing is said: confidence 0 and no step."""
        kept = [result.at_least(self.threshold) for result in self.found]
        return sum(result.step is None and result.confidence == 0 for result in kept)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(kind_of(label, None if found < 0 else found) for label, found in self.pairs)

    def share(self, kind: str) -> float:
        return self.kinds[kind] / len(self.labels)

    def share_among(self, kind: str, correct: bool) -> float | None:
        """Among the responses without an error (correct), or with one; None if there are none of these."""
        chosen = [pair for pair in self.pairs if (pair[0] < 0) == correct]
        of_kind = sum(kind_of(label, None if found < 0 else found) == kind for label, found in chosen)
        return of_kind / len(chosen) if chosen else None

    @property
    def f1(self) -> float | None:
        """ProcessBench's: the harmonic mean of the accuracies on responses with and without an error; None if all are
        of one kind."""
        a, b = (self.share_among("exact", correct) for correct in (True, False))
        if a is None or b is None:
            return None
        return 2 * a * b / (a + b) if a + b else 0.0

    def reliability(self, finds: bool = True) -> list[Bin]:
        """How often verdicts are right, by their confidence, whatever the threshold; bins without one are left out.

        finds: those that name a step, right where it is the labelled one; else those that there is no error.
        """
        said = [
            (result.confidence, label == (-1 if result.step is None else result.step))
            for label, result in zip(self.labels, self.found, strict=True)
            if (result.step is not None) == finds and result.confidence > 0
        ]
        bins = []
        for number in range(BINS):
            inside = [(c, right) for c, right in said if min(int(c * BINS), BINS - 1) == number]
            if inside:
                low = number / BINS
                right, mean = sum(r for _, r in inside), sum(c for c, _ in inside) / len(inside)
                f1 = replace(self, threshold=low).f1
                bins.append(Bin(low, (number + 1) / BINS, len(inside), right, mean, f1))
        return bins

    def calibration_error(self, finds: bool = True) -> float | None:
        """The mean distance, over verdicts, between a bin's confidence and its share of right ones; None without any.
        Naeini, Cooper and Hauskrecht 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"."""
        bins = self.reliability(finds)
        if not bins:
            return None
        return sum(abs(b.right - b.verdicts * b.confidence) for b in bins) / sum(b.verdicts for b in bins)

    def confusion(self, most: int = 8) -> list[list[int]]:
        """Rows: the labelled step, columns: the found one; first none, then steps 1 to most - 1, then all later."""

        def place(step: int) -> int:
            return min(step + 1, most)

        table = [[0] * (most + 1) for _ in range(most + 1)]
        for label, found in self.pairs:
            table[place(label)][place(found)] += 1
        return table

    def as_json(self) -> dict[str, object]:
        return {
            "responses": len(self.labels),
            "steps": self.steps,
            "seconds": self.seconds,
            "calls": self.cost.calls,
            "tokens": self.cost.tokens,
            "threshold": self.threshold,
            "shares": {kind: self.share(kind) for kind in KINDS},
            "exact_among_wrong": self.share_among("exact", correct=False),
            "false_alarms_among_right": self.share_among("false alarm", correct=True),
            "unsure": self.unsure,
            "processbench_f1": self.f1,
            "reliability": [b._asdict() for b in self.reliability()],
            "calibration_error": self.calibration_error(),
            "pairs": self.pairs,
            "confidences": [result.confidence for result in self.found],
        }


def together(parts: Sequence[Scores]) -> Scores:
    """The scores of one detector on several sources as those of all their responses."""
    return Scores(
        [label for part in parts for label in part.labels],
        [result for part in parts for result in part.found],
        sum(part.steps for part in parts),
        sum(part.seconds for part in parts),
        Cost(sum(part.cost.calls for part in parts), sum(part.cost.tokens for part in parts)),
        parts[0].threshold,
    )


def evaluate(
    detector: Detector,
    records: Sequence[Record],
    *,
    answers: bool,
    batch_size: int,
    threshold: float = 0.0,
    advance: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Of labelled records. advance: told how many responses were done."""
    begun, before = time.monotonic(), spent()
    found: list[FirstError] = []
    for batch in detected(detector, records, answers=answers, batch_size=batch_size):
        found += batch
        advance(len(batch))
    labels = [-1 if record.label is None else record.label for record in records]
    steps = sum(len(record.steps) for record in records)
    return Scores(labels, found, steps, time.monotonic() - begun, spent().since(before), threshold)


def detected(
    detector: Detector, records: Sequence[Record], *, answers: bool, batch_size: int
) -> Iterator[list[FirstError]]:
    """Batch after batch, one result a response. answers: whether the detector is told the right final answers."""
    for start in range(0, len(records), batch_size):
        yield _detected(detector, records[start : start + batch_size], answers)


def _detected(detector: Detector, batch: Sequence[Record], answers: bool) -> list[FirstError]:
    """One result a response. A batch that fails is tried again one by one, and what fails alone says so in its
    reason: hours of work are not lost to one response."""
    known = [record.answer if answers else None for record in batch]
    try:
        return detector.detect_batch([r.problem for r in batch], [r.steps for r in batch], known)
    except Exception as error:
        if len(batch) == 1:
            return [FirstError(None, f"failed: {type(error).__name__}: {error}"[:200], 0.0)]
    return [_detected(detector, [record], answers)[0] for record in batch]
