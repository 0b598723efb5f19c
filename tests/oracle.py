"""The contract once more, written to be read and not to be fast: dense float64 tensors, plain autograd, Python loops.

Shares no code with the package. Everything is flattened to N tokens first; `response[n]` says which response token n is
of. Losses come back with their graph, so that the gradients are autograd's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

INF = float("inf")


class Pair(NamedTuple):
    """Two advantages a response, as in the package's TokenAdvantages."""

    prefix: Tensor
    suffix: Tensor
    prefix_lengths: Tensor


@dataclass
class Case:
    """One call: `logits`, or `hidden` with a head. Token tensors are [B, T], or [N] with `cu_seqlens`."""

    tokens: Tensor
    advantages: Tensor | Pair
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    old_logps: Tensor | None = None
    sampler_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    ref_logits: Tensor | None = None
    group_ids: Tensor | None = None
    normalizer: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> "Case":
        return replace(self, **changes)


class Result(NamedTuple):
    """All of it flat ([N]) but the loss, which has the shape that the package must give."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Tensor | None
    ratio: Tensor
    scored: Tensor
    learning: Tensor
    in_prefix: Tensor
    metrics: dict[str, float]


DEFAULTS: dict[str, Any] = {
    "objective": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "ratio_cap": None,
    "dual_clip": None,
    "sapo_tau": (1.0, 1.05),
    "vespo_positive": (2.0, 3.0),
    "vespo_other": (3.0, 2.0),
    "divergence_cap": 0.15,
    "m2_threshold": 0.04,
    "cov_share": 0.0002,
    "cov_bounds": (1.0, 5.0),
    "cov_kl_coef": 1.0,
    "top_entropy_quantile": 1.0,
    "ratio_level": "token",
    "sampler_correction": None,
    "sampler_bounds": (0.0, 2.0),
    "sampler_missing": None,
    "off_policy_mask_threshold": None,
    "kl": None,
    "kl_coef": 0.0,
    "kl_clamp": None,
    "kl_importance": False,
    "entropy_coef": 0.0,
    "reduction": "token-mean",
    "max_length": None,
    "temperature": 1.0,
    "softcap": None,
    "logit_scale": 1.0,
    "stats": "learning",
}


def log_probs(raw: Tensor, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """log softmax(softcap(logit_scale * z) / temperature) in float64; a logit of -inf stays -inf whatever the cap."""
    raw = raw.double()
    banned = raw == -INF
    z = raw.masked_fill(banned, 0.0) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax((z / temperature).masked_fill(banned, -INF), dim=-1)


def entropy_of(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp.masked_fill(logp == -INF, 0.0)).sum(-1)


def full_kl(logp: Tensor, ref: Tensor) -> Tensor:
    """sum over the vocabulary of p (log p - log p_ref); a token that the policy never emits adds nothing."""
    impossible = logp == -INF
    return (logp.exp() * (logp.masked_fill(impossible, 0.0) - ref.masked_fill(impossible, 0.0))).sum(-1)


def responses_of(case: Case) -> tuple[list[int], int]:
    """The response of each flat token, and how many responses there are (0: unknown, packed without cu_seqlens)."""
    if case.tokens.dim() == 2:
        batch, length = case.tokens.shape
        return [b for b in range(batch) for _ in range(length)], batch
    if case.cu_seqlens is None:
        return [0] * case.tokens.numel(), 0
    bounds = case.cu_seqlens.tolist()
    return [b for b in range(len(bounds) - 1) for _ in range(bounds[b], bounds[b + 1])], len(bounds) - 1


def advantages_of(case: Case, scored: list[bool], response: list[int]) -> tuple[list[float], list[bool]]:
    """Per flat token: its advantage, and whether it lies in its response's prefix."""
    values, inside = [], []
    seen: dict[int, int] = {}
    for n, b in enumerate(response):
        if isinstance(case.advantages, tuple):
            prefix, suffix, lengths = case.advantages
            good = scored[n] and seen.get(b, 0) < int(lengths[b])
            values.append(float(prefix[b] if good else suffix[b]))
            seen[b] = seen.get(b, 0) + int(scored[n])
        else:
            given, good = case.advantages, False
            values.append(float(given.reshape(-1)[n] if given.shape == case.tokens.shape else given[b]))
        inside.append(good)
    return values, inside


def objective_term(  # noqa: PLR0911  (one a name)
    opt: dict[str, Any], adv: float, ratio: Tensor, logp: Tensor, old: Tensor | float = 0.0
) -> Tensor:
    """The loss of one token, before the sampler's weight, the KL and the entropy."""
    if adv == 0.0:
        return logp * 0.0
    name = opt["objective"]
    if name == "clip":
        capped = ratio if opt["ratio_cap"] is None else ratio.clamp(max=opt["ratio_cap"])
        clipped = capped.clamp(1 - opt["clip_low"], 1 + opt["clip_high"])
        term = -torch.minimum(capped * adv, clipped * adv)
        if opt["dual_clip"] is not None and adv < 0:
            term = torch.minimum(term, torch.full_like(term, -opt["dual_clip"] * adv))
        return term
    if name == "cispo":
        return -ratio.detach().clamp(max=opt["clip_high"]) * adv * logp
    if name == "sapo":
        tau = opt["sapo_tau"][0] if adv > 0 else opt["sapo_tau"][1]
        return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * adv
    if name == "reinforce":
        return -adv * logp
    if name == "topr":
        weight = 1.0 if adv > 0 else ratio.detach().clamp(0, 1)
        return -weight * adv * logp
    if name.startswith("dppo"):
        p, q = math.exp(float(logp)), math.exp(float(old))
        distance = abs(p - q)
        if name == "dppo-kl":
            distance = q * math.log(q / p) + ((1 - q) * math.log((1 - q) / (1 - p)) if q < 1 and p < 1 else 0.0)
        further = (p > q) if adv > 0 else (p <= q)
        return -ratio * adv * (0.0 if further and distance > opt["divergence_cap"] else 1.0)
    raise AssertionError(name)


def response_terms(opt: dict[str, Any], adv: list[float], logp: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """The losses of one response's scored tokens, for objectives that look at all of it."""
    if opt["objective"] == "gmpo":
        held = []
        for a, x, y in zip(adv, logp, old, strict=True):
            held.append((x - y).clamp(max=opt["clip_high"]) if a >= 0 else (x - y).clamp(min=-opt["clip_low"]))
        mean = sum(held, torch.zeros(())) / len(held)
        return [-mean.exp() * a for a in adv]
    if opt["objective"] == "vespo":
        total = sum(min(max(float(x.detach() - y), -20.0), 20.0) for x, y in zip(logp, old, strict=True))
        total = min(max(total, math.log(1e-8)), 20.0)
        terms = []
        for a, x in zip(adv, logp, strict=True):
            k, decay = opt["vespo_positive"] if a >= 0 else opt["vespo_other"]
            terms.append(-math.exp(decay) * math.exp(total) ** k * math.exp(-decay * math.exp(total)) * a * x)
        return terms
    raise AssertionError(opt["objective"])


def batch_terms(
    opt: dict[str, Any], adv: list[float], ratio: list[Tensor], logp: list[Tensor], old: list[Tensor]
) -> list[Tensor]:
    """The losses of all scored tokens, for objectives that choose among them."""
    tokens = range(len(adv))
    plain = [-r * a for r, a in zip(ratio, adv, strict=True)]
    apart = [float(x.detach() - y) for x, y in zip(logp, old, strict=True)]
    if opt["objective"] == "m2po":
        kept = sorted(tokens, key=lambda n: apart[n] ** 2)
        while kept and sum(apart[n] ** 2 for n in kept) / len(kept) >= opt["m2_threshold"]:
            kept.pop()
        return [term if n in kept else term * 0.0 for n, term in enumerate(plain)]
    mean_a, mean_x = sum(adv) / len(adv), sum(float(x) for x in logp) / len(adv)
    covariance = [(a - mean_a) * (float(x) - mean_x) for a, x in zip(adv, logp, strict=True)]
    most = max(1, int(opt["cov_share"] * len(adv)))
    if opt["objective"] == "kl-cov":
        chosen = sorted(tokens, key=lambda n: -covariance[n])[:most]
        size = [opt["cov_kl_coef"] * (x - y).abs() for x, y in zip(logp, old, strict=True)]
        return [term + size[n] if n in chosen else term for n, term in enumerate(plain)]
    low, high = 1 - opt["clip_low"], 1 + opt["clip_high"]
    held = [(a > 0 and float(r) > high) or (a < 0 and float(r) < low) for a, r in zip(adv, ratio, strict=True)]
    inside = [n for n in tokens if opt["cov_bounds"][0] < covariance[n] < opt["cov_bounds"][1] and not held[n]]
    chosen = sorted(inside, key=lambda n: -covariance[n])[:most]
    return [
        -torch.minimum(r * a, r.clamp(low, high) * a) * (0.0 if n in chosen else 1.0)
        for n, (r, a) in enumerate(zip(ratio, adv, strict=True))
    ]


WHOLE = ("gmpo", "vespo")
OF_BATCH = ("m2po", "clip-cov", "kl-cov")


def sampler_weights(opt: dict[str, Any], log_q: list[float], scored: list[bool], response: list[int]) -> list[float]:
    """A weight a token; NaN in log_q is a sampler's log-prob that is missing."""
    name, (low, high) = opt["sampler_correction"], opt["sampler_bounds"]
    weights = []
    for n, own in enumerate(log_q):
        q = 0.0 if math.isnan(own) else own
        if name.startswith(("sequence", "geometric")):
            of_b = [m for m in range(len(log_q)) if response[m] == response[n] and scored[m]]
            q = sum(0.0 if math.isnan(log_q[m]) else log_q[m] for m in of_b)
            q = q if name.startswith("sequence") else q / max(1, len(of_b))
        q = math.exp(q)
        if name == "tis":
            weight = min(q, high)
        elif name.endswith("truncate"):
            weight = max(min(q, high), low)
        else:
            weight = q if low <= q <= high else 0.0
        weights.append(0.0 if opt["sampler_missing"] == 0 and math.isnan(own) else weight)
    return weights


def off_policy(opt: dict[str, Any], drift: list[float], scored: list[bool], response: list[int]) -> list[bool]:
    """Which tokens lie in a response that the policy would no longer write."""
    far = []
    for b in response:
        of_b = [n for n in range(len(drift)) if response[n] == b and scored[n]]
        total = sum(0.0 if math.isnan(drift[n]) else drift[n] for n in of_b)
        far.append(total / max(1, len(of_b)) > opt["off_policy_mask_threshold"])
    return far


def kl_term(name: str, logp: Tensor, ref_logp: Tensor, clamp: float | None = None) -> Tensor:
    d = ref_logp - logp
    d = d if clamp is None else d.clamp(-clamp, clamp)
    return {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[name]


def solve(case: Case) -> Result:  # noqa: PLR0912, PLR0915  (METHOD's order, top to bottom)
    opt = {**DEFAULTS, **case.options}
    tokens = case.tokens.reshape(-1)
    count = tokens.numel()
    scored = [True] * count if case.mask is None else [bool(m) for m in case.mask.reshape(-1)]
    response, batch = responses_of(case)
    adv, inside = advantages_of(case, scored, response)
    transform = {key: opt[key] for key in ("temperature", "softcap", "logit_scale")}

    raw = case.logits
    if raw is None:
        raw = case.hidden.double() @ case.weight.double().t()
        raw = raw if case.bias is None else raw + case.bias.double()
    logp_all = log_probs(raw.reshape(count, raw.shape[-1]), **transform)
    logp = logp_all.gather(1, tokens.clamp(0, raw.shape[-1] - 1)[:, None])[:, 0]
    entropy = entropy_of(logp_all)

    def flat(given: Tensor) -> Tensor:
        return given.reshape(-1).double()

    # the ratio, at token level or as the sequence's value with a token's gradient
    old = logp.detach() if case.old_logps is None else flat(case.old_logps)
    if opt["ratio_level"] == "token":
        ratio = (logp - old).exp()
    else:
        log_s = torch.zeros_like(old)
        for b in range(batch):
            of_b = [n for n in range(count) if response[n] == b and scored[n]]
            if of_b:
                log_s[of_b] = (logp.detach() - old)[of_b].mean()
        ratio = log_s.exp() * (logp - logp.detach()).exp()

    kl = None
    if opt["kl"] == "full":
        ref_raw = case.ref_logits
        if ref_raw is None:
            ref_raw = case.ref_hidden.double() @ case.ref_weight.double().t()
            ref_raw = ref_raw if case.ref_bias is None else ref_raw + case.ref_bias.double()
        kl = full_kl(logp_all, log_probs(ref_raw.reshape(count, ref_raw.shape[-1]), **transform).detach())
    elif opt["kl"] is not None:
        kl = kl_term(opt["kl"], logp, flat(case.ref_logps), opt["kl_clamp"])

    has_kl = kl is not None and opt["kl_coef"] != 0
    learning = [scored[n] and (adv[n] != 0 or has_kl or opt["entropy_coef"] != 0) for n in range(count)]
    policy: dict[int, Tensor] = {}
    if opt["objective"] in WHOLE:
        for b in range(batch):
            of_b = [n for n in range(count) if response[n] == b and scored[n]]
            # a response without any advantage has no loss, and nobody computes it
            seen = any(adv[n] != 0 for n in of_b)
            for n in of_b:
                learning[n] = learning[n] or seen
            made = response_terms(opt, *([x[n] for n in of_b] for x in (adv, logp, old))) if of_b else []
            policy |= dict(zip(of_b, made, strict=True))
    if opt["objective"] in OF_BATCH:
        of_all = [n for n in range(count) if scored[n]]
        learning = list(scored)
        made = batch_terms(opt, *([x[n] for n in of_all] for x in (adv, ratio, logp, old))) if of_all else []
        policy |= dict(zip(of_all, made, strict=True))
    weights, far = [1.0] * count, [False] * count
    before = old if case.sampler_logps is None else flat(case.sampler_logps)
    if opt["sampler_correction"] is not None:
        weights = sampler_weights(opt, (old - before).tolist(), scored, response)
    if opt["off_policy_mask_threshold"] is not None:
        far = off_policy(opt, (before - logp.detach()).tolist(), scored, response)
    floor = -INF
    if opt["top_entropy_quantile"] < 1 and any(scored):
        of_scored = torch.stack([entropy[n] for n in range(count) if scored[n]]).detach()
        floor = float(torch.quantile(of_scored, 1 - opt["top_entropy_quantile"]))
    terms: list[Tensor] = []
    for n in range(count):
        if not scored[n]:
            terms.append(torch.zeros((), dtype=torch.float64))
            continue
        term = policy[n] if n in policy else objective_term(opt, adv[n], ratio[n], logp[n], old[n])
        term = term * (0.0 if (far[n] and adv[n] < 0) or entropy[n] < floor else weights[n])
        if has_kl:
            term = term + opt["kl_coef"] * kl[n] * (ratio[n] if opt["kl_importance"] else 1.0)
        terms.append(term - opt["entropy_coef"] * entropy[n])

    loss = reduce(opt, terms, scored, response, batch, case)
    scored_t = torch.tensor(scored, dtype=torch.bool)
    learning_t = torch.tensor(learning, dtype=torch.bool)
    inside_t = torch.tensor(inside, dtype=torch.bool)
    return Result(
        loss,
        logp,
        entropy,
        kl,
        ratio,
        scored_t,
        learning_t,
        inside_t,
        metrics_of(opt, loss, logp, entropy, kl, ratio, adv, scored, learning, inside),
    )


def reduce(
    opt: dict[str, Any], terms: list[Tensor], scored: list[bool], response: list[int], batch: int, case: Case
) -> Tensor:
    """Terms of unscored tokens are 0. `normalizer` stands in for the outermost denominator."""
    zero = torch.zeros((), dtype=torch.float64)
    how, given = opt["reduction"], case.normalizer
    given = None if given is None else float(given)
    if how == "none":
        stacked = torch.stack(terms) if terms else torch.zeros(0, dtype=torch.float64)
        return stacked.reshape(case.tokens.shape) / (1.0 if given is None else given)
    if how == "token-mean":
        return sum(terms, zero) / (max(1, sum(scored)) if given is None else given)
    if how == "group-token-mean":
        groups = case.group_ids.tolist()
        total = zero
        for label in set(groups):
            of_group = [n for n in range(len(terms)) if groups[response[n]] == label and scored[n]]
            if of_group:
                total = total + sum((terms[n] for n in of_group), zero) / len(of_group)
        return total / (len(set(groups)) if given is None else given)
    if how == "seq-mean-token-mean":
        total = zero
        for b in range(batch):
            of_b = [n for n in range(len(terms)) if response[n] == b and scored[n]]
            if of_b:
                total = total + sum((terms[n] for n in of_b), zero) / len(of_b)
        return total / (batch if given is None else given)
    if how == "seq-mean-token-sum":
        return sum(terms, zero) / (batch if given is None else given)
    if how == "constant":
        return sum(terms, zero) / (batch * opt["max_length"] if given is None else given)
    raise AssertionError(how)


def metrics_of(
    opt: dict[str, Any],
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    ratio: Tensor,
    adv: list[float],
    scored: list[bool],
    learning: list[bool],
    inside: list[bool],
) -> dict[str, float]:
    loss, logp, entropy, ratio = loss.detach(), logp.detach(), entropy.detach(), ratio.detach()
    kl = None if kl is None else kl.detach()
    seen = learning if opt["stats"] == "learning" else scored

    def mean(values: Tensor | None, keep: Sequence[bool]) -> float:
        picked = [] if values is None else [float(v) for v, k in zip(values, keep, strict=True) if k]
        return sum(picked) / len(picked) if picked else 0.0

    held = [held_back(opt, adv[n], float(ratio[n])) for n in range(len(adv)) if learning[n]]
    share = max(1, len(held))
    return {
        "scored_tokens": float(sum(scored)),
        "learning_tokens": float(sum(learning)),
        "prefix_tokens": float(sum(inside)),
        "loss": float(loss) if loss.dim() == 0 else math.nan,
        "ratio_mean": mean(ratio, seen),
        "ratio_max": max((float(r) for r, k in zip(ratio, seen, strict=True) if k), default=0.0),
        "clip_low": sum(side == "low" for side in held) / share,
        "clip_high": sum(side == "high" for side in held) / share,
        "kl": mean(kl, seen),
        "entropy": mean(entropy, seen),
        "logp_prefix": mean(logp, [s and i for s, i in zip(seen, inside, strict=True)]),
        "logp_suffix": mean(logp, [s and not i for s, i in zip(seen, inside, strict=True)]),
    }


def held_back(opt: dict[str, Any], adv: float, ratio: float) -> str:
    """Which of the objective's bounds holds the ratio of a token back: "low", "high" or neither, ""."""
    name = opt["objective"]
    if name in ("clip", "clip-cov"):
        low, high = adv < 0 and ratio < 1 - opt["clip_low"], adv > 0 and ratio > 1 + opt["clip_high"]
        return "low" if low else "high" if high else ""
    if name == "cispo":  # the cap is on every ratio; as in TRL and Liger, only those with A > 0 count
        return "high" if adv > 0 and ratio > opt["clip_high"] else ""
    if name == "topr":  # min(rho, 1) for A < 0
        return "high" if adv < 0 and ratio > 1 else ""
    if name == "gmpo":
        low, high = adv < 0 and ratio < math.exp(-opt["clip_low"]), adv > 0 and ratio > math.exp(opt["clip_high"])
        return "low" if low else "high" if high else ""
    if name in ("sapo", "reinforce", "vespo", "dppo-tv", "dppo-kl", "m2po", "kl-cov"):
        return ""
    raise AssertionError(name)


# Advantages: one list entry a response, one inner entry a token.


def _groups(group_ids: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, label in enumerate(group_ids):
        found.setdefault(label, []).append(i)
    return found


def _sample_std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return std if std > 1e-12 else 0.0  # 1e-12: summation error of equal values is not a spread


def cut_length(shorten: str | int | float, length: int, prompt_length: int | None) -> int:
    if shorten == "prompt":
        return int(prompt_length)
    return math.floor(shorten * length) if isinstance(shorten, float) else int(shorten)


def vppo(
    correct: Sequence[bool],
    lengths: Sequence[int],
    first_error: Sequence[int],
    group_ids: Sequence[int],
    *,
    prompt_lengths: Sequence[int] | None = None,
    alpha: float = 0.5,
    shorten: str | int | float = "prompt",
    relu: bool = False,
    std: bool = False,
) -> list[list[float]]:
    kept = []
    for i in range(len(correct)):
        cut = cut_length(shorten, lengths[i], None if prompt_lengths is None else prompt_lengths[i])
        found = not correct[i] and first_error[i] >= 0
        kept.append(max(0, first_error[i] - cut) if found else 0)
    average = [
        1.0 if correct[i] else (alpha * kept[i] / lengths[i] if lengths[i] else 0.0) for i in range(len(correct))
    ]
    result: list[list[float]] = [[] for _ in correct]
    for members in _groups(group_ids).values():
        values = [average[i] for i in members]
        mean = sum(values) / len(values)
        scale = 1.0
        if std:
            spread = _sample_std(values)
            scale = 1 / spread if spread > 0 else 0.0
        for i in members:
            for t in range(lengths[i]):
                good = not correct[i] and t < kept[i]
                raw = 1.0 if correct[i] else (alpha if good else 0.0)
                value = (raw - mean) * scale
                result[i].append(max(value, 0.0) if relu and good else value)
    return result


def cliff(
    correct: Sequence[bool],
    lengths: Sequence[int],
    first_error: Sequence[int],
    group_ids: Sequence[int],
    *,
    keep: float = 0.0,
) -> list[list[float]]:
    result: list[list[float]] = [[] for _ in correct]
    for members in _groups(group_ids).values():
        mu = sum(correct[i] for i in members) / len(members)
        sigma = math.sqrt(mu * (1 - mu))
        for i in members:
            for t in range(lengths[i]):
                if sigma == 0:
                    result[i].append(0.0)
                elif correct[i]:
                    result[i].append((1 - mu) / sigma)
                else:
                    result[i].append(keep * (1 - mu) / sigma if t < first_error[i] else -mu / sigma)
        every = [v for i in members for v in result[i]]
        base = sum(every) / len(every) if every else 0.0
        for i in members:
            result[i] = [v - base for v in result[i]] if sigma > 0 else result[i]
    return result


def grpo(rewards: Sequence[float], group_ids: Sequence[int], *, std: bool = True) -> list[float]:
    result = [0.0] * len(rewards)
    for members in _groups(group_ids).values():
        values = [rewards[i] for i in members]
        mean, spread = sum(values) / len(values), _sample_std(values)
        for i in members:
            result[i] = rewards[i] - mean
            if std:
                result[i] = result[i] / spread if spread > 0 else 0.0
    return result


def neutral_prefix(
    response_advantages: Sequence[float],
    correct: Sequence[bool],
    first_error: Sequence[int],
    lengths: Sequence[int],
) -> list[list[float]]:
    return [
        [0.0 if not correct[i] and t < first_error[i] else response_advantages[i] for t in range(lengths[i])]
        for i in range(len(correct))
    ]


def rts(
    correct: Sequence[bool],
    right_steps: Sequence[int],
    total_steps: Sequence[int],
    group_ids: Sequence[int],
    *,
    beta: float = -10.0,
    gamma: float = 20.0,
    std: bool = True,
) -> list[float]:
    outcome = []
    for i in range(len(correct)):
        share = right_steps[i] / total_steps[i] if total_steps[i] else 0.0
        outcome.append(1.0 if correct[i] else 1 / (1 + math.exp(beta * share + gamma)))
    return grpo(outcome, group_ids, std=std)


def mixed(
    rewards: Sequence[float],
    mean_step_scores: Sequence[float],
    group_ids: Sequence[int],
    *,
    weight: float = 0.8,
    std: bool = True,
) -> list[float]:
    blend = [weight * s + (1 - weight) * r for r, s in zip(rewards, mean_step_scores, strict=True)]
    return grpo(blend, group_ids, std=std)
