"""A call's per-token inputs, checked and flat: what every back-end works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.config import LossConfig
from prefixloss.inputs.layout import Layout
from prefixloss.inputs.reduction import token_weights
from prefixloss.inputs.token_advantages import TokenAdvantages


class Given(NamedTuple):
    """What is known about each token before the model runs; float [n] each, or None."""

    advantages: Tensor
    old_logps: Tensor | None
    sampler_logps: Tensor | None
    ref_logps: Tensor | None

    def at(self, rows: Tensor) -> Given:
        return Given(self.advantages[rows], *(None if x is None else x[rows] for x in self[1:]))

    def where(self, wanted: Tensor) -> Given:
        """0 at every other token."""
        picked = [None if x is None else torch.where(wanted, x, 0.0) for x in self]
        return Given(*picked)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Batch:
    """N tokens, flat. Values at tokens outside the mask are never read.

    tokens: int64 [N]. given: advantages and recorded log-probs, [N] each. weights [N] and denominator (0-d): the
    reduction. learning, computed, in_prefix: bool [N]: tokens that may have a gradient, tokens whose statistics are
    reported, tokens of a good prefix. by_response, by_batch: whether the objective looks at whole responses, at
    all tokens.
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
    by_response: bool = False
    by_batch: bool = False


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
        _check_needed_data(config, {**vars(self), **exact_reference}, tuple(exact_reference))
        shape, device = self.tokens.shape, self.tokens.device
        layout = Layout.of(shape, device, self.mask, self.cu_seqlens, self.cp_group)
        layout.check_token_ids(self.tokens.reshape(-1), vocabulary)
        if self.normalizer is not None:
            check.normalizer(self.normalizer)
        if self.group_ids is not None:
            check.tensor("group_ids", self.group_ids, "integer")
            check.shape("group_ids", self.group_ids, (layout.responses("group_ids"),), "[B]")
            check.device("group_ids", self.group_ids, device)
        if config.of_responses is not None:
            layout.starts(config.of_responses)
        advantages, in_prefix = self._advantages(layout)
        given = Given(
            advantages.detach().to(dtype),
            self._logps("old_logps", dtype),
            self._logps("sampler_logps", dtype),
            self._logps("ref_logps", dtype),
        )
        _check_finite(layout, given, config.sampler_missing is not None)
        weights, denominator = token_weights(config, layout, self.group_ids, self.normalizer, dtype)

        there = tuple(x is not None for x in (given.old_logps, given.sampler_logps, given.ref_logps))
        traits = config.traits(given.advantages, there)
        if traits.by_response:
            layout.starts("objective")
        learning = layout.scored
        if not config.penalised and traits.silent:
            learning = learning & (given.advantages != 0)
            if traits.by_response:
                # a token's loss may follow any token of its response
                of_response = layout.sum_by_response(learning.float(), "objective") > 0
                learning = layout.scored & layout.spread(of_response, "objective")
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
            by_response=traits.by_response,
            by_batch=traits.by_batch,
        )

    def _logps(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Recorded log-probs, [N]."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            return None
        check.tensor(name, value, "float")
        check.shape(name, value, self.tokens.shape, "the shape of tokens")
        check.device(name, value, self.tokens.device)
        return value.detach().reshape(-1).to(dtype)

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
        return layout.spread(a, "advantages"), nowhere


def _check_finite(layout: Layout, given: Given, missing: bool) -> None:
    """missing: whether a sampler's log-prob may be NaN."""
    sampler = given.sampler_logps
    if missing and sampler is not None:
        sampler = sampler.nan_to_num(0.0, math.inf, -math.inf)
    layout.check_finite(
        old_logps=given.old_logps, sampler_logps=sampler, ref_logps=given.ref_logps, advantages=given.advantages
    )


def _check_needed_data(config: LossConfig, given: dict[str, Any], exact_reference: tuple[str, ...]) -> None:
    """The arguments that the options call for. `given` maps names to values; `exact_reference` are for kl="full"."""
    needs: list[tuple[str, str]] = []
    if config.exact_kl:
        needs += [(name, f'kl="{config.kl}"') for name in exact_reference]
    elif config.kl is not None:
        needs.append(("ref_logps", f'kl="{config.kl}"'))
    if config.sampler_correction is not None:
        needs.append(("sampler_logps", f'sampler_correction="{config.sampler_correction}"'))
    argument = f'reduction="{config.reduction}"'
    if config.summed.per_group:
        needs.append(("group_ids", argument))
    for name, why in needs:
        if given[name] is None:
            check.fail(name, "None", f"a value, since {why}")
    if config.summed.times_max_length and given["normalizer"] is None and config.max_length is None:
        check.fail("max_length", "None", f"a value, since {argument} without a normalizer")
