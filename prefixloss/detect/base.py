"""What every detector is: a function from a problem and the steps of a response to its first wrong step.

A detector in doubt prefers the earlier step: too early costs a little reward, too late rewards an error. One that
cannot read a response, runs out of time or fails says so in `reason`, with confidence 0; it never raises out of a
batch.
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple


class FirstError(NamedTuple):
    """step: 0-based index of the first wrong step, None where no error was found (which is "all right" only with a
    confidence above 0). reason: one line for a reader. confidence: 0 (nothing could be said) to 1 (proved)."""

    step: int | None
    reason: str
    confidence: float

    @property
    def chances(self) -> tuple[float | None, ...]:
        """For each step how likely it is right, None where nothing is known; empty where there is a verdict only."""
        return ()

    def at_least(self, threshold: float) -> FirstError:
        """Itself; with less confidence than the threshold, a find is as good as none: it splits no credit."""
        if self.step is None or self.confidence >= threshold:
            return self
        return FirstError(None, f"below the threshold: step {self.step + 1}, {self.reason}", 0.0)


class OutOfTimeError(Exception):
    """A response took longer than the detector's limit."""


@dataclass(frozen=True)
class Detector(ABC):
    """Configured once, picklable, deterministic. seconds: the limit a response."""

    seconds: float = 5.0

    def load(self) -> None:
        """What it needs beside itself, such as a model, before the first response; raises where that cannot be had."""
        return

    @abstractmethod
    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        """The first wrong step; may raise. answer: the right final answer, where it is known."""

    def detect(self, problem: str, steps: Sequence[str], answer: str | None = None) -> FirstError:
        """`find` within the time limit; whatever goes wrong becomes a reason."""
        if not steps:
            return FirstError(None, "no steps", 0.0)
        try:
            with time_limit(self.seconds):
                return self.find(problem, steps, answer)
        except OutOfTimeError:
            return FirstError(None, f"out of time after {self.seconds:g} s", 0.0)
        except (Exception, RecursionError) as error:  # a batch goes on without this response
            return FirstError(None, f"failed: {type(error).__name__}: {error}"[:200], 0.0)

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        """One result a response, in order."""
        known = answers if answers is not None else [None] * len(problems)
        return [self.detect(p, s, a) for p, s, a in zip(problems, steps, known, strict=True)]


@dataclass(frozen=True)
class BatchDetector(Detector):
    """One whose work is done in batches: `detect_batch` is its own, and one response is a batch of one. It keeps its
    own limits, and turns whatever goes wrong into reasons."""

    @abstractmethod
    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        """One result a response, in order; never raises for one of them."""

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        return self.detect_batch([problem], [steps], [answer])[0]

    def detect(self, problem: str, steps: Sequence[str], answer: str | None = None) -> FirstError:
        return self.detect_batch([problem], [steps], [answer])[0]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError inside the block after `seconds`.

    Only a process's main thread can be interrupted: elsewhere the detectors' own bounds on the work have to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
