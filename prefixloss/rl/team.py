"""The processes of a run: one alone, or those that `torchrun` started, through accelerate."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from prefixloss.rl import UsageError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`. Every method that talks to the others is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str, timeout: float) -> Team:
        """By torchrun's environment; alone without it. timeout: seconds that one waits for the others, then fails."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device=device)
        try:
            from accelerate import PartialState  # noqa: PLC0415 (only where there are several)
        except ModuleNotFoundError:
            raise UsageError('torchrun: several processes need accelerate: pip install "prefixloss[rl]"') from None
        if not torch.distributed.is_initialized():
            atexit.register(_leave)
        state = PartialState(cpu=device == "cpu", timeout=timedelta(seconds=timeout))
        # of several GPUs each process has its own
        return cls(state.process_index, state.num_processes, "cpu" if device == "cpu" else str(state.device))

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of what all have, in order; parts differ by one at most."""
        bounds = [len(items) * r // self.size for r in (self.rank, self.rank + 1)]
        return list(items[bounds[0] : bounds[1]])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Added up over the processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        return self.sum([value])[0] > 0

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each process's gradients become the sum of all of theirs; a process without any has zeros."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    def start_alike(self, tensors: Iterable[Tensor]) -> None:
        """The first process's values, everywhere."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)

    def seed(self, seed: int, update: int) -> None:
        """Random numbers of its own for each process and update, whatever came before; alone they just go on."""
        if self.size > 1:
            torch.manual_seed(((seed * 1_000_003 + update) * 1009 + self.rank) % 2**63)

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def _leave() -> None:
    """Ends gloo's threads: one that lets go of a tensor once the interpreter is shutting down aborts the process."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
