"""A matrix of a few entries, and its two products with a dense one. Every sum has a fixed order, on every device.

Letters: n rows, V columns, m entries, D the other matrix's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# numbers of a product that is made at a time: 64 MiB of float32
_AT_ONCE = 2**24
# and of one that is added up at once: 2 MiB, still in the cache
_IN_CACHE = 2**19


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

    def split(self, sizes: list[int]) -> Iterator[Entries]:
        return (Entries(*x) for x in zip(*(x.split(sizes) for x in self), strict=True))

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
    total = matrix.new_zeros(rows, matrix.shape[1], dtype=dtype)
    if len(entries.value) <= len(matrix):  # then looking up each entry's row costs less than sharing them
        step = max(1, _IN_CACHE // matrix.shape[1])
        for start in range(0, len(entries.value), step):
            _add_product(total, Entries(*(x[start : start + step] for x in entries)), matrix)
        return total
    for _, part, some in _upcast(entries, matrix, dtype):
        total += _summed(part, rows, some)
    return total


def _add_product(total: Tensor, entries: Entries, matrix: Tensor) -> None:
    """total [n, D] += `product`, with a copy of a row of the matrix for each entry."""
    first, last = int(entries.row[0]), int(entries.row[-1])
    copies = matrix[entries.column].to(total.dtype)
    part = Entries(entries.row - first, torch.arange(len(copies), device=copies.device), entries.value)
    total[first : last + 1] += _summed(part, last + 1 - first, copies)


def transposed_product(entries: Entries, columns: int, matrix: Tensor) -> Tensor:
    """[V, D]: the transpose of the matrix [n, V] that has these entries times matrix [n, D], all of one dtype."""
    return _summed(entries.by_column(), columns, matrix)


def add_transposed(total: Tensor, entries: Entries, matrix: Tensor) -> None:
    """total [V, D] += `transposed_product`; rows without an entry are not touched."""
    turned = entries.by_column()
    columns, counts = torch.unique_consecutive(turned.row, return_counts=True)
    step = max(1, _AT_ONCE // matrix.shape[1])
    place = torch.arange(len(columns), device=matrix.device).repeat_interleave(counts)
    sizes = [int(x) for x in torch.stack([part.sum() for part in counts.split(step)])] if len(columns) else []
    turned = Entries(place, turned.column, turned.value)
    for start, part in zip(range(0, len(columns), step), turned.split(sizes), strict=True):
        some = columns[start : start + step]
        summed = _summed(Entries(part.row - start, part.column, part.value), len(some), matrix)
        # index_add_ would sort the columns again
        total.index_copy_(0, some, summed.add_(total.index_select(0, some)))


def put_transposed(total: Tensor, entries: Entries, matrix: Tensor) -> None:
    """total [V, D] = `transposed_product`, where total is 0 so far and may be of a smaller dtype, to which sums are
    rounded. It is only written: to read new memory before it is written costs a CPU more than the product."""
    turned = entries.by_column()
    step = max(1, _IN_CACHE // matrix.shape[1])
    ends = torch.searchsorted(turned.row, torch.arange(0, len(total) + step, step, device=matrix.device)).tolist()
    for at, rows in enumerate(total.split(step)):
        here = slice(ends[at], ends[at + 1])
        if ends[at] < ends[at + 1]:
            part = Entries(turned.row[here] - at * step, turned.column[here], turned.value[here])
            rows.copy_(_summed(part, len(rows), matrix))


def dots(row: Tensor, column: Tensor, hidden: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[m]: of each entry its row of hidden [n, D] times its column's row of matrix [V, D], in dtype."""
    hidden, entries = hidden.to(dtype), Entries(row, column, row)
    if matrix.dtype == dtype:
        return _dots(entries, hidden, matrix)
    made = hidden.new_empty(len(row))
    for here, part, some in _upcast(entries, matrix, dtype):
        made[here] = _dots(part, hidden, some)
    return made


def _dots(entries: Entries, hidden: Tensor, matrix: Tensor) -> Tensor:
    # the gradient of an embedding bag's weights: no row is copied
    made: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        hidden, matrix, entries.column, entries.row[:1], entries.row, 0
    )
    return made


def _upcast(entries: Entries, matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Entries, Tensor]]:
    """The matrix's rows that are needed, some at a time in dtype [.., D]: with a mask of their entries, and these."""
    needed, place = entries.column.unique(return_inverse=True)
    step = max(1, _AT_ONCE // matrix.shape[1])
    for start in range(0, len(needed), step):
        here = (place >= start) & (place < start + step)
        part = Entries(entries.row, place - start, entries.value).where(here)
        yield here, part, matrix[needed[start : start + step]].to(dtype)


def _summed(entries: Entries, rows: int, matrix: Tensor) -> Tensor:
    offsets = torch.searchsorted(entries.row, torch.arange(rows, device=matrix.device))
    return torch.nn.functional.embedding_bag(
        entries.column, matrix, offsets, mode="sum", per_sample_weights=entries.value
    )
