"""How many rows of logits a chunk has on a card, and how much memory that is where nobody set a budget.

A chunk of r rows costs three products and a pass over the head's float32 sum [V, D]:
- The logits' gradient times the head makes ceil(r / 128) * ceil(D / 256) tiles of results. Each of the card's
  multiprocessors takes one at a time, so they take whole waves, and the last one may be half empty: at D = 4,096 on 132
  of them 1,664 rows fill 79 % of two waves, 2,048 rows 97 %.
- The other two products have thousands of tiles, or take longer with every row: they take what their rows are.
- The sum is read and written, 8 V D bytes, by every chunk. Beside 6 r V D operations that is 351 / r of an H100's time:
  21 % for 1,664 rows, 9 % for 4,096, 4 % for 8,192.

All chunks of a call have the same number of rows, those that are padding included, so their number and their rows are
chosen together. Without `PREFIXLOSS_MEMORY` a chunk may have 4,096 rows, as far as they take no more than a 32nd of the
card's memory (2.3 of 80 GiB with V = 151,936), or as many as 1 GiB holds, whichever is more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from prefixloss._kernels.launch import processors
from prefixloss.backends import memory

# of the library's products of half precision
_TILE_WIDTH = 256
# operations of those in the time of one byte to or from memory: 790e12 / 3.0e12, an H100's
_BALANCE = 263
# beyond these the sum costs less than 9 % of the products
_WORTH = 4096
_SHARE_OF_CARD = 32


class Products(NamedTuple):
    """What decides a chunk's cost, besides its rows. width: D. processors: that take a tile each."""

    width: int
    processors: int

    def cost(self, rows: int) -> float:
        """Of one chunk, in waves: the time in which every processor makes a tile of the hidden states' gradient."""
        tiles = -(-rows // memory.TILE) * -(-self.width // _TILE_WIDTH)
        return -(-tiles // self.processors) + self.evenly(2 * rows) + self.sum()

    def evenly(self, rows: int) -> float:
        """Of a product with so many rows, if no wave has a gap."""
        return rows * self.width / (memory.TILE * _TILE_WIDTH * self.processors)

    def sum(self) -> float:
        """Of reading and writing the head's sum."""
        return 8 * self.width * _BALANCE / (2 * memory.TILE * _TILE_WIDTH * self.processors)


def chunk_rows(rows: int, tokens: int, bytes_per_row: int, width: int, device: torch.device, chosen: int | None) -> int:
    """Rows of logits in every chunk of `rows` in a batch of `tokens`, for a head [V, width]: `chosen`, or what costs
    least of what the memory allows."""
    if rows == 0:
        return 0
    if chosen is not None:
        return chosen
    worth = min(_WORTH, _memory(device) // _SHARE_OF_CARD // bytes_per_row)
    most = memory.most_rows(tokens, bytes_per_row, device, max(1, worth))
    return cheapest(rows, most, Products(width, processors(device)))


def cheapest(rows: int, most: int, products: Products) -> int:
    """The rows a chunk, at most `most`, with which all chunks together cost least."""
    best, size = float("inf"), most
    chunks = -(-rows // most)
    # no number of chunks costs less than full waves and its sums
    while chunks <= rows and products.evenly(3 * rows) + chunks * products.sum() < best:
        even = memory.even_rows(rows, chunks, most)
        cost = -(-rows // even) * products.cost(even)
        if cost < best:
            best, size = cost, even
        chunks += 1
    return size


@lru_cache
def _memory(device: torch.device) -> int:
    """The card's, in bytes; 0 where it is not one."""
    if device.type not in ("cuda", "xpu"):
        return 0
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)
