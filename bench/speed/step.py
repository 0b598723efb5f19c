"""A call in two halves, forward and backward, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Result(NamedTuple):
    """loss: 0-d and attached to its graph; logps: [N], detached. None where a method does not give it."""

    loss: Tensor | None = None
    logps: Tensor | None = None


def of_loss(result: Result) -> None:
    assert result.loss is not None
    result.loss.backward()


@dataclass(frozen=True)
class Step:
    """A call. leaves: what gets a gradient. renew: before each call, for one that overwrites its input."""

    forward: Callable[[], Result]
    leaves: tuple[Tensor, ...] = ()
    backward: Callable[[Result], None] = of_loss
    renew: Callable[[], None] = lambda: None

    def __call__(self) -> Tensor | None:
        result = self.forward()
        self.backward(result)
        return None if result.loss is None else result.loss.detach()

    def start_again(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.renew()
