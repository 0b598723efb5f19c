"""Several processes on one machine, that talk through gloo."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@contextmanager
def group_of(rank: int, size: int, file: str) -> Iterator[Any]:
    """In a process: the group of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    yield dist.group.WORLD
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


def in_processes(function: Callable[..., None], size: int, tmp_path: Path, *arguments: Any) -> None:
    """Runs `function(rank, size, file, *arguments)` in `size` processes; raises what one of them raised."""
    mp.spawn(_to_the_end, (function, size, str(tmp_path / "store"), *arguments), nprocs=size)


def _to_the_end(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    function(rank, *arguments)
    sys.stdout.flush()
    # gloo's threads may still let go of tensors; one that does so while the interpreter shuts down aborts the process
    os._exit(0)
