"""What one token contributes: its policy loss, KL penalty and entropy bonus, and the derivatives of their sum.

Every policy loss touches the model only through a token's log-prob, its entropy and its KL. So the gradient of a
token's logits is three coefficients times three fixed rows:
    dL/dz = d_logp * (onehot - p) + d_entropy * dH/dz + d_kl * dKL/dz
and the coefficients are derivatives of a function of a few numbers, which autograd makes. The formulas stand in
`objectives`, `kl` and `corrections`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Given
from prefixloss.maths import corrections, objectives
from prefixloss.maths import kl as estimators
from prefixloss.maths.derivatives import known, ratio_of, recording
from prefixloss.maths.objectives import Everyone, Responses, View, with_options
from prefixloss.maths.trial import called


class _Nobody:
    """In place of responses and of the batch, where a function has been found not to ask for them."""

    @property
    def count(self) -> Tensor:
        return self.sum(torch.zeros(()))

    def sum(self, x: Tensor) -> Tensor:
        wants = "one that asks for them whatever its values are, or never"
        got = "a function that asks for given.response or given.batch for some values only"
        check.fail("objective", got, wants)
        raise AssertionError

    mean = max = descending = sum


NONE = _Nobody()


class Terms(NamedTuple):
    """Per token, [n]: the loss before any reduction, its derivatives, and the ratio and KL that went into it."""

    loss: Tensor
    d_logp: Tensor
    d_entropy: Tensor | None
    d_kl: Tensor | None  # with respect to the exact KL; the derivatives of k1, k2, k3 are part of d_logp
    ratio: Tensor
    kl: Tensor


def token_losses(
    config: LossConfig,
    given: Given,
    logp: Tensor,
    entropy: Tensor,
    exact_kl: Tensor | None,
    log_ratio: Tensor | None = None,
    responses: Responses = NONE,
    everyone: Everyone = NONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss before any reduction, ratio and KL of each token, [n], differentiable in logp, entropy and exact_kl.

    logp, entropy, exact_kl (None unless kl="full"): [n]. log_ratio: the response's mean log ratio, for GSPO. responses:
    where the tokens are those of whole responses. everyone: where they are all.
    """
    watch = None if isinstance(config.objective, str) else _Watch(responses is not NONE or everyone is not NONE)
    if watch is not None:
        logp, entropy = watch.of("logp", logp), watch.of("entropy", entropy)
        exact_kl = None if exact_kl is None else watch.of("kl", exact_kl)
    ratio = ratio_of(logp, torch.exp(token_log_ratio(given, logp) if log_ratio is None else log_ratio))
    seen = entropy if config.entropy_coef != 0 else None
    recorded = (given.advantages, given.old_logps, given.sampler_logps, given.ref_logps)
    loss = policy_losses(config, logp, View(*recorded, ratio, seen, exact_kl, responses, everyone))
    loss = loss if watch is None else watch.result(loss)
    if config.sampler_correction is not None:
        weight = sampler_weights(config, given, logp, responses)
        # a dropped token counts 0 even if its own loss overflowed
        loss = torch.where(weight == 0, 0.0, weight * loss)
    if config.top_entropy_quantile < 1:
        loss = torch.where(objectives.top_entropy(entropy, everyone, config.top_entropy_quantile), loss, 0.0)
    if config.off_policy_mask_threshold is not None:
        far = responses.mean(_drift(given, logp))
        kept = corrections.near_enough(given.advantages, far, config.off_policy_mask_threshold)
        loss = torch.where(kept, loss, 0.0)
    kl, slope = divergences(config, given, logp, exact_kl)
    if config.penalises_kl:
        penalty = kl
        if config.kl_importance:
            # d (rho k) / d logp = rho (dk / d logp + k), where an infinite rho makes no difference of infinities
            penalty = ratio * kl if slope is None else known(logp, ratio * kl, ratio * (slope + kl))
        loss = loss + config.kl_coef * penalty
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * entropy
    # a scored token that the policy cannot produce has no finite log-prob: never a silent 0
    impossible = torch.where(logp.detach() > -math.inf, 0.0, math.nan).to(logp.dtype)
    return loss + known(logp, impossible, impossible), ratio, kl


def token_terms(
    config: LossConfig,
    given: Given,
    logp: Tensor,
    entropy: Tensor,
    exact_kl: Tensor | None,
    *,
    derivatives: bool = True,
) -> Terms:
    """The numbers of `token_losses`, detached, and its derivatives (0 without `derivatives`)."""
    if not derivatives:
        loss, ratio, kl = token_losses(config, given, logp, entropy, exact_kl)
        return Terms(loss, torch.zeros_like(logp), None, None, ratio, kl)
    wanted = (True, config.entropy_coef != 0, exact_kl is not None and config.follows_exact_kl)
    with recording():
        values = (logp, entropy, exact_kl)
        x = [v.detach().requires_grad_() if v is not None and w else v for v, w in zip(values, wanted, strict=True)]
        loss, ratio, kl = token_losses(config, given, *x)  # type: ignore[arg-type]
        leaves = [v for v, w in zip(x, wanted, strict=True) if w]
        made: Any = torch.autograd.grad(loss, leaves, torch.ones_like(loss), materialize_grads=True)  # type: ignore[arg-type]
    slopes = iter(made)
    d_logp, d_entropy, d_kl = (next(slopes) if w else None for w in wanted)
    assert d_logp is not None
    return Terms(loss.detach(), d_logp, d_entropy, d_kl, ratio.detach(), kl.detach())


def token_log_ratio(given: Given, logp: Tensor) -> Tensor:
    """log rho = logp - old_logp; 0 on policy (old_logps None)."""
    return torch.zeros_like(logp) if given.old_logps is None else logp - given.old_logps


def policy_losses(config: LossConfig, logp: Tensor, given: View) -> Tensor:
    """The objective's loss of each token, before weights and penalties."""
    if not isinstance(config.objective, str):
        return called(config.objective, logp, given).to(logp.dtype)
    loss = objectives.BY_NAME[config.objective].loss
    return loss(logp, given, **with_options(loss, config))


class _Watch:
    """A caller's function, whose derivatives have to be finite where its losses, and the gradients they get, are.

    The tensors handed to the function are copies that tell of their gradients.
    """

    def __init__(self, of_many: bool) -> None:
        self.of_many = of_many
        self.fine: Tensor | None = None

    def of(self, name: str, x: Tensor) -> Tensor:
        if not x.requires_grad or torch.compiler.is_compiling():
            return x
        mine = x.clone()

        def finite(grad: Tensor) -> None:
            if self.fine is None or not check.readable(grad):
                return
            wrong = self.fine & ~grad.isfinite()
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                got = f"a derivative of {float(grad[at])} by {name} at {name} = {float(x.detach()[at])}"
                check.fail("objective", got, "a finite one where the loss is")

        mine.register_hook(finite)
        return mine

    def result(self, loss: Tensor) -> Tensor:
        """The losses, which tell of the gradients that they get."""
        if loss.requires_grad and not torch.compiler.is_compiling():
            finite = loss.detach().isfinite()

            def got(grad: Tensor) -> None:
                self.fine = finite & grad.isfinite()
                if self.of_many:  # any other token's may have come over
                    self.fine = self.fine & self.fine.all()

            loss.register_hook(got)
        return loss


def clipped(config: LossConfig, advantages: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that the objective's own bounds on the ratio hold back, below and above: bool [n] each."""
    holds = objectives.BY_NAME[config.objective].holds if isinstance(config.objective, str) else None
    held = (None, None) if holds is None else holds(advantages, ratio, **with_options(holds, config))
    low, high = (torch.zeros_like(ratio, dtype=torch.bool) if x is None else x for x in held)
    return low, high


def sampler_weights(config: LossConfig, given: Given, logp: Tensor, responses: Responses = NONE) -> Tensor:
    """The policy term's weight, a constant, from q = exp(old_logp - sampler_logp) of a token or its response."""
    name, sampler = config.sampler_correction, given.sampler_logps
    assert name is not None
    assert sampler is not None
    log_q = (logp.detach() if given.old_logps is None else given.old_logps) - sampler
    if config.sampler_missing is not None:
        log_q = torch.where(sampler.isnan(), 0.0, log_q)
    level = corrections.LEVELS.get(name)
    if level is not None:
        log_q = responses.sum(log_q) if level == "sequence" else responses.mean(log_q)
    weight = corrections.BY_NAME[name](torch.exp(log_q), *config.sampler_bounds)
    return torch.where(sampler.isnan(), 0.0, weight) if config.sampler_missing == 0 else weight


def _drift(given: Given, logp: Tensor) -> Tensor:
    """sampler_logp - logp, a constant; old_logp in its place where no sampler's was recorded, 0 for one that is NaN."""
    before = given.old_logps if given.sampler_logps is None else given.sampler_logps
    if before is None:
        return torch.zeros_like(logp)
    return torch.where(before.isnan(), 0.0, before - logp.detach())


def divergences(
    config: LossConfig, given: Given, logp: Tensor, exact_kl: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """KL(policy || reference) of each token: the exact one, 0 without a reference, or an estimate, which follows logp,
    and its slope there."""
    if config.kl is None:
        return torch.zeros_like(logp), None
    if config.exact_kl:
        assert exact_kl is not None
        return exact_kl, None
    assert given.ref_logps is not None
    estimator, d = estimators.BY_NAME[config.kl], given.ref_logps - logp
    if config.kl_clamp is None:
        slope = estimator.slope(d)
        return known(logp, estimator.value(d), slope), slope
    held = d.clamp(-config.kl_clamp, config.kl_clamp)
    slope = torch.where(held == d, estimator.slope(held), 0.0)
    return known(logp, estimator.value(held), slope), slope
