"""A matrix of a few entries, and its two products with a dense one. Every sum has a fixed order, on every device.

Letters: n rows, V columns, m entries, D the other matrix's width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# numbers of a product that is made at a time: 64 MiB of float32
_AT_ONCE = 2**24


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


def add_transposed(total: Tensor, entries: Entries, matrix: Tensor) -> None:
    """total [V, D] += the transpose of the matrix [n, V] that has these entries times matrix [n, D], all of one dtype;
    rows without an entry are not touched."""
    turned = entries.by_column()
    columns, row = torch.unique_consecutive(turned.row, return_inverse=True)
    for start in range(0, len(columns), max(1, _AT_ONCE // matrix.shape[1])):
        some = columns[start : start + max(1, _AT_ONCE // matrix.shape[1])]
        here = (row >= start) & (row < start + len(some))
        part = Entries(row - start, turned.column, turned.value).where(here)
        total.index_add_(0, some, _summed(part, len(some), matrix))
