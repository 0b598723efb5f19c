"""The advantages of a call as two numbers a response."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.inputs.layout import Layout


class TokenAdvantages(NamedTuple):
    """Two advantages a response: A[b, t] = prefix[b] for its first prefix_lengths[b] scored tokens, else suffix[b].

    prefix, suffix: float [B]. prefix_lengths: int64 [B], in scored tokens; 0 for responses that are all of one piece.
    """

    prefix: Tensor
    suffix: Tensor
    prefix_lengths: Tensor

    def per_token(self, like: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """The advantage of every token: float, shaped like `like`, 0 where `mask` is False.

        like: any tensor shaped like the tokens, [B, T], or [N] with `cu_seqlens` [B + 1].
        """
        check.dense("like", like, "a tensor shaped like the tokens")
        check.rows("like", like)
        layout = Layout.of(like.shape, like.device, mask, cu_seqlens)
        return self.spread(layout)[0].reshape(like.shape)

    def spread(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """`per_token` over a flat layout, float [N], and which scored tokens take the prefix advantage, bool [N]."""
        _check(self, layout)
        prefix, suffix, lengths = (layout.spread(x, "advantages") for x in self)
        in_prefix = layout.scored & (layout.rank() < lengths)
        return torch.where(layout.scored, torch.where(in_prefix, prefix, suffix), 0.0), in_prefix


def _check(advantages: TokenAdvantages, layout: Layout) -> None:
    for name, kind in (("prefix", "float"), ("suffix", "float"), ("prefix_lengths", "integer")):
        value = getattr(advantages, name)
        check.tensor(f"advantages.{name}", value, kind)
        check.shape(f"advantages.{name}", value, (layout.responses("advantages"),), "[B]")
        check.device(f"advantages.{name}", value, layout.scored.device)
    prefixes = advantages.prefix_lengths
    if check.readable(prefixes):
        check.none("advantages.prefix_lengths", prefixes, prefixes < 0, "0 or more scored tokens")
        lengths = layout.lengths("advantages")
        beyond = (prefixes > lengths) & (lengths > 0)  # of a response that is masked altogether nothing is looked at
        check.none("advantages.prefix_lengths", prefixes, beyond, "no more than its scored tokens,", lengths)
