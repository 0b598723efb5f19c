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

SLOW_TO_IMPORT = (
    "pytest", "hypothesis", "torch.testing", "torch.distributed.tensor", "triton", "prefixloss", "prefixloss.cli",
    "prefixloss.rl.train", "transformers", "transformers.models.llama.modeling_llama", "accelerate", "peft", "trl",
)  # fmt: skip


@contextmanager
def group_of(rank: int, size: int, file: str) -> Iterator[Any]:
    """In a process: the group of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    yield dist.group.WORLD
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


def process_context() -> Any:
    """Of `multiprocessing`: processes are copies of one that has imported, once, what is slow to import and loaded here
    when the first of them is asked for."""
    if sys.platform != "linux":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([name for name in SLOW_TO_IMPORT if name in sys.modules])
    return context


def in_processes(
    function: Callable[..., None], size: int, tmp_path: Path, *arguments: Any, method: str | None = None
) -> None:
    """Runs `function(rank, size, file, *arguments)` in `size` processes with this one's environment; raises what one of
    them raised. method: "spawn" where what is imported depends on the environment."""
    given = (dict(os.environ), function, size, str(tmp_path / "store"), *arguments)
    mp.start_processes(_to_the_end, given, nprocs=size, start_method=method or process_context().get_start_method())


def _to_the_end(rank: int, environment: dict[str, str], function: Callable[..., None], *arguments: Any) -> None:
    # a copy has that of the time when the first process was asked for
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *arguments)
    sys.stdout.flush()
    # gloo's threads may still let go of tensors; one that does so while the interpreter shuts down aborts the process
    os._exit(0)
