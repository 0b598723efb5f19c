"""Methods in turns in one process: times beside a floor's, and a call's peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .clock import Clock
from .step import Step
from .worker import described, resident, resident_before


class Leaves(Protocol):
    """What a method's step is made of; the tensors that get a gradient."""

    @property
    def leaves(self) -> tuple[Tensor, ...]: ...


Data = TypeVar("Data", bound=Leaves)


def measure(
    methods: Mapping[str, Callable[[Data], Step]], floor: str, data: Data, rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    """A row a method: median milliseconds, the median of the rounds' ratios to the floor, the peak, the loss."""
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in methods}
    steps: dict[str, Step] = {}
    for name, make in methods.items():
        try:
            step = make(data)
            step()  # loads libraries
            step.start_again()
            before = resident_before()
            loss = step()
            rows[name] |= {"loss": None if loss is None else float(loss)}
            if before and data.leaves[0].device.type == "cpu":
                rows[name]["peak_bytes"] = max(0, resident("VmHWM") - before)
            step.start_again()
        except Exception as error:  # one that is not installed, or fails, says so in its row
            rows[name]["error"] = described(error)
        else:
            steps[name] = step
        for leaf in data.leaves:
            leaf.grad = None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            times[name].append(clock(steps[name])[0])
            steps[name].start_again()
    for name, seconds in times.items():
        ratios = [mine / beside for mine, beside in zip(seconds, times[floor], strict=True)]
        rows[name] |= {"seconds": statistics.median(seconds), "times_the_floor": statistics.median(ratios)}
    return list(rows.values())
