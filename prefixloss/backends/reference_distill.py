"""backend="reference" of distillation: dense, by autograd, a line a formula. See `prefixloss.maths.divergence`.

It shares no formula with the other back-ends. Letters: n tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.backends.problem import Distil
from prefixloss.backends.reference import distribution_scores, linear_logits
from prefixloss.maths.divergence import LEAST_LEFT


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), [n]; 0 log 0 = 0, and infinite, with a gradient of 0, where p has what q has not."""
    possible = log_p > -math.inf
    infinite = (possible & (log_q == -math.inf)).any(1, keepdim=True)
    counts = possible & ~infinite
    terms = torch.where(counts, log_p, 0.0).exp() * (torch.where(counts, log_p, 0.0) - torch.where(counts, log_q, 0.0))
    return torch.where(infinite.squeeze(1), math.inf, torch.where(counts, terms, 0.0).sum(1))


def mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log (beta q + (1 - beta) p)."""
    nothing = (log_p == -math.inf) & (log_q == -math.inf)
    a, b = torch.where(nothing, 0.0, log_p), torch.where(nothing, 0.0, log_q)
    return torch.where(nothing, -math.inf, torch.logaddexp(a + math.log(1 - beta), b + math.log(beta)))


def divergences(name: str, beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log-probs of student and teacher [n, C] -> [n]."""
    if name == "reverse":
        return kl(log_p, log_q)
    if name == "forward":
        return kl(log_q, log_p)
    log_m = mixture(log_p, log_q, beta)
    if name == "skew-forward":
        return kl(log_q, log_m)
    if name == "skew-reverse":
        return kl(log_p, log_m)
    if name == "jsd":
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    raise ValueError(f"divergence: got {name!r}, expected one that is written here")


def listed_classes(log_p: Tensor, ids: Tensor, logps: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Log-probs [n, K + 1] of student [n, V] and teacher: of the listed ids, and of all others together. rounding: how
    far from 1 the teacher's may add up."""
    used = ids >= 0
    index = torch.where(used, ids, log_p.shape[1])  # a column behind the vocabulary
    is_listed = torch.zeros(len(log_p), log_p.shape[1] + 1, dtype=torch.bool, device=log_p.device)
    is_other = ~is_listed.scatter(1, index, True)[:, :-1]
    own = torch.where(used, log_p.gather(1, torch.where(used, ids, 0)), -math.inf)
    logps = torch.where(used, logps, -math.inf)
    left = 1 - logps.double().exp().sum(1)
    # log-probs are rounded: others have something, but nobody has next to nothing
    left = torch.where(is_other.any(1), left.clamp(min=LEAST_LEFT), torch.where(left <= rounding, 0.0, left))
    return torch.cat([own, rest(log_p, is_other)[:, None]], 1), torch.cat([logps, left.log().to(logps)[:, None]], 1)


def rest(log_p: Tensor, is_other: Tensor) -> Tensor:
    """The log-prob [n] of all others together; -inf, without a gradient, where none of them is possible."""
    possible = is_other & (log_p > -math.inf)
    none = ~possible.any(1, keepdim=True)
    others = torch.where(possible | none, log_p, -math.inf)
    return torch.where(none.squeeze(1), -math.inf, torch.where(none, 0.0, others).logsumexp(1))


def shared_classes(log_p: Tensor, chosen: Tensor) -> Tensor:
    """Log-probs [n, K + 1] of the chosen columns [K], and of all others together."""
    is_other = torch.ones(log_p.shape[1], dtype=torch.bool, device=log_p.device)
    is_other[chosen] = False
    return torch.cat([log_p[:, chosen], rest(log_p, is_other.expand_as(log_p))[:, None]], 1)


def distillation(asked: Distil) -> tuple[Tensor, Tensor]:
    """See `prefixloss.backends.problem.Distil`."""
    settings, teacher, batch = asked.settings, asked.teacher, asked.batch
    rows = batch.learning.nonzero().squeeze(1)
    dtype = batch.weights.dtype
    log_p = distribution_scores(settings.student, _logits(asked.student, rows, dtype)).log_softmax(1)
    if teacher.first is None:
        listed = teacher.listed(rows, dtype, log_p.shape[1])
        assert teacher.logps is not None
        log_p, log_q = listed_classes(log_p, listed.ids, listed.logps, check.rounding_of(teacher.logps))
    else:
        log_q = distribution_scores(settings.teacher, _logits(teacher[:3], rows, dtype)).log_softmax(1)
    if asked.vocabulary is not None:
        own = (asked.vocabulary >= 0).nonzero().squeeze(1)
        log_p, log_q = shared_classes(log_p, own), shared_classes(log_q, asked.vocabulary[own])
    values = divergences(settings.divergence.name, settings.divergence.beta, log_p, log_q)
    by_token = values.new_zeros(len(batch.weights)).index_copy(0, rows, values)
    losses = torch.where(batch.learning, batch.weights * by_token, 0.0) / batch.denominator
    return losses if settings.student.reduction == "none" else losses.sum(), by_token.detach()


def _logits(tensors: tuple[Any, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] of hidden states, head and bias, or of logits alone."""
    if len(tensors) == 1 or tensors[1] is None:
        return tensors[0][rows].to(dtype)
    return linear_logits((tensors[0], tensors[1], tensors[2]), rows, dtype)
