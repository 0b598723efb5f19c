"""The options of the loss, checked where they are set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.maths import corrections, kl, objectives, reductions
from prefixloss.maths.objectives import View
from prefixloss.maths.trial import Traits, tried

RatioLevel = Literal["token", "sequence"]
Stats = Literal["learning", "scored"]


def _one_of(names: Collection[str], *more: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, str) and (v in names or v in more), " | ".join(map(repr, (*names, *more)))


def _function_or(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    accepts, wants = rule
    return lambda v: accepts(v) or objectives.is_function(v), f"{wants}, or a function of (logp, given)"


def _number(low: float, *, above: bool = False) -> tuple[Callable[[Any], bool], str]:
    """A finite number >= low (> low with `above`)."""
    return (
        lambda v: check.is_number(v) and (v > low if above else v >= low),
        f"a finite number {'>' if above else '>='} {low:g}, in float32's range",
    )


def _or_none(rule: tuple[Callable[[Any], bool], str], link: str = " or ") -> tuple[Callable[[Any], bool], str]:
    accepts, wants = rule
    return lambda v: v is None or accepts(v), f"None{link}{wants}"


def _pair(low: float, *, above: bool, ordered: bool) -> tuple[Callable[[Any], bool], str]:
    """Two numbers >= low (> low with `above`); the second may be infinite when they are bounds (`ordered`)."""

    def accepts(v: Any) -> bool:
        if not isinstance(v, (tuple, list)) or len(v) != 2:
            return False
        endless = ordered and isinstance(v[1], Real) and v[1] == math.inf
        if not check.is_number(v[0]) or not (endless or check.is_number(v[1])):
            return False
        return all(x > low if above else x >= low for x in v) and (v[0] <= v[1] or not ordered)

    wants = f"two numbers {'>' if above else '>='} {low:g}"
    return accepts, wants + (", the first not above the second" if ordered else "")


def _share() -> tuple[Callable[[Any], bool], str]:
    return lambda v: check.is_number(v) and 0 < v <= 1, "a number > 0, at most 1"


def _positive_int() -> tuple[Callable[[Any], bool], str]:
    return lambda v: check.is_whole(v, 1), "a whole number > 0"


def _plain(value: Any) -> Any:
    """A value that was accepted, numbers of NumPy and fractions as Python's own: what `encoded` can write down."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, (bool, int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _value(word: str) -> Any:
    """A value from its text: None, True, False, a pair of numbers, a number or a name."""
    if word in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[word]
    if "," in word:
        return tuple(map(float, word.split(",")))
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def _or_auto(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    accepts, wants = rule
    return lambda v: (isinstance(v, str) and v == "auto") or accepts(v), f"'auto' or {wants}"


_any_number = (check.is_number, "a finite number, in float32's range")
_flag = (lambda v: isinstance(v, bool), "True or False")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "objective": _function_or(_one_of(objectives.BY_NAME)),
    "clip_low": _number(0),
    "clip_high": _number(0),
    "ratio_cap": _or_none(_number(0, above=True)),
    "dual_clip": _or_none(_number(1, above=True)),
    "sapo_tau": _pair(0, above=True, ordered=False),
    "vespo_positive": _pair(0, above=True, ordered=False),
    "vespo_other": _pair(0, above=True, ordered=False),
    "divergence_cap": _number(0),
    "m2_threshold": _number(0, above=True),
    "cov_share": _share(),
    "cov_bounds": _pair(0, above=False, ordered=True),
    "cov_kl_coef": _number(0),
    "top_entropy_quantile": _share(),
    "ratio_level": _one_of(get_args(RatioLevel)),
    "sampler_correction": _or_none(_one_of(corrections.BY_NAME), " | "),
    "sampler_bounds": _pair(0, above=False, ordered=True),
    "sampler_missing": _or_none((lambda v: check.is_whole(v) and v <= 1, "0 or 1")),
    "off_policy_mask_threshold": _or_none(_number(0)),
    "kl": _or_none(_one_of(kl.BY_NAME, kl.FULL), " | "),
    "kl_coef": _any_number,
    "kl_clamp": _or_none(_number(0, above=True)),
    "kl_importance": _flag,
    "entropy_coef": _any_number,
    "reduction": _one_of(reductions.BY_NAME),
    "max_length": _or_none(_positive_int()),
    "temperature": _number(0, above=True),
    "softcap": _or_none(_number(0, above=True)),
    "logit_scale": _number(0, above=True),
    "stats": _one_of(get_args(Stats)),
    "row_tolerance": _number(0),
    "gradient_tolerance": _or_auto(_number(0)),
    "head_gradient_tolerance": _or_auto(_number(0)),
    "chunk_tokens": _or_none(_positive_int()),
}


@dataclass(frozen=True)
class LossConfig:
    """What the loss computes. Every value is checked on construction (ValueError naming the field).

    Per-token objective, with rho = exp(logp - old_logp) and advantage A:
        objective: a name of `prefixloss.maths.objectives`, where formulas and papers stand: "clip" (PPO, GRPO, DAPO),
            "cispo", "sapo", "reinforce", "topr", "gmpo", "vespo", "dppo-tv", "dppo-kl", "m2po", "clip-cov" or
            "kl-cov"; or a function f(logp, given) -> loss of each token, [n] like logp, in plain torch and
            differentiable in logp (and given.entropy, given.kl). `given` is `prefixloss.maths.objectives.View`. The
            function is tried once on made-up tokens: where it uses `given.response` or `given.batch`, the log-probs of
            whole responses, or of all tokens, come first; where its loss and derivatives are 0 for an advantage of 0,
            such tokens do not learn. It must treat every token alike, whatever else is in the tensor.
        clip_low, clip_high: "clip" keeps rho inside [1 - clip_low, 1 + clip_high], "gmpo" log rho inside [-clip_low,
            clip_high] (0.4 both in its paper). For "cispo", `clip_high` is the cap
            on rho itself, at least 1: 5.0 is usual, as in TRL, and the default 0.2 is refused.
        ratio_cap: two-sided clip ("clip" only): rho is capped at this first.
        dual_clip: "clip" only: for A < 0 the loss is at most -dual_clip * A.
        sapo_tau: the temperatures of "sapo" for A > 0 and for A <= 0.
        vespo_positive, vespo_other: k and lambda of "vespo" for A >= 0 and for A < 0.
        divergence_cap: of "dppo-tv" and "dppo-kl".
        m2_threshold: of "m2po".
        cov_share, cov_bounds, cov_kl_coef: of "clip-cov" and "kl-cov": which share of the tokens is chosen, between
            which covariances ("clip-cov"), and the weight of |log rho| for those chosen ("kl-cov").
        top_entropy_quantile: below 1, only this share of the scored tokens, those of the largest entropy, has a policy
            term ("80/20", `objectives.top_entropy`; TRL's name). Penalties and the entropy bonus are of all tokens.
        ratio_level: "token", or "sequence" for GSPO in its token form.
        sampler_correction: weights the policy term by q = exp(old_logp - sampler_logp): "tis" caps q at
            sampler_bounds[1], "token_truncate" holds it within both sampler_bounds, "icepop" drops tokens whose q lies
            outside them; "sequence_truncate" and "sequence_mask" do these two with one q a response, the product of its
            tokens', "geometric_truncate" and "geometric_mask" with their geometric mean
            (`prefixloss.maths.corrections`). TRL's default is "sequence_mask" with bounds (0, 3).
        sampler_missing: for a sampler log-prob that is NaN: 1 counts it as q = 1, as TRL does, 0 drops the token (and
            counts q = 1 in its response's). None: an error.
        off_policy_mask_threshold: DeepSeek-V3.2's mask (and TRL's name): a token with A < 0 has no policy term where
            its response's mean of sampler_logp (old_logp without it) - logp is above this.
    Penalties:
        kl, kl_coef: the estimator of KL(policy || reference), "k1", "k2" or "k3" (`prefixloss.maths.kl`), and its
            weight. "k1" has zero expected gradient on policy,
            so as a loss term it only adds noise; "full" is the exact sum over the vocabulary.
        kl_clamp: ref_logp - logp is held within [-kl_clamp, kl_clamp] in "k1", "k2" and "k3"; beyond, no gradient.
        kl_importance: multiply the KL term by rho (before any cap); the gradient flows through both. With ratio_level
            "sequence" rho is the token form here as everywhere: its value is the response's, and its gradient is each
            token's own, rho k d logp. TRL and Liger go through the mean there, which hands a token the mean of the
            response's KLs in place of its own: the credit that per-token advantages take apart.
        entropy_coef: weight of the entropy bonus, - entropy_coef * H.
    Reduction:
        reduction: how the tokens' losses become one number; max_length is for "constant": sum / (B * max_length).
    The policy's distribution is softmax(softcap * tanh(logit_scale * z / softcap) / temperature).
    Cost:
        stats: "learning" computes log-probs, KL and metrics only for tokens that may have a gradient, "scored" for
            every token in the mask.
        row_tolerance: 0 is exact. Above 0, tokens whose logit gradient is surely at most this times the largest one
            (in L1 norm, by bounds on both) leave the backward.
        gradient_tolerance, head_gradient_tolerance: 0 is exact. Above 0, the smallest entries of a token's logit
            gradient leave the product for the gradient of the hidden states, or those for the head and its bias: in
            Euclidean norm at most this times the root mean square of the norms of its chunk's rows. "auto" is a quarter
            of what rounding to the gradient's dtype costs. Meaning and price: `prefixloss.backends.tolerance`. From
            hidden states, and not by backend="reference"; metrics["gradient_left_out"] says how much.
        chunk_tokens: tokens per chunk; None: by a memory budget (`prefixloss.backends.memory`). A number is also a
            promise: a token's log-prob, entropy, KL and gradient (of its hidden state or logits) then have the same
            bits alone, at any place in any batch and under any mask, given the same weight in the loss (`normalizer`).
            For that every product has this many rows, rounded up to 16, however few tokens there are: the cost of a
            call is that of whole chunks. The head's gradient is a sum over tokens: the same from run to run, not more.
            Left out: the tolerances, which look at other tokens, `tp_group`, and `backend="torch"` on a GPU. For
            kernels on a GPU it holds where the vendor's library sums all rows of a product alike.
    """

    objective: str | Callable[[Tensor, View], Tensor] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    dual_clip: float | None = None
    sapo_tau: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_other: tuple[float, float] = (3.0, 2.0)
    divergence_cap: float = 0.15
    m2_threshold: float = 0.04
    cov_share: float = 0.0002
    cov_bounds: tuple[float, float] = (1.0, 5.0)
    cov_kl_coef: float = 1.0
    top_entropy_quantile: float = 1.0
    ratio_level: RatioLevel = "token"
    sampler_correction: str | None = None
    sampler_bounds: tuple[float, float] = (0.0, 2.0)
    sampler_missing: int | None = None
    off_policy_mask_threshold: float | None = None
    kl: str | None = None
    kl_coef: float = 0.0
    kl_clamp: float | None = None
    kl_importance: bool = False
    entropy_coef: float = 0.0
    reduction: str = "token-mean"
    max_length: int | None = None
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    stats: Stats = "learning"
    row_tolerance: float = 0.0
    gradient_tolerance: float | Literal["auto"] = 0.0
    head_gradient_tolerance: float | Literal["auto"] = 0.0
    chunk_tokens: int | None = None

    @property
    def encoded(self) -> str:
        """The options as one line of text, which is what an operator of `torch.library` can take."""
        text: str = vars(self)["_encoded"]
        return text

    @classmethod
    def decoded(cls, text: str) -> LossConfig:
        """The options from `encoded`."""
        options = {name: _value(word) for name, word in (pair.split("=") for pair in text.split())}
        return cls(**{**options, "objective": objectives.function_of(options["objective"])})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        object.__setattr__(self, "_encoded", self._all_encoded())  # a function has another key in another process

    def __post_init__(self) -> None:
        for field in fields(self):
            accepts, wants = _RULES[field.name]
            value = getattr(self, field.name)
            if not accepts(value):
                check.fail(field.name, check.describe(value), wants)
            object.__setattr__(self, field.name, _plain(value))
        if self.objective == "cispo" and self.clip_high < 1:
            wants = "a number >= 1: there it is the cap on the ratio itself, as in TRL, and 5.0 is usual"
            check.fail("clip_high", f'{self.clip_high!r} for objective="cispo"', wants)
        # once, here: a compiler may take the numbers of an object that it is given for variables
        object.__setattr__(self, "_encoded", self._all_encoded())
        if self.kl is None and self.kl_coef != 0:
            warnings.warn(f"kl_coef={self.kl_coef!r} has no effect: kl is None", stacklevel=3)
        if self.kl_clamp is not None and self.exact_kl:
            check.fail("kl_clamp", f'{self.kl_clamp!r} with kl="full"', "None, or an estimator of the KL")

    def _all_encoded(self) -> str:
        return " ".join(map(self._encoded_field, fields(self)))

    def _encoded_field(self, field: Any) -> str:
        value = getattr(self, field.name)
        if callable(value):
            value = objectives.key_of(value)
        return f"{field.name}={f'{value[0]},{value[1]}' if isinstance(value, (tuple, list)) else value}"

    def traits(self, like: Tensor, recorded: tuple[bool, ...]) -> Traits:
        """What the objective does. like, recorded: see `prefixloss.maths.trial.tried`."""
        if isinstance(self.objective, str):
            made = objectives.BY_NAME[self.objective]
            return Traits(made.by_response, made.by_batch, silent=not made.by_batch)
        return Traits(*_traits_of(self.encoded, str(like.device), str(like.dtype), *recorded))

    @property
    def tolerant(self) -> bool:
        """Whether entries of a logit gradient may be left out."""
        return self.gradient_tolerance != 0 or self.head_gradient_tolerance != 0

    @property
    def exact_kl(self) -> bool:
        """Whether the KL is the sum over the vocabulary, which needs the reference's logits."""
        return self.kl == kl.FULL

    @property
    def penalises_kl(self) -> bool:
        return self.kl is not None and self.kl_coef != 0

    @property
    def follows_exact_kl(self) -> bool:
        """Whether a gradient may go through the exact KL: through the penalty, or a function's given.kl."""
        return self.exact_kl and (self.penalises_kl or callable(self.objective))

    @property
    def penalised(self) -> bool:
        """Whether every scored token has a gradient, whatever its advantage."""
        return self.penalises_kl or self.entropy_coef != 0

    @property
    def sequence_ratio(self) -> bool:
        """Whether a response has one ratio."""
        return self.ratio_level == "sequence"

    @property
    def of_responses(self) -> str | None:
        """An option, if any, for which a token's loss needs the log-probs of all its response, the objective apart."""
        if self.sequence_ratio:
            return 'ratio_level="sequence"'
        if self.sampler_correction in corrections.LEVELS:
            return f'sampler_correction="{self.sampler_correction}"'
        return None if self.off_policy_mask_threshold is None else "off_policy_mask_threshold"

    @property
    def of_batch(self) -> bool:
        """Whether a token's loss needs the entropies of all tokens, the objective apart."""
        return self.top_entropy_quantile < 1

    @property
    def summed(self) -> reductions.Reduction:
        """The reduction itself."""
        return reductions.BY_NAME[self.reduction]

    @property
    def shows_every_scored(self) -> bool:
        """Whether the results are of every token in the mask, not of the learning ones alone."""
        return self.stats == "scored"


def _traits_of(options: str, device: str, dtype: str, *recorded: bool) -> tuple[bool, bool, bool]:
    by_response, by_batch, silent = _tried(options, device, dtype, recorded)
    return by_response, by_batch, silent


# under compilation it is tried while the graph is made: what torch.compiler.assume_constant_result says of a function,
# which would import the compiler, two seconds, with the package
_traits_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _tried(options: str, device: str, dtype: str, recorded: tuple[bool, ...]) -> Traits:
    config = LossConfig.decoded(options)
    like = torch.empty(0, device=device, dtype=getattr(torch, dtype.removeprefix("torch.")))
    assert callable(config.objective)
    return tried(config.objective, like, recorded, config.entropy_coef != 0, config.exact_kl)
