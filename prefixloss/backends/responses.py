"""What objectives ask of responses and of all tokens: of tokens [N] laid out anyhow, over processes too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixloss.inputs.layout import Layout

_ARGUMENT = "objective"


class LaidOut:
    """`prefixloss.maths.objectives.Responses` of a whole batch."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.of_token = layout.response_of_token(_ARGUMENT)
        self.sizes = layout.starts(_ARGUMENT).diff()
        self.lengths = layout.lengths(_ARGUMENT).clamp(min=1)

    def sum(self, x: Tensor) -> Tensor:
        return self._summed(x)[self.of_token]

    def mean(self, x: Tensor) -> Tensor:
        return (self._summed(x) / self.lengths)[self.of_token]

    def max(self, x: Tensor) -> Tensor:
        low = torch.finfo(x.dtype).min
        parts = self._reduced(torch.where(self.layout.scored, x, low), "max", low)
        parts = parts if self.layout.group is None else _Largest.apply(parts, self.layout)
        return parts[self.of_token]

    def _summed(self, x: Tensor) -> Tensor:
        parts = self._reduced(torch.where(self.layout.scored, x, 0.0), "sum", 0.0)
        return parts if self.layout.group is None else _Added.apply(parts, self.layout)

    def _reduced(self, x: Tensor, how: str, initial: float) -> Tensor:
        """[N] -> [B], in a fixed order on every device."""
        return torch.segment_reduce(x, how, lengths=self.sizes, unsafe=True, initial=initial)


class Everyone:
    """`prefixloss.maths.objectives.Everyone` of a whole batch."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def count(self) -> Tensor:
        return self.layout.scored_tokens()

    def mean(self, x: Tensor) -> Tensor:
        total = torch.where(self.layout.scored, x.detach(), 0.0).sum()
        total = total if self.layout.group is None else self.layout.of_all(total).sum(0)
        return total / self.count.clamp(min=1)

    def descending(self, x: Tensor) -> Tensor:
        here = torch.where(self.layout.scored, x.detach(), -torch.inf)
        if self.layout.group is not None:
            longest = int(self.layout.of_all(torch.tensor(len(here), device=here.device)).max())
            here = torch.nn.functional.pad(here, (0, longest - len(here)), value=-torch.inf)
            here = self.layout.of_all(here).flatten()
        return here.sort(descending=True).values


class _Added(torch.autograd.Function):
    """Every process's parts [B] added up; each process's loss may follow the sum, so gradients add up likewise."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return layout.of_all(parts).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layout.of_all(grad).sum(0), None


class _Largest(torch.autograd.Function):
    """The largest of every process's parts [B]; the gradient goes to the first process that has it."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        everywhere = layout.of_all(parts)
        ctx.mine = everywhere.argmax(0) == torch.distributed.get_rank(layout.group)
        return everywhere.amax(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.where(ctx.mine, ctx.layout.of_all(grad).sum(0), 0.0), None
