"""How much memory the loss may use beyond its inputs and gradients.

`PREFIXLOSS_MEMORY` (bytes) sets the budget for the logits of one chunk of tokens and all the tokens' own statistics;
unset, it is 1 GiB, and on a CPU, where larger chunks gain little, 128 MiB or what 512 rows of a whole vocabulary take.
`prefixloss.backends.triton.waves` says what a card has for its kernels.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

# statistics, coefficients and indices of a token, in bytes, rounded up
_PER_TOKEN = 64
# each chunk reads the head twice, and reads and writes its gradient: with fewer rows a CPU spends over 7 % on that
_ROWS_ON_CPU = 512
# rows that fill a tile of the matrix units
TILE = 128
# bytes of a page of a CPU's memory
_PAGE = 4096
# rows of a small tile, and elements of a row, that every product takes whole: 64 bytes at least of any dtype but half
ALIGNED = 16


def budget(device: torch.device) -> int:
    """The budget in bytes."""
    text = os.environ.get("PREFIXLOSS_MEMORY")
    if text is None:
        return 2**27 if device.type == "cpu" else 2**30
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"PREFIXLOSS_MEMORY: got {text!r}, expected a whole number of bytes > 0")
    return int(text)


def rows_in_budget(tokens: int, bytes_per_row: int, device: torch.device) -> int:
    """How many rows of logits fit beside the statistics of `tokens`.

    A quarter of the budget is for logits however many tokens there are; never less than one row.
    """
    whole = budget(device)
    return max(1, max(whole - _PER_TOKEN * tokens, whole // 4) // bytes_per_row)


def chunk_rows(rows: int, tokens: int, bytes_per_row: int, device: torch.device, chosen: int | None) -> int:
    """Rows of logits in every chunk but the last, of `rows` in a batch of `tokens`: `chosen`, or as many as the budget
    allows, divided evenly, in whole tiles of a matrix unit."""
    if rows == 0:
        return 0
    if chosen is not None:
        return chosen
    most = most_rows(tokens, bytes_per_row, device, _ROWS_ON_CPU if device.type == "cpu" else 1)
    return even_rows(rows, -(-rows // most), most)


def most_rows(tokens: int, bytes_per_row: int, device: torch.device, worth: int) -> int:
    """Rows that a chunk may have, in whole tiles where it holds one: what is in the budget, and `worth` if nobody set
    one."""
    least = 1 if "PREFIXLOSS_MEMORY" in os.environ else worth
    return whole_tiles(max(least, rows_in_budget(tokens, bytes_per_row, device)))


def whole_tiles(most: int) -> int:
    """As many rows, or the whole tiles among them where they hold one."""
    return most if most < TILE else most // TILE * TILE


def even_rows(rows: int, chunks: int, most: int) -> int:
    """Rows of each of so many chunks, at most `most`: the same in all, in whole tiles or, where one is too many, in
    small ones."""
    even = -(-rows // chunks)
    tile = 1 if most < TILE else TILE if even > TILE else ALIGNED
    return min(most, -(-even // tile) * tile)


def zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a CPU from NumPy, which asks Linux for huge pages: a large buffer's first use is 4 x faster."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(tuple(shape), dtype=f"i{dtype.itemsize}")
    return torch.from_numpy(raw).view(dtype)


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, on a CPU from NumPy as `zeros` is."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    raw = np.empty(tuple(shape), dtype=f"i{dtype.itemsize}")
    return torch.from_numpy(raw).view(dtype)


def room(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] to write into, rows a multiple of 16 elements apart: Triton sees then that they are aligned, and
    a CPU's products treat all of them alike. On a CPU they are never whole pages apart: such rows share the same few
    places of the cache, which costs a product a fifth of its time."""
    apart = -(-columns // ALIGNED) * ALIGNED
    if device.type == "cpu" and apart * dtype.itemsize % _PAGE == 0:
        apart += ALIGNED
    return empty((rows, apart), dtype, device)[:, :columns]


def product_rows(chosen: int) -> int:
    """Rows of every product where chunks have `chosen` tokens, so that a row's bits depend on nothing else: whole
    tiles, since a library sums the rows that are left over in another order."""
    return -(-chosen // ALIGNED) * ALIGNED
