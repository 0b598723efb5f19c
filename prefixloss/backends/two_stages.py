"""The loss from statistics that exist already: for options whose coefficients are known only once all rows are.

A back-end makes the statistics and, later, turns the gradient that arrives at them into the logits' gradient; what
lies between is a few operations on [N], here. Needed for a ratio over the whole response, an objective that looks at
whole responses or all tokens, a tolerance relative to the largest gradient, and losses per token that the caller
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss.backends.responses import Everyone, LaidOut
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, Given, TokenValues
from prefixloss.maths.objective import NONE, token_log_ratio, token_losses


class Statistics(NamedTuple):
    """Per token, [N]: log-prob, entropy and, with a reference, exact KL; differentiable, 0 where not computed."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None


def needed_by(config: LossConfig, batch: Batch) -> bool:
    of_many = batch.by_response or batch.by_batch or config.of_responses is not None or config.of_batch
    return of_many or config.row_tolerance > 0 or config.summed.by_token


def loss(statistics: Callable[[Tensor], Statistics], batch: Batch, config: LossConfig) -> tuple[Tensor, TokenValues]:
    """The reduced loss (per token [N] for "none") and the per-token results.

    statistics: makes those of the tokens in a mask, bool [N].
    """
    needed = batch.computed
    if config.of_responses is not None:
        # of all the response's scored tokens, the ones that do not learn included
        of_response = batch.layout.sum_by_response(needed.float(), config.of_responses) > 0
        needed = batch.layout.scored & batch.layout.spread(of_response, config.of_responses)
    if config.of_batch or batch.by_batch:
        needed = batch.layout.scored
    logp, entropy, exact_kl = statistics(needed)
    # what was given for other tokens may be anything
    given = batch.given.where(needed)
    log_ratio = None
    if config.sequence_ratio:
        log_ratio = _mean_log_ratio(batch, given, logp.detach())

    # what does not learn has no gradient whatever its values, NaN included
    def learned(x: Tensor) -> Tensor:
        return torch.where(batch.learning, x, x.detach())

    followed = learned(logp), learned(entropy), None if exact_kl is None else learned(exact_kl)
    responses = LaidOut(batch.layout) if batch.by_response or config.of_responses is not None else NONE
    everyone = Everyone(batch.layout) if batch.by_batch or config.of_batch else NONE
    token_loss, ratio, kl = token_losses(config, given, *followed, log_ratio, responses, everyone)
    token_loss = torch.where(needed, token_loss, 0.0)
    weighted = token_loss * batch.weights / batch.denominator
    shown = (token_loss, logp, entropy, kl, ratio)
    values = TokenValues(*(torch.where(batch.computed, x.detach(), 0.0) for x in shown))
    return weighted if config.summed.by_token else weighted.sum(), values


def _mean_log_ratio(batch: Batch, given: Given, logp: Tensor) -> Tensor:
    """log s of GSPO, [N]: the mean of logp - old_logp over the response's scored tokens."""
    argument = 'ratio_level="sequence"'
    total = batch.layout.sum_by_response(token_log_ratio(given, logp), argument)
    return batch.layout.spread(total / batch.layout.lengths(argument).clamp(min=1), argument)
