"""What `from_head` offers, for a head split over processes: no operators, since a process group is no argument of one.
To `torch.compile` each is a graph break.

hidden, weight, ...: as there, weight [columns, D] of this process. ids: int64 [N], in the whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefixloss.backends.autograd import first_order
from prefixloss.backends.columns import Shard
from prefixloss.backends.library import decoded
from prefixloss.backends.problem import Head
from prefixloss.backends.triton import from_head
from prefixloss.backends.triton.scaling import save_gradients, scaled_gradients


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Any, ref_weight: Any, ref_bias: Any,
        ids: Tensor, flags: Tensor, given: Tensor, recorded: list[bool], options: str, most: int,
        needs: list[bool], columns: Shard,
    ) -> Any:  # fmt: skip
        head, reference = Head(hidden, weight, bias), from_head.head_of(ref_hidden, ref_weight, ref_bias)
        return from_head.fused_loss(
            head, reference, columns, ids, flags, given, recorded, decoded(options), most, needs
        )

    setup_context = staticmethod(save_gradients)
    backward = staticmethod(scaled_gradients)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Any, ref_weight: Any, ref_bias: Any,
        ids: Tensor, flags: Tensor, options: str, most: int, slope: bool, left_out: Any, columns: Shard,
    ) -> Any:  # fmt: skip
        head, reference = Head(hidden, weight, bias), from_head.head_of(ref_hidden, ref_weight, ref_bias)
        return from_head.statistics_of(head, reference, columns, ids, flags, decoded(options), most, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        from_head.save_for_gradient(ctx, inputs[:-1], output)
        ctx.columns = inputs[-1]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        def gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            *heads, ids, flags, stats, coefficients, options, most, needs = arguments
            head, reference = Head(*heads[:3]), from_head.head_of(*heads[3:])
            return from_head.gradient_of(
                head, reference, ctx.columns, ids, flags, stats, coefficients, decoded(options), most, needs
            )

        return *from_head.gradients_later(ctx, grad, gradient), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_loss(columns: Shard, *arguments: Any) -> tuple[Tensor, ...]:
    """`from_head.linear_loss` of these columns."""
    made: tuple[Tensor, ...] = _Loss.apply(*arguments, columns)
    return made


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_statistics(columns: Shard, *arguments: Any) -> tuple[Tensor, ...]:
    """`from_head.linear_statistics` of these columns."""
    made: tuple[Tensor, ...] = _Statistics.apply(*arguments, columns)
    return made
