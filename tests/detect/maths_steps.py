"""The maths detector on a few steps, for tests: where it finds the first error."""

from __future__ import annotations

from prefixloss.detect.maths.detector import Maths

MATHS = Maths(seconds=60)  # the limit itself is tested where it is short; here a busy machine must not meet it


def step(*steps: str, problem: str = "", answer: str | None = None) -> int | None:
    result = MATHS.detect(problem, steps, answer)
    assert not result.reason.startswith("failed"), result
    return result.step
