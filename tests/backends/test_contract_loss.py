"""prefix_loss, linear_prefix_loss and linear_logps against the dense float64 oracle, and the promises around them."""

import math
from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from cases import (
    CORRECTIONS,
    KLS,
    METRICS,
    NAN,
    OBJECTIVES,
    RATIO_LEVELS,
    REDUCTIONS,
    STATS,
    Counter,
    call,
    call_with_grads,
    close,
    leaf_names,
    of_objective,
    packed,
    poisoned,
    random_case,
    rows,
    small_case,
    solve_with_grads,
    without_ref,
)
from oracle import INF, Case, Pair, Result
from torch import Tensor

import prefixloss
from prefixloss import LossConfig, TokenAdvantages, linear_logps, linear_prefix_loss, prefix_loss

BACKENDS = ("reference", "torch")
# float64: both sides sum fewer than 100 terms of size ~1, so rounding stays below 100 * 2**-53 ~ 1e-14 times the
# condition of the formulas (exp of up to e**3, 1 / temperature); 1e-9 leaves room for that and for nothing else.
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
# The same, when the package hands a float64 computation back in float32: half a unit in the last place is 6e-8.
ROUNDED = {"rtol": 1e-6, "atol": 1e-7}

backends = pytest.mark.parametrize("backend", BACKENDS)
levels = pytest.mark.parametrize("level", ["linear", "logits"])


# Against the oracle


def check_against_oracle(case: Case, backend: str, note: str, outer: Tensor | float) -> None:
    want, want_grads = solve_with_grads(case, outer)
    out, grads = call_with_grads(poisoned(case), backend, outer)
    options = {**oracle.DEFAULTS, **case.options}

    assert out.loss.dtype == torch.float64, note
    close(out.loss, want.loss, f"{note} loss", **TIGHT)
    for name, grad in grads.items():
        close(grad, want_grads[name], f"{note} gradient of {name}", **TIGHT)

    learning = want.learning.reshape(case.tokens.shape)
    scored = want.scored.reshape(case.tokens.shape)
    assert torch.equal(out.learning, learning), f"{note} learning"
    seen = learning if options["stats"] == "learning" else scored
    for name in ("logps", "entropy", "kl"):
        expected = getattr(want, name)
        got = getattr(out, name)
        if expected is None:
            assert got is None or not got.any(), f"{note} {name} without a kl"
            continue
        expected = expected.reshape(case.tokens.shape)
        assert got.shape == case.tokens.shape, f"{note} {name}"
        assert not got.requires_grad, f"{note} {name}"
        close(got[seen], expected[seen], f"{note} {name}", **(TIGHT if got.dtype == torch.float64 else ROUNDED))
        if options["ratio_level"] == "token":
            assert not got[~seen].any(), f"{note} {name} is 0 where not computed"
        else:  # the sequence's ratio needs the log-probs of all its scored tokens, learning or not
            assert not got[~scored].any(), f"{note} {name} is 0 where not scored"

    for name, expected in want.metrics.items():
        if name == "loss" and options["reduction"] == "none":
            continue
        got = out.metrics[name]
        assert got.dim() == 0, f"{note} metric {name}"
        close(got, torch.tensor(expected), f"{note} metric {name}", **ROUNDED)


@backends
@pytest.mark.parametrize("block", range(32))
def test_random_configurations_agree_with_the_dense_oracle(backend: str, block: int) -> None:
    # 32 blocks of 25 seeds: 800 configurations a back-end, each with its masked positions poisoned
    for seed in range(25 * block, 25 * block + 25):
        case = random_case(seed)
        gen = torch.Generator().manual_seed(seed)
        reduction = case.options["reduction"]
        outer = torch.randn(case.tokens.shape, generator=gen, dtype=torch.float64) if reduction == "none" else 3.25
        check_against_oracle(case, backend, f"seed {seed}, {case.options},", outer)


def test_the_random_cases_reach_every_option_and_layout() -> None:
    """Guards the test above: a generator that stopped producing something would let it pass for nothing."""
    cases = [random_case(seed) for seed in range(800)]
    for key, values in {
        "objective": OBJECTIVES,
        "reduction": REDUCTIONS,
        "kl": KLS,
        "ratio_level": RATIO_LEVELS,
        "sampler_correction": CORRECTIONS,
        "stats": STATS,
    }.items():
        for value in values:
            assert sum(case.options.get(key) == value for case in cases) > 20, (key, value)
    results = [oracle.solve(case) for case in cases]
    assert sum(bool(r.learning.any()) for r in results) > 500
    assert sum(bool((r.scored & ~r.learning).any()) for r in results) > 100
    clips = [(c.options["objective"], r.metrics) for r, c in zip(results, cases, strict=True)]
    assert sum(name == "clip" and m["clip_low"] > 0 for name, m in clips) > 20
    for objective in ("clip", "cispo", "topr"):
        assert sum(name == objective and m["clip_high"] > 0 for name, m in clips) > 10, objective
    assert sum(c.cu_seqlens is not None and bool((c.cu_seqlens.diff() == 0).any()) for c in cases) > 50
    assert sum(c.bias is not None and bool(c.bias.isinf().any()) for c in cases) > 20
    assert sum(c.logits is not None and bool(c.logits.isinf().any()) for c in cases) > 20


# One case by hand, built up in the tests below


GRADCHECK_OPTIONS: tuple[dict[str, Any], ...] = (
    # those whose value is differentiable as written: nothing behind a stopped gradient
    {"objective": "clip", "dual_clip": 3.0, "ratio_cap": 3.0},
    {"objective": "sapo", "sampler_correction": "icepop", "kl": "k1", "kl_coef": 0.2, "kl_importance": True},
    {
        "objective": "reinforce",
        "kl": "k3",
        "kl_coef": 0.3,
        "temperature": 0.7,
        "softcap": 3.0,
        "logit_scale": 1.5,
    },
    {"objective": "clip", "kl": "full", "kl_coef": 0.5, "entropy_coef": 0.1, "softcap": 4.0},
    {"objective": "sapo", "kl": "full", "kl_coef": 0.5, "kl_importance": True, "reduction": "none"},
    {
        "objective": "clip",
        "kl": "k2",
        "kl_coef": 0.5,
        "entropy_coef": -0.1,
        "reduction": "seq-mean-token-mean",
    },
)


@backends
@levels
@pytest.mark.parametrize("options", GRADCHECK_OPTIONS)
def test_gradcheck_in_float64(backend: str, level: str, options: dict[str, Any]) -> None:
    case = small_case(level, **options)
    names = leaf_names(case)

    def loss(*leaves: Tensor) -> Tensor:
        changed = case.but(**dict(zip(names, leaves, strict=True)))
        shared = {
            "mask": case.mask,
            "old_logps": case.old_logps,
            "sampler_logps": case.sampler_logps,
            "config": LossConfig(**options),
            "backend": backend,
        }
        if options.get("kl") in ("k1", "k2", "k3"):
            shared["ref_logps"] = case.ref_logps
        if level == "logits":
            return prefix_loss(changed.logits, case.tokens, case.advantages, ref_logits=case.ref_logits, **shared).loss
        return linear_prefix_loss(
            changed.hidden,
            changed.weight,
            case.tokens,
            case.advantages,
            lm_head_bias=changed.bias,
            ref_hidden=case.ref_hidden,
            ref_lm_head_weight=case.ref_weight,
            **shared,
        ).loss

    leaves = [getattr(case, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=False)


# Precision


LOW_PRECISION_OPTIONS: tuple[dict[str, Any], ...] = (
    {"objective": "clip"},
    {"objective": "reinforce", "entropy_coef": 0.1, "temperature": 0.8},
    {"objective": "sapo", "kl": "full", "kl_coef": 0.5, "softcap": 20.0},
    {"objective": "cispo", "clip_high": 5.0, "kl": "k3", "kl_coef": 0.5, "reduction": "seq-mean-token-mean"},
)
UNIT = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}  # half a unit in the last place of 1


@backends
@levels
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("options", LOW_PRECISION_OPTIONS)
def test_low_precision_inputs_cost_only_their_own_rounding(
    backend: str, level: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # Sizes: D = 64 and V = 257 make sums long enough for a 16-bit accumulator to show (8 bits are gone after 256 equal
    # terms), and V is odd so that nothing is aligned. 16-bit inputs are exact in float64: the oracle sees the same.
    width, vocab = 64, 257
    case = small_case(
        level,
        batch=6,
        width=width,
        vocab=vocab,
        seed=1,
        scale=1.0 if level == "logits" else width**-0.5,
        **options,
    )
    for name in (*leaf_names(case), "ref_hidden", "ref_weight", "ref_logits"):
        if getattr(case, name) is not None:
            setattr(case, name, getattr(case, name).to(dtype).double())
    plain = {key: options[key] for key in ("temperature", "softcap") if key in options}
    logps = oracle.solve(case.but(options=plain)).logps.reshape(case.tokens.shape)
    steps = torch.tensor([-0.5, -0.1, 0.1, 0.5]).double()
    chosen = steps[torch.randint(4, logps.shape, generator=torch.Generator().manual_seed(2))]
    case.old_logps = (logps + chosen).float().double()
    case.ref_logps = (logps - chosen).float().double()
    case.advantages = case.advantages.float().double()
    case = case if options.get("kl") == "full" else case.but(ref_hidden=None, ref_weight=None, ref_logits=None)

    out, grads = call_with_grads(case, backend, 1024.0, dtype=dtype)  # a loss scale, as float16 training has
    want, want_grads = solve_with_grads(case, 1024.0)
    assert out.loss.dtype == out.logps.dtype == out.entropy.dtype == torch.float32

    single = UNIT[torch.float32]
    raw = case.logits
    if raw is None:
        raw = case.hidden @ case.weight.t() + case.bias
        products = (case.hidden.abs() @ case.weight.abs().t() + case.bias.abs()).max()
    else:
        products = raw.abs().max()
    # A logit is a float32 sum of D products (or given); its transform and the sum of V exponentials add V roundings.
    error_z = float((width + 8) * single * products) / options.get("temperature", 1.0)
    error_logp = 2 * error_z + (vocab + 16) * single
    keep = want.learning
    shown = {"rtol": 0.0, "atol": error_logp}
    close(out.logps.reshape(-1)[keep], want.logps[keep], "logps", **shown)
    # H = - sum p log p with |log p| up to ~16 on both factors
    close(out.entropy.reshape(-1)[keep], want.entropy[keep], "entropy", rtol=0.0, atol=16 * error_logp)
    # every token's loss has slope below e**0.5 (|A| + kl_coef * few + entropy_coef * few) in its log-prob
    slope = float(case.advantages.abs().max()) + 4
    close(out.loss, want.loss, "loss", rtol=16 * single, atol=4 * slope * error_logp)

    _, (dz,) = _logit_gradient(case, raw, 1024.0)
    p = oracle.log_probs(raw, **plain).exp()
    p = p.scatter_add(-1, case.tokens[..., None], torch.ones_like(p[..., :1]))
    # float32 arithmetic moves dL/dz_j by a few logp errors, relative to the row's size and to p_j or the target's 1;
    # 4 * unit: dL/dz rounded once to the input's type for the product, that product's terms, and the result's rounding.
    error_dz = 8 * error_logp * dz.abs().sum(-1, keepdim=True) * p + 4 * UNIT[dtype] * dz.abs()
    flat_error = error_dz.reshape(-1, vocab)
    if level == "logits":
        bound = {"logits": error_dz}
    else:
        hidden = case.hidden.reshape(-1, width).abs()
        bound = {
            "hidden": (flat_error @ case.weight.abs()).reshape(case.hidden.shape),
            "weight": flat_error.t() @ hidden,
            "bias": flat_error.sum(0),
        }
    for name, grad in grads.items():
        assert grad.dtype == dtype
        tolerance = (
            bound[name] + 2 * UNIT[dtype] * want_grads[name].abs() + (2.0**-25 if dtype == torch.float16 else 1e-30)
        )
        excess = (grad.double() - want_grads[name]).abs() / tolerance
        assert excess.max() <= 1, f"{name}: {float(excess.max()):.2f} times the tolerance"


def _logit_gradient(case: Case, raw: Tensor, outer: float) -> tuple[Result, tuple[Tensor, ...]]:
    """dL/dz of the raw logits, whatever they came from."""
    leaf = raw.detach().double().requires_grad_()
    ref = case.ref_logits
    if case.ref_hidden is not None:
        ref = case.ref_hidden @ case.ref_weight.t()
    want = oracle.solve(
        case.but(logits=leaf, hidden=None, weight=None, bias=None, ref_hidden=None, ref_weight=None, ref_logits=ref)
    )
    return want, torch.autograd.grad((want.loss * outer).sum(), (leaf,))


@backends
@pytest.mark.parametrize("gap", [12.0, 40.0, 80.0])
def test_log_probs_near_zero_keep_relative_accuracy_in_float32(backend: str, gap: float) -> None:
    # logp = -log1p(7 exp(-gap)); as z - logsumexp it would be exactly 0 from gap 17 on. exp's argument is rounded to
    # float32, which moves the result by gap * 2**-24 = 5e-6 at most.
    vocab = 8
    want = -math.log1p((vocab - 1) * math.exp(-gap))
    logits = torch.zeros(1, 1, vocab)
    logits[..., 3] = gap
    tokens, ones = torch.tensor([[3]]), torch.ones(1, 1)
    weight = torch.zeros(vocab, 2)
    weight[3, 0] = gap
    hidden = torch.tensor([[[1.0, 5.0]]])
    got = {
        "prefix_loss": prefix_loss(logits, tokens, ones, backend=backend).logps,
        "linear_prefix_loss": linear_prefix_loss(hidden, weight, tokens, ones, backend=backend).logps,
        "linear_logps": linear_logps(hidden, weight, tokens, backend=backend).logps,
    }
    for name, logps in got.items():
        assert logps.item() == pytest.approx(want, rel=2e-5), name


@backends
def test_gradient_of_a_log_prob_near_zero_keeps_relative_accuracy_in_float32(backend: str) -> None:
    # d logp / dz_target = 1 - p = 7 exp(-20) = 1.4e-8, below float32's spacing at 1: p - 1 would be exactly 0
    logits = torch.zeros(1, 1, 8)
    logits[..., 3] = 20.0
    logits.requires_grad_()
    prefix_loss(logits, torch.tensor([[3]]), torch.ones(1, 1), backend=backend).loss.backward()
    small = math.exp(-20) / (1 + 7 * math.exp(-20))
    want = torch.full((8,), small)
    want[3] = -7 * small
    torch.testing.assert_close(logits.grad[0, 0], want, rtol=2e-5, atol=0.0)


@backends
@levels
def test_tiny_float16_gradients_survive_with_a_loss_scale(backend: str, level: str) -> None:
    # 1e-6 * p is below half of float16's smallest number (6e-8): only a backward that meets the scale of 65536 before
    # it rounds to float16 keeps it. Tolerance: 4 roundings to 11 bits, of every term of the sums.
    vocab = 16
    case = small_case(level, vocab=vocab, seed=3).but(old_logps=None, normalizer=1e6)
    case = without_ref(case).but(sampler_logps=None)
    for name in leaf_names(case):
        setattr(case, name, getattr(case, name).half().double())
    _, grads = call_with_grads(case, backend, 65536.0, dtype=torch.float16)
    _, want = solve_with_grads(case, 65536.0)
    for name, grad in grads.items():
        bound = want[name].abs().max()
        close(grad, want[name], name, rtol=4 * 2.0**-11, atol=float(4 * 2.0**-11 * bound))
        assert bound > 1e-4


@backends
def test_float16_logits_may_exceed_float16(backend: str) -> None:
    # logits 102400 and 102401 + 3/8: beyond float16's 65504, every product exact in float32. logp = -log1p(exp(-1.375))
    hidden = torch.full((1, 1, 4), 256.0, dtype=torch.float16, requires_grad=True)
    weight = torch.full((2, 4), 100.0, dtype=torch.float16)
    bias = torch.tensor([0.0, 1.375], dtype=torch.float16)
    want = -math.log1p(math.exp(-1.375))
    tokens = torch.tensor([[1]])
    out = linear_prefix_loss(hidden, weight, tokens, torch.ones(1), lm_head_bias=bias, backend=backend)
    out.loss.backward()
    # float32's spacing at 102400 is 2**-7, which divides 1.375: only log and exp round
    assert out.logps.item() == pytest.approx(want, rel=1e-5)
    assert hidden.grad.isfinite().all()
    logps = linear_logps(hidden, weight, tokens, lm_head_bias=bias, backend=backend).logps
    assert logps.item() == pytest.approx(want, rel=1e-5)


# Numbers at the edge


@backends
@levels
def test_banned_tokens_have_probability_zero_and_leave_everything_finite(backend: str, level: str) -> None:
    for options in (
        {"entropy_coef": 0.1},
        {"entropy_coef": 0.1, "kl": "full", "kl_coef": 0.5, "softcap": 3.0},
    ):
        case = small_case(level, vocab=7, **options)
        case.tokens = case.tokens.clamp(max=4)
        if level == "linear":
            case.bias[5:] = -INF
            case.ref_bias = torch.zeros(7).double()
            case.ref_bias[5] = -INF  # banned for both, and for the policy only
        else:
            case.logits[..., 5:] = -INF
            case.ref_logits[..., 5] = -INF
        case = case if "kl" in options else without_ref(case)
        check_against_oracle(case, backend, f"{level} {options}", 1.0)


@backends
@levels
def test_all_but_the_target_banned_is_certainty(backend: str, level: str) -> None:
    case = small_case(level, entropy_coef=0.1)
    case = without_ref(case).but(tokens=torch.full((3, 4), 2), old_logps=None, sampler_logps=None)
    if level == "linear":
        case.bias[:] = -INF
        case.bias[2] = 0.5
    else:
        case.logits[..., :2] = case.logits[..., 3:] = -INF
    out, grads = call_with_grads(case, backend)
    assert not out.logps.any()
    assert not out.entropy.any()
    for name, grad in grads.items():
        assert torch.count_nonzero(grad) == 0, name  # NaN counts as non-zero


def _own_token_banned(layout: str, level: str) -> Case:
    """Response 1's token 2 has probability 0 (of responses of 4 tokens, nothing masked)."""
    case = small_case(level, vocab=7).but(mask=None)
    case = without_ref(case).but(tokens=case.tokens.clamp(max=5), sampler_logps=None)
    case.tokens[1, 2] = 6
    if level == "linear":
        case.bias[6] = -INF
    else:
        case.logits[1, 2, 6] = -INF
    case.old_logps = torch.full((3, 4), -1.0).double()
    if layout == "packed":
        case = packed(case)
    return case


@levels
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_reference_names_response_and_position_of_an_impossible_token(level: str, layout: str) -> None:
    with pytest.raises(ValueError, match=r"(?is)(?=.*response\W{0,4}1\b)(?=.*position\W{0,4}2\b)"):
        call(_own_token_banned(layout, level), "reference")


@levels
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_torch_yields_nan_loss_for_an_impossible_token(level: str, layout: str, objective: str) -> None:
    case = _own_token_banned(layout, level)
    case.options = of_objective(objective)
    out, _ = call(case, "torch")
    assert out.loss.isnan()
    assert out.logps.reshape(-1)[6] == -INF


@backends
@pytest.mark.parametrize(
    ("options", "advantage", "log_ratio", "log_q"),
    [
        ({}, 1.0, 200.0, 0.0),
        ({"kl": None}, 1.0, -200.0, 0.0),
        ({}, -1.0, -200.0, 0.0),
        ({"dual_clip": 3.0}, -1.0, 200.0, 0.0),
        ({"ratio_cap": 2.0}, -1.0, 200.0, 0.0),
        ({"ratio_level": "sequence"}, 1.0, 200.0, 0.0),
        ({"objective": "cispo", "clip_high": 5.0}, 1.0, 200.0, 0.0),
        ({"objective": "cispo", "clip_high": 5.0}, -1.0, 200.0, 0.0),
        ({"objective": "sapo"}, 1.0, 200.0, 0.0),
        ({"objective": "sapo"}, -1.0, 200.0, 0.0),
        ({"objective": "topr"}, 1.0, 200.0, 0.0),
        ({"objective": "topr"}, -1.0, 200.0, 0.0),
        ({"objective": "reinforce"}, -1.0, 200.0, 0.0),
        ({"entropy_coef": 0.1}, 0.0, 200.0, 0.0),
        ({"objective": "sapo", "entropy_coef": 0.1}, 0.0, 200.0, 0.0),
        ({"sampler_correction": "tis"}, 1.0, 0.1, 200.0),
        ({"sampler_correction": "icepop"}, 1.0, 0.1, 200.0),
        ({"sampler_correction": "icepop", "sampler_bounds": (0.5, 2.0)}, 1.0, 0.1, -200.0),
    ],
)
def test_ratios_beyond_float32_stay_finite(
    backend: str, options: dict[str, Any], advantage: float, log_ratio: float, log_q: float
) -> None:
    # exp(200) is infinite in float32 (its largest is exp(88.7)) and finite in the oracle's float64
    case = without_ref(small_case("linear", **options))
    logps = oracle.solve(case.but(options={})).logps.reshape(3, 4)
    case.old_logps = logps - log_ratio
    case.sampler_logps = case.old_logps - log_q if "sampler_correction" in options else None
    case.advantages = torch.full((3, 4), advantage).double()
    out, grads = call_with_grads(case, backend, dtype=torch.float32)
    want, want_grads = solve_with_grads(case)
    # old_logps near -200 rounds to 2**-17 = 8e-6 in float32, which is the relative error of an unclipped ratio
    assert out.loss.isfinite()
    close(out.loss, want.loss, "loss", rtol=1e-4, atol=1e-6)
    for name, grad in grads.items():
        close(grad, want_grads[name], name, rtol=1e-4, atol=1e-6)
        if torch.count_nonzero(want_grads[name]) == 0:
            assert torch.count_nonzero(grad) == 0, f"{name}: a clipped token has no gradient at all"


@backends
def test_a_ratio_clipped_at_overflow_has_zero_gradient(backend: str) -> None:
    case = without_ref(small_case("linear")).but(sampler_logps=None, mask=None, advantages=torch.ones(3, 4).double())
    case.old_logps = oracle.solve(case).logps.reshape(3, 4) - 200
    out, grads = call_with_grads(case, backend, dtype=torch.float32)
    assert out.loss.item() == pytest.approx(-1.2, rel=1e-6)
    assert out.learning.all()
    assert all(torch.count_nonzero(grad) == 0 for grad in grads.values())
    assert out.metrics["clip_high"].item() == 1.0


# Nothing to learn


@backends
@levels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("why", ["masked", "no advantage"])
def test_nothing_learning_gives_zero_loss_with_a_graph_and_zero_gradients(
    backend: str, level: str, reduction: str, why: str
) -> None:
    options = {"reduction": reduction, "max_length": 4 if reduction == "constant" else None}
    case = without_ref(small_case(level, **options)).but(sampler_logps=None)
    if why == "masked":
        case.mask = torch.zeros(3, 4, dtype=torch.bool)
        case = poisoned(case)
    else:
        case.advantages = torch.zeros(3).double()
    out, leaves = call(case, backend)
    assert out.loss.requires_grad
    assert torch.count_nonzero(out.loss) == 0
    assert not out.learning.any()
    assert out.metrics["learning_tokens"] == 0
    out.loss.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape, name
        assert torch.count_nonzero(leaf.grad) == 0, name  # NaN counts as non-zero
    for name in METRICS:
        assert out.metrics[name].isfinite(), name


@backends
@pytest.mark.parametrize("layout", ["packed", "packed with empty responses", "padded"])
def test_no_token_at_all(backend: str, layout: str) -> None:
    shape = (2, 0) if layout == "padded" else (0,)
    cu = {
        "packed": torch.tensor([0]),
        "packed with empty responses": torch.tensor([0, 0, 0]),
        "padded": None,
    }[layout]
    case = Case(
        tokens=torch.zeros(shape, dtype=torch.int64),
        advantages=torch.zeros(shape).double(),
        cu_seqlens=cu,
        hidden=torch.zeros(*shape, 5).double(),
        weight=torch.randn(7, 5).double(),
        bias=torch.zeros(7).double(),
    )
    out, grads = call_with_grads(case, backend)
    assert out.loss.item() == 0
    assert out.logps.shape == shape
    assert out.learning.shape == shape
    assert grads["hidden"].shape == (*shape, 5)
    assert torch.count_nonzero(grads["weight"]) == 0
    assert torch.count_nonzero(grads["bias"]) == 0
    logits = case.but(hidden=None, weight=None, bias=None, logits=torch.zeros(*shape, 7).double())
    out, grads = call_with_grads(logits, backend)
    assert out.loss.item() == 0
    assert grads["logits"].shape == (*shape, 7)


@backends
def test_no_token_at_all_in_place_beside_a_reference(backend: str) -> None:
    logits = torch.zeros(2, 0, 7, requires_grad=True)
    given = {"ref_logits": torch.zeros(2, 0, 7), "config": LossConfig(kl="full", kl_coef=0.1)}
    tokens = torch.zeros(2, 0, dtype=torch.int64)
    out = prefix_loss(logits * 1, tokens, torch.zeros(2), inplace=True, backend=backend, **given)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad.shape == (2, 0, 7)


@backends
def test_no_token_at_all_has_kept_sets(backend: str) -> None:
    hidden = torch.zeros(2, 0, 5, requires_grad=True)
    tokens, kept = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 3, dtype=torch.int64)
    out = linear_prefix_loss(hidden, torch.randn(7, 5), tokens, torch.zeros(2), kept_ids=kept, backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0
    assert hidden.grad.shape == (2, 0, 5)


@levels
def test_tokens_that_do_not_learn_never_enter_a_product(level: str) -> None:
    # NaN at scored tokens without an advantage: one product with them, even times 0, would spread it
    case = without_ref(small_case(level)).but(sampler_logps=None)
    case.advantages[1] = 0.0
    clean, want = call_with_grads(case, "torch")
    if level == "linear":
        case.hidden[1] = NAN
    else:
        case.logits[1] = NAN
    out, grads = call_with_grads(case, "torch")
    assert torch.equal(out.loss, clean.loss)
    assert not out.logps[1].any()
    for name, grad in grads.items():
        assert torch.equal(grad, want[name]), name


def counted_case(**options: Any) -> Case:
    # N = 64 tokens, V = 50 and D = 6: N * V = 3200 is far above N * D = 384 and V * D = 300
    case = without_ref(small_case("linear", batch=8, length=8, width=6, vocab=50, **options).but(group_ids=None)).but(
        sampler_logps=None, mask=None, old_logps=None
    )
    case.advantages = torch.zeros(8, 8).double()
    case.advantages[:2] = 1.0  # 16 of 64 tokens learn
    return case


def products_of(case: Case, frozen: Sequence[str] = ()) -> int:
    with Counter() as count:
        out, _ = call(case, "torch", frozen=frozen)
        out.loss.backward()
    return count.products


ROW = (
    6 * 50
)  # multiply-adds of one token's logits; as many for its hidden state's gradient, and its share of the head's


def test_products_are_paid_for_learning_tokens_only() -> None:
    # at most the logits twice (forward and again in the backward) and two gradients
    assert 3 * 16 * ROW <= products_of(counted_case()) <= 4 * 16 * ROW


def test_clipped_tokens_leave_the_products_of_the_backward() -> None:
    case = counted_case()
    case.old_logps = oracle.solve(case).logps.reshape(8, 8).detach()
    case.old_logps[0] -= 1.0  # ratio e, advantage 1: clipped
    assert (16 + 2 * 8) * ROW <= products_of(case) <= (16 + 3 * 8) * ROW


@pytest.mark.parametrize("old", [False, True])
def test_a_frozen_head_costs_no_weight_gradient_product(old: bool) -> None:
    case = counted_case()
    case.old_logps = oracle.solve(case).logps.reshape(8, 8).detach() if old else None
    assert products_of(case, frozen=("weight", "bias")) == products_of(case) - 16 * ROW


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")])
def test_without_grad_only_the_logits_are_computed(frozen: tuple[str, ...]) -> None:
    case = counted_case()
    with torch.no_grad(), Counter() as count:
        call(case, "torch", frozen=frozen)
    assert 0 < count.products <= 16 * ROW


def test_linear_loss_never_holds_all_logits() -> None:
    case = counted_case(chunk_tokens=4, entropy_coef=0.1)
    case.ref_hidden, case.ref_weight = case.hidden.clone(), case.weight.clone()
    case.options |= {"kl": "full", "kl_coef": 0.1}
    with Counter() as count:
        call_with_grads(case, "torch")
    # the rows of a chunk come in tiles of 16 with 64 places each; weight and hidden states hold 300 and 384
    assert count.largest <= 16 * 64 < 64 * 50 / 3


# Invariances


@backends
@levels
@pytest.mark.parametrize(
    "options", [{}, {"kl": "full", "kl_coef": 0.3, "entropy_coef": 0.1, "ratio_level": "sequence"}]
)
def test_chunk_size_does_not_matter(backend: str, level: str, options: dict[str, Any]) -> None:
    case = small_case(level, **options)
    case = case if "kl" in options else without_ref(case)
    want, want_grads = call_with_grads(case, backend)
    for size in (1, 2, 3, 12, 1000):
        out, grads = call_with_grads(case, backend, chunk_tokens=size)
        close(out.loss, want.loss, f"chunk_tokens={size} loss", rtol=1e-13, atol=1e-14)
        for name, grad in grads.items():
            close(grad, want_grads[name], f"chunk_tokens={size} {name}", rtol=1e-12, atol=1e-14)


@backends
@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_the_same_from_run_to_run(backend: str, level: str, dtype: torch.dtype) -> None:
    case = small_case(level, batch=6, length=16, vocab=101, kl="full", kl_coef=0.3, entropy_coef=0.1, chunk_tokens=7)
    first, first_grads = call_with_grads(case, backend, dtype=dtype)
    again, again_grads = call_with_grads(case, backend, dtype=dtype)
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.logps, again.logps)
    assert all(torch.equal(first_grads[name], again_grads[name]) for name in first_grads)


@backends
@levels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_a_normalizer_equal_one_big_batch(
    backend: str, level: str, reduction: str, as_tensor: bool
) -> None:
    # whole groups in each micro-batch (group-token-mean needs them together); one response has no scored token
    case = small_case(
        level,
        batch=6,
        reduction=reduction,
        max_length=9 if reduction == "constant" else None,
        kl="k3",
        kl_coef=0.2,
        entropy_coef=0.05,
    )
    case.group_ids = torch.tensor([5, 5, 2, 8, 8, 8])
    case.mask[4] = False
    denominator = {
        "token-mean": float(case.mask.sum()),
        "group-token-mean": 3.0,
        "seq-mean-token-mean": 6.0,
        "seq-mean-token-sum": 6.0,
        "constant": 54.0,
        "none": 1.0,
    }[reduction]
    normalizer = torch.tensor(denominator) if as_tensor else denominator
    big, big_grads = call_with_grads(case, backend)
    loss, grads = 0.0, {name: [] for name in big_grads}
    for keep in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part, part_grads = call_with_grads(rows(case, keep).but(normalizer=normalizer), backend)
        loss = loss + part.loss.detach().sum()
        for name, grad in part_grads.items():
            grads[name].append(grad)
    close(torch.as_tensor(loss), big.loss.sum(), "loss", rtol=1e-12, atol=1e-14)
    for name, parts in grads.items():
        joined = sum(parts) if name in ("weight", "bias") else torch.cat(parts)
        close(joined, big_grads[name], name, rtol=1e-12, atol=1e-14)


@backends
@pytest.mark.parametrize("reduction", ["group-token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"])
def test_responses_and_groups_without_a_scored_token_count_in_the_denominator(backend: str, reduction: str) -> None:
    # Ratio 1, A = 1, so every scored token's loss is -1. Responses of 2, 0 and 1 tokens; the last one's is masked.
    # groups 0, 0, 1: (-1 + 0) / 2; sequences: (-1 + 0 + 0) / 3; sums: -2 / 3; constant with max_length 4: -2 / 12
    want = {
        "group-token-mean": -0.5,
        "seq-mean-token-mean": -1 / 3,
        "seq-mean-token-sum": -2 / 3,
        "constant": -1 / 6,
    }
    config = LossConfig(reduction=reduction, max_length=4 if reduction == "constant" else None)
    out = prefix_loss(
        torch.zeros(3, 5, dtype=torch.float64),
        torch.tensor([0, 1, 2]),
        torch.ones(3),
        mask=torch.tensor([True, True, False]),
        cu_seqlens=torch.tensor([0, 2, 2, 3]),
        group_ids=torch.tensor([0, 0, 1]),
        config=config,
        backend=backend,
    )
    assert out.loss.item() == pytest.approx(want[reduction], rel=1e-12)


@backends
@levels
def test_packed_and_padded_give_the_same(backend: str, level: str) -> None:
    case = without_ref(small_case(level, ratio_level="sequence", reduction="seq-mean-token-mean"))
    case.advantages = Pair(torch.tensor([1.0, 0.5, -0.2]), torch.tensor([-1.0, 0.0, 0.3]), torch.tensor([2, 0, 3]))
    want, want_grads = call_with_grads(case, backend)
    for dtype in (torch.int32, torch.int64):
        flat = packed(case)
        flat.cu_seqlens = flat.cu_seqlens.to(dtype)
        out, grads = call_with_grads(flat, backend)
        assert out.logps.shape == (12,)
        close(out.loss, want.loss, "loss", rtol=1e-13, atol=0.0)
        for name, grad in grads.items():
            close(grad, want_grads[name], name, rtol=1e-12, atol=1e-14)


@backends
def test_empty_responses_change_no_token_mean(backend: str) -> None:
    case = packed(without_ref(small_case("linear")).but(sampler_logps=None, group_ids=None))
    case.advantages = torch.tensor([1.0, -0.5, 2.0]).double()
    want, want_grads = call_with_grads(case, backend)
    case.cu_seqlens = torch.tensor([0, 0, 4, 4, 8, 12, 12])
    case.advantages = torch.tensor([NAN, 1.0, 9.0, -0.5, 2.0, 7.0]).double()
    case.advantages[0] = 3.0
    out, grads = call_with_grads(case, backend)
    assert torch.equal(out.loss, want.loss)
    assert all(torch.equal(grads[name], want_grads[name]) for name in grads)


@backends
@levels
def test_non_contiguous_inputs(backend: str, level: str) -> None:
    case = small_case(level, kl="full", kl_coef=0.2)
    want, want_grads = call_with_grads(case, backend)

    def strided(value: Tensor | None) -> Tensor | None:
        """The same numbers, every second entry of a larger tensor along the first dimension and reversed strides."""
        if value is None:
            return None
        wide = torch.zeros(*value.shape, 2, dtype=value.dtype)
        wide[..., 0] = value
        view = wide[..., 0]
        return view if view.dim() < 2 else view.transpose(0, 1).contiguous().transpose(0, 1)

    changed = case.but(
        **{
            name: strided(getattr(case, name))
            for name in (
                "tokens",
                "advantages",
                "mask",
                "old_logps",
                "ref_hidden",
                "ref_weight",
                "ref_logits",
                "group_ids",
            )
        }
    )
    assert not changed.tokens.is_contiguous()
    leaves = {name: strided(getattr(case, name)).detach().requires_grad_() for name in leaf_names(case)}
    shared = {
        "mask": changed.mask,
        "old_logps": changed.old_logps,
        "config": LossConfig(**case.options),
        "backend": backend,
    }
    if level == "logits":
        out = prefix_loss(leaves["logits"], changed.tokens, changed.advantages, ref_logits=changed.ref_logits, **shared)
    else:
        out = linear_prefix_loss(
            leaves["hidden"],
            leaves["weight"],
            changed.tokens,
            changed.advantages,
            lm_head_bias=leaves["bias"],
            ref_hidden=changed.ref_hidden,
            ref_lm_head_weight=changed.ref_weight,
            **shared,
        )
    out.loss.backward()
    close(out.loss, want.loss, "loss", rtol=1e-13, atol=0.0)
    for name, leaf in leaves.items():
        close(leaf.grad, want_grads[name], name, rtol=1e-12, atol=1e-14)


@backends
def test_the_shifted_slice_of_a_model_s_logits(backend: str) -> None:
    # what trainers pass: logits[:, :-1] of a larger tensor, whose last position must get gradient 0
    case = without_ref(small_case("logits"))
    full = torch.cat([case.logits, torch.full((3, 1, 7), NAN)], 1).requires_grad_()
    out = prefix_loss(
        full[:, :-1], case.tokens, case.advantages, mask=case.mask, old_logps=case.old_logps, backend=backend
    )
    out.loss.backward()
    _, want = solve_with_grads(case)
    close(full.grad[:, :-1], want["logits"], "logits", **TIGHT)
    assert torch.count_nonzero(full.grad[:, -1]) == 0


@backends
@levels
def test_expanded_advantages_and_integer_masks(backend: str, level: str) -> None:
    case = without_ref(small_case(level))
    case.advantages = torch.tensor([1.0, -1.0, 0.5]).double()
    want, _ = call_with_grads(case, backend)
    for mask in (case.mask.long(), case.mask.to(torch.uint8), case.mask.float()):
        out, _ = call_with_grads(case.but(mask=mask, advantages=case.advantages[:, None].expand(3, 4)), backend)
        assert torch.equal(out.loss, want.loss)


# What gets a gradient


@backends
def test_a_frozen_head_and_frozen_hidden_states(backend: str) -> None:
    case = small_case("linear", kl="full", kl_coef=0.3, entropy_coef=0.1)
    _, want = call_with_grads(case, backend)
    for frozen in (
        ("weight", "bias"),
        ("weight",),
        ("bias",),
        ("hidden",),
        ("hidden", "bias"),
        ("hidden", "weight"),
    ):
        out, leaves = call(case, backend, frozen=frozen)
        out.loss.backward()
        for name, leaf in leaves.items():
            if name in frozen:
                assert leaf.grad is None
            else:
                close(leaf.grad, want[name], f"{name} with {frozen} frozen", rtol=1e-12, atol=1e-14)


@backends
@levels
def test_the_reference_and_the_statistics_get_no_gradient(backend: str, level: str) -> None:
    case = small_case(level, kl="full", kl_coef=0.3)
    for name in ("ref_hidden", "ref_weight", "ref_logits", "old_logps"):
        if getattr(case, name) is not None:
            getattr(case, name).requires_grad_()
    call_with_grads(case, backend)
    for name in ("ref_hidden", "ref_weight", "ref_logits", "old_logps"):
        assert getattr(case, name) is None or getattr(case, name).grad is None, name


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inplace_gives_the_same_gradient(backend: str, dtype: torch.dtype) -> None:
    case = small_case("logits", kl="full", kl_coef=0.3, entropy_coef=0.1)
    want, want_grads = call_with_grads(case, backend, 2.0, dtype=dtype)
    # through a non-leaf, as a model's logits are
    leaf = case.logits.to(dtype).requires_grad_()
    config = LossConfig(**case.options)
    out = prefix_loss(
        leaf * 1.0,
        case.tokens,
        case.advantages.to(want.loss.dtype),
        mask=case.mask,
        inplace=True,
        old_logps=case.old_logps.to(want.loss.dtype),
        ref_logits=case.ref_logits.to(dtype),
        config=config,
        backend=backend,
    )
    (out.loss * 2.0).backward()
    # a different order of the same few operations may round differently, by units in the last place
    unit = torch.finfo(dtype).eps
    close(out.loss, want.loss, "loss", rtol=4 * torch.finfo(want.loss.dtype).eps, atol=0.0)
    close(leaf.grad, want_grads["logits"], "logits", rtol=2 * unit, atol=4 * unit * float(leaf.grad.abs().max()))


@backends
def test_without_inplace_the_logits_stay_as_they_were(backend: str) -> None:
    case = without_ref(small_case("logits"))
    out, leaves = call(case, backend)
    out.loss.backward()
    assert torch.equal(leaves["logits"].detach(), case.logits)


@backends
def test_per_token_losses_take_any_outer_weighting(backend: str) -> None:
    case = small_case("linear", reduction="none", kl="k3", kl_coef=0.3).but(normalizer=8.0)
    outer = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double()
    outer[1, 1] = 0.0
    out, grads = call_with_grads(case, backend, outer)
    want, want_grads = solve_with_grads(case, outer)
    assert out.loss.shape == (3, 4)
    assert not out.loss[~case.mask].any()
    close(out.loss, want.loss, "loss", **TIGHT)
    for name, grad in grads.items():
        close(grad, want_grads[name], name, **TIGHT)
    assert not grads["hidden"][1, 1].any()


@backends
def test_gradients_accumulate_over_two_backward_calls_of_two_losses(backend: str) -> None:
    case = without_ref(small_case("linear"))
    _, once = call_with_grads(case, backend)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in leaf_names(case)}
    for _ in range(2):
        prefixloss.linear_prefix_loss(
            leaves["hidden"],
            leaves["weight"],
            case.tokens,
            case.advantages,
            mask=case.mask,
            old_logps=case.old_logps,
            lm_head_bias=leaves["bias"],
            backend=backend,
        ).loss.backward()
    for name, leaf in leaves.items():
        close(leaf.grad, 2 * once[name], name, rtol=1e-13, atol=0.0)


@backends
def test_no_grad_still_gives_the_numbers(backend: str) -> None:
    case = without_ref(small_case("linear"))
    want, _ = call(case, backend)
    with torch.no_grad():
        out, _ = call(case, backend)
    assert torch.equal(out.loss, want.loss.detach())
    assert not out.loss.requires_grad
    assert torch.equal(out.logps, want.logps)


# Objectives by hand


@backends
def test_vppo_vector_1_has_its_loss(backend: str) -> None:
    # METHOD's vector 1 at ratio 1, one group of 10 + 20 + 8 + 12 tokens: loss = - sum A / 50 = +0.0125
    adv = TokenAdvantages(
        torch.tensor([0.6875, 0.1875, -0.3125, -0.3125]),
        torch.tensor([0.6875, -0.3125, -0.3125, -0.3125]),
        torch.tensor([0, 10, 0, 0]),
    )
    cu = torch.tensor([0, 10, 30, 38, 50])
    out = prefix_loss(
        torch.randn(50, 7),
        torch.zeros(50, dtype=torch.int64),
        adv,
        cu_seqlens=cu,
        group_ids=torch.zeros(4, dtype=torch.int64),
        config=LossConfig(reduction="group-token-mean"),
        backend=backend,
    )
    assert out.loss.item() == pytest.approx(0.0125, rel=1e-5)
    assert out.metrics["prefix_tokens"] == 10
    assert out.metrics["scored_tokens"] == 50


@backends
@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "want", "slope"),
    [
        # slope: d loss / d logp; ratio * advantage where the ratio is not clipped
        ({}, 1.1, 2.0, -2.2, -2.2),
        ({}, 1.5, 2.0, -2.4, 0.0),
        ({}, 1.5, -2.0, 3.0, 3.0),
        ({}, 0.5, -2.0, 1.6, 0.0),
        ({"clip_high": 0.28}, 1.5, 2.0, -2.56, 0.0),
        ({"dual_clip": 3.0}, 4.0, -2.0, 6.0, 0.0),
        ({"dual_clip": 3.0}, 2.0, -2.0, 4.0, 4.0),
        ({"dual_clip": 3.0}, 4.0, 2.0, -2.4, 0.0),
        ({"ratio_cap": 2.0}, 4.0, -2.0, 4.0, 0.0),
        ({"objective": "cispo", "clip_high": 5.0}, 2.0, -2.0, 4.0 * math.log(0.25), 4.0),
        ({"objective": "cispo", "clip_high": 5.0}, 8.0, 2.0, -10.0 * math.log(0.25), -10.0),
        ({"objective": "sapo"}, 1.0, 2.0, -4.0, -2.0),
        ({"objective": "reinforce"}, 3.0, 2.0, -2.0 * math.log(0.25), -2.0),
        ({"objective": "topr"}, 3.0, -2.0, 2.0 * math.log(0.25), 2.0),
        ({"objective": "topr"}, 0.5, -2.0, 1.0 * math.log(0.25), 1.0),
        ({"objective": "topr"}, 0.5, 2.0, -2.0 * math.log(0.25), -2.0),
        ({"sampler_correction": "tis"}, 1.1, 2.0, -4.4, -4.4),  # q = 4, cut to 2
        ({"sampler_correction": "icepop"}, 1.1, 2.0, 0.0, 0.0),
        ({"sampler_correction": "icepop", "sampler_bounds": (0.0, 5.0)}, 1.1, 2.0, -8.8, -8.8),
        # the sampler's weight is on the policy term only; k2 = log(1.1)**2 / 2 for ref = old
        (
            {"sampler_correction": "icepop", "kl": "k2", "kl_coef": 2.0},
            1.1,
            2.0,
            math.log(1.1) ** 2,
            2 * math.log(1.1),
        ),
    ],
)
def test_one_token_by_hand(
    backend: str, options: dict[str, Any], ratio: float, advantage: float, want: float, slope: float
) -> None:
    # uniform over 4 tokens: logp = log(1/4), and d logp / dz_target = 3/4
    logits = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), math.log(0.25) - math.log(ratio), dtype=torch.float64)
    sampler = old - math.log(4.0) if "sampler_correction" in options else None
    out = prefix_loss(
        logits,
        torch.tensor([[2]]),
        torch.tensor([advantage]).double(),
        old_logps=old,
        sampler_logps=sampler,
        ref_logps=old if "kl" in options else None,
        config=LossConfig(**options),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert logits.grad[0, 0, 2].item() == pytest.approx(0.75 * slope, rel=1e-9, abs=1e-12)


@backends
def test_gspo_token_form_has_the_sequence_s_value_and_the_token_s_gradient(backend: str) -> None:
    # log-ratios 0.3 and -0.1 (the third token is masked): s = exp(0.1), inside the clip range, though exp(0.3) is not
    logits = torch.zeros(1, 3, 4, dtype=torch.float64, requires_grad=True)
    old = math.log(0.25) - torch.tensor([[0.3, -0.1, 9.0]], dtype=torch.float64)
    out = prefix_loss(
        logits,
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[1.0, 3.0, 5.0]]).double(),
        old_logps=old,
        mask=torch.tensor([[True, True, False]]),
        config=LossConfig(ratio_level="sequence"),
        backend=backend,
    )
    out.loss.backward()
    s = math.exp(0.1)
    assert out.loss.item() == pytest.approx(-s * (1 + 3) / 2, rel=1e-9)
    assert logits.grad[0, 0, 0].item() == pytest.approx(-s * 0.75 / 2, rel=1e-9)
    assert logits.grad[0, 1, 1].item() == pytest.approx(-3 * s * 0.75 / 2, rel=1e-9)
    assert out.metrics["ratio_mean"].item() == pytest.approx(s, rel=1e-6)


@backends
def test_the_sequence_ratio_counts_scored_tokens_that_do_not_learn(backend: str) -> None:
    case = without_ref(small_case("linear", ratio_level="sequence")).but(sampler_logps=None)
    case.advantages = torch.zeros(3, 4).double()
    case.advantages[1, 2] = 1.0
    check_against_oracle(case, backend, "one learning token", 1.0)
    out, _ = call(case, backend)
    assert int(out.learning.sum()) == 1


# Output and options


@backends
def test_stats_scored_computes_every_scored_token_and_learns_the_same(backend: str) -> None:
    case = small_case("linear", kl="k3").but(ref_hidden=None, ref_weight=None)
    case.advantages[1] = 0.0
    few, few_grads = call_with_grads(case, backend)
    every, every_grads = call_with_grads(case, backend, stats="scored")
    want = oracle.solve(case)
    assert torch.equal(few.learning, every.learning)
    assert not every.learning[1].any()
    assert not few.logps[1].any()
    assert not few.entropy[1].any()
    assert not few.kl[1].any()
    scored = case.mask
    close(every.logps[scored], want.logps.reshape(3, 4)[scored], "logps", **ROUNDED)
    close(every.entropy[scored], want.entropy.reshape(3, 4)[scored], "entropy", **ROUNDED)
    close(every.kl[scored], want.kl.reshape(3, 4)[scored], "kl", **ROUNDED)
    assert not every.logps[~scored].any()
    close(every.loss, few.loss, "loss", rtol=1e-13, atol=0.0)
    for name in few_grads:
        close(every_grads[name], few_grads[name], name, rtol=1e-12, atol=1e-15)


@backends
def test_learning_tokens_are_scored_and_have_something_to_learn(backend: str) -> None:
    case = without_ref(small_case("linear")).but(sampler_logps=None)
    case.advantages = torch.tensor([1.0, 0.0, -1.0]).double()
    expected = case.mask & torch.tensor([[True], [False], [True]])
    assert torch.equal(call(case, backend)[0].learning, expected)
    for options in ({"entropy_coef": 0.1}, {"kl": "k1", "kl_coef": 0.1}):
        more = case.but(options=options, ref_logps=case.old_logps if "kl" in options else None)
        assert torch.equal(call(more, backend)[0].learning, case.mask)


@backends
def test_metrics_have_the_promised_keys_as_scalar_tensors(backend: str) -> None:
    out, _ = call(without_ref(small_case("linear")), backend)
    for name in METRICS:
        assert isinstance(out.metrics[name], Tensor), name
        assert out.metrics[name].dim() == 0, name
        assert not out.metrics[name].requires_grad, name


@backends
def test_metrics_by_hand(backend: str) -> None:
    # ratios 2, 0.5, 1.1 | 0.5, 1, 3; A = 1 in the prefix (2 and 1 tokens), -1 after it; the last token is masked.
    # clip_high: A > 0 and ratio > 1.2: the first of 5; clip_low: A < 0 and ratio < 0.8: none of 1.1 and 1
    ratios = torch.tensor([[2.0, 0.5, 1.1], [0.5, 1.0, 3.0]]).double()
    adv = TokenAdvantages(torch.ones(2).double(), -torch.ones(2).double(), torch.tensor([2, 1]))
    logits = torch.zeros(2, 3, 4).double()
    logits[:, 2:] = torch.tensor([0.0, 0.0, -INF, -INF])  # 2 choices at the last position, else 4
    logits[1, 1] = torch.tensor([0.0, -INF, -INF, -INF])
    logps = torch.tensor([[0.25, 0.25, 0.5], [0.25, 1.0, 0.5]]).log().double()
    out = prefix_loss(
        logits,
        torch.zeros(2, 3, dtype=torch.int64),
        adv,
        old_logps=logps - ratios.log(),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        backend=backend,
    )
    log2 = math.log(2)
    want = {
        "scored_tokens": 5,
        "learning_tokens": 5,
        "prefix_tokens": 3,
        "ratio_mean": 5.1 / 5,
        "ratio_max": 2.0,
        "clip_high": 1 / 5,
        "clip_low": 0.0,
        "kl": 0.0,
        "logp_prefix": -2 * log2,
        "logp_suffix": -log2 / 2,
        "entropy": (3 * 2 * log2 + log2) / 5,
        "loss": (-1.2 - 0.5 + 1.1 - 0.5 + 1.0) / 5,
    }
    for name, value in want.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


@levels
def test_row_tolerance_drops_only_rows_that_are_small(level: str) -> None:
    # the same distribution everywhere, so that rows differ by their advantage alone: 1 against 1e-9, 1e-3 allowed
    case = Case(
        tokens=torch.tensor([[1, 1, 1, 1]]),
        advantages=torch.tensor([[1.0, 1e-9, -0.5, 1e-9]]).double(),
        options={"row_tolerance": 1e-3},
    )
    if level == "linear":
        case.hidden, case.weight = torch.ones(1, 4, 3).double(), torch.randn(7, 3).double()
    else:
        case.logits = torch.linspace(0, 2, 7).double().expand(1, 4, 7).clone()
    out, grads = call_with_grads(case, "torch")
    exact, exact_grads = call_with_grads(case.but(options={}), "torch")
    name = leaf_names(case)[0]
    assert torch.equal(out.loss, exact.loss)
    assert not grads[name][0, 1].any()
    assert not grads[name][0, 3].any()
    assert exact_grads[name][0, 1].any()
    close(grads[name][0, 0], exact_grads[name][0, 0], name, rtol=1e-12, atol=0.0)
    close(grads[name][0, 2], exact_grads[name][0, 2], name, rtol=1e-12, atol=0.0)


@backends
@pytest.mark.parametrize("tolerance", [1e-4, 0.05, 0.3])
@pytest.mark.parametrize("options", [{}, {"kl": "full", "kl_coef": 0.2, "entropy_coef": 0.1}])
def test_row_tolerance_bounds_every_dropped_row(backend: str, tolerance: float, options: dict[str, Any]) -> None:
    case = small_case("logits", batch=6, length=8, scale=3.0, **options)
    case.advantages = case.advantages * torch.logspace(-6, 0, 48).double().reshape(6, 8)
    case = case if options else without_ref(case)
    exact = call_with_grads(case, backend)[1]["logits"]
    got = call_with_grads(case, backend, row_tolerance=tolerance)[1]["logits"]
    kept = got.abs().sum(-1) > 0
    close(got[kept], exact[kept], "kept rows", rtol=1e-12, atol=1e-16)
    # every sensible size of a row lies between its largest entry and the sum of them all
    largest = exact.abs().sum(-1).max()
    assert float(exact[~kept].abs().max()) <= tolerance * float(largest)


@backends
@pytest.mark.parametrize("filler", [0, -100])
def test_tokens_under_the_mask_may_hold_any_id_and_advantage(backend: str, filler: int) -> None:
    # -100: what Hugging Face data collators put where nothing is to be predicted
    case = without_ref(small_case("linear")).but(sampler_logps=None)
    want, want_grads = call_with_grads(case, backend)
    case.tokens = case.tokens.masked_fill(~case.mask, filler)
    case.advantages = case.advantages.masked_fill(~case.mask, 1e30)
    out, grads = call_with_grads(case, backend)
    assert torch.equal(out.loss, want.loss)
    assert all(torch.equal(grads[name], want_grads[name]) for name in grads)


@backends
@pytest.mark.parametrize("position", ["old_logps", "sampler_logps", "ref_logps", "hidden", "ref_hidden"])
def test_poison_under_the_mask_does_not_matter(backend: str, position: str) -> None:
    case = small_case(
        "linear",
        kl="full" if position == "ref_hidden" else "k3",
        kl_coef=0.2,
        entropy_coef=0.1,
        sampler_correction="tis",
    )
    want, want_grads = call_with_grads(case, backend)
    for value in (NAN, INF, -INF):
        changed = getattr(case, position).clone()
        changed[~case.mask] = value
        out, grads = call_with_grads(case.but(**{position: changed}), backend)
        assert torch.equal(out.loss, want.loss), value
        assert all(torch.equal(grads[name], want_grads[name]) for name in grads), value


def test_auto_runs_on_the_cpu_like_a_named_back_end() -> None:
    case = without_ref(small_case("linear"))
    out, _ = call(case, "auto")
    close(out.loss, oracle.solve(case).loss, "loss", **TIGHT)


# linear_logps


def logps_case(seed: int, entropy: bool, **transform: Any) -> tuple[Case, Tensor, Tensor]:
    case = small_case("linear", seed=seed, **transform)
    gen = torch.Generator().manual_seed(seed + 1)
    outer = torch.randn(2, 3, 4, generator=gen, dtype=torch.float64)
    return case, outer[0], outer[1] * entropy


@backends
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.5}])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)])
@pytest.mark.parametrize("flat", [False, True])
def test_linear_logps_and_their_gradients(
    backend: str, entropy: bool, transform: dict[str, float], frozen: tuple[str, ...], flat: bool
) -> None:
    case, weight_p, weight_h = logps_case(7, entropy, **transform)
    if flat:
        case, weight_p, weight_h = packed(case), weight_p.reshape(-1), weight_h.reshape(-1)
    dirty = poisoned(case)
    leaves = {n: getattr(dirty, n).clone().requires_grad_(n not in frozen) for n in leaf_names(case)}
    out = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        case.tokens,
        mask=case.mask,
        lm_head_bias=leaves["bias"],
        entropy=entropy,
        backend=backend,
        **transform,
    )
    exact = {n: getattr(case, n).clone().requires_grad_() for n in leaf_names(case)}
    solved = oracle.solve(case.but(**exact, options=transform))
    keep = case.mask
    logps, entropies = solved.logps.reshape(case.tokens.shape), solved.entropy.reshape(case.tokens.shape)
    want = (logps * weight_p)[keep].sum() + (entropies * weight_h)[keep].sum()
    total = (out.logps * weight_p).sum()
    if entropy:
        total = total + (out.entropy * weight_h).sum()
        close(out.entropy[keep], entropies[keep], "entropy", **ROUNDED)
        assert not out.entropy[~keep].any()
    close(out.logps[keep], logps[keep], "logps", **ROUNDED)
    assert out.logps.shape == case.tokens.shape
    assert not out.logps[~keep].any()
    total.backward()
    want.backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            close(leaf.grad, exact[name].grad, name, **TIGHT)


@backends
def test_linear_logps_gradcheck(backend: str) -> None:
    case = small_case("linear")

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logps(
            hidden,
            weight,
            case.tokens,
            mask=case.mask,
            lm_head_bias=bias,
            entropy=True,
            softcap=4.0,
            temperature=0.8,
            backend=backend,
        )
        return out.logps, out.entropy

    leaves = [getattr(case, name).clone().requires_grad_() for name in leaf_names(case)]
    assert both(*leaves)[0].dtype == torch.float64, "gradcheck needs float64 results"
    assert torch.autograd.gradcheck(both, leaves)


def test_linear_logps_backward_skips_rows_without_incoming_gradient() -> None:
    # a NaN row whose log-prob gets weight 0 would spread through any product it entered, even times 0
    case = small_case("linear").but(mask=None)
    case.hidden[1] = NAN
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in leaf_names(case)}
    out = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        case.tokens,
        lm_head_bias=leaves["bias"],
        entropy=True,
        backend="torch",
    )
    (out.logps[[0, 2]].sum() + out.entropy[0].sum()).backward()
    assert torch.count_nonzero(leaves["hidden"].grad[1]) == 0
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    clean = {
        name: getattr(case, name)[[0, 2]] if name == "hidden" else getattr(case, name) for name in leaf_names(case)
    }
    clean = {name: value.clone().requires_grad_() for name, value in clean.items()}
    out = linear_logps(
        clean["hidden"],
        clean["weight"],
        case.tokens[[0, 2]],
        lm_head_bias=clean["bias"],
        entropy=True,
        backend="torch",
    )
    (out.logps.sum() + out.entropy[0].sum()).backward()
    close(leaves["weight"].grad, clean["weight"].grad, "weight", rtol=1e-12, atol=1e-14)


def test_linear_logps_pays_the_backward_for_rows_with_gradient_only() -> None:
    case = counted_case()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    out = linear_logps(hidden, weight, case.tokens, lm_head_bias=case.bias, backend="torch")
    with Counter() as count:
        out.logps[:1].sum().backward()  # 8 of 64 rows
    assert 0 < count.products <= 3 * 8 * 6 * 50


@backends
def test_linear_logps_with_nothing_scored_has_zero_gradients(backend: str) -> None:
    case = poisoned(small_case("linear").but(mask=torch.zeros(3, 4, dtype=torch.bool)))
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in leaf_names(case)}
    out = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        case.tokens,
        mask=case.mask,
        lm_head_bias=leaves["bias"],
        entropy=True,
        backend=backend,
    )
    (out.logps.sum() + out.entropy.sum()).backward()
    assert not out.logps.any()
    assert not out.entropy.any()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert torch.count_nonzero(leaf.grad) == 0, name


@backends
def test_linear_logps_in_bfloat16_have_float32_log_probs(backend: str) -> None:
    # bfloat16 inputs are exact in float64; D = 64 products of size ~1 / 8 and V = 257 terms in float32 give 3e-5 at
    # most, where logits rounded to bfloat16 would be off by 2**-9 * 3 = 6e-3
    case = small_case("linear", width=64, vocab=257, scale=0.125)
    rounded = {name: getattr(case, name).bfloat16() for name in leaf_names(case)}
    out = linear_logps(
        rounded["hidden"],
        rounded["weight"],
        case.tokens,
        lm_head_bias=rounded["bias"],
        entropy=True,
        backend=backend,
    )
    want = oracle.solve(case.but(**{name: value.double() for name, value in rounded.items()}, mask=None, options={}))
    assert out.logps.dtype == torch.float32
    close(out.logps, want.logps, "logps", rtol=0.0, atol=3e-5)
    close(out.entropy, want.entropy, "entropy", rtol=0.0, atol=3e-4)
