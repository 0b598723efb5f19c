"""backend="reference": the loss in its plainest form. Read this file to know what is computed.

It runs in float64 when the input does (half precision is computed in float32), holds all the logits of the scored
tokens at once, and leaves every derivative to autograd. The other back-ends are tested against it; it shares with them
what a token's loss is (`prefixloss.maths.objective`) and nothing of how they get there. Letters: n scored tokens, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prefixloss.backends.problem import HeadLoss, HeadStatistics, LogitLoss, by_rows
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, Given, TokenValues
from prefixloss.maths.objective import NONE, token_log_ratio, token_losses
from prefixloss.maths.precision import accumulation_dtype


def head_loss(asked: HeadLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`."""
    batch, dtype = asked.batch, accumulation_dtype(asked.head.hidden, asked.head.weight)
    rows = batch.layout.scored.nonzero().squeeze(1)
    logits = learning_logits(asked.head, rows, batch.learning, dtype)
    ref_logits = None if asked.reference is None else linear_logits(asked.reference, rows, dtype)
    return _loss(logits, ref_logits, rows, batch, asked.config)


def logit_loss(asked: LogitLoss) -> tuple[Tensor, TokenValues]:
    """See `prefixloss.backends.problem.Backend`. Of inplace=True no use is made."""
    dtype, rows = accumulation_dtype(asked.logits), asked.batch.layout.scored.nonzero().squeeze(1)
    logits, ref_logits = (None if x is None else by_rows(x)[rows].to(dtype) for x in (asked.logits, asked.reference))
    assert logits is not None
    return _loss(logits, ref_logits, rows, asked.batch, asked.config)


def head_statistics(asked: HeadStatistics) -> Statistics:
    """See `prefixloss.backends.problem.Backend`."""
    dtype, rows = accumulation_dtype(asked.head.hidden, asked.head.weight), asked.wanted.nonzero().squeeze(1)
    return statistics(asked.config, linear_logits(asked.head, rows, dtype), asked.tokens, rows)


def statistics(config: LossConfig, logits: Tensor, tokens: Tensor, rows: Tensor) -> Statistics:
    """From the logits [n, V] of the tokens `rows` [n] out of `tokens` [N]."""
    scores = distribution_scores(config, logits)
    made = log_probs(scores, tokens[rows]), entropies(scores)
    logp, entropy = (x.new_zeros(len(tokens)).index_copy(0, rows, x) for x in made)
    return Statistics(logp, entropy, None)


def linear_logits(head: tuple[Tensor, Tensor, Tensor | None], rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states [N, D], head [V, D], bias [V] or None -> logits [n, V] of the tokens `rows` [n]."""
    hidden, weight, bias = head
    logits = hidden[rows].to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def learning_logits(
    head: tuple[Tensor, Tensor, Tensor | None], rows: Tensor, learning: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same, with a gradient for those in `learning` [N] alone: in a product, 0 times a NaN of the others is NaN."""
    with torch.no_grad():
        logits = linear_logits(head, rows, dtype)
    at = learning[rows].nonzero().squeeze(1)
    return logits.index_copy(0, at, linear_logits(head, rows[at], dtype))


def distribution_scores(config: LossConfig, logits: Tensor) -> Tensor:
    """The policy is softmax(softcap(logit_scale * z) / temperature). A banned token (-inf) stays banned."""
    scores = logits * config.logit_scale
    if config.softcap is not None:
        banned = scores == -math.inf
        capped = config.softcap * torch.tanh(torch.where(banned, 0.0, scores) / config.softcap)
        scores = torch.where(banned, -math.inf, capped)
    return scores / config.temperature


def log_probs(scores: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) = -log(1 + sum_{j != token} exp(s_j - s_token)): accurate near 0, where s - logsumexp is not."""
    target = tokens[:, None]
    others = scores.scatter(1, target, -math.inf)
    alone = (others == -math.inf).all(1)  # every other token banned: certain
    others = torch.where(alone[:, None], torch.zeros_like(others), others)
    excess = others.logsumexp(1) - scores.gather(1, target).squeeze(1)
    return torch.where(alone, excess * 0, -torch.logaddexp(torch.zeros_like(excess), excess))


def entropies(scores: Tensor) -> Tensor:
    """H = - sum p log p, with 0 log 0 = 0."""
    log_p = scores.log_softmax(1)
    return -(log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p)).sum(1)


def exact_kl(scores: Tensor, ref_scores: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), with 0 log 0 = 0."""
    log_p, log_q = scores.log_softmax(1), ref_scores.log_softmax(1)
    impossible = log_p == -math.inf
    log_ratio = torch.where(impossible, 0.0, log_p) - torch.where(impossible, 0.0, log_q)
    return (log_p.exp() * log_ratio).sum(1)


def mean_log_ratio(config: LossConfig, batch: Batch, rows: Tensor, logp: Tensor, given: Given) -> Tensor | None:
    """log s of GSPO for each scored token: the mean over its response's; None where each token has its own."""
    if not config.sequence_ratio:
        return None
    log_ratio = token_log_ratio(given, logp.detach())
    response = batch.layout.response_of_token("ratio_level")[rows]
    log_s = torch.zeros_like(logp)
    for i in response.unique():
        log_s[response == i] = log_ratio[response == i].mean()
    return log_s


class _Plain:
    """What an objective may ask of responses: a response at a time. response: of each scored token, [n]."""

    def __init__(self, response: Tensor) -> None:
        self.response = response

    def _each(self, of_one: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in self.response.unique():
            out = torch.where(self.response == i, of_one(x[self.response == i]), out)
        return out

    def sum(self, x: Tensor) -> Tensor:
        return self._each(torch.sum, x)

    def mean(self, x: Tensor) -> Tensor:
        return self._each(torch.mean, x)

    def max(self, x: Tensor) -> Tensor:
        return self._each(torch.max, x)


class _All:
    """What an objective may ask of all scored tokens, [n] of them."""

    def __init__(self, tokens: int) -> None:
        self.count = torch.tensor(tokens)

    def mean(self, x: Tensor) -> Tensor:
        return x.detach().mean()

    def descending(self, x: Tensor) -> Tensor:
        return x.detach().sort(descending=True).values


def reduce(config: LossConfig, batch: Batch, rows: Tensor, losses: Tensor) -> Tensor:
    """The losses of the scored tokens as one number; [N] for "none". `batch.denominator` may be the caller's."""
    reduction = config.summed
    if reduction.by_token:
        return losses.new_zeros(len(batch.tokens)).index_copy(0, rows, losses / batch.denominator)
    if reduction.mean_within is None:
        return losses.sum() / batch.denominator
    of_token = batch.layout.response_of_token("reduction")[rows]
    if reduction.mean_within == "group":
        assert batch.group_ids is not None
        of_token = batch.group_ids[of_token]
    means = [losses[of_token == unit].mean() for unit in of_token.unique()]
    return sum(means, losses[:0].sum()) / batch.denominator


def _loss(
    logits: Tensor, ref_logits: Tensor | None, rows: Tensor, batch: Batch, config: LossConfig
) -> tuple[Tensor, TokenValues]:
    """The reduced loss and the per-token results, from the logits [n, V] of the scored tokens `rows` [n]."""
    tokens = batch.tokens[rows]
    # a token that does not learn has no gradient whatever its values
    scores = distribution_scores(config, torch.where(batch.learning[rows, None], logits, logits.detach()))
    report_impossible_tokens(scores, tokens, rows, batch)
    logp, entropy = log_probs(scores, tokens), entropies(scores)
    full_kl = None
    if ref_logits is not None:
        full_kl = exact_kl(scores, distribution_scores(config, ref_logits))
    given = batch.given.at(rows)
    log_ratio = mean_log_ratio(config, batch, rows, logp, given)
    asks = batch.by_response or config.of_responses is not None
    responses = _Plain(batch.layout.response_of_token("objective")[rows]) if asks else NONE
    everyone = _All(len(rows)) if batch.by_batch or config.of_batch else NONE
    losses, ratio, kl = token_losses(config, given, logp, entropy, full_kl, log_ratio, responses, everyone)
    losses = torch.where(batch.computed[rows], losses, 0.0)
    total = reduce(config, batch, rows, losses)

    def shown(values: Tensor) -> Tensor:
        by_token = batch.weights.new_zeros(len(batch.tokens)).index_copy(0, rows, values.detach())
        return torch.where(batch.computed, by_token, 0.0)

    return total, TokenValues(shown(losses), shown(logp), shown(entropy), shown(kl), shown(ratio))


def report_impossible_tokens(scores: Tensor, tokens: Tensor, rows: Tensor, batch: Batch) -> None:
    """A scored token whose own logit is -inf has log-prob -inf: the policy cannot have written it. Say which."""
    impossible = (scores.gather(1, tokens[:, None]).squeeze(1) == -math.inf).nonzero()
    if not len(impossible):
        return
    at = int(impossible[0])
    raise ValueError(
        f"tokens: {batch.layout.place(int(rows[at]))}: token {int(tokens[at])} has logit -inf, so log-prob -inf; "
        "expected a token that the policy can produce"
    )
