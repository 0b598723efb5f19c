"""backend="reference": the loss in its plainest form. Read this file to know what is computed.

It runs in float64 when the input does (half precision is computed in float32), holds all the logits of the scored
tokens at once, and leaves every derivative to autograd. The other back-ends are tested against it; it shares no formula
with them. Letters: n scored tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefixloss.backends.problem import HeadLoss, HeadStatistics, LogitLoss, by_rows
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig, unknown
from prefixloss.inputs.batch import Batch, TokenValues
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
    scores = distribution_scores(asked.config, linear_logits(asked.head, rows, dtype))
    made = log_probs(scores, asked.tokens[rows]), entropies(scores)
    logp, entropy = (x.new_zeros(len(asked.tokens)).index_copy(0, rows, x) for x in made)
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


def policy_loss(config: LossConfig, a: Tensor, logp: Tensor, log_ratio: Tensor) -> Tensor:
    """The objective of each token; a = advantage, log_ratio = log rho. See `LossConfig` for the papers' names."""
    if config.objective == "clip":
        # -min(rho A, clip(rho) A), the bounds in log space so that a huge rho makes no inf * 0 in the gradient
        low = math.log1p(-config.clip_low) if config.clip_low < 1 else -math.inf
        log_rho = log_ratio if config.ratio_cap is None else log_ratio.clamp(max=math.log(config.ratio_cap))
        for_good = log_rho.clamp(max=math.log1p(config.clip_high))
        for_bad = log_rho.clamp(min=low)
        if config.dual_clip is not None:
            for_bad = for_bad.clamp(max=math.log(config.dual_clip))
        return -a * torch.exp(torch.where(a >= 0, for_good, for_bad))
    if config.objective == "cispo":
        return -torch.exp(log_ratio.detach()).clamp(max=config.clip_high) * a * logp
    if config.objective == "sapo":
        tau = torch.where(a > 0, a.new_tensor(config.sapo_tau[0]), config.sapo_tau[1])
        rho = torch.exp(log_ratio.clamp(max=50))  # the sigmoid is 1 long before
        return -(4 / tau) * torch.sigmoid(tau * (rho - 1)) * a
    if config.objective == "topr":
        return -torch.where(a > 0, 1.0, torch.exp(log_ratio.detach()).clamp(max=1)) * a * logp
    if config.objective == "reinforce":
        return -a * logp
    unknown("objective", config.objective)


def sampler_weight(config: LossConfig, q: Tensor) -> Tensor:
    """q = exp(old_logp - sampler_logp), capped or, outside its bounds, 0."""
    low, high = config.sampler_bounds
    if config.sampler_correction == "tis":
        return q.clamp(max=high)
    if config.sampler_correction == "icepop":
        return torch.where((q >= low) & (q <= high), q, 0.0)
    unknown("sampler_correction", config.sampler_correction)


def kl_estimate(config: LossConfig, d: Tensor) -> Tensor:
    """KL(policy || reference) from d = ref_logp - logp."""
    if config.kl == "k1":
        return -d
    if config.kl == "k2":
        return d**2 / 2
    if config.kl == "k3":
        return torch.expm1(d) - d
    unknown("kl", config.kl)


def token_losses(
    config: LossConfig, batch: Batch, rows: Tensor, logp: Tensor, entropy: Tensor, full_kl: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ratio and KL of each scored token, [n] each."""
    given = batch.given.at(rows)
    old_logps = logp.detach() if given.old_logps is None else given.old_logps
    log_ratio = logp - old_logps
    if config.sequence_ratio:
        # GSPO's token form: the value of s, the gradient of each token's own log-prob
        response = batch.layout.response_of_token("ratio_level")[rows]
        log_s = torch.zeros_like(logp)
        for i in response.unique():
            log_s[response == i] = log_ratio[response == i].detach().mean()
        log_ratio = log_s + logp - logp.detach()
    if config.sampler_correction is None:
        loss = policy_loss(config, given.advantages, logp, log_ratio)
    else:
        assert given.sampler_logps is not None
        weight = sampler_weight(config, torch.exp((old_logps - given.sampler_logps).detach()))
        # a dropped token counts 0 even if its own ratio overflows
        loss = weight * policy_loss(config, given.advantages, logp, torch.where(weight == 0, 0.0, log_ratio))

    kl = torch.zeros_like(logp)
    if config.kl == "full":
        assert full_kl is not None
        kl = full_kl
    elif config.kl is not None:
        assert given.ref_logps is not None
        kl = kl_estimate(config, given.ref_logps - logp)
    if config.penalises_kl:
        loss = loss + config.kl_coef * (torch.exp(log_ratio) * kl if config.kl_importance else kl)
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * entropy
    return loss, torch.exp(log_ratio), kl


def reduce(config: LossConfig, batch: Batch, rows: Tensor, losses: Tensor) -> Tensor:
    """The losses of the scored tokens as one number; [N] for "none". `batch.denominator` may be the caller's."""
    if config.reduction == "none":
        return losses.new_zeros(len(batch.tokens)).index_copy(0, rows, losses / batch.denominator)
    if config.reduction in ("group-token-mean", "seq-mean-token-mean"):
        of_token = batch.layout.response_of_token("reduction")[rows]
        if config.reduction == "group-token-mean":
            assert batch.group_ids is not None
            of_token = batch.group_ids[of_token]
        means = [losses[of_token == unit].mean() for unit in of_token.unique()]
        return sum(means, losses[:0].sum()) / batch.denominator
    if config.reduction in ("token-mean", "seq-mean-token-sum", "constant"):
        return losses.sum() / batch.denominator
    unknown("reduction", config.reduction)


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
    losses, ratio, kl = token_losses(config, batch, rows, logp, entropy, full_kl)
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
