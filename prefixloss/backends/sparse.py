"""A matrix of a few entries, and its two products with a dense one. Every sum has a fixed order, on every device.

Letters: n rows, V columns, m entries, D the other matrix's width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# numbers of a product that is made at a time: 64 MiB of float32
_AT_ONCE = 2**24
# and of one that is added up at once: 4 MiB, still in the cache
_IN_CACHE = 2**20


class Entries(NamedTuple):
    """Of a matrix [n, V], in the order of its rows and then its columns: row, column int64 [m]; value [m]."""

    row: Tensor
    column: Tensor
    value: Tensor

    def where(self, mask: Tensor) -> Entries:
        return Entries(*(x[mask] for x in self))

    def by_column(self) -> Entries:
        """The transpose."""
        order = torch.sort(self.column, stable=True).indices
        return Entries(self.column[order], self.row[order], self.value[order])

    def only_their_rows(self) -> tuple[Tensor, Entries]:
        """The rows that have entries, and these with the places of their rows among them."""
        rows, place = torch.unique_consecutive(self.row, return_inverse=True)
        return rows, Entries(place, self.column, self.value)

    def times(self, factor: float) -> Entries:
        return Entries(self.row, self.column, self.value * factor)

    @classmethod
    def none(cls, like: Tensor) -> Entries:
        nothing = torch.empty(0, dtype=torch.int64, device=like.device)
        return cls(nothing, nothing, like.new_empty(0))

    @classmethod
    def joined(cls, parts: list[Entries]) -> Entries:
        return cls(*(torch.cat(x) for x in zip(*parts, strict=True)))


def product(entries: Entries, rows: int, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, D]: the matrix [rows, V] that has these entries times matrix [V, D], in dtype.

    Each row of the result adds up its entries' rows of the matrix, one after the other.
    """
    if matrix.dtype == dtype:
        return _summed(entries, rows, matrix)
    # only what is needed of a matrix in half precision
    needed, place = entries.column.unique(return_inverse=True)
    total = matrix.new_zeros(rows, matrix.shape[1], dtype=dtype)
    for start in range(0, len(needed), max(1, _AT_ONCE // matrix.shape[1])):
        stop = start + max(1, _AT_ONCE // matrix.shape[1])
        here = (place >= start) & (place < stop)
        part = Entries(entries.row, place - start, entries.value).where(here)
        total += _summed(part, rows, matrix[needed[start:stop]].to(dtype))
    return total


def _summed(entries: Entries, rows: int, matrix: Tensor) -> Tensor:
    offsets = torch.searchsorted(entries.row, torch.arange(rows, device=matrix.device))
    return torch.nn.functional.embedding_bag(
        entries.column, matrix, offsets, mode="sum", per_sample_weights=entries.value
    )


def add_transposed(total: Tensor, entries: Entries, matrix: Tensor, *, fresh: bool = False) -> None:
    """total [V, D] += the transpose of the matrix [n, V] that has these entries times matrix [n, D].

    fresh: total is 0 so far, and perhaps of a smaller dtype, to which sums are rounded. It is only written: to read new
    memory before it is written costs a CPU more than the product.
    """
    turned = entries.by_column()
    step = max(1, _IN_CACHE // matrix.shape[1])
    starts = torch.arange(0, len(total) + step, step, device=matrix.device)
    ends = torch.searchsorted(turned.row, starts).tolist()
    for at, rows in enumerate(total.split(step)):
        here = slice(ends[at], ends[at + 1])
        if ends[at] < ends[at + 1]:
            part = Entries(turned.row[here] - at * step, turned.column[here], turned.value[here])
            found = _summed(part, len(rows), matrix)
            rows.copy_(found) if fresh else rows.add_(found)
