"""How a kernel is cut into blocks: a short table by element size and vocabulary, and how many programs share a row; and
on which device it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec

import torch
import triton

# a row is split only if there are too few rows for one program each to fill the device
_MOST_SPLITS = 16
# multiprocessors assumed where none can be counted
_PROCESSORS = 128

Arguments = ParamSpec("Arguments")


class Launch(NamedTuple):
    """A block is [lanes, vector] logits; `vector` neighbours are 16 bytes of the narrowest element."""

    lanes: int
    vector: int
    num_warps: int

    @property
    def block(self) -> int:
        return self.lanes * self.vector


def launch_for(vocabulary: int, *dtypes: torch.dtype, heavy: bool = False, aligned: bool = True) -> Launch:
    """dtypes: of all that is read and written. A thread has 64 bytes of the widest of a block, 4 loads in flight; a
    wide row gets 512 threads, so that few rows are in flight and the second pass finds them in the cache.

    heavy: a second model is read, so a thread has fewer of each. Where all is float32 it has fewer too: the compiler
    then fits two programs on a multiprocessor without spilling. aligned: rows are read by whole vectors; where they
    cannot be, a logit is loaded by itself.
    """
    if not aligned:
        return launch_with(16 if vocabulary > 2**15 else 4, 16, vocabulary, *dtypes)._replace(vector=1)
    num_warps = 16 if vocabulary > 2**15 else 8 if vocabulary > 2**13 else 4
    narrow = any(dtype.itemsize < 4 for dtype in dtypes)
    return launch_with(num_warps, 64 if narrow and not heavy else 32, vocabulary, *dtypes)


def vector_of(*dtypes: torch.dtype) -> int:
    """Logits in 16 bytes of the narrowest."""
    return 16 // min(dtype.itemsize for dtype in dtypes)


def launch_with(num_warps: int, bytes_a_thread: int, vocabulary: int, *dtypes: torch.dtype) -> Launch:
    """The same with as many bytes of the widest dtype a thread and block; less where the vocabulary has no more."""
    vector = vector_of(*dtypes)
    logits_a_thread = bytes_a_thread // max(dtype.itemsize for dtype in dtypes)
    lanes = max(32, num_warps * 32 * logits_a_thread // vector)
    while lanes > 32 and lanes * vector > vocabulary:
        lanes //= 2
    # a lane each for every thread, also of warps of 64
    return Launch(lanes, vector, min(num_warps, max(1, lanes // 64)))


def splits_for(rows: int, vocabulary: int, block: int, device: torch.device) -> int:
    """Programs a row, a power of two: enough for two a multiprocessor, none of less than one block."""
    splits = 1
    wanted = min(_MOST_SPLITS, 2 * processors(device) // max(1, rows), vocabulary // block)
    while 2 * splits <= wanted:
        splits *= 2
    return splits


@lru_cache
def processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _PROCESSORS


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one: Triton launches on the current device's stream, wherever the tensors are."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def on_device(launcher: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """For every launcher: the kernel runs where its first argument is, logits (of a problem) or a tensor."""

    @wraps(launcher)
    def launch_there(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        first: Any = args[0]
        with current(getattr(first, "logits", first).device):
            launcher(*args, **kwargs)

    return launch_there


def warp_size() -> int:
    """Lanes of a warp of the current device."""
    if triton.knobs.runtime.interpret:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def options(num_warps: int) -> dict[str, object]:
    """Launch options of every kernel: products and sums may fuse, as Triton's default was until 3.9."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def next_power_of_two(n: int) -> int:
    return triton.next_power_of_2(n)
