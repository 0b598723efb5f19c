"""What every back-end is asked, each question one object, and the three questions that each of them answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefixloss.backends.columns import Columns
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenValues
from prefixloss.inputs.distillation import Distillation, DistillBatch, Teacher


class Head(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V] or None; V columns without padding, of this process."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class HeadStatistics:
    """Log-probs, entropies and, with a reference, exact KLs of the tokens in wanted, bool [N].

    tokens: int64 [N]. columns: which part of the vocabulary the heads are. most: an upper bound on the wanted tokens,
    with which nothing may wait for the device. left_out: 0-d, where a back-end writes which share of the gradient it
    left out, if any, once the gradient is made.
    """

    head: Head
    reference: Head | None
    tokens: Tensor
    wanted: Tensor
    config: LossConfig
    columns: Columns
    most: int | None
    left_out: Tensor


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a batch from hidden states. reference: for the exact KL. most: as above, of the computed tokens."""

    head: Head
    reference: Head | None
    batch: Batch
    config: LossConfig
    columns: Columns
    most: int | None
    left_out: Tensor

    def statistics(self, wanted: Tensor) -> HeadStatistics:
        """What the loss is made of, if it is made in two stages."""
        return HeadStatistics(
            self.head, self.reference, self.batch.tokens, wanted, self.config, self.columns, self.most, self.left_out
        )


@dataclass(frozen=True)
class LogitLoss:
    """The loss of a batch from logits [B, T, V] or [N, V], of any strides. reference: likewise, for the exact KL.

    inplace: whether the gradient may overwrite the logits.
    """

    logits: Tensor
    reference: Tensor | None
    batch: Batch
    config: LossConfig
    columns: Columns
    inplace: bool
    left_out: Tensor

    @property
    def gradient_later(self) -> bool:
        """float16 gradients are made once the incoming scale is known, or small ones would underflow before it."""
        return self.logits.dtype == torch.float16


@dataclass(frozen=True)
class Distil:
    """The divergence of a student from a teacher: the reduced loss ([N] for "none"), differentiable, and the
    divergences [N] of the learning tokens.

    student: a head, or logits [N, V] alone. It is answered by `reference_distill.distillation`, by
    `torch.distill.distillation` and by `triton.distill.distillation`, which has no `vocabulary`.
    vocabulary: int64 [V], the ids that a teacher with a head or logits has for the student's, -1 for none; None where
    they are the same.
    """

    student: Head | tuple[Tensor]
    teacher: Teacher
    batch: DistillBatch
    settings: Distillation
    columns: Columns
    vocabulary: Tensor | None = None

    @property
    def gradient_later(self) -> bool:
        """As in `LogitLoss`."""
        return len(self.student) == 1 and self.student[0].dtype == torch.float16


class Backend(Protocol):
    """Losses come reduced (per token [N] for "none") with the per-token results; all of them are differentiable."""

    def head_loss(self, asked: HeadLoss, /) -> tuple[Tensor, TokenValues]: ...

    def logit_loss(self, asked: LogitLoss, /) -> tuple[Tensor, TokenValues]: ...

    def head_statistics(self, asked: HeadStatistics, /) -> Statistics:
        """The entropy carries a gradient where config.entropy_coef is not 0."""
        ...


def by_rows(x: Tensor) -> Tensor:
    """[.., V] -> [N, V]."""
    return x.reshape(-1, x.shape[-1])
