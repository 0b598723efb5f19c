"""Cases for the tests of the losses: calls of the package and the oracle on them, and how far rounding may go."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import oracle
import torch
from oracle import INF, Case, Pair, Result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefixloss import LossConfig, TokenAdvantages, linear_prefix_loss, prefix_loss
from prefixloss._kernels.objective import CORRECTIONS, POLICIES
from prefixloss.config import RatioLevel, Stats
from prefixloss.maths import kl as estimators
from prefixloss.maths import reductions

NAN = float("nan")
# every name there is: a new one is tested without being asked for. The others' objectives are in test_new_objectives
OBJECTIVES, REDUCTIONS = POLICIES, tuple(reductions.BY_NAME)
KLS, RATIO_LEVELS, STATS = (*estimators.BY_NAME, estimators.FULL), get_args(RatioLevel), get_args(Stats)
METRICS = (
    "scored_tokens",
    "learning_tokens",
    "prefix_tokens",
    "loss",
    "ratio_mean",
    "ratio_max",
    "clip_low",
    "clip_high",
    "kl",
    "entropy",
    "logp_prefix",
    "logp_suffix",
)

# fields of a case that hold a value a token
PER_TOKEN = (
    "tokens",
    "advantages",
    "hidden",
    "logits",
    "mask",
    "old_logps",
    "sampler_logps",
    "ref_logps",
    "ref_hidden",
    "ref_logits",
)


def of_objective(name: str, **options: Any) -> dict[str, Any]:
    """Options with that objective; for "cispo" with a cap that it takes."""
    return {"objective": name, **({"clip_high": 5.0} if name == "cispo" else {}), **options}


# Calls


def leaf_names(case: Case) -> list[str]:
    if case.logits is not None:
        return ["logits"]
    return ["hidden", "weight"] + (["bias"] if case.bias is not None else [])


def poisoned(case: Case) -> Case:
    """NaN, or an infinity, at every position that the mask leaves out: none of it may matter."""
    if case.mask is None:
        return case
    out = ~case.mask.bool()

    def fill(given: Tensor | None, value: float = NAN) -> Tensor | None:
        if given is None or not isinstance(given, Tensor) or given.shape[: out.dim()] != out.shape:
            return given
        given = given.clone()
        given[out] = value
        return given

    advantages = case.advantages
    if isinstance(advantages, Tensor) and advantages.shape == case.tokens.shape:
        advantages = fill(advantages)
    return case.but(
        hidden=fill(case.hidden),
        logits=fill(case.logits),
        old_logps=fill(case.old_logps, -INF),
        sampler_logps=fill(case.sampler_logps),
        ref_logps=fill(case.ref_logps, INF),
        ref_hidden=fill(case.ref_hidden),
        ref_logits=fill(case.ref_logits),
        advantages=advantages,
    )


def call(
    case: Case,
    backend: str,
    dtype: torch.dtype | None = None,
    frozen: Sequence[str] = (),
    inplace: bool = False,
    **more: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """The package's output, and its differentiable inputs by name. `dtype` is that of the model's tensors."""
    leaves = {}
    for name in leaf_names(case):
        value = getattr(case, name)
        value = value.detach().clone() if dtype is None else value.detach().to(dtype, copy=True)
        leaves[name] = value.requires_grad_(name not in frozen)

    def model(value: Tensor | None) -> Tensor | None:
        return value if value is None or dtype is None else value.to(dtype)

    def statistic(value: Any) -> Any:
        if value is None or dtype in (None, torch.float64):
            return value
        if isinstance(value, tuple):
            return Pair(value[0].float(), value[1].float(), value[2])
        return value.float()

    advantages = statistic(case.advantages)
    if isinstance(advantages, tuple):
        advantages = TokenAdvantages(*advantages)
    shared = {
        "mask": case.mask,
        "cu_seqlens": case.cu_seqlens,
        "old_logps": statistic(case.old_logps),
        "sampler_logps": statistic(case.sampler_logps),
        "ref_logps": statistic(case.ref_logps),
        "group_ids": case.group_ids,
        "normalizer": case.normalizer,
        "config": LossConfig(**case.options, **more),
        "backend": backend,
    }
    if case.logits is not None:
        return prefix_loss(
            leaves["logits"],
            case.tokens,
            advantages,
            ref_logits=model(case.ref_logits),
            inplace=inplace,
            **shared,
        ), leaves
    return linear_prefix_loss(
        leaves["hidden"],
        leaves["weight"],
        case.tokens,
        advantages,
        lm_head_bias=leaves.get("bias"),
        ref_hidden=model(case.ref_hidden),
        ref_lm_head_weight=model(case.ref_weight),
        ref_lm_head_bias=model(case.ref_bias),
        **shared,
    ), leaves


def call_with_grads(
    case: Case, backend: str, outer: Tensor | float = 1.0, **more: Any
) -> tuple[Any, dict[str, Tensor]]:
    out, leaves = call(case, backend, **more)
    (out.loss * outer).sum().backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def solve_with_grads(case: Case, outer: Tensor | float = 1.0) -> tuple[Result, dict[str, Tensor]]:
    leaves = {name: getattr(case, name).detach().double().requires_grad_() for name in leaf_names(case)}
    want = oracle.solve(case.but(**leaves))
    total = (want.loss * outer).sum()
    if not total.requires_grad:
        return want, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return want, dict(zip(leaves, grads, strict=True))


def close(got: Tensor, want: Tensor, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(
        got.double(),
        want.detach().double().reshape(got.shape),
        **tolerance,
        msg=lambda text: f"{what}: {text}",
    )


class Counter(TorchDispatchMode):
    """Multiply-adds of every matrix product, and the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in func.overloadpacket.__name__:
            left, right = [a for a in args if isinstance(a, Tensor) and a.dim() > 1][-2:]
            self.products += left.numel() * right.shape[-1]
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


# Random cases


def pick_options(rng: random.Random, per_response: bool) -> dict[str, Any]:
    objective = rng.choice(OBJECTIVES)
    options: dict[str, Any] = {
        "objective": objective,
        "clip_low": rng.choice((0.1, 0.2, 0.5)),
        "clip_high": rng.choice((1.0, 1.3, 5.0)) if objective == "cispo" else rng.choice((0.1, 0.28, 0.5)),
        "temperature": rng.choice((1.0, 1.0, 0.7, 1.5)),
        "softcap": rng.choice((None, None, 2.0, 30.0)),
        "logit_scale": rng.choice((1.0, 1.0, 0.5, 2.0)),
        "entropy_coef": rng.choice((0.0, 0.0, 0.1)),
        "stats": rng.choice(STATS),
        "chunk_tokens": rng.choice((None, 1, 2, 3, 64)),
        "reduction": rng.choice([r for r in REDUCTIONS if per_response or not reductions.BY_NAME[r].per_response]),
        "ratio_level": rng.choice(("token", "token", "sequence") if per_response else ("token",)),
    }
    if rng.random() < 0.3:
        options["ratio_cap"] = rng.choice((1.2, 2.0, 3.0))
    if rng.random() < 0.3:
        options["dual_clip"] = rng.choice((1.2, 3.0))
    if rng.random() < 0.3:
        options["sapo_tau"] = (rng.choice((0.5, 1.0)), rng.choice((1.05, 2.0)))
    if rng.random() < 0.4:
        options["sampler_correction"] = rng.choice(CORRECTIONS)
        options["sampler_bounds"] = rng.choice(((0.0, 2.0), (0.5, 1.5)))
    if rng.random() < 0.6:
        options["kl"] = rng.choice((*KLS, "full"))
        options["kl_coef"] = rng.choice((0.0, 0.1, 0.7))
        options["kl_importance"] = rng.random() < 0.4
    if options["reduction"] == "constant":
        options["max_length"] = rng.choice((5, 9))
    return options


def random_case(seed: int) -> Case:  # noqa: PLR0912, PLR0915  (one draw after another)
    """Tiny on purpose: every option meets every layout many times over, and a failure can be read."""
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64) * scale

    def maybe_zero(values: Tensor) -> Tensor:
        return values * (torch.rand(values.shape, generator=gen) > rng.choice((0.0, 0.3, 0.7)))

    batch, width, vocab = rng.randint(1, 4), rng.randint(1, 5), rng.randint(3, 9)
    packed = rng.random() < 0.5
    cu_seqlens = None
    if packed:
        lengths = [rng.randint(0, 4) for _ in range(batch)]
        shape: tuple[int, ...] = (sum(lengths),)
        dtype = rng.choice((torch.int32, torch.int64))
        cu_seqlens = torch.tensor([sum(lengths[:b]) for b in range(batch + 1)], dtype=dtype)
    else:
        shape = (batch, rng.randint(1, 4))
    per_response = not packed or rng.random() < 0.8
    if not per_response:
        cu_seqlens = None
    options = pick_options(rng, per_response)

    # one vocabulary entry may be banned for all (by the bias), or others for single positions (in the logits)
    banned = rng.randrange(vocab) if rng.random() < 0.3 else None
    tokens = torch.randint(vocab - (banned is not None), shape, generator=gen)
    if banned is not None:
        tokens = tokens + (tokens >= banned)
    mask = None
    if rng.random() < 0.75:
        mask = (torch.rand(shape, generator=gen) < rng.choice((0.4, 0.8))).to(rng.choice((torch.bool, torch.int64)))

    case = Case(
        tokens=tokens,
        advantages=maybe_zero(normal(*shape)),
        mask=mask,
        cu_seqlens=cu_seqlens,
        options=options,
    )
    form = rng.choice(("token", "response", "pair")) if per_response else "token"
    if form == "response":
        case.advantages = maybe_zero(normal(batch))
    elif form == "pair":
        scored = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        sizes = torch.tensor([len(part) for part in scored]) if cu_seqlens is None else cu_seqlens.long().diff()
        scored_of_each = torch.tensor([int(part.sum()) for part in scored.reshape(-1).split(sizes.tolist())])
        lengths_good = torch.minimum(torch.randint(0, 4, (batch,), generator=gen), scored_of_each)
        case.advantages = Pair(maybe_zero(normal(batch)), maybe_zero(normal(batch)), lengths_good)

    ref_banned = banned if rng.random() < 0.5 else None
    if rng.random() < 0.6:
        case.hidden = normal(*shape, width)
        case.weight = normal(vocab, width)
        if banned is not None or rng.random() < 0.5:
            case.bias = normal(vocab)
        if banned is not None:
            case.bias[banned] = -INF
    else:
        case.logits = normal(*shape, vocab, scale=2.0)
        if banned is not None:
            others = torch.rand((*shape, vocab), generator=gen) < 0.3
            others[..., banned] = True
            others.scatter_(-1, tokens[..., None], False)
            case.logits[others] = -INF
    if options.get("kl") == "full" and case.logits is None:
        ref_width = rng.randint(1, 5)
        case.ref_hidden, case.ref_weight = normal(*shape, ref_width), normal(vocab, ref_width)
        if ref_banned is not None or rng.random() < 0.5:
            case.ref_bias = normal(vocab)
        if ref_banned is not None:
            case.ref_bias[ref_banned] = -INF
    elif options.get("kl") == "full":
        case.ref_logits = normal(*shape, vocab, scale=2.0)
        if ref_banned is not None:
            case.ref_logits[..., ref_banned] = -INF

    logps = oracle.solve(
        case.but(
            advantages=torch.zeros(shape),
            options={key: options[key] for key in ("temperature", "softcap", "logit_scale")},
        )
    ).logps.reshape(shape)
    if rng.random() < 0.75:
        case.old_logps = logps + normal(*shape, scale=0.4)
    if "sampler_correction" in options:
        base = logps if case.old_logps is None else case.old_logps
        case.sampler_logps = base + normal(*shape, scale=0.5)
    if options.get("kl") in estimators.BY_NAME:
        case.ref_logps = logps + normal(*shape, scale=0.5)
    if per_response and (options["reduction"] == "group-token-mean" or rng.random() < 0.3):
        case.group_ids = torch.tensor([rng.choice((-7, 3, 10**12)) for _ in range(batch)])
    if rng.random() < 0.4:
        case.normalizer = rng.choice((7.5, 3, torch.tensor(4.0), torch.tensor(11)))
    return case


# A case with everything set, and changes to it


def small_case(
    level: str = "linear",
    batch: int = 3,
    length: int = 4,
    width: int = 5,
    vocab: int = 7,
    seed: int = 0,
    scale: float = 1.0,
    **options: Any,
) -> Case:
    """Everything set: padded, partly masked, ratios on both sides of the clip but 0.03 or more away from its edges."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    shape = (batch, length)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, 0] = mask[-1, -1] = False
    case = Case(
        tokens=torch.randint(vocab, shape, generator=gen),
        advantages=normal(*shape),
        mask=mask,
        options=options,
        group_ids=torch.tensor([4, -1, 4, 9, 9, 9][:batch]),
    )
    if level == "linear":
        case.hidden, case.weight, case.bias = (
            normal(*shape, width),
            normal(vocab, width) * scale,
            normal(vocab),
        )
        case.ref_hidden, case.ref_weight = normal(*shape, width + 1), normal(vocab, width + 1) * scale
    else:
        case.logits, case.ref_logits = normal(*shape, vocab) * 2 * scale, normal(*shape, vocab) * 2 * scale
    plain = {key: options[key] for key in ("temperature", "softcap", "logit_scale") if key in options}
    logps = oracle.solve(case.but(options=plain)).logps.reshape(shape)
    # ratios exp(-0.5), exp(-0.1), exp(0.1), exp(0.5) around the edges 0.8 and 1.2
    steps = torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64)
    case.old_logps = logps + steps[torch.randint(4, shape, generator=gen)]
    case.sampler_logps = case.old_logps + steps[torch.randint(4, shape, generator=gen)]
    case.ref_logps = logps + steps[torch.randint(4, shape, generator=gen)]
    return case


def without_ref(case: Case) -> Case:
    return case.but(ref_hidden=None, ref_weight=None, ref_logits=None, ref_logps=None)


def packed(case: Case) -> Case:
    """The same padded tokens as one row, every response `length` long."""
    batch, length = case.tokens.shape

    def flat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:2] == (batch, length):
            return value.reshape(batch * length, *value.shape[2:])
        return value

    fields = {name: flat(getattr(case, name)) for name in PER_TOKEN}
    return case.but(**fields, cu_seqlens=torch.arange(0, batch * length + 1, length))


def rows(case: Case, keep: slice) -> Case:
    names = (*PER_TOKEN, "group_ids")
    return case.but(**{name: None if getattr(case, name) is None else getattr(case, name)[keep] for name in names})


def representable(case: Case, dtype: torch.dtype = torch.float32) -> Case:
    """The case on values that `dtype` (the model's tensors) and float32 (the statistics) hold exactly."""

    def rounded(value: Tensor | None, to: torch.dtype) -> Tensor | None:
        return None if value is None else value.to(to).double()

    model = ("hidden", "weight", "bias", "logits", "ref_hidden", "ref_weight", "ref_bias", "ref_logits")
    statistics = ("old_logps", "sampler_logps", "ref_logps")
    changes: dict[str, Any] = {name: rounded(getattr(case, name), dtype) for name in model}
    changes |= {name: rounded(getattr(case, name), torch.float32) for name in statistics}
    if isinstance(case.advantages, tuple):
        prefix, suffix, lengths = case.advantages
        changes["advantages"] = Pair(prefix.float().double(), suffix.float().double(), lengths)
    else:
        changes["advantages"] = case.advantages.float().double()
    return case.but(**changes)


# How far rounding may move a result

# the relative error of one rounding, half a unit in the last place, and float16's absolute one near 0
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NEAR_ZERO = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
SINGLE = ROUNDING[torch.float32]


class Model(NamedTuple):
    """One model's float64 log-probs [N, V], and how far float32 may move a score and a log-prob there, absolutely."""

    raw: Tensor
    logp: Tensor
    error: Tensor


def finite(values: Tensor) -> Tensor:
    return values.masked_fill(values == -INF, 0.0)


def model_of(case: Case, hidden: Any, weight: Any, bias: Any, logits: Any) -> Model:
    """A logit from a head is a float32 sum of D products and a bias: D + 2 roundings of the sum of their sizes.
    The scale, the temperature, the argument of the exponential and its two units: 6 of the score's size and 2 more; a
    soft cap's tanh is right to 14 units of itself. A log-prob has the error of its own score and
    the mean error of the others', and that of a sum over V. 8: the logarithm, and sums of a few.
    """
    option = oracle.DEFAULTS | case.options
    if logits is not None:
        raw = logits.detach().double().reshape(-1, logits.shape[-1])
        error = torch.zeros_like(raw)
    else:
        hidden, weight = hidden.detach().double().reshape(-1, hidden.shape[-1]), weight.detach().double()
        bias = torch.zeros(len(weight)).double() if bias is None else bias.detach().double()
        raw = hidden @ weight.t() + bias
        error = (hidden.shape[1] + 2) * SINGLE * (hidden.abs() @ weight.abs().t() + finite(bias).abs())
    z, cap = finite(raw) * option["logit_scale"], option["softcap"]
    error = error * option["logit_scale"] / option["temperature"]
    if cap is not None:
        z = cap * torch.tanh(z / cap)
        error = error + 14 * SINGLE * z.abs() / option["temperature"]
    logp = oracle.log_probs(raw, **{key: option[key] for key in ("temperature", "softcap", "logit_scale")})
    error = error + SINGLE * (6 * z.abs() / option["temperature"] + 2)
    error = error + (logp.exp() * error).sum(-1, keepdim=True) + (raw.shape[-1] + 8) * SINGLE
    return Model(raw, logp, error)


class Allowed(NamedTuple):
    """Absolute errors, by token [N], of log-probs, entropies, KLs and ratios; of the loss; and of the gradients."""

    logp: Tensor
    entropy: Tensor
    kl: Tensor
    ratio: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def policy_terms(case: Case, want: Result, adv: list[float]) -> tuple[Tensor, Tensor]:
    """Sizes of each token's policy term and of its slope in the log-prob, from the oracle's own formula."""
    option = oracle.DEFAULTS | case.options
    values, slopes = torch.zeros_like(want.logps), torch.zeros_like(want.logps)
    for n in want.learning.nonzero().flatten().tolist():
        logp = want.logps[n].detach().requires_grad_()
        value = oracle.objective_term(option, adv[n], want.ratio[n].detach() * (logp - logp.detach()).exp(), logp)
        (slopes[n],) = torch.autograd.grad(value, logp)
        values[n] = value.detach()
    return values.abs(), slopes.abs()


def token_weights(case: Case, want: Result, outer: Tensor | float) -> Tensor:
    """|d(outer * loss) / d(a token's loss)|, from the oracle's own reduction."""
    response, batch = oracle.responses_of(case)
    terms = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in response]
    loss = oracle.reduce(oracle.DEFAULTS | case.options, terms, want.scored.tolist(), response, batch, case)
    if not loss.requires_grad:
        return torch.zeros(len(terms)).double()
    grads = torch.autograd.grad((loss * outer).sum(), terms, allow_unused=True, materialize_grads=True)
    return torch.stack(grads).abs() * want.learning


def entropy_errors(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """H = - sum p log p, its error, and that of dH/dz_j = -p_j (log p_j + H)."""
    p, size, error = model.logp.exp(), finite(model.logp).abs(), model.error
    entropy = (p * size).sum(-1)
    error_entropy = (p * (error * (1 + size) + (p.shape[-1] + 8) * SINGLE * size)).sum(-1)
    rows = p * (error * (1 + size + entropy[:, None]) + error_entropy[:, None] + 4 * SINGLE * size)
    return entropy, error_entropy, rows


def gradient_errors(case: Case, dz: Tensor, error_dz: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """From |dL/dz| [N, V] and its error: those of the gradients that the inputs get, in `dtype`."""
    unit, tiny = ROUNDING[dtype], NEAR_ZERO[dtype]
    error_dz = error_dz + (8 * SINGLE + unit) * dz
    if case.logits is not None:
        # made in `dtype`, then scaled by the incoming factor: one rounding more
        return {"logits": (error_dz + unit * dz + tiny * (dz != 0)).reshape(case.logits.shape)}
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double().abs()
    hidden = hidden.reshape(-1, hidden.shape[-1]).abs()

    def summed(terms: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        size = product(dz)
        return product(error_dz) + (terms * SINGLE + unit) * size + tiny * (size != 0)

    errors = {
        "hidden": summed(dz.shape[1] + 2, lambda x: x @ weight),
        "weight": summed(dz.shape[0] + 2, lambda x: x.t() @ hidden),
        "bias": summed(dz.shape[0] + 2, lambda x: x.sum(0)),
    }
    return {name: errors[name].reshape(getattr(case, name).shape) for name in leaf_names(case)}


def allowed(  # noqa: PLR0915  (one bound after another)
    case: Case, want: Result, outer: Tensor | float = 1.0, dtype: torch.dtype = torch.float32
) -> Allowed:
    """First-order bounds, from the sizes of what is summed (not of the sums, which may cancel).

    A product's relative error is the sum of its factors'; exp turns an absolute error into a relative one. Sums over N
    tokens, V logits or D products add as many roundings. What is returned in `dtype`, or enters a product in it, is
    rounded to it once. What is of second order is far below what these worst cases leave unused.
    """
    option = oracle.DEFAULTS | case.options
    count = case.tokens.numel()
    model = model_of(case, case.hidden, case.weight, case.bias, case.logits)
    vocabulary = model.raw.shape[-1]
    p, size, error = model.logp.exp(), finite(model.logp).abs(), model.error
    ids = case.tokens.reshape(-1, 1).long().clamp(0, vocabulary - 1)
    target = torch.zeros_like(p).scatter_(1, ids, 1.0)
    logp, ratio = finite(want.logps.detach()), want.ratio.detach()
    scored = want.scored

    def given(values: Tensor | None) -> Tensor:
        return logp if values is None else values.reshape(-1).double()

    error_logp = (error * target).sum(-1) + 2 * SINGLE * logp.abs()
    old = given(case.old_logps)
    error_ratio = error_logp + SINGLE * (logp.abs() + old.abs() + 4)
    if option["ratio_level"] == "sequence" and scored.any():
        # the mean over a response's tokens
        error_ratio = (error_ratio[scored].max() + count * SINGLE * (logp - old)[scored].abs().max()).expand(count)

    entropy, error_entropy, rows_entropy = entropy_errors(model)

    # KL and its slope in the log-prob; for "full", K = sum p (log p - log q), dK/dz_j = p_j (log p_j - log q_j - K)
    zero = torch.zeros(count).double()
    kl, kl_slope, error_kl, error_kl_slope, rows_kl = zero, zero, zero, zero, torch.zeros_like(p)
    if option["kl"] == "full":
        ref = model_of(case, case.ref_hidden, case.ref_weight, case.ref_bias, case.ref_logits)
        both, moved = size + finite(ref.logp).abs(), error + ref.error
        kl = finite(want.kl.detach()).abs()
        error_kl = (p * (moved * (1 + both) + (vocabulary + 8) * SINGLE * both)).sum(-1)
        rows_kl = p * (moved * (1 + both + kl[:, None]) + error_kl[:, None] + 4 * SINGLE * both)
    elif option["kl"] is not None:
        d = given(case.ref_logps) - logp
        error_d = error_logp + SINGLE * (given(case.ref_logps).abs() + logp.abs())
        kl = want.kl.detach().abs()
        kl_slope = {"k1": torch.ones_like(d), "k2": d.abs(), "k3": d.exp() + 1}[option["kl"]]
        error_kl = kl_slope * error_d + 4 * SINGLE * (d.abs() + (d.exp() if option["kl"] == "k3" else 0.0))
        error_kl_slope = {"k1": 0.0, "k2": 1.0, "k3": d.exp()}[option["kl"]] * error_d + 2 * SINGLE * kl_slope

    # the policy's term, weighted by the sampler's q
    adv = oracle.advantages_of(case, scored.tolist(), oracle.responses_of(case)[0])[0]
    value, slope = policy_terms(case, want, adv)
    relative = error_ratio + 4 * SINGLE
    if option["objective"] == "sapo":
        relative = relative * (1 + 2 * max(option["sapo_tau"]) * ratio)
    if option["sampler_correction"] is not None:
        q = old - given(case.sampler_logps)
        factor = q.exp().clamp(max=option["sampler_bounds"][1])
        value, slope = value * factor, slope * factor
        relative = relative + (error_logp if case.old_logps is None else 0.0) + SINGLE * (old.abs() + q.abs() + 4)
    error_value, error_slope = slope * error_logp + value * relative, slope * relative
    # the penalties: the KL's has a slope through its factor, the ratio, too
    coef, bonus = abs(option["kl_coef"]), abs(option["entropy_coef"])
    factor = torch.full_like(logp, coef)
    error_factor = zero
    if option["kl_importance"]:
        factor, error_factor = coef * ratio, error_ratio
        error_kl_slope = error_kl_slope + error_kl + kl * error_ratio
        kl_slope = kl_slope + kl
    error_value = error_value + factor * (error_kl + kl * (error_factor + 4 * SINGLE))
    error_value = error_value + bonus * (error_entropy + 4 * SINGLE * entropy)
    error_slope = error_slope + factor * (error_kl_slope + kl_slope * (error_factor + 4 * SINGLE))
    slope = slope + factor * kl_slope

    weights, plain = token_weights(case, want, outer), token_weights(case, want, 1.0)
    terms = value + factor * kl + bonus * entropy
    error_loss = plain * (error_value + (count + 4) * SINGLE * terms)
    error_loss = error_loss.reshape(case.tokens.shape) if option["reduction"] == "none" else error_loss.sum()

    # dL/dz_j = slope (p_j - 1 at the target) + ..., then through the transform, whose tanh^2 is right to 8 units of 1
    per_row = error_slope[:, None] * (p - target).abs() + slope[:, None] * p * (error + 8 * SINGLE)
    per_row = per_row + factor[:, None] * rows_kl + bonus * rows_entropy
    if option["softcap"] is not None:
        full = factor[:, None] * p * (size + kl[:, None]) * (option["kl"] == "full")
        full = full + slope[:, None] * (p - target).abs() + bonus * p * (size + entropy[:, None])
        per_row = per_row + 8 * SINGLE * full
    dz = logit_gradient(case, model.raw, outer).abs()
    per_row = weights[:, None] * per_row * option["logit_scale"] / option["temperature"]
    grads = gradient_errors(case, dz, per_row, dtype)
    return Allowed(error_logp, error_entropy, error_kl, error_ratio * ratio, error_loss, grads)


def logit_gradient(case: Case, raw: Tensor, outer: Tensor | float) -> Tensor:
    """d(outer * loss) / d(raw logits), wherever they come from, [N, V]."""
    leaf = raw.detach().requires_grad_()
    changes: dict[str, Any] = dict.fromkeys(("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"))
    changes["logits"] = leaf.reshape(*case.tokens.shape, raw.shape[-1])
    if case.ref_hidden is not None and case.options.get("kl") == "full":
        ref = model_of(case, case.ref_hidden, case.ref_weight, case.ref_bias, None).raw
        changes["ref_logits"] = ref.reshape(changes["logits"].shape)
    total = (oracle.solve(case.but(**changes)).loss * outer).sum()
    if not total.requires_grad:
        return torch.zeros_like(raw)
    return torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)[0]


def within(got: Tensor, want: Tensor, tolerance: Tensor | float, what: str) -> None:
    """|got - want| <= tolerance, entry by entry; a tolerance of 0 means exactly."""
    want = want.detach().double().reshape(got.shape)
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand(want.shape)
    assert got.isfinite().all(), f"{what}: {got}"
    excess = (got.double() - want).abs() - tolerance
    assert not (excess > 0).any(), (
        f"{what}: {float(got.double().flatten()[excess.argmax()])!r}, expected "
        f"{float(want.flatten()[excess.argmax()])!r} +- {float(tolerance.flatten()[excess.argmax()]):.3g}"
    )
