"""An LM head over many tokens, a chunk of logits at a time: what `backend="triton"` multiplies.

Every chunk of a call has the same number of rows, so that no token's result depends on where in the batch it lies; with
`chunk_tokens` every call's chunks have, so that none depends on the batch. One room holds a chunk's float32 logits
and then, in the same memory, their gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss._kernels.scale import launch_scale
from prefixloss.backends import memory, products
from prefixloss.backends.columns import Collective, Columns, Shard
from prefixloss.backends.problem import Head
from prefixloss.backends.sums import Sum
from prefixloss.backends.triton import waves
from prefixloss.maths.precision import storage_dtype

# no row's gradient is scaled by more: see `row_scale` in the kernels
LARGEST_SCALE = 2.0**120


class Wanted(NamedTuple):
    """Which tokens to compute: int64 [n]; wanted: bool [n] where not all of them are."""

    token: Tensor
    wanted: Tensor | None

    @classmethod
    def where(cls, wanted: Tensor, most: int | None) -> Wanted:
        """The True entries of wanted [N]: exactly, after one synchronisation with the device, or, with `most`, the
        first `most` of them and then others, without any."""
        if most is None:
            return cls(wanted.nonzero().squeeze(1), None)
        if most >= len(wanted):
            return cls(torch.arange(len(wanted), device=wanted.device), wanted)
        index = torch.argsort(~wanted, stable=True)[:most]
        return cls(index, wanted[index])

    @classmethod
    def split(cls, first: Tensor, wanted: Tensor) -> tuple[Wanted, Wanted]:
        """The tokens in both of two masks [N], and those in the second alone; one synchronisation."""
        kind = torch.where(wanted, torch.where(first, 0, 1), 2)
        counts = torch.stack([(kind == 0).sum(), (kind <= 1).sum()]).tolist()
        index = torch.argsort(kind, stable=True)
        return cls(index[: counts[0]], None), cls(index[counts[0] : counts[1]], None)


class Room(NamedTuple):
    """What a chunk is made in: float32 logits [size, V] and hidden states [size, D], whose rows beyond the chunk's own
    are never NaN; the reference's, or None. scales [size]: what each row's gradient comes times, None for 1."""

    logits: Tensor
    hidden: Tensor
    reference_logits: Tensor | None
    reference_hidden: Tensor | None
    scales: Tensor | None


class Chunk(NamedTuple):
    """rows: int64 [n], the tokens it is made of. logits: float32 [n, V]; reference likewise, or None."""

    rows: Tensor
    logits: Tensor
    reference: Tensor | None
    room: Room


class HeadChunks:
    """The logits of the tokens `rows` [n] in chunks, and what their gradients add up to.

    needs: whether hidden, weight and bias want gradients. chosen: rows a chunk, None for as many as memory advises.
    columns: which part of the vocabulary the head is, None for all of it. While several processes share what they know
    of a chunk, the next is made, in a room of its own.
    """

    def __init__(
        self,
        head: Head,
        reference: Head | None,
        rows: Wanted,
        chosen: int | None,
        needs: Sequence[bool] = (False, False, False),
        columns: Columns | None = None,
    ) -> None:
        self.head, self.reference, self.rows = head, reference, rows
        hidden, weight, _ = head
        self.vocabulary, self.device = len(weight), hidden.device
        self.columns = columns or Columns(self.vocabulary)
        self.step = self._step(chosen)
        # the rows of the rooms and of every product
        self.size = self.step if chosen is None else memory.product_rows(self.step)
        ahead = isinstance(self.columns, Shard) and self.step < len(rows.token)
        self.rooms = [self._room() for _ in range(1 + ahead)]
        self.grads_dtype = products.gradient_dtype(self.rooms[0].hidden, weight)
        self.scaled = self.rooms[0].scales is not None
        self.sum_scale = torch.full((), LARGEST_SCALE, device=self.device) if self.scaled else None
        self._on_the_way: tuple[Tensor, Tensor, Collective] | None = None
        self.d_hidden = self.d_weight = self.d_bias = None
        if needs[0]:
            self.d_hidden = torch.zeros(hidden.shape, device=self.device, dtype=storage_dtype(hidden.dtype))
        if needs[1]:
            self.d_weight = Sum(weight.shape, torch.float32, self.device)
        if needs[2]:
            self.d_bias = Sum((self.vocabulary, 1), torch.float32, self.device)

    def _step(self, chosen: int | None) -> int:
        """Rows a chunk."""
        count, fit = len(self.rows.token), self.columns.rows_at_once
        if chosen is None and fit is not None:
            if count <= fit:
                return count
            most = memory.whole_tiles(max(1, fit // 2))
            return memory.even_rows(count, -(-count // most), most)
        per_row, (hidden, _, _) = 4 * self.vocabulary * (1 if self.reference is None else 2), self.head
        return waves.chunk_rows(count, len(hidden), per_row, hidden.shape[1], self.device, chosen)

    def _room(self) -> Room:
        hidden = self._hidden_room(self.head)
        # float16 ends at 6e-8: there each row's gradient comes times a power of two of its own, and so does the sum
        scaled = products.gradient_dtype(hidden, self.head.weight) == torch.float16
        scales = torch.full((self.size,), LARGEST_SCALE, device=self.device) if scaled else None
        if self.reference is None:
            return Room(self._matrix(torch.float32), hidden, None, None, scales)
        others = self._matrix(torch.float32), self._hidden_room(self.reference)
        return Room(self._matrix(torch.float32), hidden, *others, scales)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """[size, V]."""
        return memory.room(self.size, self.vocabulary, dtype, self.device)

    def _hidden_room(self, head: Head) -> Tensor:
        dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
        return memory.room(self.size, head.hidden.shape[1], dtype, self.device).zero_()

    def gradient_apart(self) -> Tensor:
        """[size, V] in the products' dtype, for any chunk: where several programs share a row, none may overwrite what
        another has yet to read."""
        return self._matrix(self.grads_dtype)

    def gradient_over(self, logits: Tensor) -> Tensor:
        """[size, V] in the products' dtype, over a room's logits, for half precision in the upper half of each row."""
        if self.grads_dtype == torch.float32:
            return logits
        stride = logits.stride(0)
        halves = logits.as_strided((self.size, stride), (stride, 1)).view(self.grads_dtype)
        return halves[:, stride : stride + self.vocabulary]

    def __iter__(self) -> Iterator[Chunk]:
        starts = range(0, len(self.rows.token), max(1, self.step))
        for start, room in zip(starts, itertools.cycle(self.rooms), strict=False):
            here = slice(start, start + self.step)
            rows, wanted = self.rows.token[here], None if self.rows.wanted is None else self.rows.wanted[here]
            self._multiply(self.head, rows, wanted, room.hidden, room.logits)
            reference = None
            if self.reference is not None:
                assert room.reference_hidden is not None
                assert room.reference_logits is not None
                self._multiply(self.reference, rows, wanted, room.reference_hidden, room.reference_logits)
                reference = room.reference_logits[: len(rows)]
            yield Chunk(rows, room.logits[: len(rows)], reference, room)

    def _multiply(self, head: Head, rows: Tensor, wanted: Tensor | None, hidden: Tensor, out: Tensor) -> None:
        chosen = hidden[: len(rows)].copy_(head.hidden.index_select(0, rows))
        if wanted is not None:
            # a token outside the mask may hold anything, and 0 times NaN is NaN
            chosen.masked_fill_(~wanted[:, None], 0)
        products.logits(hidden, head.weight, head.bias, out)

    def hidden_gradient(self, grads: Tensor, rows: int, scales: Tensor | None) -> Tensor:
        """float32 [rows, D]: the first rows of grads [size, V] times the head, their scales taken back."""
        product = products.hidden_gradient(grads, self.head.weight)[:rows]
        return product if scales is None else product.div_(scales[:rows, None])

    def add_gradient(self, chunk: Chunk, grads: Tensor, hidden: bool = True, head: bool = True) -> None:
        """Takes in grads [size, V] of a chunk; of hidden states, or head, alone if the other's product is not
        wanted."""
        rows, scales = chunk.rows, chunk.room.scales
        grads[len(rows) :] = 0
        if scales is not None:
            scales[len(rows) :] = LARGEST_SCALE
        if self.d_hidden is not None and hidden:
            self.put_summed(self.d_hidden, rows, self.hidden_gradient(grads, len(rows), scales))
        if head:
            self.add_head_gradient(grads, chunk.room.hidden, scales)

    def put_summed(self, out: Tensor, rows: Tensor, shares: Tensor) -> None:
        """out[rows] = the sum of all processes' shares, float32 [n, D]; with several processes not before the next
        call or `finish`, so that there is something to compute meanwhile."""
        self.finish()
        self._on_the_way = out, rows, self.columns.begin_sum(shares)
        if not isinstance(self.columns, Shard):
            self.finish()

    def finish(self) -> None:
        """Waits for the sum on its way, if any, and puts it in its place."""
        if self._on_the_way is not None:
            out, rows, total = self._on_the_way
            out.index_copy_(0, rows, total.wait().to(out.dtype))
            self._on_the_way = None

    def add_head_gradient(self, grads: Tensor, hidden: Tensor, scales: Tensor | None) -> None:
        """Adds the products of grads [n, V] with hidden [n, D], and with 1 for the bias."""
        if self.d_weight is None and self.d_bias is None:
            return
        share = None if scales is None else self._share_of_sum(scales)[:, None]
        for total, matrix in self.head_sums(hidden):
            total.add_head_gradient(grads, matrix if share is None else (matrix * share).to(self.grads_dtype))

    def head_sums(self, hidden: Tensor) -> Iterator[tuple[Sum, Tensor]]:
        """The sums [V, D] that want a gradient of the head or its bias, and what logits' gradients come times: hidden
        states [n, D], and 1."""
        if self.d_weight is not None:
            yield self.d_weight, hidden
        if self.d_bias is not None:
            yield self.d_bias, torch.ones(len(hidden), 1, dtype=self.grads_dtype, device=self.device)

    def _share_of_sum(self, scales: Tensor) -> Tensor:
        """[size], at most 1: what a row's gradient, times its own scale, needs to have the sum's scale.

        The sum has the smallest scale of any row so far, so that nothing in it is too large for the products.
        """
        assert self.sum_scale is not None
        smallest = torch.minimum(scales.min(), self.sum_scale)
        for total in (self.d_weight, self.d_bias):
            if total is not None and total.begun:
                launch_scale(total.value, smallest / self.sum_scale)
        self.sum_scale = smallest
        return smallest / scales

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, in their dtype; float16's wait for the incoming scale in float32. The end."""
        self.finish()
        del self.rooms  # room for the head's gradient in its own dtype
        sums: list[Tensor | None] = []
        for total, given in ((self.d_weight, self.head.weight), (self.d_bias, self.head.bias)):
            if total is None or given is None:
                sums.append(None)
                continue
            value = total.value
            if self.sum_scale is not None:
                value.div_(self.sum_scale)
            sums.append(value.reshape(given.shape).to(storage_dtype(given.dtype)))
        return self.d_hidden, sums[0], sums[1]
