"""Where the tokens of a call lie: padded [B, T] or packed [N] with cu_seqlens, seen as one flat list of N tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixloss import check


@dataclass(frozen=True)
class Layout:
    """scored: bool [N], the tokens in `mask`. offsets: int64 [B + 1] of packed input with cu_seqlens. padded: (B, T) of
    padded input.

    group: processes that have a part of every response each, in the order of their ranks; None if all is here. What is
    asked of a response is then asked of all of it, by a collective.
    """

    scored: Tensor
    offsets: Tensor | None
    group: Any = None
    padded: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        shape: torch.Size,
        device: torch.device,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        group: Any = None,
    ) -> Layout:
        """Checks `mask` and `cu_seqlens` against tokens of that shape ([B, T] or [N])."""
        check.layout(shape, mask, cu_seqlens)
        tokens = shape.numel()
        if mask is None:
            scored = torch.ones(tokens, dtype=torch.bool, device=device)
        else:
            scored = mask.reshape(-1).to(device=device, dtype=torch.bool)
        if len(shape) == 2:
            return cls(scored, None, group, (shape[0], shape[1]))
        offsets = None if cu_seqlens is None else in_bounds(cu_seqlens.to(device=device, dtype=torch.int64), tokens)
        return cls(scored, offsets, group)

    @property
    def tokens(self) -> int:
        return self.scored.shape[0]  # not its len: a compiler would take that for a constant

    def starts(self, argument: str) -> Tensor:
        """int64 [B + 1]: where responses begin and the last one ends, or the error that `argument` needs it."""
        if self.padded is not None:
            return torch.arange(self.padded[0] + 1, device=self.scored.device) * self.padded[1]
        if self.offsets is None:
            raise ValueError(
                f"{argument}: is per response, got packed input without cu_seqlens, expected cu_seqlens [B + 1]"
            )
        return self.offsets

    def responses(self, argument: str) -> int:
        """B, or the error that `argument` needs it."""
        return self.starts(argument).shape[0] - 1 if self.padded is None else self.padded[0]

    def spread(self, values: Tensor, argument: str) -> Tensor:
        """[B] -> [N]: for every token its response's."""
        if self.padded is None:
            return values[self.response_of_token(argument)]
        return values[:, None].expand(self.padded).flatten()

    def response_of_token(self, argument: str) -> Tensor:
        """int64 [N]: the response each token belongs to."""
        starts = self.starts(argument)
        positions = torch.arange(self.tokens, device=starts.device)
        return torch.searchsorted(starts, positions, right=True) - 1

    def rank(self) -> Tensor:
        """int64 [N]: how many scored tokens of the same response stand before each token."""
        if self.padded is not None and self.group is None:
            scored = self.scored.reshape(self.padded)
            return scored.cumsum(1).sub_(scored.long()).flatten()
        starts = self.starts("advantages")
        before = torch.nn.functional.pad(self.scored.long().cumsum(0), (1, 0))
        first = -before[starts[:-1]]
        if self.group is not None:
            rank = torch.distributed.get_rank(self.group)
            first = first + self.of_all(before[starts].diff())[:rank].sum(0)
        return before[:-1] + self.spread(first, "advantages")

    def place(self, position: int) -> str:
        """Where a token lies, in words, for an error message."""
        if self.padded is None and self.offsets is None:
            return f"position {position}"
        response = int(self.response_of_token("tokens")[position])
        return f"response {response}, position {position - int(self.starts('tokens')[response])}"

    def check_finite(self, **arguments: Tensor | None) -> None:
        """Per-token values [N], of one dtype: no NaN and no infinity at a scored token. One look at the device."""
        given = {name: values for name, values in arguments.items() if values is not None}
        if not all(check.readable(values) for values in given.values()):
            return
        wrong = torch.stack(list(given.values())).isfinite().logical_not_().logical_and_(self.scored)
        if bool(wrong.any()):
            which, at = wrong.nonzero()[0].tolist()
            name, values = list(given.items())[which]
            check.fail(name, f"{float(values[at])} at {self.place(at)}", "finite values at scored tokens")

    def check_token_ids(self, tokens: Tensor, vocabulary: int) -> None:
        """Ids [N] of scored tokens in [0, V)."""
        if not check.readable(tokens):
            return
        wrong = self.scored & ((tokens < 0) | (tokens >= vocabulary))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            check.fail("tokens", f"id {int(tokens[at])} at {self.place(at)}", f"ids in [0, V) with V = {vocabulary}")

    def lengths(self, argument: str) -> Tensor:
        """int64 [B]: scored tokens of each response."""
        before = torch.nn.functional.pad(self.scored.long().cumsum(0), (1, 0))
        return self._summed(before[self.starts(argument)].diff())

    def sum_by_response(self, values: Tensor, argument: str) -> Tensor:
        """[N] -> [B], summed in a fixed order on every device."""
        lengths = self.starts(argument).diff()
        return self._summed(torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0))

    def scored_tokens(self) -> Tensor:
        """0-d."""
        return self._summed(self.scored.sum())

    def _summed(self, values: Tensor) -> Tensor:
        return values if self.group is None else self.of_all(values).sum(0)

    def of_all(self, values: Tensor) -> Tensor:
        """Every process's values, [processes, ...], in the order of their ranks."""
        rank, size = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        places = values.new_zeros(size, *values.shape)
        places[rank] = values
        torch.distributed.all_reduce(places, group=self.group)
        return places


def in_bounds(offsets: Tensor, tokens: int) -> Tensor:
    """Offsets that were checked, as they are; else made such that wrong ones lead to no read out of bounds."""
    if check.readable(offsets):
        return offsets
    offsets = offsets.clamp(0, tokens).cummax(0).values
    offsets[0], offsets[-1] = 0, tokens
    return offsets
