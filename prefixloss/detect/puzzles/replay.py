"""Puzzles whose steps report a state: each is replayed beside its steps, and the first false report is the error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefixloss.detect.base import Detector, FirstError

_FALSE = 0.95  # confidence in a report that is not the replayed state,
_UNREAD = 0.3  # in a step that is only taken for wrong because it could not be read,
_BEHIND = 0.5  # in anything after a step that could not be read

_PLAIN_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


class WrongError(Exception):
    """A step reports what is not so: why, and how sure that is."""

    def __init__(self, reason: str, confidence: float = _FALSE) -> None:
        super().__init__(reason)
        self.confidence = confidence


class UnreadError(Exception):
    """A step, or the problem itself, speaks of the puzzle in a way the reader does not know."""


class Puzzle(ABC):
    """The true state of one puzzle while its steps are read.

    answered: whether a step has stated the final answer (a wrong one raises).
    """

    answered: bool = False

    @abstractmethod
    def read(self, step: str) -> None:
        """Follows one step. Raises WrongError at a false report, else UnreadError if some of it could not be read."""

    @abstractmethod
    def agrees(self, answer: str) -> bool:
        """Whether a final answer that is known from elsewhere is the one the replay gives."""


@dataclass(frozen=True)
class Replay(Detector):
    """unread: what a step counts as that speaks of the puzzle but cannot be read. "wrong", the default, prefers the
    earlier step, as a detector in doubt should; "ignore" reads on, at half the confidence, and cannot say "all right".
    Steps that say nothing about the puzzle's state are neither.
    """

    unread: Literal["ignore", "wrong"] = "wrong"

    def __post_init__(self) -> None:
        if self.unread not in ("ignore", "wrong"):
            raise ValueError(f"unread: got {self.unread!r}, expected 'ignore' | 'wrong'")

    @abstractmethod
    def start(self, problem: str) -> Puzzle:
        """The puzzle before the first step; UnreadError if the problem is not of this kind. Quotes are plain here."""

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        try:
            puzzle = self.start(problem.translate(_PLAIN_QUOTES))
        except UnreadError as error:
            return FirstError(None, f"problem: {error}", 0.0)
        if answer is not None and not puzzle.agrees(answer):
            return FirstError(None, "the known answer is not the one the problem gives as read", 0.0)
        unread: str | None = None
        for k, step in enumerate(steps):
            try:
                puzzle.read(step.translate(_PLAIN_QUOTES))
            except WrongError as error:
                confidence = error.confidence if unread is None else _BEHIND
                return FirstError(k, str(error), confidence)
            except UnreadError as error:
                if self.unread == "wrong":
                    return FirstError(k, f"cannot be read: {error}", _UNREAD)
                unread = unread or f"step {k + 1} cannot be read: {error}"
        if unread is not None or not puzzle.answered:
            return FirstError(None, unread or "no final answer", 0.0)
        return FirstError(None, "every report agrees", _FALSE)
