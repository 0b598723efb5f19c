"""Detectors against human labels: how often the first wrong step is found, and how the rest goes wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.records import Record

KINDS = ("exact", "earlier", "later", "none found", "false alarm")


def kind_of(label: int, found: int | None) -> str:
    """One of `KINDS`; label: -1 for a response without an error."""
    if label == (-1 if found is None else found):
        return "exact"
    if found is None:
        return "none found"
    return "false alarm" if label < 0 else "earlier" if found < label else "later"


@dataclass(frozen=True)
class Scores:
    """pairs: for each response the labelled and the found step, -1 for none. unsure: confidence 0 and no step."""

    pairs: list[tuple[int, int]]
    unsure: int
    steps: int
    seconds: float

    @property
    def kinds(self) -> Counter[str]:
        return Counter(kind_of(label, None if found < 0 else found) for label, found in self.pairs)

    def share(self, kind: str) -> float:
        return self.kinds[kind] / len(self.pairs)

    @property
    def f1(self) -> float | None:
        """ProcessBench's: the harmonic mean of the accuracies on responses with and without an error; None if all are
        of one kind."""
        right, wrong = (
            [found == label for label, found in self.pairs if (label < 0) == correct] for correct in (True, False)
        )
        if not right or not wrong:
            return None
        a, b = sum(right) / len(right), sum(wrong) / len(wrong)
        return 2 * a * b / (a + b) if a + b else 0.0

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
            "responses": len(self.pairs),
            "steps": self.steps,
            "seconds": self.seconds,
            "shares": {kind: self.share(kind) for kind in KINDS},
            "unsure": self.unsure,
            "processbench_f1": self.f1,
            "pairs": self.pairs,
        }


def evaluate(
    detector: Detector,
    records: Sequence[Record],
    *,
    answers: bool,
    batch_size: int,
    clock: Callable[[], float],
    advance: Callable[[int], None],
    found: list[FirstError] | None = None,
) -> tuple[Scores, list[FirstError]]:
    """answers: whether the detector is told the right final answers. advance: told how many responses were done.
    found: the list that is filled, for a caller who keeps what was done if he is interrupted.
    """
    begun = clock()
    found = [] if found is None else found
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        found += _detected(detector, batch, answers)
        advance(len(batch))
    pairs = [
        (-1 if record.label is None else record.label, -1 if result.step is None else result.step)
        for record, result in zip(records, found, strict=True)
    ]
    unsure = sum(result.step is None and result.confidence == 0 for result in found)
    return Scores(pairs, unsure, sum(len(record.steps) for record in records), clock() - begun), found


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
