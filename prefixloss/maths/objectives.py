"""The objectives: the loss of each token, a few lines under its formula and its paper. The maths stands here alone.

A function takes logp, the policy's log-probs [n], and `given` (`View`), everything else that is known of the tokens; it
returns their losses [n], and autograd makes the derivatives. Its keyword arguments are fields of `LossConfig`. A
function of the caller's own, `LossConfig(objective=f)`, is the same without those.

Letters: rho = exp(logp - old_logp), A the advantage, sg = stop gradient. To add one, write it here and put it into
`BY_NAME`; `CONTRIBUTING.md` says what else.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from prefixloss.maths.derivatives import sigmoid


class Responses(Protocol):
    """Sums, means and maxima over the scored tokens of each token's response: [n] -> [n], differentiable."""

    def sum(self, x: Tensor, /) -> Tensor: ...

    def mean(self, x: Tensor, /) -> Tensor: ...

    def max(self, x: Tensor, /) -> Tensor: ...


class Everyone(Protocol):
    """All scored tokens of the call, over all processes of a cp_group; what it returns are constants."""

    @property
    def count(self) -> Tensor:
        """How many, 0-d."""

    def mean(self, x: Tensor, /) -> Tensor:
        """Of x [n], 0-d."""

    def descending(self, x: Tensor, /) -> Tensor:
        """The values of x [n] from the largest on, `count` of them, and then -inf."""


@dataclass(frozen=True)
class View:
    """What an objective sees of its tokens beside their log-probs; float [n] each.

    advantages: A. old_logps, sampler_logps, ref_logps: as recorded, or None. ratio: rho, differentiable in logp; where
    old_logps is None it is 1 with gradient. entropy, kl (the exact one): differentiable, None unless the config asks
    for them (entropy_coef, kl="full"). response: sum, mean and max over responses; batch: of all scored tokens. What
    uses neither is computed a chunk of tokens at a time.
    """

    advantages: Tensor
    old_logps: Tensor | None
    sampler_logps: Tensor | None
    ref_logps: Tensor | None
    ratio: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    response: Responses
    batch: Everyone


def clip(
    logp: Tensor, given: View, *, clip_low: float, clip_high: float, ratio_cap: float | None, dual_clip: float | None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A): PPO (1707.06347), GRPO (2402.03300), DAPO (2503.14476).

    That is -A min(rho, 1 + high) for A >= 0 and -A max(rho, 1 - low) for A < 0. ratio_cap: rho is capped at this first
    (two-sided, 2502.14770). dual_clip: for A < 0 the loss is at most -dual_clip A (1912.09729).
    """
    ratio = given.ratio if ratio_cap is None else given.ratio.clamp(max=ratio_cap)
    below = ratio.clamp(max=1 + clip_high)
    above = ratio.clamp(min=1 - clip_low)
    above = above if dual_clip is None else above.clamp(max=dual_clip)
    return -given.advantages * torch.where(given.advantages >= 0, below, above)


def clip_holds(a: Tensor, ratio: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor | None, Tensor | None]:
    """Below for A < 0, above for A > 0, where the bound ends the gradient. ratio_cap and dual_clip do not count."""
    return (a < 0) & (ratio < 1 - clip_low), (a > 0) & (ratio > 1 + clip_high)


def cispo(logp: Tensor, given: View, *, clip_high: float) -> Tensor:
    """-sg(min(rho, high)) A logp: CISPO (2506.13585)."""
    return -given.ratio.detach().clamp(max=clip_high) * given.advantages * logp


def cispo_holds(a: Tensor, ratio: Tensor, *, clip_high: float) -> tuple[Tensor | None, Tensor | None]:
    """The cap is on every ratio; as in TRL and Liger those with A > 0 count, which it keeps from being raised."""
    return None, (a > 0) & (ratio > clip_high)


def sapo(logp: Tensor, given: View, *, sapo_tau: tuple[float, float]) -> Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau one of two numbers, for A > 0 and for A <= 0: SAPO (2511.20347)."""
    a = given.advantages
    tau = torch.where(a > 0, a.new_full((), sapo_tau[0]), sapo_tau[1])
    return -(4 / tau) * sigmoid(tau * (given.ratio - 1)) * a


def reinforce(logp: Tensor, given: View) -> Tensor:
    """-A logp: REINFORCE (Williams, 1992)."""
    return -given.advantages * logp


def topr(logp: Tensor, given: View) -> Tensor:
    """-w A logp, w = 1 for A > 0, else sg(min(rho, 1)): TOPR (2503.14286)."""
    weight = torch.where(given.advantages > 0, 1.0, given.ratio.detach().clamp(max=1))
    return -weight * given.advantages * logp


def topr_holds(a: Tensor, ratio: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The weight is capped for A < 0 alone."""
    return None, (a < 0) & (ratio > 1)


def log_ratio(logp: Tensor, given: View) -> Tensor:
    """log rho of each token, by its own log-prob whatever the ratio's level; 0 with gradient on policy."""
    return logp - (logp.detach() if given.old_logps is None else given.old_logps)


def gmpo(logp: Tensor, given: View, *, clip_low: float, clip_high: float) -> Tensor:
    """-s A, s = exp of the response's mean of log rho, held at most at high for A >= 0 and at least at -low for A < 0:
    GMPO (2507.20673), the geometric mean of the ratios. The bounds are on log rho; the paper's are 0.4 both.
    """
    difference, a = log_ratio(logp, given), given.advantages
    held = torch.where(a >= 0, difference.clamp(max=clip_high), difference.clamp(min=-clip_low))
    return -torch.exp(given.response.mean(held)) * a


def gmpo_holds(a: Tensor, ratio: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor | None, Tensor | None]:
    return (a < 0) & (ratio < math.exp(-clip_low)), (a > 0) & (ratio > math.exp(clip_high))


def vespo(
    logp: Tensor, given: View, *, vespo_positive: tuple[float, float], vespo_other: tuple[float, float]
) -> Tensor:
    """-sg(phi(w)) A logp, phi(w) = exp(lambda) w^k exp(-lambda w), w the product of the response's ratios: VESPO
    (2602.10693). k and lambda are one pair for A >= 0, another for A < 0. As in TRL each log rho is held within 20, and
    log w between log 1e-8 and 20.
    """
    a = given.advantages
    log_w = given.response.sum(log_ratio(logp, given).detach().clamp(-20, 20))
    log_w = log_w.clamp(math.log(1e-8), 20)
    k, decay = (torch.where(a >= 0, a.new_full((), x), y) for x, y in zip(vespo_positive, vespo_other, strict=True))
    return -torch.exp(decay + k * log_w - decay * torch.exp(log_w)) * a * logp


def _within(logp: Tensor, given: View, divergence: Tensor, most: float) -> Tensor:
    """-rho A where the policy is near its old self, or the step leads back to it."""
    away = (given.advantages > 0) == (log_ratio(logp, given).detach() > 0)
    return torch.where(away & (divergence > most), 0.0, -given.ratio * given.advantages)


def _old_and_new(logp: Tensor, given: View) -> tuple[Tensor, Tensor]:
    """log-probs of the sampled token, constants."""
    new = logp.detach()
    return new if given.old_logps is None else given.old_logps, new


def dppo_tv(logp: Tensor, given: View, *, divergence_cap: float) -> Tensor:
    """-M rho A, M = 0 where |p - p_old| > cap and the step leads further away (A and rho - 1 of one sign), else 1:
    DPPO with the binary total variation (2602.04879).
    """
    old, new = _old_and_new(logp, given)
    return _within(logp, given, (new.exp() - old.exp()).abs(), divergence_cap)


def dppo_kl(logp: Tensor, given: View, *, divergence_cap: float) -> Tensor:
    """The same with the binary KL, p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p)): DPPO (2602.04879)."""
    old, new = _old_and_new(logp, given)
    rest_old, rest_new = -torch.expm1(old), -torch.expm1(new)
    tiny = torch.finfo(new.dtype).tiny
    others = torch.where(rest_old > 0, rest_old * (rest_old.clamp(min=tiny) / rest_new.clamp(min=tiny)).log(), 0.0)
    return _within(logp, given, old.exp() * (old - new) + others, divergence_cap)


def m2po(logp: Tensor, given: View, *, m2_threshold: float) -> Tensor:
    """-M rho A, M = 0 for the tokens of the largest (log rho)^2, as few of them as make the batch's mean over the
    others less than the threshold: M2PO (2510.01161).
    """
    m2 = log_ratio(logp, given).detach() ** 2
    ordered, count = given.batch.descending(m2), given.batch.count
    before = torch.arange(len(ordered), device=m2.device)
    there = before < count
    sums = torch.where(there, ordered, 0.0).flip(0).cumsum(0).flip(0)
    dropped = (there & (sums >= m2_threshold * (count - before))).sum()
    # equal ones go together
    least = torch.where(dropped > 0, at(ordered, dropped - 1), math.inf)
    return torch.where(m2 < least, -given.ratio * given.advantages, 0.0)


def _covariances(logp: Tensor, given: View) -> Tensor:
    """(A - mean A) (logp - mean logp), constants."""
    a, x = given.advantages, logp.detach()
    return (a - given.batch.mean(a)) * (x - given.batch.mean(x))


def _largest(values: Tensor, given: View, share: float) -> Tensor:
    """bool [n]: the largest of the batch, a share of all tokens, at least one; -inf never; equal ones all."""
    wanted = (share * given.batch.count).long().clamp(min=1)
    return (values >= at(given.batch.descending(values), wanted - 1)) & (values > -math.inf)


def clip_cov(
    logp: Tensor, given: View, *, clip_low: float, clip_high: float, cov_share: float, cov_bounds: tuple[float, float]
) -> Tensor:
    """The loss of "clip", 0 for a share of the tokens whose covariance (A - mean A) (logp - mean logp), means over the
    batch, lies between the bounds, and which the clip does not hold: Clip-Cov (2505.22617). The paper draws them at
    random; these are those of the largest covariance, the same on every back-end and process.
    """
    low, high = clip_holds(given.advantages, given.ratio.detach(), clip_low=clip_low, clip_high=clip_high)
    covariance = _covariances(logp, given)
    open_to = (covariance > cov_bounds[0]) & (covariance < cov_bounds[1]) & ~(low | high)  # type: ignore[operator]
    chosen = _largest(torch.where(open_to, covariance, -math.inf), given, cov_share)
    loss = clip(logp, given, clip_low=clip_low, clip_high=clip_high, ratio_cap=None, dual_clip=None)
    return torch.where(chosen, 0.0, loss)


def kl_cov(logp: Tensor, given: View, *, cov_share: float, cov_kl_coef: float) -> Tensor:
    """-rho A, plus coef |log rho| for the share of tokens of the largest covariance: KL-Cov (2505.22617)."""
    chosen = _largest(_covariances(logp, given), given, cov_share)
    penalty = cov_kl_coef * log_ratio(logp, given).abs()
    return -given.ratio * given.advantages + torch.where(chosen, penalty, 0.0)


def at(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for an index 0-d, held within x, without a look at it; 0 for an empty x."""
    if len(x) == 0:
        return x.new_zeros(())
    return x.gather(0, index.long().clamp(0, len(x) - 1).reshape(1)).squeeze(0)


def top_entropy(entropy: Tensor, everyone: Everyone, share: float) -> Tensor:
    """bool [n]: tokens whose entropy is not below the (1 - share) quantile of the batch, "80/20" (2506.01939). As in
    TRL the quantile lies between two tokens' in a straight line."""
    place = share * (everyone.count - 1).to(torch.float64)  # from the largest on
    ordered, below = everyone.descending(entropy.detach()), place.floor()
    first, second = at(ordered, below), at(ordered, place.ceil())
    return entropy.detach() >= first + (place - below).to(first.dtype) * (second - first)


@dataclass(frozen=True)
class Objective:
    """loss: as this module says; for A = 0 it is 0, with no gradient. holds: which tokens the objective's own bounds on
    rho hold back, below and above. by_response, by_batch: whether it looks at `given.response`, at `given.batch`."""

    loss: Callable[..., Tensor]
    holds: Callable[..., tuple[Tensor | None, Tensor | None]] | None = None
    by_response: bool = False
    by_batch: bool = False


BY_NAME = {
    "clip": Objective(clip, clip_holds),
    "cispo": Objective(cispo, cispo_holds),
    "sapo": Objective(sapo),
    "reinforce": Objective(reinforce),
    "topr": Objective(topr, topr_holds),
    "gmpo": Objective(gmpo, gmpo_holds, by_response=True),
    "vespo": Objective(vespo, by_response=True),
    "dppo-tv": Objective(dppo_tv),
    "dppo-kl": Objective(dppo_kl),
    "m2po": Objective(m2po, by_batch=True),
    "clip-cov": Objective(clip_cov, clip_holds, by_batch=True),
    "kl-cov": Objective(kl_cov, by_batch=True),
}


def with_options(function: Callable[..., Any], config: Any) -> dict[str, Any]:
    """The function's keyword arguments, from the fields of a LossConfig."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: getattr(config, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}


# the functions of callers that configurations name, for operators, which take only text
_FUNCTIONS: WeakValueDictionary[str, Any] = WeakValueDictionary()
_KEYS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_numbers = count()


def is_function(value: Any) -> bool:
    """Whether it can be called, told from others (hash) and named for as long as it lives."""
    if not callable(value) or isinstance(value, type):
        return False
    try:
        return bool(hash(value) or True) and weakref.ref(value) is not None
    except TypeError:
        return False


def key_of(function: Any) -> str:
    """The function's name in this process, without a space, for as long as it lives."""
    if function not in _KEYS:
        _KEYS[function] = f"function:{next(_numbers)}"
        _FUNCTIONS[_KEYS[function]] = function
    return _KEYS[function]


def function_of(key: str) -> Any:
    """The function of that key; any other text as it is."""
    return _FUNCTIONS[key] if key.startswith("function:") else key
