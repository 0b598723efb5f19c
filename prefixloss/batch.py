"""A call's per-token inputs, checked and flat: what every back-end works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check, memory
from prefixloss.advantages import TokenAdvantages
from prefixloss.config import LossConfig
from prefixloss.layout import Layout
from prefixloss.objective import Given
from prefixloss.reduction import token_weights


@dataclass(frozen=True)
class Batch:
    """N tokens, flat. Values at tokens outside the mask are never read.

    tokens: int64 [N]. given: advantages and recorded log-probs, [N] each. weights [N] and denominator (0-d): the
    reduction. learning, computed, in_prefix: bool [N]: tokens that may have a gradient, tokens whose statistics are
    reported, tokens of a good prefix.
    """

    layout: Layout
    tokens: Tensor
    given: Given
    weights: Tensor
    denominator: Tensor
    group_ids: Tensor | None
    learning: Tensor
    computed: Tensor
    in_prefix: Tensor


class TokenValues(NamedTuple):
    """Per-token results, detached; over a batch [N], 0 where not computed."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    kl: Tensor
    ratio: Tensor

    @classmethod
    def zeros(cls, tokens: int, like: Tensor) -> TokenValues:
        return cls(*(like.new_zeros(tokens) for _ in cls._fields))

    def at(self, rows: Tensor) -> TokenValues:
        return TokenValues(*(x[rows] for x in self))

    def put(self, rows: Tensor, part: TokenValues) -> None:
        for whole, piece in zip(self, part, strict=True):
            whole.index_copy_(0, rows, piece)


@dataclass(frozen=True)
class TokenInputs:
    """The arguments of a loss that say something about tokens or responses, as the caller gave them."""

    tokens: Tensor
    advantages: Tensor | TokenAdvantages
    mask: Tensor | None
    cu_seqlens: Tensor | None
    old_logps: Tensor | None
    sampler_logps: Tensor | None
    ref_logps: Tensor | None
    group_ids: Tensor | None
    normalizer: float | Tensor | None
    cp_group: Any = None

    def checked(
        self,
        config: LossConfig,
        dtype: torch.dtype,
        vocabulary: int,
        exact_reference: dict[str, Tensor | None],
    ) -> Batch:
        """The batch, or the first error found.

        dtype: the accumulation dtype, which floats are turned into. exact_reference: what kl="full" needs, by name.
        """
        memory.budget(self.tokens.device)  # an unusable PREFIXLOSS_MEMORY is found before any work
        check.needed_data(config, {**vars(self), **exact_reference}, tuple(exact_reference))
        shape, device = self.tokens.shape, self.tokens.device
        layout = Layout.of(shape, device, self.mask, self.cu_seqlens, self.cp_group)
        check.token_ids(self.tokens.reshape(-1), layout.scored, vocabulary)
        for name in ("old_logps", "sampler_logps", "ref_logps"):
            value = getattr(self, name)
            if value is not None:
                check.tensor(name, value, "float")
                check.shape(name, value, shape, "the shape of tokens")
                check.device(name, value, device)
        if self.normalizer is not None:
            check.normalizer(self.normalizer)
        if self.group_ids is not None:
            check.tensor("group_ids", self.group_ids, "integer")
            check.shape("group_ids", self.group_ids, (layout.responses("group_ids"),), "[B]")
            check.device("group_ids", self.group_ids, device)
        if config.sequence_ratio:
            layout.starts('ratio_level="sequence"')
        advantages, in_prefix = self._advantages(layout)
        weights, denominator = token_weights(config, layout, self.group_ids, self.normalizer, dtype)

        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.detach().reshape(-1).to(dtype)

        penalised = config.penalises_kl or config.entropy_coef != 0
        learning = layout.scored if penalised else layout.scored & (advantages != 0)
        given = Given(
            advantages.detach().to(dtype),
            flat(self.old_logps),
            flat(self.sampler_logps),
            flat(self.ref_logps),
        )
        return Batch(
            layout=layout,
            tokens=self.tokens.reshape(-1).long().contiguous(),
            given=given,
            weights=weights,
            denominator=denominator,
            group_ids=self.group_ids,
            learning=learning,
            computed=layout.scored if config.shows_every_scored else learning,
            in_prefix=in_prefix,
        )

    def _advantages(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The advantage of every token, [N], and which tokens lie in a good prefix."""
        a, shape = self.advantages, self.tokens.shape
        if isinstance(a, TokenAdvantages):
            return a.spread(layout)
        check.tensor("advantages", a, "float")
        check.device("advantages", a, self.tokens.device)
        nowhere = torch.zeros_like(layout.scored)
        if a.shape == shape:
            return a.reshape(-1), nowhere
        if a.dim() != 1:
            wants = f"[B], the shape of tokens {list(shape)}, or TokenAdvantages"
            check.fail("advantages", f"shape {list(a.shape)}", wants)
        check.shape("advantages", a, (layout.responses("advantages"),), "[B]")
        return a[layout.response_of_token("advantages")], nowhere
