"""A sum of products, as a head's gradient is: the first is written where it stays, with no fill and no read before."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from prefixloss.backends import memory, products


class Sum:
    """Of products [n, V].T @ [n, D]: [V, D], in dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.begun = False

    @cached_property
    def _room(self) -> Tensor:
        return memory.empty(self.shape, self.dtype, self.device)

    @property
    def value(self) -> Tensor:
        """The sum so far, to read and to add to; 0 before anything is in it."""
        if not self.begun:
            self._room.zero_()
            self.begun = True
        return self._room

    def put(self, made: Tensor) -> None:
        """What was made at once, and may have a dtype of its own, is all there is."""
        self._room, self.begun = made, True

    def add_product(self, a: Tensor, b: Tensor, alpha: float) -> None:
        """alpha * a [V, n] @ b [n, D], all of the sum's dtype."""
        products.add_product(self._room, a, b, alpha, first=not self.begun)
        self.begun = True

    def add_head_gradient(self, grads: Tensor, hidden: Tensor) -> None:
        """grads [n, V].T @ hidden [n, D] to a float32 sum."""
        products.add_head_gradient(self._room, grads, hidden, first=not self.begun)
        self.begun = True
