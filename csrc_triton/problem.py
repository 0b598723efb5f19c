"""What a launch over rows of logits is given: where its rows and tokens lie, what to compute, in which blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch
from .objective import ObjectiveKind, Options
from .softmax import LogitScaling

# bits of `flags`
COMPUTED: tl.constexpr = tl.constexpr(1)  # its statistics are wanted
LEARNING: tl.constexpr = tl.constexpr(2)  # it may have a gradient

# rows of `stats` [7, N] and `terms` [6, N], in the order of the named tuples
STATS = ("logp", "entropy", "kl", "top", "total", "shift", "gap")
TERMS = ("loss", "ratio", "kl", "d_logp", "d_entropy", "d_kl")


class Matrix(NamedTuple):
    """[B, T, V] of which a row is contiguous: element (b, t, v) is at b * per_sequence + t * per_token + v."""

    ptr: torch.Tensor
    per_sequence: int
    per_token: int


class Tokens(NamedTuple):
    """Per token, [N]: ids, flags (uint8), `TokenInputs` [5, N]; and with `work.indexed`, which token each row belongs
    to (int64)."""

    ids_ptr: torch.Tensor
    flags_ptr: torch.Tensor
    given_ptr: torch.Tensor
    rows_ptr: torch.Tensor


class Work(NamedTuple):
    """What the kernels are compiled for, besides the objective."""

    aligned: bool = False  # every row starts at a multiple of VECTOR
    peeled: bool = False  # rows start anywhere, each at the same place in all matrices: their ends go apart
    softcap: bool = False
    reference: bool = False  # the exact KL is wanted: both models are read together
    penalty: bool = False  # entropy or KL have coefficients
    indexed: bool = False  # rows belong to the tokens in `rows`, not to token 0, 1, 2, ...
    terms: bool = False  # the objective is evaluated
    gradient: bool = False
    clear: bool = False  # rows without gradient get 0
    narrowed: bool = False  # gradients of half the logits' width lie in the upper half of the logits' own rows
    rescaled: bool = False  # each row's gradient comes times a power of two, for float16


@dataclass(frozen=True)
class Problem:
    """What the launchers need besides their outputs: logits and reference logits ([B, T, V] or [rows, V], rows
    contiguous; the reference is not read without `work.reference`), and how to work on them."""

    logits: torch.Tensor
    ref: torch.Tensor
    tokens: Tokens
    transform: LogitScaling
    options: Options
    work: Work
    kind: ObjectiveKind
    launch: Launch

    @property
    def rows(self) -> int:
        return self.logits.numel() // self.vocabulary

    @property
    def length(self) -> int:
        """Rows a sequence: all of them where they are equally far apart, so that no kernel is made for one stride."""
        if all(x.dim() == 2 or x.stride(0) == x.shape[1] * x.stride(1) for x in (self.logits, self.ref)):
            return max(1, self.rows)
        return self.logits.shape[-2]

    def matrix(self, x: torch.Tensor) -> Matrix:
        """x: logits, reference or gradients."""
        return Matrix(x, 0 if self.length >= self.rows else x.stride(0), x.stride(-2))

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    @property
    def count(self) -> int:
        """N."""
        return len(self.tokens.ids_ptr)

    def span(self, splits: int) -> int:
        """Columns a slice: whole blocks."""
        return triton.cdiv(triton.cdiv(self.vocabulary, self.launch.block), splits) * self.launch.block
