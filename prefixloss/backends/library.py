"""What operators of `torch.library` share, which take tensors, numbers and strings only."""

from __future__ import annotations

import warnings
from functools import lru_cache

from torch import Tensor

from prefixloss.config import LossConfig
from prefixloss.maths.precision import storage_dtype


@lru_cache(maxsize=256)
def decoded(options: str) -> LossConfig:
    """The options from `LossConfig.encoded`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given once already, where the caller made the options
        return LossConfig.decoded(options)


def gradients_like(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Room for the gradients as operators return them: float32 for float16 inputs, empty where there is none."""
    first = tensors[0]
    assert first is not None
    return tuple(
        t.new_empty(t.shape, dtype=storage_dtype(t.dtype)) if t is not None and need else first.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )
