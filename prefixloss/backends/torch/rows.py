"""Where rows of logits come from, and where their gradients go: an LM head over hidden states, or logits themselves.

Both give `scores(rows)`, the chunk of logits of those tokens in the accumulation dtype, and `room(rows)`, where their
probabilities and then their gradient are made, and take the gradient with `add_gradient(rows, gradient)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from prefixloss.backends import memory, products, sparse
from prefixloss.backends.columns import Columns, Shard
from prefixloss.backends.problem import Head
from prefixloss.backends.sparse import Entries
from prefixloss.backends.sums import Sum
from prefixloss.backends.tolerance import of_products
from prefixloss.backends.torch import entries
from prefixloss.maths.precision import accumulation_dtype, storage_dtype
from prefixloss.maths.softmax import Transform, row_sums

# elements of a head that are multiplied at a time, from the cache: 4 MiB of float32
_AT_ONCE = 2**20
# and where a product is added up: 16 MiB
_ADDED = 2**22
# hidden states of several chunks that are turned into the accumulation dtype at once: 64 MiB of float32
_KEPT = 2**24
# logits of the caller's tensor a chunk: 16 MiB of float32, still in the cache when their gradient is made
_IN_CACHE = 2**22


class Rows(Protocol):
    """N rows of V logits, worked on in `dtype`. `multiplies`: whether products follow the logits' gradient. Then rows
    without gradient had better leave a chunk, and factors wait for the end, where nothing can underflow."""

    multiplies: bool
    transform: Transform
    dtype: torch.dtype

    def chunks(self, rows: Tensor, chosen: int | None) -> Iterator[Tensor]:
        """The rows [n] in pieces: of `chosen` rows, or as many as memory and cache advise."""

    def scores(self, rows: Tensor) -> Tensor:
        """[n, V], transformed; read only, valid until the next call."""

    def room(self, rows: Tensor, learning: bool) -> Tensor:
        """[n, V] to write into, once the scores are made; it may be the scores, or where the gradient of rows that
        are `learning` will stay."""

    def add_gradient(self, rows: Tensor, gradient: Tensor, scale: float) -> None:
        """gradient: [n, V], with respect to `transform.before` times the logits, still to be multiplied by `scale`; of
        rows that do not multiply, with all factors in it."""

    def clear_except(self, rows: Tensor) -> None:
        """Makes sure that the gradient of every other row is 0."""

    def left_out(self) -> float:
        """Which share of the gradients' norm was left out of the products, the largest of the chunks."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """One for each tensor the rows were made of."""


def as_slice(rows: Tensor) -> Tensor | slice:
    """Increasing indices as a slice where they have no gap: no gather, no scatter."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


class LinearRows:
    """Logits of hidden [N, D] under a head weight [V, D] and bias [V] (or None).

    columns: which part of the vocabulary the head is; of a split one the hidden states' gradient is a share.
    tolerances: of the products for the hidden states and for the head, see `prefixloss.backends.tolerance`.
    chosen: tokens a chunk, where the caller chose: then every product has the same number of rows, those beyond a
    chunk's own 0, and no token's bits depend on the others.
    """

    multiplies = True

    def __init__(
        self,
        tensors: Head | tuple[Tensor, Tensor, Tensor | None],
        transform: Transform,
        needs: tuple[bool, ...] = (False, False, False),
        buffers: int = 1,
        columns: Columns | None = None,
        tolerances: tuple[float | str, float | str] = (0.0, 0.0),
        chosen: int | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias = tensors
        self.padded = None if chosen is None else memory.product_rows(chosen)
        self.transform = transform
        self.buffers = buffers
        self.dtype = accumulation_dtype(self.hidden, self.weight)
        self.vocabulary = len(self.weight)
        self.scaled_bias = None if self.bias is None else self.bias.to(self.dtype) * transform.before
        self.buffer = self.hidden.new_empty(0, self.vocabulary, dtype=self.dtype)
        self.d_hidden = self.d_weight = self.d_bias = None
        self.mean_row: Tensor | None = None
        self.few: list[Entries] = []  # of chunks whose part of the head's gradient is still to be made
        wanted = needs[0], needs[1] or needs[2]
        dtypes = self.hidden.dtype, self.weight.dtype
        columns = columns or Columns(self.vocabulary)
        numbers = of_products(tolerances, dtypes, wanted, columns.vocabulary)
        self.tolerance = entries.Tolerance(*numbers, columns)
        if needs[0]:
            # of several processes' shares only the sum is rounded
            kept = self.dtype if isinstance(columns, Shard) else storage_dtype(self.hidden.dtype)
            self.d_hidden = memory.zeros(self.hidden.shape, kept, self.hidden.device)
        if needs[1]:
            self.d_weight = Sum(self.weight.shape, self.dtype, self.weight.device)
        if needs[2]:
            self.d_bias = self.weight.new_zeros(self.vocabulary, dtype=self.dtype)

    def chunks(self, rows: Tensor, chosen: int | None) -> Iterator[Tensor]:
        per_row = self.vocabulary * self.dtype.itemsize * self.buffers
        size = memory.chunk_rows(len(rows), len(self.hidden), per_row, self.hidden.device, chosen)
        return iter(rows.split(size) if len(rows) else ())

    def _states(self, rows: Tensor) -> Tensor:
        return self.hidden.index_select(0, rows).to(self.dtype).mul_(self.transform.before)

    def _hidden(self, rows: Tensor) -> Tensor:
        hidden = self._states(rows)
        if self.padded is None:
            return hidden
        whole = self._room(hidden.shape[1])
        whole[: len(rows)] = hidden
        whole[len(rows) :] = 0
        return whole

    def _room(self, columns: int) -> Tensor:
        """Where every product's rows lie, [padded, columns]."""
        assert self.padded is not None
        return memory.room(self.padded, columns, self.dtype, self.hidden.device)

    def _weight_slices(self, elements: int) -> Iterator[tuple[slice, Tensor]]:
        """The head in the accumulation dtype, a slice of the vocabulary at a time; valid until the next one."""
        width = self.weight.shape[1]
        step = min(self.vocabulary, max(1, elements // max(1, width)))
        room = None if self.weight.dtype == self.dtype else self.weight.new_empty(step, width, dtype=self.dtype)
        for start in range(0, self.vocabulary, step):
            columns = slice(start, min(start + step, self.vocabulary))
            weight = self.weight[columns]
            yield columns, weight if room is None else room[: len(weight)].copy_(weight)

    def scores(self, rows: Tensor) -> Tensor:
        if self.padded is not None and len(self.buffer) == 0:
            self.buffer = self._room(self.vocabulary)
        elif len(self.buffer) < len(rows):
            self.buffer = memory.room(len(rows), self.vocabulary, self.dtype, self.buffer.device)
        hidden = self._hidden(rows)
        for columns, weight in self._weight_slices(_AT_ONCE):
            products.multiply(hidden, weight.t(), self.buffer[: len(hidden), columns])
        scores = self.buffer[: len(rows)]
        if self.scaled_bias is not None:
            scores.add_(self.scaled_bias)
        return self.transform.cap_(scores)

    def room(self, rows: Tensor, learning: bool) -> Tensor:
        return self.buffer[: len(rows)]

    def hidden_gradient(self, gradient: Tensor, scale: float) -> Tensor:
        """scale * gradient @ weight: [n, D]. gradient: the first rows of `room`."""
        width, whole = self.weight.shape[1], self._whole(gradient)
        product = gradient.new_empty(len(whole), width) if self.padded is None else self._room(width)
        self._multiply(whole, product)
        return product[: len(gradient)].mul_(self.transform.before * scale)

    def _multiply(self, gradient: Tensor, product: Tensor) -> None:
        """product [n, D] = gradient [n, V] @ weight."""
        # a head that is as it is multiplied is best taken whole
        elements = self.weight.numel() if self.weight.dtype == self.dtype else _ADDED
        for columns, weight in self._weight_slices(elements):
            products.add_product(product, gradient[:, columns], weight, first=columns.start == 0)

    def _whole(self, gradient: Tensor) -> Tensor:
        """The gradient with 0 for the rows that a product has beyond it."""
        if self.padded is None:
            return gradient
        self.buffer[len(gradient) :] = 0
        return self.buffer

    def add_gradient(self, rows: Tensor, gradient: Tensor, scale: float) -> None:
        for_hidden, for_head = self.tolerance.split(gradient)
        if self.d_hidden is not None:
            if for_hidden is None:
                product = self.hidden_gradient(gradient, scale)
            else:
                product = sparse.product(for_hidden, len(rows), self.weight, self.dtype)
                product.addmm_(self._left_out_of(gradient, for_hidden), self._mean_row())
                product.mul_(self.transform.before * scale)
            self.d_hidden.index_copy_(0, rows, product.to(self.d_hidden.dtype))
        if for_head is None:
            self._add_head_gradient(rows, gradient, scale)
            return
        for_head = for_head.times(scale)
        if self.d_weight is not None:
            self._keep(Entries(rows[for_head.row], for_head.column, for_head.value))
        if self.d_bias is not None:
            ones = self.d_bias.new_full((len(rows), 1), self.transform.before)
            sparse.add_transposed(self.d_bias[:, None], for_head, ones)

    def _left_out_of(self, gradient: Tensor, few: Entries) -> Tensor:
        """[n, 1]: the sum of each row's entries that are not among the few."""
        ones = gradient.new_ones(1, 1).expand(self.vocabulary, 1).contiguous()
        return row_sums(gradient) - sparse.product(few, len(gradient), ones, self.dtype)

    def _mean_row(self) -> Tensor:
        """[1, D]: of the head, in whose place the rows of left out entries are taken."""
        if self.mean_row is None:
            even = self.buffer.new_full((1, self.vocabulary), 1 / self.vocabulary)
            self.mean_row = self.buffer.new_empty(1, self.weight.shape[1])
            self._multiply(even, self.mean_row)
        return self.mean_row

    def _keep(self, entries: Entries) -> None:
        """A chunk's few entries wait for those of the others: the head's gradient is then made at once, and in its own
        dtype. The hidden states that it takes in the accumulation dtype have a limit."""
        self.few.append(entries)
        if self.hidden.numel() > _KEPT:
            self._add_few()

    def _add_few(self) -> None:
        if self.few and self.d_weight is not None:
            rows, few = Entries.joined(self.few).only_their_rows()
            sparse.add_transposed(self.d_weight.value, few, self._states(rows))
            self.few = []

    def _head_gradient(self) -> Tensor | None:
        if self.d_weight is None:
            return None
        kept = storage_dtype(self.weight.dtype)
        if self.few and not self.d_weight.begun:
            total = memory.zeros(self.weight.shape, kept, self.weight.device)
            rows, few = Entries.joined(self.few).only_their_rows()
            sparse.put_transposed(total, few, self._states(rows))
            return total
        self._add_few()
        return self.d_weight.value.to(kept)

    def _add_head_gradient(self, rows: Tensor, gradient: Tensor, scale: float) -> None:
        if self.d_weight is not None:
            self.d_weight.add_product(self._whole(gradient).t(), self._hidden(rows), scale)
        if self.d_bias is not None:
            self.d_bias.add_(gradient.sum(0), alpha=self.transform.before * scale)

    def clear_except(self, rows: Tensor) -> None:
        """Nothing to do: gradients are made as zeros."""

    def left_out(self) -> float:
        return self.tolerance.left_out()

    def gradients(self) -> tuple[Tensor | None, ...]:
        d_bias = self.d_bias
        if d_bias is not None and self.bias is not None:
            d_bias = d_bias.to(storage_dtype(self.bias.dtype))
        return self.d_hidden, self._head_gradient(), d_bias


class LogitRows:
    """Logits [N, V] as they are. `into`: where the gradient goes; `logits` itself overwrites them."""

    multiplies = False

    def __init__(
        self, logits: Tensor, transform: Transform, needs: tuple[bool, ...] = (False,), into: Tensor | None = None
    ) -> None:
        self.logits = logits
        self.transform = transform
        self.dtype = accumulation_dtype(logits)
        self.vocabulary = logits.shape[1]
        self.buffer = logits.new_empty(0, self.vocabulary, dtype=self.dtype)
        self.d_logits = None
        if needs[0]:
            self.d_logits = memory.zeros(logits.shape, logits.dtype, logits.device) if into is None else into

    def chunks(self, rows: Tensor, chosen: int | None) -> Iterator[Tensor]:
        return iter(rows.split(chosen or max(1, _IN_CACHE // self.vocabulary)) if len(rows) else ())

    def scores(self, rows: Tensor) -> Tensor:
        logits = self.logits[as_slice(rows)]
        transform = self.transform
        if logits.dtype == self.dtype and transform.before == 1 and transform.softcap is None:
            return logits
        return transform.cap_(self._chunk(rows).copy_(logits).mul_(transform.before))

    def room(self, rows: Tensor, learning: bool) -> Tensor:
        where = as_slice(rows)
        if learning and self.d_logits is not None and self.d_logits.dtype == self.dtype and isinstance(where, slice):
            return self.d_logits[where]
        return self._chunk(rows)

    def _chunk(self, rows: Tensor) -> Tensor:
        if len(self.buffer) < len(rows):
            self.buffer = self.buffer.new_empty(len(rows), self.vocabulary)
        return self.buffer[: len(rows)]

    def add_gradient(self, rows: Tensor, gradient: Tensor, scale: float) -> None:
        if self.d_logits is None:
            return
        where = as_slice(rows)
        made_in_place = isinstance(where, slice) and gradient.data_ptr() == self.d_logits[where].data_ptr()
        if not made_in_place:
            self.d_logits[where] = gradient.to(self.d_logits.dtype)

    def left_out(self) -> float:
        return 0.0

    def clear_except(self, rows: Tensor) -> None:
        if self.d_logits is self.logits:  # overwritten in place: the others still hold logits
            others = torch.ones(len(self.logits), dtype=torch.bool, device=rows.device)
            others[rows] = False
            self.logits.index_fill_(0, others.nonzero().squeeze(1), 0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (self.d_logits,)
