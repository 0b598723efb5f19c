"""backend="triton" against the float64 oracle and the contract: on a GPU where there is one, else interpreted.

The oracle works on the CPU in float64, on the very values that the kernels get, so that what differs is rounding alone.
"""

import dataclasses
import math
from collections.abc import Callable
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
    SINGLE,
    STATS,
    allowed,
    leaf_names,
    of_objective,
    poisoned,
    random_case,
    representable,
    small_case,
    solve_with_grads,
    within,
    without_ref,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import INF, Case, Pair
from torch import Tensor

from prefixloss import LossConfig, LossOutput, TokenAdvantages, check, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss._kernels import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = (torch.bfloat16, torch.float16)

levels = pytest.mark.parametrize("level", ["linear", "logits"])
halves = pytest.mark.parametrize("dtype", HALVES)


# Calls


def on_device(value: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if value is None else value.detach().to(DEVICE, dtype)


def fresh_leaves(case: Case, dtype: torch.dtype = torch.float32, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Copies of the differentiable inputs on the device."""
    copies = {name: getattr(case, name).detach().to(DEVICE, dtype, copy=True) for name in leaf_names(case)}
    return {name: copy.requires_grad_(name not in frozen) for name, copy in copies.items()}


def loss_of(
    case: Case, leaves: dict[str, Tensor], backend: str = "triton", options: dict[str, Any] | None = None, **more: Any
) -> LossOutput:
    """The public function's output for a case whose differentiable inputs are `leaves`. `options` add to the case's,
    `more` to the function's arguments."""
    model = leaves[leaf_names(case)[0]].dtype
    statistic = torch.float64 if model == torch.float64 else torch.float32
    given = case.advantages
    if isinstance(given, tuple):
        advantages: Any = TokenAdvantages(*(on_device(v, statistic) for v in given[:2]), on_device(given[2]))
    else:
        advantages = on_device(given, statistic)
    arguments: dict[str, Any] = {
        "tokens": on_device(case.tokens),
        "advantages": advantages,
        "mask": on_device(case.mask),
        "cu_seqlens": on_device(case.cu_seqlens),
        "old_logps": on_device(case.old_logps, statistic),
        "sampler_logps": on_device(case.sampler_logps, statistic),
        "ref_logps": on_device(case.ref_logps, statistic),
        "group_ids": on_device(case.group_ids),
        "normalizer": case.normalizer,
        "config": LossConfig(**case.options | (options or {})),
        "backend": backend,
    }
    if case.logits is not None:
        arguments["ref_logits"] = on_device(case.ref_logits, model)
        return prefix_loss(leaves["logits"], **arguments | more)
    arguments["lm_head_bias"] = leaves.get("bias")
    arguments["ref_hidden"] = on_device(case.ref_hidden, model)
    arguments["ref_lm_head_weight"] = on_device(case.ref_weight, model)
    arguments["ref_lm_head_bias"] = on_device(case.ref_bias, model)
    return linear_prefix_loss(leaves["hidden"], leaves["weight"], **arguments | more)


def on_cpu(out: LossOutput) -> LossOutput:
    parts = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    metrics = {name: value.cpu() for name, value in parts.pop("metrics").items()}
    return LossOutput(**{name: value.detach().cpu() for name, value in parts.items()}, metrics=metrics)


def gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of those that ask for one, on the CPU."""
    assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves.values())
    return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


def run(
    case: Case,
    outer: Tensor | float = 1.0,
    dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
    **more: Any,
) -> tuple[LossOutput, dict[str, Tensor]]:
    """One forward and backward: the output, and the gradients by name."""
    leaves = fresh_leaves(case, dtype, frozen)
    out = loss_of(case, leaves, **more)
    (out.loss * (on_device(outer, out.loss.dtype) if isinstance(outer, Tensor) else outer)).sum().backward()
    return on_cpu(out), gradients(leaves)


def check_against_oracle(
    case: Case,
    note: str = "",
    outer: Tensor | float = 1.0,
    dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
    **more: Any,
) -> tuple[LossOutput, dict[str, Tensor]]:
    """All that a call returns, with poison at the masked positions, against the oracle on the same values."""
    case = representable(case, dtype)
    want, want_grads = solve_with_grads(case, outer)
    allow = allowed(case, want, outer, dtype)
    out, grads = run(poisoned(case), outer, dtype, frozen, **more)
    option = oracle.DEFAULTS | case.options

    assert out.loss.dtype == out.logps.dtype == out.entropy.dtype == torch.float32, note
    within(out.loss, want.loss, allow.loss, f"{note} loss")
    assert set(grads) == set(leaf_names(case)) - set(frozen), note
    for name, grad in grads.items():
        assert grad.dtype == dtype, f"{note} gradient of {name}"
        within(grad, want_grads[name], allow.grads[name], f"{note} gradient of {name}")

    learning, scored = want.learning.reshape(case.tokens.shape), want.scored.reshape(case.tokens.shape)
    assert torch.equal(out.learning, learning), f"{note} learning"
    computed = learning if option["stats"] == "learning" else scored
    for name, got, expected, error in (
        ("logps", out.logps, want.logps, allow.logp),
        ("entropy", out.entropy, want.entropy, allow.entropy),
        ("kl", out.kl, torch.zeros_like(want.logps) if want.kl is None else want.kl, allow.kl),
    ):
        assert got.shape == case.tokens.shape, f"{note} {name}"
        here = computed.reshape(-1)
        within(got.reshape(-1)[here], expected[here], error[here], f"{note} {name}")
        # the sequence's ratio needs the log-probs of all its scored tokens, learning or not
        elsewhere = ~computed if option["ratio_level"] == "token" else ~scored
        assert not got[elsewhere].any(), f"{note} {name} is 0 where not computed"

    # a mean's error is at most the largest of its terms', and N + 2 roundings
    here = computed.reshape(-1)
    largest = {
        name: float(error[here].max()) if here.any() else 0.0
        for name, error in (("ratio", allow.ratio), ("kl", allow.kl), ("entropy", allow.entropy), ("logp", allow.logp))
    }
    for name, expected in want.metrics.items():
        if name == "loss" and option["reduction"] == "none":
            continue  # the contract leaves open how a loss per token is summed up
        error = float(allow.loss.sum()) if name == "loss" else largest.get(name.split("_")[0], 0.0)
        rounding = (case.tokens.numel() + 2) * SINGLE * abs(expected)
        within(out.metrics[name], torch.tensor(expected), error + rounding, f"{note} metric {name}")
    return out, grads


# Against the oracle


SEEDS = range(20000, 20240)
BLOCK = 20


def seeded(seed: int) -> tuple[Case, tuple[str, ...], dict[str, Any]]:
    """A random case, what of it is frozen, and arguments that change no result."""
    case = random_case(seed)
    more: dict[str, Any] = {}
    frozen: tuple[str, ...] = ()
    if seed % 2:
        case.tokens = case.tokens.int()
    if case.logits is not None:
        more["inplace"] = seed % 3 == 0
    else:
        frozen = ((), (), ("weight", "bias"), ("hidden",), ("weight",), ("bias",))[seed % 6]
        frozen = tuple(name for name in frozen if name in leaf_names(case))
        if seed % 5 == 0:
            more["max_learning_tokens"] = case.tokens.numel() + seed % 2
    return case, frozen, more


# on a GPU nearly every configuration compiles kernels of its own
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="compiling them all takes minutes")


@pytest.mark.parametrize(
    "block", [pytest.param(i, marks=[interpreted] if i >= 3 else []) for i in range(len(SEEDS) // BLOCK)]
)
def test_random_configurations_agree_with_the_dense_oracle(block: int) -> None:
    for seed in SEEDS[BLOCK * block : BLOCK * (block + 1)]:
        case, frozen, more = seeded(seed)
        outer: Tensor | float = 3.25
        if case.options["reduction"] == "none":
            outer = torch.randn(case.tokens.shape, generator=torch.Generator().manual_seed(seed)).double()
        note = f"seed {seed}, {case.options}, frozen {frozen}, {more}:"
        check_against_oracle(case, note, outer, frozen=frozen, **more)


def test_the_random_configurations_reach_every_option_and_way_of_calling() -> None:
    """Guards the test above: a generator that stopped producing something would let it pass for nothing."""
    drawn = [seeded(seed) for seed in SEEDS]
    for key, values in {
        "objective": OBJECTIVES,
        "reduction": REDUCTIONS,
        "kl": KLS,
        "ratio_level": RATIO_LEVELS,
        "sampler_correction": CORRECTIONS,
        "stats": STATS,
    }.items():
        for value in values:
            assert sum(case.options.get(key) == value for case, _, _ in drawn) > 10, (key, value)
    assert sum(more.get("inplace", False) for _, _, more in drawn) > 20
    assert sum("max_learning_tokens" in more for _, _, more in drawn) > 20
    assert sum("hidden" in frozen for _, frozen, _ in drawn) > 10
    assert sum("weight" in frozen for _, frozen, _ in drawn) > 10
    assert sum(isinstance(case.advantages, tuple) for case, _, _ in drawn) > 20
    assert sum(case.cu_seqlens is not None for case, _, _ in drawn) > 50
    results = [oracle.solve(case) for case, _, _ in drawn]
    assert sum(bool(r.learning.any()) for r in results) > 150
    assert sum(bool((r.scored & ~r.learning).any()) for r in results) > 30


# those that a fused one-pass kernel cannot finish in one pass are among them
SHAPES_OF_A_LOSS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "none"},
    {"ratio_level": "sequence"},
    {"entropy_coef": 0.1, "stats": "scored"},
    {"kl": "full", "kl_coef": 0.3, "kl_importance": True},
    {"ratio_level": "sequence", "entropy_coef": 0.1, "softcap": 5.0},
)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("weight",), ("bias",), ("hidden",), ("hidden", "bias")])
@pytest.mark.parametrize("options", SHAPES_OF_A_LOSS)
def test_what_is_not_frozen_gets_its_gradient(options: dict[str, Any], frozen: tuple[str, ...]) -> None:
    check_against_oracle(small_case("linear", **options), frozen=frozen)


LOW_PRECISION_OPTIONS: tuple[dict[str, Any], ...] = (
    {"objective": "clip"},
    {"objective": "reinforce", "entropy_coef": 0.1, "temperature": 0.8},
    {"objective": "sapo", "kl": "full", "kl_coef": 0.5, "softcap": 20.0},
    {"objective": "cispo", "clip_high": 5.0, "kl": "k3", "kl_coef": 0.5, "reduction": "none"},
)


def low_precision_case(level: str, dtype: torch.dtype, vocab: int = 257, width: int = 64, **options: Any) -> Case:
    """`small_case` with ratios on both sides of the clip for inputs rounded to `dtype`."""
    scale = 1.0 if level == "logits" else width**-0.5
    case = representable(small_case(level, width=width, vocab=vocab, scale=scale, seed=1, **options), dtype)
    plain = {key: options[key] for key in ("temperature", "softcap", "logit_scale") if key in options}
    logps = oracle.solve(case.but(options=plain)).logps.reshape(case.tokens.shape)
    steps = torch.tensor([-0.5, -0.1, 0.1, 0.5]).double()
    steps = steps[torch.randint(4, logps.shape, generator=torch.Generator().manual_seed(2))]
    return case.but(old_logps=logps + steps, ref_logps=logps - steps)


@levels
@halves
@pytest.mark.parametrize("options", LOW_PRECISION_OPTIONS)
def test_low_precision_inputs_cost_only_their_own_rounding(
    level: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # V = 257 and D = 64 are sums long enough for a 16-bit accumulator to show: 8 bits are gone after 256 equal terms
    case = low_precision_case(level, dtype, **options)
    outer = torch.full(case.tokens.shape, 1024.0).double() if options.get("reduction") == "none" else 1024.0
    check_against_oracle(case, outer=outer, dtype=dtype)


@levels
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_tiny_float16_gradients_survive_with_a_loss_scale(level: str, options: dict[str, Any]) -> None:
    # a row's gradient is of size 1e-6 * p, below half of float16's smallest number (3e-8) for most p; times 65536 it
    # is 0.07 * p, which float16 holds
    case = low_precision_case(level, torch.float16, vocab=33, **options).but(normalizer=1e6)
    outer = torch.full(case.tokens.shape, 65536.0).double() if options else 65536.0
    _, grads = check_against_oracle(case, outer=outer, dtype=torch.float16)
    _, want = solve_with_grads(case, outer)
    for name, grad in grads.items():
        held = want[name].abs() > 2.0**-24
        assert held.sum() > grad.numel() / 4, name
        assert (grad[held] != 0).all(), name


@levels
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_float16_gradients_beyond_float16_come_back_with_a_small_outer_factor(
    level: str, options: dict[str, Any]
) -> None:
    # ratio 1e4 and A = -30: the loss's slope is 3e5, above float16's 65504; times 2**-9 it is 600
    case = low_precision_case(level, torch.float16, vocab=33, **options).but(normalizer=1.0)
    logps = oracle.solve(case.but(options={})).logps.reshape(3, 4)
    case.old_logps, case.advantages = logps - math.log(1e4), torch.full((3, 4), -30.0).double()
    outer = torch.full(case.tokens.shape, 2.0**-9).double() if options else 2.0**-9
    _, grads = check_against_oracle(case, outer=outer, dtype=torch.float16)
    assert all(grad.abs().max() > 100 for grad in grads.values())


VOCABULARY_OPTIONS: dict[str, Any] = {"kl": "full", "kl_coef": 0.3, "entropy_coef": 0.1, "softcap": 20.0}


@levels
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 33, 129, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_that_no_block_divides(level: str, vocab: int, dtype: torch.dtype) -> None:
    case = low_precision_case(level, dtype, vocab=vocab, width=8, **VOCABULARY_OPTIONS)
    check_against_oracle(case, dtype=dtype)


@levels
def test_a_vocabulary_of_a_real_size(level: str) -> None:
    check_against_oracle(small_case(level, batch=1, length=3, vocab=50257, scale=0.5, **VOCABULARY_OPTIONS))


def test_the_target_may_be_any_token_of_the_vocabulary() -> None:
    # once each, so that also every edge between blocks is a target
    vocab = 300
    case = without_ref(small_case("logits", batch=1, length=vocab, vocab=vocab)).but(
        mask=None, group_ids=None, tokens=torch.randperm(vocab)[None], sampler_logps=None, old_logps=None
    )
    check_against_oracle(case)


@pytest.mark.parametrize(
    ("rows", "vocab", "processors"),
    # the last ones as on a device of so many multiprocessors that every row is split as far as its blocks allow
    [(2, 40_000, None), (3, 300, 10**6), (1, 700, 10**6), (5, 2500, 10**6)],
)
@pytest.mark.parametrize("options", [{}, VOCABULARY_OPTIONS, VOCABULARY_OPTIONS | {"reduction": "none"}])
@levels
def test_few_rows_and_a_wide_vocabulary_share_a_row_among_programs(
    level: str, rows: int, vocab: int, processors: int | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if processors is not None:
        monkeypatch.setattr(launch, "processors", lambda _: processors)
    assert launch.splits_for(rows, vocab, 128, DEVICE) > 1
    case = small_case(level, batch=1, length=rows, vocab=vocab, scale=0.5, **options)
    case = case.but(mask=None) if "kl" in options else without_ref(case).but(mask=None)
    if level == "logits":
        case.logits[..., vocab // 2 :] = -INF  # whole programs see banned tokens only
        case.tokens = case.tokens % (vocab // 2)
        case.old_logps = oracle.solve(case.but(options={})).logps.reshape(1, rows) + 0.1
    outer = 2.0 if options.get("reduction") != "none" else torch.arange(rows).double()[None]
    for dtype in (torch.float32, torch.bfloat16) if vocab < 1000 else (torch.float32,):
        check_against_oracle(case, outer=outer, dtype=dtype)


@st.composite
def extreme_cases(draw: st.DrawFn) -> tuple[Case, torch.dtype, bool]:
    """Shapes, sizes of logits, ties, bans and ratios that `random_case` does not draw."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    vocab = draw(st.sampled_from([1, 2, 5, 17, 130]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    objective = draw(st.sampled_from(OBJECTIVES))
    options: dict[str, Any] = {
        **of_objective(objective),
        "reduction": draw(st.sampled_from(["token-mean", "seq-mean-token-mean", "none"])),
        "ratio_level": draw(st.sampled_from(["token", "token", "sequence"])),
        "dual_clip": draw(st.sampled_from([None, 3.0])),
        "kl": draw(st.sampled_from([None, "full", "k2"])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.1, -0.1])),
        "temperature": draw(st.sampled_from([1.0, 0.01, 100.0])),
        "softcap": draw(st.sampled_from([None, None, 0.5, 30.0])),
        "stats": draw(st.sampled_from(STATS)),
    }
    options["kl_coef"] = draw(st.sampled_from([0.0, 0.3, -0.3])) if options["kl"] else 0.0

    def of(values: list[float]) -> Tensor:
        return torch.tensor(values).double()[torch.randint(len(values), (batch, length), generator=gen)]

    def logits() -> Tensor:
        size = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
        drawn = torch.randn(batch, length, vocab, generator=gen).double() * size + draw(st.sampled_from([0.0, -50.0]))
        return drawn.round() if draw(st.booleans()) else drawn

    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    case = Case(
        tokens=torch.randint(vocab, (batch, length), generator=gen),
        advantages=of([0.0, 0.5, -2.0, 1e-3]),
        logits=logits(),
        ref_logits=logits() if options["kl"] == "full" else None,
        mask=(torch.rand(batch, length, generator=gen) < 0.8),
        options=options,
    )
    banned = torch.rand(case.logits.shape, generator=gen) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    case.logits[banned.scatter(-1, case.tokens[..., None], False)] = -INF
    case = representable(case, dtype)
    plain = {key: options[key] for key in ("temperature", "softcap")}
    logps = oracle.solve(case.but(options=plain)).logps.reshape(batch, length)
    if draw(st.booleans()):
        # away from the edges 0.8, 1.2, 3 and 5, where rounding may choose either side
        case.old_logps = logps - of([0.0, 0.1, -0.1, 1.3, -1.3, 20.0, -20.0])
    case.ref_logps = logps + of([0.0, 0.5, -0.5]) if options["kl"] == "k2" else None
    return representable(case, dtype), dtype, draw(st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(extreme_cases())
def test_the_kernels_agree_with_the_torch_back_end_in_float64(drawn: tuple[Case, torch.dtype, bool]) -> None:
    case, dtype, inplace = drawn
    allow = allowed(case, oracle.solve(case), 2.0, dtype)
    got, got_grads = run(poisoned(case), 2.0, dtype, inplace=inplace)
    want, want_grads = run(case, 2.0, torch.float64, backend="torch")
    within(got.loss, want.loss, allow.loss, "loss")
    within(got_grads["logits"], want_grads["logits"], allow.grads["logits"], "gradient")
    assert torch.equal(got.learning, want.learning)
    within(got.logps, want.logps, allow.logp.reshape(got.logps.shape), "logps")
    within(got.entropy, want.entropy, allow.entropy.reshape(got.logps.shape), "entropy")
    within(got.kl, want.kl, allow.kl.reshape(got.logps.shape), "kl")


@levels
@pytest.mark.parametrize("options", SHAPES_OF_A_LOSS)
def test_metrics_are_those_of_the_torch_back_end(level: str, options: dict[str, Any]) -> None:
    case = representable(small_case(level, **options))
    case.advantages = Pair(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([-1.0, 0.0, 0.3]), torch.tensor([2, 0, 3]))
    got, _ = run(case)
    want, _ = run(case, backend="torch")
    assert set(METRICS) <= set(got.metrics)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in got.metrics.items():
        assert value.dim() == 0, name
        assert value.dtype == want.metrics[name].dtype, name
        # means of 12 numbers of size ~3, each with the roundings of sums of 7 terms, in both
        torch.testing.assert_close(value, want.metrics[name], rtol=2e-5, atol=2e-5, msg=name)


# Nothing there, or nothing to learn


@levels
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"kl": "full", "kl_coef": 0.1, "entropy_coef": 0.1}])
def test_no_token_at_all(level: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    case = Case(
        tokens=torch.zeros(shape, dtype=torch.int64),
        advantages=torch.zeros(shape),
        cu_seqlens=torch.tensor([0]) if len(shape) == 1 else None,
        options=options,
    )
    if level == "linear":
        case.hidden, case.weight, case.bias = torch.zeros(*shape, 5), torch.ones(7, 5), torch.zeros(7)
        case.ref_hidden, case.ref_weight = torch.zeros(*shape, 3), torch.ones(7, 3)
    else:
        case.logits = case.ref_logits = torch.zeros(*shape, 7)
    out, grads = run(case)
    assert out.loss.shape == (shape if options.get("reduction") == "none" else ())
    assert not out.loss.any()
    for values in (out.logps, out.entropy, out.kl, out.learning):
        assert values.shape == shape
    for name, grad in grads.items():
        assert grad.shape == getattr(case, name).shape
        assert torch.count_nonzero(grad) == 0, name
    assert all(value.isfinite() for value in out.metrics.values())


@levels
@pytest.mark.parametrize("options", [{}, {"kl": "full", "kl_coef": 0.1, "entropy_coef": 0.1}, {"reduction": "none"}])
def test_a_single_token(level: str, options: dict[str, Any]) -> None:
    case = small_case(level, batch=1, length=1, **options).but(mask=None)
    check_against_oracle(case if "kl" in options else without_ref(case))


@levels
@pytest.mark.parametrize("options", SHAPES_OF_A_LOSS)
@pytest.mark.parametrize("why", ["masked", "no advantage"])
def test_nothing_learning_gives_zero_loss_with_a_graph_and_zero_gradients(
    level: str, options: dict[str, Any], why: str
) -> None:
    case = small_case(level, **options)
    if why == "masked":
        case = poisoned(case.but(mask=torch.zeros(3, 4, dtype=torch.bool)))
    else:
        case = case.but(options=options | {"kl_coef": 0.0, "entropy_coef": 0.0}, advantages=torch.zeros(3).double())
    leaves = fresh_leaves(case)
    out = loss_of(case, leaves)
    assert out.loss.requires_grad
    assert torch.count_nonzero(out.loss) == 0
    assert not out.learning.any()
    assert all(value.isfinite() for value in out.metrics.values())
    out.loss.sum().backward()
    for name, grad in gradients(leaves).items():
        assert grad.shape == leaves[name].shape
        assert torch.count_nonzero(grad) == 0, name  # NaN counts as non-zero


@levels
@pytest.mark.parametrize("options", [{}, {"ratio_level": "sequence"}, {"reduction": "none"}])
@pytest.mark.parametrize("inplace", [False, True])
def test_nan_in_a_row_that_does_not_learn_has_no_effect(level: str, options: dict[str, Any], inplace: bool) -> None:
    case = without_ref(small_case(level, **options)).but(sampler_logps=None)
    case.advantages[1] = 0.0
    more = {"inplace": inplace} if level == "logits" else {}
    want, want_grads = run(case, **more)
    source = case.logits if level == "logits" else case.hidden
    source[1] = NAN
    out, grads = run(case, **more)
    assert torch.equal(out.loss, want.loss)
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name
    assert torch.count_nonzero(grads[leaf_names(case)[0]][1]) == 0
    assert not out.logps[1].any()


@levels
@pytest.mark.parametrize("options", [*SHAPES_OF_A_LOSS, {"objective": "topr"}, {"objective": "sapo"}])
def test_nan_in_a_row_that_learns_makes_the_loss_nan(level: str, options: dict[str, Any]) -> None:
    case = small_case(level, **options)
    (case.logits if level == "logits" else case.hidden)[1, 2, 0] = NAN
    out, grads = run(case)
    assert out.loss.isnan().any()
    if "ratio_level" not in options:  # else every token of the response is NaN
        assert out.loss.isnan().sum() == 1
    assert grads[leaf_names(case)[0]][1, 2].isnan().any()


# Strides and integer types


def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.cat([x, torch.full_like(x[:, :1], NAN)], 1)
    return wide, wide[:, :-1]


def batch_second(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.transpose(0, 1).contiguous()
    return wide, wide.transpose(0, 1)


def columns(x: Tensor) -> tuple[Tensor, Tensor]:
    pad = torch.full_like(x[..., :3], NAN)
    wide = torch.cat([pad, x, pad], -1)
    return wide, wide[..., 3:-3]


def every_second(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)
    return wide, wide[..., ::2]


def vocabulary_first(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.permute(2, 0, 1).contiguous()
    return wide, wide.permute(1, 2, 0)


VIEWS = (shifted, batch_second, columns, every_second, vocabulary_first)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{"kl": "full", "kl_coef": 0.2}, {"reduction": "none"}])
def test_logits_may_have_any_strides(
    view: Callable[[Tensor], tuple[Tensor, Tensor]], inplace: bool, options: dict[str, Any]
) -> None:
    # around the logits is NaN: neither may it be read, nor may anything but 0 come back there
    case = representable(small_case("logits", **options))
    want, want_grads = solve_with_grads(case)
    allow = allowed(case, want)
    given = poisoned(case)
    leaf = view(given.logits.to(DEVICE, torch.float32))[0].clone().requires_grad_()
    # the same view of a copy, as a model's output is; the leaf itself for inplace=False
    _, pattern = view(torch.zeros_like(case.logits))
    base = leaf * 1.0 if inplace else leaf
    logits = base.as_strided(pattern.shape, pattern.stride(), pattern.storage_offset())
    assert not logits.is_contiguous()
    reference = None if case.ref_logits is None else view(given.ref_logits.to(DEVICE, torch.float32))[1]
    out = loss_of(given, {"logits": logits}, inplace=inplace, ref_logits=reference)
    out.loss.sum().backward()
    within(out.loss.cpu(), want.loss, allow.loss, "loss")
    got = leaf.grad.as_strided(pattern.shape, pattern.stride(), pattern.storage_offset())
    within(got.cpu(), want_grads["logits"], allow.grads["logits"], "gradient")
    got.zero_()
    assert torch.count_nonzero(leaf.grad) == 0, "gradient beside the logits"


def test_expanded_logits_get_the_sum_of_their_gradients() -> None:
    # every token has the same row in memory; written over, it could be read only once
    case = representable(without_ref(small_case("logits")).but(mask=None))
    case.logits = case.logits[:1, :1].expand(3, 4, 7)
    want, want_grads = solve_with_grads(case)
    leaf = case.logits[:1, :1].to(DEVICE, torch.float32).clone().requires_grad_()
    expanded = (leaf * 1.0).expand(3, 4, 7)
    with pytest.raises(ValueError, match=r"^logits: got .* overlap in memory"):
        loss_of(case, {"logits": expanded}, inplace=True)
    loss_of(case, {"logits": expanded}).loss.backward()
    tolerance = allowed(case, want).grads["logits"].sum((0, 1)) + 12 * SINGLE * want_grads["logits"].abs().sum((0, 1))
    within(leaf.grad.cpu()[0, 0], want_grads["logits"].sum((0, 1)), tolerance, "gradient")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "entropy_coef": 0.1}])
def test_hidden_states_of_any_strides_and_a_tied_transposed_head(
    view: Callable[[Tensor], tuple[Tensor, Tensor]], options: dict[str, Any]
) -> None:
    case = representable(without_ref(small_case("linear", **options)))
    want, want_grads = solve_with_grads(case)
    allow = allowed(case, want)
    embedding = case.weight.t().contiguous().to(DEVICE, torch.float32).requires_grad_()
    wide = torch.stack([case.bias, torch.full_like(case.bias, NAN)], -1).to(DEVICE, torch.float32)
    leaves = {
        "hidden": view(poisoned(case).hidden.to(DEVICE, torch.float32))[1].detach().requires_grad_(),
        "weight": embedding.t(),
        "bias": wide[:, 0].detach().requires_grad_(),
    }
    out = loss_of(poisoned(case), leaves)
    out.loss.sum().backward()
    within(out.loss.cpu(), want.loss, allow.loss, "loss")
    got = {"hidden": leaves["hidden"].grad, "weight": embedding.grad.t(), "bias": leaves["bias"].grad}
    for name, grad in got.items():
        within(grad.cpu(), want_grads[name], allow.grads[name], name)


@levels
def test_statistics_of_any_strides_and_integer_types(level: str) -> None:
    case = small_case(level, kl="k3", kl_coef=0.3, sampler_correction="tis", reduction="group-token-mean")
    want, want_grads = run(case)

    def strided(x: Tensor) -> Tensor:
        x = x.to(DEVICE)
        return torch.stack([x, x], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)

    more = {name: strided(getattr(case, name).float()) for name in ("old_logps", "sampler_logps", "ref_logps")}
    for integer in (torch.int32, torch.int64):
        leaves = fresh_leaves(case)
        out = loss_of(
            case,
            leaves,
            tokens=strided(case.tokens.to(integer)),
            mask=strided(case.mask.to(integer)),
            advantages=strided(case.advantages.float()),
            group_ids=torch.stack([case.group_ids] * 2, 1).to(DEVICE, integer)[:, 0],
            **more,
        )
        out.loss.backward()
        assert torch.equal(out.loss.detach().cpu(), want.loss)
        for name, grad in gradients(leaves).items():
            assert torch.equal(grad, want_grads[name]), name


def test_tokens_may_be_one_column_of_a_longer_batch() -> None:
    """Flat, such a column is still strided."""
    logits, ids = torch.randn(6, 1, 9, device=DEVICE), torch.randint(9, (6, 4), device=DEVICE)
    for column in (ids[:, :1], ids[:, :1].contiguous()):
        logps = prefix_loss(logits, column, torch.ones(6, device=DEVICE), backend="triton").logps
        torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, column[..., None]).squeeze(-1))
        hidden, weight = logits, torch.eye(9, device=DEVICE)
        torch.testing.assert_close(linear_logps(hidden, weight, column, backend="triton").logps, logps)


def test_rows_may_lie_beyond_two_to_the_31_elements() -> None:
    # 4 GiB of addresses, of which only the two rows are ever touched on a CPU
    case = representable(without_ref(small_case("logits", batch=1, length=2, vocab=9)).but(mask=None), torch.float16)
    far = 2**31 + 5
    room = torch.empty(far + 9, dtype=torch.float16, device=DEVICE)
    logits = room.as_strided((1, 2, 9), (2 * far, far, 1))
    logits.copy_(case.logits.to(DEVICE))
    want, want_grads = solve_with_grads(case)
    allow = allowed(case, want, dtype=torch.float16)
    out = loss_of(case, {"logits": logits.requires_grad_()})
    (grad,) = torch.autograd.grad(out.loss, logits)
    within(out.loss.detach().cpu(), want.loss, allow.loss, "loss")
    within(grad.cpu(), want_grads["logits"], allow.grads["logits"], "gradient")


# Numbers at the edge


@levels
@pytest.mark.parametrize("options", [{"entropy_coef": 0.1}, VOCABULARY_OPTIONS, {"reduction": "none", "softcap": 3.0}])
def test_banned_tokens_have_probability_zero_and_leave_everything_finite(level: str, options: dict[str, Any]) -> None:
    case = small_case(level, **options)
    case.tokens = case.tokens.clamp(max=4)
    if level == "linear":
        case.bias[5:] = -INF
        case.ref_bias = torch.zeros(7).double()
        case.ref_bias[5] = -INF  # banned for both, and for the policy only
    else:
        case.logits[..., 5:] = -INF
        case.logits[0, 1, 0:2] = -INF
        case.tokens[0, 1] = 3
        case.ref_logits[..., 5] = -INF
    _, grads = check_against_oracle(case if options.get("kl") == "full" else without_ref(case))
    if level == "logits":
        assert torch.count_nonzero(grads["logits"][..., 5:]) == 0


@levels
@pytest.mark.parametrize("options", [{"entropy_coef": 0.1}, {"reduction": "none"}])
def test_all_but_the_target_banned_is_certainty(level: str, options: dict[str, Any]) -> None:
    case = without_ref(small_case(level, **options))
    case = case.but(tokens=torch.full((3, 4), 2), old_logps=None, sampler_logps=None)
    if level == "linear":
        case.bias[:] = -INF
        case.bias[2] = 0.5
    else:
        case.logits[..., :2] = case.logits[..., 3:] = -INF
    out, grads = run(case)
    assert out.learning.sum() == 10
    assert not out.logps.any()
    assert not out.entropy.any()
    for name, grad in grads.items():
        assert torch.count_nonzero(grad) == 0, name  # NaN counts as non-zero


@levels
@pytest.mark.parametrize(
    "options",
    [*map(of_objective, OBJECTIVES), {"entropy_coef": 0.1}, {"reduction": "none"}, {"softcap": 3.0}],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_banned_token_that_was_sampled_makes_the_loss_nan(
    level: str, options: dict[str, Any], advantage: float
) -> None:
    case = without_ref(small_case(level, **options)).but(mask=None, sampler_logps=None)
    case.advantages = torch.full((3, 4), advantage).double()
    case.tokens = case.tokens.clamp(max=5)
    case.tokens[1, 2] = 6
    if level == "linear":
        case.bias[6] = -INF
    else:
        case.logits[1, 2, 6] = -INF
    case.old_logps = torch.full((3, 4), -1.0).double()
    out, _ = run(case)
    assert out.loss.isnan().sum() == 1
    assert out.logps[1, 2] == -INF
    assert out.logps.isinf().sum() == 1


@levels
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_with_every_token_banned_makes_the_loss_nan(level: str, objective: str) -> None:
    # its own token is banned like the rest: log-prob -inf (or NaN: 0 / 0), never the 0 of certainty
    case = without_ref(small_case(level, **of_objective(objective))).but(mask=None, sampler_logps=None)
    case.old_logps = torch.full((3, 4), -1.0).double()
    if level == "linear":
        case.bias[:] = -INF
    else:
        case.logits[1, 2] = -INF
    out, _ = run(case)
    assert out.loss.isnan()
    assert not out.logps[1, 2].isfinite()


@pytest.mark.parametrize("value", [0.0, 2.5, 1e4, -1e4, -1e30, 3e38, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_rows_of_equal_logits_are_uniform_however_large(value: float, reduction: str) -> None:
    # logp = -log 5; loss = -A at ratio 1 and - 0.5 H; H = log 5 has no slope. d(-A logp) / dz = A (1 / 5 - 1[target])
    case = Case(
        tokens=torch.tensor([[4, 0]]),
        advantages=torch.tensor([[1.0, -2.0]]),
        logits=torch.full((1, 2, 5), value),
        options={"reduction": reduction, "entropy_coef": 0.5},
        normalizer=1.0,
    )
    out, grads = run(case)
    log5 = math.log(5)
    # the one logarithm, and sums of 5 terms
    assert out.logps.flatten().tolist() == pytest.approx([-log5] * 2, rel=1e-6)
    assert out.entropy.flatten().tolist() == pytest.approx([log5] * 2, rel=1e-6)
    assert out.loss.sum().item() == pytest.approx(-1 + 2 - log5, rel=1e-6)
    want = torch.full((1, 2, 5), 0.2)
    want[0, 1] *= -2
    want[0, 0, 4] -= 1
    want[0, 1, 0] += 2
    torch.testing.assert_close(grads["logits"], want, rtol=1e-6, atol=5e-7)


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_of_ten_thousand(level: str, dtype: torch.dtype) -> None:
    # logits 10000, 10000 - 8 and -10000, exact in float16 too: logp = -log1p(exp(-8)) and -8 - log1p(exp(-8))
    rows = torch.tensor([[10000.0, 9992.0, -10000.0]]).expand(2, 3)
    case = Case(tokens=torch.tensor([0, 1]), advantages=torch.ones(2), normalizer=1.0)
    if level == "logits":
        case.logits = rows.clone()
    else:
        case.hidden, case.weight = torch.full((2, 1), 8.0), rows[:1].t() / 8
    out, grads = run(case, dtype=dtype)
    small = math.log1p(math.exp(-8))
    assert out.logps.tolist() == pytest.approx([-small, -8 - small], rel=1e-5)
    p = 1 / (1 + math.exp(-8))
    if level == "logits":
        want = torch.tensor([[p - 1, 1 - p, 0.0], [p, -p, 0.0]]).double()
        # float16 rounds once, and 1 - p = 3e-4 is computed from exp(-8), not from p
        torch.testing.assert_close(grads["logits"].double(), want, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("options", "advantage", "log_ratio", "log_q"),
    [
        ({}, 1.0, 200.0, 0.0),
        ({}, -1.0, -200.0, 0.0),
        ({}, 1.0, -200.0, 0.0),
        ({"dual_clip": 3.0}, -1.0, 200.0, 0.0),
        ({"ratio_cap": 2.0}, -1.0, 200.0, 0.0),
        ({"ratio_level": "sequence"}, 1.0, 200.0, 0.0),
        ({"reduction": "none"}, 1.0, 200.0, 0.0),
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
@levels
def test_ratios_beyond_float32_stay_finite(
    level: str, options: dict[str, Any], advantage: float, log_ratio: float, log_q: float
) -> None:
    # exp(200) is infinite in float32 (its largest is exp(88.7)) and finite in the oracle's float64
    case = representable(without_ref(small_case(level, **options)))
    logps = oracle.solve(case.but(options={})).logps.reshape(3, 4)
    case.old_logps = logps - log_ratio
    case.sampler_logps = case.old_logps - log_q if "sampler_correction" in options else None
    case.advantages = torch.full((3, 4), advantage).double()
    case = representable(case)
    out, grads = run(case)
    want, want_grads = solve_with_grads(case)
    # a log-prob's error of ~100 roundings in numbers near 200 is the relative error of an unclipped ratio
    assert out.loss.isfinite().all()
    torch.testing.assert_close(out.loss.double(), want.loss.detach(), rtol=1e-4, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), want_grads[name], rtol=1e-4, atol=1e-6, msg=name)
        if torch.count_nonzero(want_grads[name]) == 0:
            assert torch.count_nonzero(grad) == 0, f"{name}: a clipped token has no gradient at all"


@pytest.mark.parametrize("gap", [12.0, 40.0, 80.0])
def test_log_probs_near_zero_and_their_gradients_keep_relative_accuracy(gap: float) -> None:
    # logp = -log1p(7 exp(-gap)), d(-logp) / dz = p_j and -7 p_j at the target; as z - logsumexp and p - 1 they would
    # be 0 from gap 17 on. exp's argument is rounded to float32: gap * 2**-24 = 5e-6 at most
    case = Case(tokens=torch.tensor([3]), advantages=torch.ones(1), logits=torch.zeros(1, 8), normalizer=1.0)
    case.logits[0, 3] = gap
    out, grads = run(case)
    assert out.logps.item() == pytest.approx(-math.log1p(7 * math.exp(-gap)), rel=2e-5)
    want = torch.full((8,), math.exp(-gap) / (1 + 7 * math.exp(-gap)))
    want[3] *= -7
    torch.testing.assert_close(grads["logits"][0], want, rtol=2e-5, atol=0.0)


# Ids


@levels
@pytest.mark.parametrize("bad", [-1, 7, 10**9])
def test_ids_outside_the_vocabulary_are_refused_where_they_can_be_looked_at(
    level: str, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type != "cpu":
        monkeypatch.setenv("PREFIXLOSS_CHECK", "1")
    case = without_ref(small_case(level)).but(sampler_logps=None)
    case.tokens[1, 2] = bad
    with pytest.raises(ValueError, match=rf"tokens.*{bad}"):
        run(case)
    if level == "linear":
        with pytest.raises(ValueError, match=rf"tokens.*{bad}"):
            linear_logps(
                *(on_device(x) for x in (case.hidden.float(), case.weight.float(), case.tokens)), backend="triton"
            )
    run(case.but(mask=case.tokens != bad))  # under the mask any id is right


@levels
@pytest.mark.parametrize("bad", [-1, 7, -(10**6)])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_ids_outside_the_vocabulary_are_never_read_where_nobody_looks(
    level: str, bad: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a GPU without PREFIXLOSS_CHECK: the other tokens are not the worse for it, and the loss cannot look right
    monkeypatch.setattr(check, "readable", lambda _: False)
    case = without_ref(small_case(level, reduction=reduction)).but(sampler_logps=None, mask=None)
    case.tokens[1, 2] = 0
    want, want_grads = run(case)
    case.tokens[1, 2] = bad
    out, grads = run(case)
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out.logps[others], want.logps[others])
    name = leaf_names(case)[0]
    # with "none" the rows of the backward's products are one fewer or more, and may be summed in another order: 7 terms
    got, expected = grads[name][others], want_grads[name][others].double()
    within(got, expected, 8 * SINGLE * expected.abs().max() * torch.ones_like(expected), "others")
