"""The device code, piece by piece: its functions, the objective value by value, and the kernels over rows.

On a CPU it runs in Triton's interpreter, which computes each step with NumPy in float32, or, with `--emulate`, as the
code of a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import CORRECTIONS, KLS, OBJECTIVES, of_objective
from torch import Tensor

import prefixloss.maths.objective as torch_form
from prefixloss import LossConfig
from prefixloss._kernels import distill, launch, problem, rows, scale
from prefixloss._kernels import objective as device_form
from prefixloss._kernels.launch import Launch
from prefixloss._kernels.maths import expm1, log1p, softplus, tanh
from prefixloss._kernels.objective import divergence, policy, sampler_weight, token_terms
from prefixloss._kernels.problem import Problem, Tokens
from prefixloss._kernels.scale import launch_scale
from prefixloss.backends.problem import Head
from prefixloss.backends.triton import problems
from prefixloss.backends.triton.chunks import HeadChunks, Wanted
from prefixloss.inputs.batch import Given
from prefixloss.maths import corrections
from prefixloss.maths.derivatives import ratio_of
from prefixloss.maths.objectives import View

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# for a GPU or the emulator of one: its divisions and exponentials are approximate
COMPILED = not triton.knobs.runtime.interpret
NAN, INF = math.nan, math.inf
# half a unit in the last place of float32, relative
HALF_ULP = 2.0**-24
SMALLEST_NORMAL = 2.0**-126
# by name, what each call compiled, and the types in each kernel's offsets
Compiled = dict[str, dict[str, list[str]]]
NONE, COMPUTED, LEARNING = 0, problem.COMPUTED.value, problem.COMPUTED.value | problem.LEARNING.value


def on_device(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(values).to(device=DEVICE, dtype=dtype)


# --- functions that Triton lacks


@triton.jit
def maths_kernel(x_ptr, out_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    if NAME == "log1p":
        y = log1p(x)
    elif NAME == "expm1":
        y = expm1(x)
    elif NAME == "softplus":
        y = softplus(x)
    else:
        y = tanh(x)
    tl.store(out_ptr + at, y, mask=at < size)


def device_function(name: str, x: Tensor) -> Tensor:
    x = on_device(x)
    out = torch.full_like(x, 7.0)
    maths_kernel[(1,)](x, out, len(x), name, triton.next_power_of_2(len(x)))
    return out.cpu()


def sizes() -> Tensor:
    """From 1e-30 to 1e30, 34 values a factor of ten."""
    return torch.logspace(-30, 30, 2041, dtype=torch.float64).float()


def within(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """NaN and infinities in the same places, and everything else within the bound."""
    got, want = got.double(), want.double()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(want)
    # an overflow of float32 is infinite in the device's result alone
    want = torch.where(want.abs() > torch.finfo(torch.float32).max, want.sign() * INF, want)
    same = (got == want) | (got.isnan() & want.isnan())
    close = want.isfinite() & ((got - want).abs() <= bound)
    wrong = ~(same | close)
    assert not wrong.any(), f"at {wrong.nonzero()[:5].tolist()}: got {got[wrong][:5]}, expected {want[wrong][:5]}"


# Each bound counts half ulps. On a GPU a division may err by 4, log by 2, exp by 4, and exp(x) by 2 |x| more, since
# log2(e) and its product with x are rounded; every other operation errs by 1.


def test_log1p_keeps_its_relative_accuracy_from_1e_30_to_1e30() -> None:
    x = sizes()
    want = torch.log1p(x.double())
    # log, the quotient and the product: 2 + 4 + 1, twice for safety
    within(device_function("log1p", x), want, 14 * HALF_ULP * want)


def test_expm1_keeps_its_relative_accuracy_on_both_sides_of_0() -> None:
    x = torch.cat([-sizes(), sizes()])
    want = torch.expm1(x.double())
    # exp's error is in log(u) too, except that a large x leaves it whole: 2 |x|
    within(device_function("expm1", x), want, (14 + 2 * x.double().clamp(0, 90)) * HALF_ULP * want.abs())


def test_softplus_keeps_its_relative_accuracy_where_it_is_near_0() -> None:
    x = torch.cat([-sizes(), sizes()])
    exact = x.double()
    want = exact.clamp(min=0) + torch.log1p(torch.exp(-exact.abs()))
    # log1p's 14 and exp's 4 + 2 |x|; below the normal numbers float32 has only an absolute accuracy
    bound = (18 + 2 * exact.abs().clamp(max=90)) * HALF_ULP * want + SMALLEST_NORMAL
    within(device_function("softplus", x), want, bound)


def test_tanh_keeps_its_relative_accuracy() -> None:
    x = torch.cat([-sizes(), sizes(), torch.linspace(0.5, 0.75, 2001)])
    want = torch.tanh(x.double())
    # below 0.625 a few roundings; from there on y = 2 / (1 + E) <= 0.45 errs by 5 of itself (the sum, the quotient) and
    # by 0.35 of E's 4 + 4 * 1.25, and the difference by 1: 7.5 of 0.55; nothing is relative below the normal numbers
    within(device_function("tanh", x), want, 14 * HALF_ULP * want.abs() + SMALLEST_NORMAL)


@pytest.mark.parametrize(
    ("name", "x", "want"),
    [
        ("log1p", [0.0, INF, NAN, 3e38], [0.0, INF, NAN, math.log(3e38)]),
        ("expm1", [0.0, INF, -INF, NAN, 89.0], [0.0, INF, -1.0, NAN, INF]),
        ("softplus", [0.0, INF, -INF, NAN], [math.log(2), INF, 0.0, NAN]),
        ("tanh", [0.0, INF, -INF, NAN], [0.0, 1.0, -1.0, NAN]),
    ],
)
def test_functions_at_0_at_infinity_and_at_nan(name: str, x: list[float], want: list[float]) -> None:
    within(device_function(name, torch.tensor(x)), torch.tensor(want), 16 * HALF_ULP * 100)


# --- the objective, against the torch form
# A kernel's own parameter cannot be called `options`: Triton's launcher has that name for its keyword arguments.


@triton.jit
def policy_kernel(a_ptr, logp_ptr, ratio_ptr, out_ptr, size, numbers, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0)
    logp = tl.load(logp_ptr + at, mask=at < size, other=0.0)
    ratio = tl.load(ratio_ptr + at, mask=at < size, other=0.0)
    loss, d_logp = policy(a, logp, ratio, numbers, KIND)
    tl.store(out_ptr + at, loss, mask=at < size)
    tl.store(out_ptr + size + at, d_logp, mask=at < size)


@triton.jit
def weight_kernel(q_ptr, out_ptr, size, numbers, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    q = tl.load(q_ptr + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, sampler_weight(q, numbers, KIND), mask=at < size)


@triton.jit
def divergence_kernel(d_ptr, exact_ptr, out_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    d = tl.load(d_ptr + at, mask=at < size, other=0.0)
    exact = tl.load(exact_ptr + at, mask=at < size, other=0.0)
    kl, slope = divergence(d, exact, KIND)
    tl.store(out_ptr + at, kl, mask=at < size)
    tl.store(out_ptr + size + at, slope, mask=at < size)


@triton.jit
def terms_kernel(
    given_ptr, logp_ptr, entropy_ptr, exact_ptr, out_ptr, size, numbers, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    wanted = at < size
    given = device_form.TokenInputs(
        tl.load(given_ptr + at, mask=wanted, other=0.0),
        tl.load(given_ptr + size + at, mask=wanted, other=0.0),
        tl.load(given_ptr + 2 * size + at, mask=wanted, other=0.0),
        tl.load(given_ptr + 3 * size + at, mask=wanted, other=0.0),
        tl.load(given_ptr + 4 * size + at, mask=wanted, other=0.0),
    )
    logp = tl.load(logp_ptr + at, mask=wanted, other=0.0)
    entropy = tl.load(entropy_ptr + at, mask=wanted, other=0.0)
    exact = tl.load(exact_ptr + at, mask=wanted, other=0.0)
    loss, slopes, ratio, kl = token_terms(given, logp, entropy, exact, numbers, KIND)
    tl.store(out_ptr + at, loss, mask=wanted)
    tl.store(out_ptr + size + at, slopes.logp, mask=wanted)
    tl.store(out_ptr + 2 * size + at, slopes.entropy, mask=wanted)
    tl.store(out_ptr + 3 * size + at, slopes.kl, mask=wanted)
    tl.store(out_ptr + 4 * size + at, ratio, mask=wanted)
    tl.store(out_ptr + 5 * size + at, kl, mask=wanted)


def outputs(count: int, size: int) -> Tensor:
    return torch.full((count, size), 7.0, device=DEVICE)


def neighbours(*bounds: float) -> list[float]:
    """Each bound as float32 rounds it, and the numbers next to it."""
    exact = torch.tensor(bounds)
    return torch.cat([exact, *(torch.nextafter(exact, exact.new_tensor(to)) for to in (0.0, INF))]).tolist()


def columns(*choices: list[float]) -> list[Tensor]:
    """Every combination, as one float32 column for each choice."""
    return list(torch.tensor(list(product(*choices)), dtype=torch.float64).float().T.contiguous())


ADVANTAGES = [-2.0, -1e-3, 0.0, 1e-3, 2.0]
EXTREMES = [0.0, 1e-30, 0.5, 3.7, 20.0, 1e30, INF, NAN]
POLICIES = [
    *(
        LossConfig(objective="clip", clip_low=low, clip_high=high, ratio_cap=cap, dual_clip=dual)
        for (low, high), cap, dual in product([(0.2, 0.28), (0.0, 0.0)], [None, 1.1, 5.0], [None, 3.0])
    ),
    LossConfig(objective="cispo", clip_high=5.0),
    LossConfig(objective="cispo", clip_high=1.0),
    LossConfig(objective="sapo"),
    LossConfig(objective="sapo", sapo_tau=(0.5, 2.0)),
    LossConfig(objective="reinforce"),
    LossConfig(objective="topr"),
]


def name_of(config: LossConfig) -> str:
    defaults = LossConfig().encoded.split()
    return "-".join([config.objective, *(word for word in config.encoded.split() if word not in defaults)])


@pytest.mark.parametrize("config", POLICIES, ids=name_of)
def test_policy_takes_the_torch_form_s_branch_at_every_bound(config: LossConfig) -> None:
    bounds = [1.0, 1 - config.clip_low, 1 + config.clip_high, config.clip_high, config.ratio_cap, config.dual_clip]
    ratios = [*neighbours(*(b for b in bounds if b)), *EXTREMES]
    a, ratio, logp = columns(ADVANTAGES, ratios, [-3.0, 0.0])
    kind, options = problems.objective_of(config, True)
    out = outputs(2, len(a))
    block = triton.next_power_of_2(len(a))
    policy_kernel[(1,)](on_device(a), on_device(logp), on_device(ratio), out, len(a), options, kind, block)
    loss, d_logp = out.cpu()
    leaf = logp.requires_grad_()
    # the ratio itself, so that it is exactly at a bound
    moving = ratio_of(leaf, ratio)
    want = torch_form.policy_losses(
        config, leaf, View(a, None, None, None, moving, None, None, torch_form.NONE, torch_form.NONE)
    )
    (want_slope,) = torch.autograd.grad(want.sum(), leaf)
    want_loss = want.detach()
    assert torch.equal(d_logp == 0, want_slope == 0)
    # without "sapo" both are products in the same order; its sigmoid has an exp of up to 2 (20 - 1), whose error is
    # twice that, and 12 operations
    bound = (24 + 2 * 38) * HALF_ULP if config.objective == "sapo" else 0.0
    within(loss, want_loss, bound * want_loss.abs())
    within(d_logp, want_slope, bound * want_slope.abs())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (0.1, 1.3), (0.0, INF), (1.0, 1.0)], ids=str)
def test_sampler_weight_is_the_torch_form_s_at_and_beside_its_bounds(
    correction: Any, bounds: tuple[float, float]
) -> None:
    config = LossConfig(sampler_correction=correction, sampler_bounds=bounds)
    q = torch.tensor([*neighbours(*bounds), 1.0, *EXTREMES])
    kind, options = problems.objective_of(config, True)
    out = outputs(1, len(q))
    weight_kernel[(1,)](on_device(q), out, len(q), options, kind, triton.next_power_of_2(len(q)))
    want = corrections.BY_NAME[correction](q, *bounds)
    within(out[0].cpu(), want, 0.0)


@pytest.mark.parametrize("kl", KLS)
def test_divergence_is_the_torch_form_s(kl: Any) -> None:
    config = LossConfig(kl=kl, kl_coef=0.1)
    d = torch.tensor([0.0, *(sign * x for x in (1e-30, 1e-6, 1e-3, 1.0, 20.0, 100.0, INF) for sign in (1, -1)), NAN])
    exact = torch.linspace(0, 3, len(d))
    kind, _ = problems.objective_of(config, True)
    out = outputs(2, len(d))
    divergence_kernel[(1,)](on_device(d), on_device(exact), out, len(d), kind, triton.next_power_of_2(len(d)))
    value, slope = out.cpu()
    leaf = torch.zeros_like(d).requires_grad_()
    want_value, _ = torch_form.divergences(config, Given(torch.zeros_like(d), None, None, d), leaf, exact)
    want_slope = torch.zeros_like(d)
    if not config.exact_kl:
        (want_slope,) = torch.autograd.grad(want_value.sum(), leaf)
        want_value = want_value.detach()
    assert torch.equal(slope == 0, want_slope == 0)
    # k3's two terms, of size |expm1(d)| and |d|, cancel near 0: expm1 errs by 14 + 2 |d| half ulps, the torch form by 2
    size = torch.expm1(d.double()).abs() + d.double().abs()
    bound = (18 + 2 * d.double().abs()) * HALF_ULP * size if kl == "k3" else torch.zeros_like(size)
    within(value, want_value, bound)
    within(slope, want_slope, bound)


def terms_configs(objective: str) -> list[tuple[LossConfig, bool]]:
    """Each KL once, with and without old log-probs; every sampler correction, importance and entropy bonus."""
    index = OBJECTIVES.index(objective)
    found = []
    for j, kl in enumerate((None, *KLS)):
        correction = (None, *CORRECTIONS)[(index + j) % 3]
        options = of_objective(objective, kl=kl, sampler_correction=correction)
        options |= {"sampler_bounds": (0.5, 2.0), "entropy_coef": 0.3 * (j % 2), "kl_importance": index % 2 == 1}
        if kl is not None:
            options["kl_coef"] = 0.7
        if objective == "clip":
            options |= {"ratio_cap": 5.0 if j % 2 else None, "dual_clip": 3.0 if j > 1 else None}
        found.append((LossConfig(**options), (index + j) % 2 == 0))
    found.append((LossConfig(**of_objective(objective, kl="k3")), True))  # reported, not penalised
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_token_terms_are_the_torch_form_s(objective: str) -> None:
    # 200 overflows; all log ratios lie away from the bounds, so that an ulp of exp decides nothing
    a, logp, log_ratio, log_q, d = columns(
        ADVANTAGES, [-INF, -5.0, 0.0], [-1.0, 0.0, 0.5, 20.0, 200.0], [-3.0, 0.0, 3.0, 200.0], [-100.0, 0.0, 1e-6, 20.0]
    )
    finite = logp.clamp(min=-5)
    old, entropy, exact = finite - log_ratio, finite.abs() + 0.1, log_ratio.abs() / 100
    for config, off_policy in terms_configs(objective):
        sampler = (old if off_policy else finite) - log_q
        kind, options = problems.objective_of(config, off_policy)
        stacked = torch.stack([a, torch.ones_like(a), old, sampler, finite + d])
        out = outputs(6, len(a))
        terms_kernel[(1,)](
            on_device(stacked), on_device(logp), on_device(entropy), on_device(exact), out, len(a), options, kind,
            triton.next_power_of_2(len(a)),
        )  # fmt: skip
        loss, d_logp, d_entropy, d_kl, ratio, kl = out.cpu()
        given = Given(a, old if off_policy else None, sampler, finite + d)
        want = torch_form.token_terms(config, given, logp, entropy, exact if config.kl == "full" else None)

        impossible = logp == -INF
        assert loss[impossible].isnan().all()
        assert d_logp[impossible].isnan().all()
        # exp of up to 20 and another one of that: 2 (4 + 2 * 20), and 40 for the rest, of the largest of the summands
        bound = 128 * HALF_ULP
        scale = config.kl_coef * (want.ratio.double() if config.kl_importance else 1)
        penalty = (scale * (want.kl.double().abs() + torch.expm1(d.double()).abs() + d.double().abs())).nan_to_num()
        penalty = penalty + config.entropy_coef * entropy
        within(loss, want.loss, bound * (want.loss.abs().double() + 2 * penalty) + SMALLEST_NORMAL)
        within(d_logp, want.d_logp, bound * (want.d_logp.abs().double() + 2 * penalty) + SMALLEST_NORMAL)
        within(ratio, want.ratio, bound * want.ratio)
        within(kl, want.kl, bound * (torch.expm1(d.double()).abs() + d.double().abs()))
        want_entropy, want_kl = (torch.zeros_like(a) if x is None else x for x in (want.d_entropy, want.d_kl))
        within(d_entropy, want_entropy, 0.0)
        within(d_kl, want_kl, bound * want_kl.abs())
        if not config.penalises_kl:
            assert torch.equal(d_logp == 0, want.d_logp == 0)


# --- how a kernel is cut


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32, torch.bfloat16),
]
VOCABULARIES = [1, 2, 7, 31, 127, 128, 129, 255, 1024, 1030, 8192, 8193, 32000, 32769, 50257, 151936, 262144, 300_000]


def bytes_a_thread(chosen: Launch, dtypes: tuple[torch.dtype, ...]) -> float:
    return chosen.block * max(dtype.itemsize for dtype in dtypes) / (32 * chosen.num_warps)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_launch_is_whole_lanes_of_16_bytes_and_few_enough_bytes_a_thread(
    dtypes: tuple[torch.dtype, ...], heavy: bool, aligned: bool
) -> None:
    for vocabulary in VOCABULARIES:
        chosen = launch.launch_for(vocabulary, *dtypes, heavy=heavy, aligned=aligned)
        for number in (chosen.lanes, chosen.vector, chosen.num_warps):
            assert number & (number - 1) == 0
        assert chosen.vector * min(dtype.itemsize for dtype in dtypes) == 16 or (chosen.vector == 1 and not aligned)
        assert chosen.lanes >= 32
        # a lane each for every thread, of 32 or of 64 a warp, unless a single warp has more threads
        assert chosen.lanes >= 64 * chosen.num_warps or chosen.num_warps == 1
        assert bytes_a_thread(chosen, dtypes) <= 64
        # more than one block, or one that is not twice too large
        assert chosen.lanes == 32 or chosen.block <= vocabulary


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_a_heavy_launch_has_fewer_bytes_a_thread(dtypes: tuple[torch.dtype, ...]) -> None:
    for vocabulary in VOCABULARIES[-5:]:
        assert bytes_a_thread(launch.launch_for(vocabulary, *dtypes, heavy=True), dtypes) <= 32


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_splits_are_a_power_of_two_and_never_more_than_blocks(vocabulary: int) -> None:
    device = torch.device("cpu")  # 128 multiprocessors are assumed
    block = launch.launch_for(vocabulary, torch.bfloat16).block
    last = launch._MOST_SPLITS
    for count in (1, 2, 3, 15, 16, 17, 63, 128, 129, 10_000):
        splits = launch.splits_for(count, vocabulary, block, device)
        assert splits & (splits - 1) == 0
        assert 1 <= splits <= max(1, vocabulary // block)
        assert count * splits <= 2 * 128 or splits == 1
        assert splits <= last  # more rows never mean more slices
        last = splits
    assert last == 1


# --- the kernels over rows


SMALL = Launch(32, 4, 1)  # 128 logits a block
GUARD, GAP = 5.0, 256  # between rows, so that two blocks past a row's end would show


def gapped(values: Tensor) -> Tensor:
    """A copy of rows [n, V] with a guard behind each of them."""
    count, vocabulary = values.shape
    storage = torch.full((count, vocabulary + GAP), GUARD, device=values.device, dtype=values.dtype)
    storage[:, :vocabulary] = values
    return storage[:, :vocabulary]


def behind(rows_of: Tensor) -> Tensor:
    """The guards of `gapped`."""
    count, vocabulary = rows_of.shape
    return rows_of.as_strided((count, GAP), (vocabulary + GAP, 1), vocabulary)


class Run:
    """A problem's outputs, poisoned before the launch."""

    def __init__(self, problem: Problem, splits: int = 1, grads: Tensor | None = None) -> None:
        device = problem.logits.device
        guarded = grads is None
        self.grads = gapped(torch.full_like(problem.logits, NAN)) if grads is None else grads
        self.stats = torch.full((7, problem.count), NAN, device=device)
        # several programs a row take the coefficients of tokens that were not computed from `terms`
        self.terms = torch.full((6, problem.count), NAN if splits == 1 else 0.0, device=device)
        self.scales = torch.full((problem.rows,), NAN, device=device)
        problems.run(problem, self.stats, self.terms, self.grads, self.scales, splits)
        if guarded:
            assert (behind(self.grads) == GUARD).all()


def make(
    logits: Tensor,
    config: LossConfig = LossConfig(objective="reinforce"),
    *,
    ref: Tensor | None = None,
    ids: Any = None,
    flags: Any = None,
    given: Tensor | None = None,
    which: Tensor | None = None,
    grads: torch.dtype | None = None,
    cut: Launch = SMALL,
    **work: bool,
) -> Problem:
    """A problem whose tokens all learn, with advantage -1 and weight 1, unless given otherwise."""
    count = logits[..., 0].numel() if ids is None else len(ids)
    ids = torch.arange(count) % logits.shape[-1] if ids is None else ids
    if given is None:
        given = torch.zeros(5, count)
        given[0], given[1] = -1.0, 1.0
    tokens = Tokens(
        on_device(ids, torch.int64),
        on_device([LEARNING] * count if flags is None else flags, torch.uint8),
        on_device(given),
        on_device(torch.arange(count) if which is None else which, torch.int64),
    )
    asked = {"terms": True, "gradient": True, "clear": True, "indexed": which is not None, **work}
    problem = problems.problem_of(config, logits, ref, tokens, False, grads or logits.dtype, **asked)
    return dataclasses.replace(problem, launch=cut)


def random_logits(count: int, vocabulary: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return on_device(3 * torch.randn(count, vocabulary, generator=generator))


def exact(problem: Problem, config: LossConfig) -> tuple[Tensor, Tensor]:
    """logp, entropy and KL [3, n], and the gradient of the logits, by autograd in float64; all tokens learn."""

    def scores(z: Tensor) -> Tensor:
        z = z * config.logit_scale
        return (z if config.softcap is None else config.softcap * torch.tanh(z / config.softcap)) / config.temperature

    leaf = problem.logits.double().requires_grad_()
    log_p = scores(leaf).log_softmax(1)
    log_q = scores(problem.ref.double()).log_softmax(1)
    logp = log_p.gather(1, problem.tokens.ids_ptr[:, None]).squeeze(1)
    entropy, kl = -(log_p.exp() * log_p).sum(1), (log_p.exp() * (log_p - log_q)).sum(1)
    advantage, weight = problem.tokens.given_ptr[:2].double()
    loss = -advantage * logp - config.entropy_coef * entropy + config.kl_coef * kl
    (weight * loss).sum().backward()
    assert leaf.grad is not None
    return torch.stack([logp, entropy, kl]).detach().cpu(), leaf.grad.cpu()


PLAIN = LossConfig(objective="reinforce")
ALL = LossConfig(objective="reinforce", kl="full", kl_coef=-0.4, entropy_coef=0.2, softcap=6.0, temperature=1.4)
PENALTIES = LossConfig(objective="reinforce", kl="full", kl_coef=0.4, entropy_coef=0.2)
SOFTCAP = LossConfig(objective="reinforce", softcap=4.0, logit_scale=1.3, temperature=0.7)
# scores of up to 15 are rounded by 15 half ulps, exp makes that their relative error, and the sums, a log and the
# products that follow double it a few times; log-probs and entropies are as large as that again
STATISTICS = 40 * 15 * HALF_ULP
several_splits = pytest.mark.parametrize("splits", [1, 4])


# 1: no other token. 7: less than a block. 128: one whole block. 300: two and a rest. 640: with 4 slices of two blocks
# the last one begins behind the row's end
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 300, 640])
@pytest.mark.parametrize("config", [PLAIN, SOFTCAP, PENALTIES, ALL], ids=name_of)
def test_any_number_of_slices_gives_float64_s_statistics_and_gradient(config: LossConfig, vocabulary: int) -> None:
    logits, ref = random_logits(2, vocabulary), random_logits(2, vocabulary, 1)
    given = torch.zeros(5, 2)
    given[0], given[1] = torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 0.25])
    problem = make(logits, config, ref=ref, ids=[vocabulary // 2, vocabulary - 1], given=given)
    want, want_grads = exact(problem, config)
    known = 3 if problem.work.reference else 2
    largest = want_grads.abs().amax(1, keepdim=True)
    for splits in (1, 2, 4, 16) if (config, vocabulary) == (PLAIN, 640) else (1, 4):
        run = Run(problem, splits)
        within(run.stats[:known].cpu(), want[:known], STATISTICS)
        # where all is certain what remains is the penalties' rounding, and the log of 1: on a GPU within 2^-22
        within(run.grads.cpu(), want_grads, STATISTICS * largest + 4 * HALF_ULP)


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_a_second_run_is_the_same_to_the_bit(splits: int) -> None:
    problem = make(random_logits(2, 300), ALL, ref=random_logits(2, 300, 1))
    first, second = Run(problem, splits), Run(problem, splits)
    for x, y in ((first.grads, second.grads), (first.stats, second.stats), (first.terms, second.terms)):
        assert torch.equal(x, y)


@several_splits
def test_rows_that_are_not_computed_are_never_read_and_get_exactly_0(splits: int) -> None:
    logits, ref = random_logits(5, 300), random_logits(5, 300, 1)
    flags = [LEARNING, NONE, LEARNING, COMPUTED, NONE]
    others, computed = [1, 4], [0, 2, 3]
    given, ids = torch.zeros(5, 5), torch.tensor([5, -7, 299, 3, 10**12])
    given[0], given[1] = -1.0, 1.0
    clean = Run(make(logits, PENALTIES, ref=ref, ids=ids, flags=flags, given=given), splits)
    logits[others], ref[others], given[:, others] = NAN, NAN, NAN
    run = Run(make(logits, PENALTIES, ref=ref, ids=ids, flags=flags, given=given), splits)
    assert torch.equal(run.grads, clean.grads)
    assert torch.equal(run.stats[:, computed], clean.stats[:, computed])
    assert torch.equal(run.terms[:, computed], clean.terms[:, computed])
    assert not run.stats[:, computed].isnan().any()
    assert (run.grads[[0, 2]] != 0).all()
    assert (run.grads[[1, 3, 4]] == 0).all()  # the fourth is computed and does not learn
    # what was there before the launch
    assert run.stats[:, others].isnan().all()
    assert (run.terms[:, others].isnan() if splits == 1 else run.terms[:, others] == 0).all()


@several_splits
def test_rows_without_coefficients_are_never_read_for_the_gradient(splits: int) -> None:
    logits = random_logits(4, 300)
    stats = Run(make(logits, ids=[5, 0, 299, 0])).stats
    problem = make(logits, ids=[5, -7, 299, 10**12])
    coefficients = on_device([[0.5, 0, -1, 0]] + 2 * [[0, 0, 0, 0]])
    clean, poisoned = torch.full_like(logits, NAN), torch.full_like(logits, NAN)
    rows.launch_gradient(problem, stats, coefficients, clean, stats, splits)
    logits[[1, 3]], stats[:, [1, 3]] = NAN, NAN
    rows.launch_gradient(problem, stats, coefficients, poisoned, stats, splits)
    assert torch.equal(poisoned, clean)
    assert (clean[[1, 3]] == 0).all()
    assert (clean[[0, 2]] != 0).all()


@several_splits
def test_without_clear_rows_without_gradient_keep_what_was_there(splits: int) -> None:
    problem = make(random_logits(3, 300), flags=[LEARNING, COMPUTED, NONE], clear=False)
    run = Run(problem, splits, torch.full_like(problem.logits, 9.0))
    assert (run.grads[1:] == 9).all()
    assert (run.grads[0] != 9).all()


# 640 columns are 5 blocks: 4 slices have two each, and the last one begins a block behind the row's end. 1100 are 9
@pytest.mark.parametrize(("vocabulary", "splits"), [(640, 4), (1100, 8)])
@pytest.mark.parametrize("flag", [NONE, COMPUTED, LEARNING])
def test_a_slice_behind_the_end_of_its_row_writes_nothing(vocabulary: int, splits: int, flag: int) -> None:
    problem = make(random_logits(2, vocabulary), flags=[LEARNING, flag])
    run = Run(problem, splits)  # looks behind each row
    assert (run.grads[0] != 0).all()
    assert (run.grads[1] != 0).all() == (flag == LEARNING)


# targets in the first, a middle and the last slice
@pytest.mark.parametrize(("vocabulary", "splits"), [(300, 1), (300, 2), (640, 4)])
@pytest.mark.parametrize("config", [PLAIN, ALL], ids=name_of)
def test_in_place_the_gradient_is_the_same_to_the_bit(config: LossConfig, vocabulary: int, splits: int) -> None:
    logits = gapped(random_logits(4, vocabulary))
    problem = make(
        logits, config, ref=random_logits(4, vocabulary, 1), ids=[0, vocabulary // 2, vocabulary - 1, 3],
        flags=[LEARNING, LEARNING, LEARNING, NONE],
    )  # fmt: skip
    apart = Run(problem, splits)
    in_place = Run(problem, splits, logits)
    assert torch.equal(in_place.grads, apart.grads)
    assert torch.equal(in_place.stats[:, :3], apart.stats[:, :3])
    assert (behind(logits) == GUARD).all()


def among_nan(values: Tensor, base: int = 0) -> tuple[Tensor, Tensor]:
    """A copy of rows [n, V] that start anywhere, from element `base` on, and the memory of NaN that they lie in."""
    count, vocabulary = values.shape
    step = vocabulary + 16  # whole vectors
    memory = torch.full((base + count * step + 16,), NAN, device=values.device, dtype=values.dtype)
    rows_of = memory.as_strided((count, vocabulary), (step, 1), base)
    return rows_of.copy_(values), memory


# 1 and 3: less than a vector. 11: some rows have no whole one. 133 and 301: a block and a rest. 769: 4 slices, the last
# of one column, which may lie before its first whole vector. A base that is no multiple of 16 bytes narrows the loads
@pytest.mark.parametrize(
    ("config", "dtype", "vocabulary", "base", "splits"),
    [
        (PLAIN, torch.float16, 1, 0, 1),
        (PLAIN, torch.bfloat16, 3, 1, 1),
        (ALL, torch.bfloat16, 11, 8, 1),
        (ALL, torch.float32, 133, 0, 1),
        (PENALTIES, torch.float16, 301, 3, 4),
        (PLAIN, torch.bfloat16, 769, 0, 4),
    ],
)
def test_rows_that_start_anywhere_read_and_write_nothing_around_them(
    config: LossConfig, dtype: torch.dtype, vocabulary: int, base: int, splits: int
) -> None:
    """In place too, where neither a gradient nor a neighbour may be taken for a logit."""
    flags = [LEARNING, LEARNING, NONE, LEARNING, COMPUTED]
    learning = [0, 1, 3]
    values, ref_values = (random_logits(5, vocabulary, seed).to(dtype) for seed in (0, 1))
    values[2], ref_values[2] = NAN, NAN
    (logits, memory), (ref, _) = among_nan(values, base), among_nan(ref_values, base)
    # targets in both ends of a row and between them
    ids, cut = [0, vocabulary - 1, 10**12, vocabulary // 2, 0], Launch(32, 16 // dtype.itemsize, 1)
    problem = make(logits, config, ref=ref, ids=ids, flags=flags, cut=cut, clear=False)
    assert (problem.work.aligned, problem.work.peeled) == (False, True)
    problem.tokens.ids_ptr[2] = 0  # for autograd, which has no flags
    want, want_grads = exact(problem, config)
    problem.tokens.ids_ptr[2] = 10**12

    grads, around = among_nan(torch.full_like(logits, NAN), base)
    apart = Run(problem, splits, grads)
    assert memory.isnan().sum() == len(memory) - 4 * vocabulary
    assert around.isnan().sum() == len(memory) - 3 * vocabulary
    known = 3 if problem.work.reference else 2
    within(apart.stats[:known, [0, 1, 3, 4]].cpu(), want[:known, [0, 1, 3, 4]], STATISTICS)
    want_grads = want_grads[learning]
    # Triton's interpreter cuts bfloat16 off, by up to a unit in the last place; 2^-25 is half of float16's smallest
    rounded = torch.finfo(dtype).eps * want_grads.abs() + 2.0**-25
    bound = rounded + STATISTICS * want_grads.abs().amax(1, keepdim=True) + 4 * HALF_ULP
    within(grads[learning].cpu(), want_grads, bound)

    before = memory.clone()
    in_place = Run(problem, splits, logits)
    assert torch.equal(in_place.stats[:known, learning], apart.stats[:known, learning])
    assert torch.equal(logits[learning], grads[learning])
    logits[learning] = values[learning]
    assert torch.equal(memory.nan_to_num(7.0), before.nan_to_num(7.0))


@several_splits
def test_rows_without_gradient_that_start_anywhere_are_cleared(splits: int) -> None:
    problem = make(random_logits(4, 301), flags=[LEARNING, COMPUTED, NONE, LEARNING])
    assert problem.work.peeled
    run = Run(problem, splits)  # looks behind each row
    assert (run.grads[1:3] == 0).all()
    assert (run.grads[[0, 3]] != 0).all()


def test_rows_are_read_one_logit_at_a_time_where_no_vector_is_everybody_s() -> None:
    odd = random_logits(3, 301)
    assert make(odd).work.peeled
    # a lane's columns depend on where in the batch the row lies, and so do a token's bits
    assert not make(odd, dataclasses.replace(PLAIN, chunk_tokens=4)).work.peeled
    # rows that start elsewhere than the reference's, or the gradient's
    assert not make(odd, ALL, ref=torch.zeros(3, 304, device=DEVICE)[:, :301]).work.peeled
    assert not make(torch.zeros(3, 302, device=DEVICE)[:, :301]).work.peeled
    sequences = torch.zeros(2, 4, 301, device=DEVICE)
    assert make(sequences).work.peeled
    assert not make(sequences[:, :-1]).work.peeled
    assert make(sequences[:1, :-1]).work.peeled  # where a second sequence would start matters to nobody


def head_chunks(size: int, vocabulary: int, dtype: torch.dtype) -> HeadChunks:
    """Room for chunks of `size` rows whose gradients have that dtype."""
    head = Head(torch.zeros(size, 2, device=DEVICE), torch.zeros(vocabulary, 2, device=DEVICE), None)
    chunks = HeadChunks(head, None, Wanted(torch.arange(size, device=DEVICE), None), size)
    chunks.grads_dtype = dtype
    return chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("config", "vocabulary"), [(PLAIN, 1), (PLAIN, 256), (PLAIN, 1030), (ALL, 7), (ALL, 300)])
def test_narrowed_gradients_equal_those_in_a_room_apart(
    config: LossConfig, vocabulary: int, dtype: torch.dtype
) -> None:
    chunks = head_chunks(3, vocabulary, dtype)
    room = chunks.rooms[0].logits
    logits = room[:3]  # products have more rows
    logits.copy_(random_logits(3, vocabulary))
    narrow = chunks.gradient_over(room)[:3]
    assert narrow.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    problem = make(
        logits, config, ref=random_logits(3, vocabulary, 1), ids=[0, vocabulary - 1, 0],
        flags=[LEARNING, LEARNING, COMPUTED], grads=dtype, cut=Launch(32, 8, 1), rescaled=dtype == torch.float16,
    )  # fmt: skip
    apart = Run(problem, 1, chunks.gradient_apart()[:3].fill_(NAN))
    together = Run(dataclasses.replace(problem, work=problem.work._replace(narrowed=True)), 1, narrow)
    assert not apart.grads.isnan().any()
    assert torch.equal(together.grads, apart.grads)
    assert (together.grads[2] == 0).all()
    assert torch.equal(together.scales, apart.scales) == (dtype == torch.float16)


@several_splits
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_rescaled_rows_fill_float16_and_say_by_how_much(entropy_coef: float, splits: int) -> None:
    config = LossConfig(objective="reinforce", entropy_coef=entropy_coef, temperature=0.7)
    logits, given = random_logits(6, 300), torch.zeros(5, 6)
    given[0], given[1] = torch.tensor([-1.0, 1.0, -3e4, 1e-35, -1e30, 0.0]), 1.0
    flags = [LEARNING] * 5 + [COMPUTED]
    problem = make(logits, config, given=given, flags=flags, grads=torch.float16, rescaled=True)
    run = Run(problem, splits, torch.full_like(logits, NAN, dtype=torch.float16))
    scales = run.scales.double().cpu()
    assert torch.equal(scales.log2(), scales.log2().round())
    assert scales[5] == 2.0**120  # such a row never limits the scale of a sum
    _, want = exact(problem, config)
    want[5] = 0
    # half of float16's ulp is 2^-11 relative, and 2^-25 of the scale where it has no normal numbers
    bound = 1.1 * 2.0**-11 * want.abs() + 2.0**-24 / scales[:, None]
    within(run.grads.double().cpu() / scales[:, None], want, bound)
    # the bound on a row's largest gradient, times its scale
    entropy = run.stats[1].double().cpu()
    largest = (given[0].abs() + entropy_coef * (1 + entropy)) / config.temperature * scales
    assert (largest[:5] <= 2.0**14).all()
    assert (largest[:5] >= 2.0**13).tolist() == [True, True, True, entropy_coef > 0, True]  # 1e-35 meets the limit


@several_splits
@pytest.mark.parametrize("kl_coef", [0.5, 2e5])
def test_a_rescaled_row_s_scale_knows_how_large_the_kl_s_gradient_may_be(kl_coef: float, splits: int) -> None:
    # no advantage: all of the gradient is the KL's, p (log p - log q - K), at most 1 + 2 K
    config = LossConfig(objective="reinforce", kl="full", kl_coef=kl_coef)
    logits, given = random_logits(3, 300), torch.zeros(5, 3)
    given[1] = 1.0
    problem = make(logits, config, ref=random_logits(3, 300, 1), given=given, grads=torch.float16, rescaled=True)
    run = Run(problem, splits, torch.full_like(logits, NAN, dtype=torch.float16))
    scales = run.scales.double().cpu()
    (_, _, kl), want = exact(problem, config)
    largest = kl_coef * (1 + 2 * kl) * scales
    assert (largest <= 2.0**14).all()
    assert (largest >= 2.0**13).all()
    bound = 1.1 * 2.0**-11 * want.abs() + 2.0**-24 / scales[:, None]
    within(run.grads.double().cpu() / scales[:, None], want, bound + STATISTICS * want.abs().amax(1, keepdim=True))


def test_a_nan_shows_in_a_rescaled_row() -> None:
    logits = random_logits(2, 300)
    logits[1, 7] = NAN
    run = Run(make(logits, grads=torch.float16, rescaled=True), 1, torch.zeros_like(logits, dtype=torch.float16))
    assert run.grads[1].isnan().all()
    assert run.grads[0].isfinite().all()


@several_splits
def test_rows_of_a_slice_of_a_longer_batch_are_found(splits: int) -> None:
    whole = random_logits(2 * 4, 330).reshape(2, 4, 330)
    part, ids = whole[:, 1:3, 10:310], torch.arange(4)
    flat = Run(make(part.reshape(4, 300), ids=ids), splits)
    room = torch.full_like(whole, GUARD)
    run = Run(make(part, ids=ids), splits, room[:, 1:3, 10:310])
    # rows that start elsewhere have a kernel of their own, whose sums the compiler may fuse otherwise
    within(run.grads.reshape(4, 300).cpu(), flat.grads.double().cpu(), STATISTICS * flat.grads.abs().max().item())
    within(run.stats.cpu(), flat.stats.double().cpu(), STATISTICS * flat.stats.abs().max().item())
    assert (room == GUARD).sum() == whole.numel() - part.numel()


@several_splits
def test_indexed_rows_take_the_values_of_their_tokens(splits: int) -> None:
    logits, given = random_logits(3, 300), torch.rand(5, 6)
    ids, which = torch.tensor([9, 8, 7, 6, 5, 4]), torch.tensor([4, 1, 5])
    run = Run(make(logits, ids=ids, given=given, which=which), splits)
    plain = Run(make(logits, ids=ids[which], given=given[:, which]), splits)
    assert torch.equal(run.grads, plain.grads)
    assert torch.equal(run.stats[:, which], plain.stats)
    assert torch.equal(run.terms[:, which], plain.terms)
    assert run.stats[:, [0, 2, 3]].isnan().all()


@several_splits
def test_an_id_outside_the_vocabulary_is_nan_and_never_read(splits: int) -> None:
    logits = random_logits(6, 300)
    # modulo 2^32 two of them are inside
    run = Run(make(logits, ids=[5, -1, 300, -(2**32) + 3, 2**32 + 5, 7]), splits)
    right = Run(make(logits[[0, 5]], ids=[5, 7]), splits)
    assert run.stats[0, 1:5].isnan().all()
    assert run.terms[0, 1:5].isnan().all()
    assert run.grads[1:5].isnan().any(1).all()
    assert torch.equal(run.grads[[0, 5]], right.grads)
    assert torch.equal(run.stats[:, [0, 5]], right.stats)


@several_splits
def test_a_nan_logit_shows_in_everything_of_its_row(splits: int) -> None:
    logits = random_logits(4, 300)
    for row, column in enumerate((0, 5, 299)):  # 5 is the target's
        logits[row, column] = NAN
    run = Run(make(logits, ids=[5] * 4), splits)
    assert run.stats[:2, :3].isnan().all()
    assert run.terms[0, :3].isnan().all()
    assert run.grads[:3].isnan().all()
    assert run.grads[3].isfinite().all()


@several_splits
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_banned_tokens_have_no_probability_and_no_gradient(softcap: float | None, splits: int) -> None:
    config = LossConfig(objective="reinforce", softcap=softcap, kl="full", kl_coef=0.3, entropy_coef=0.1)
    logits, ref = random_logits(3, 300), random_logits(3, 300, 1)
    banned = torch.zeros(3, 300, dtype=torch.bool, device=DEVICE)
    banned[0, 1::2] = banned[1, :256] = banned[2, 7:] = True  # the second: whole blocks of them
    run = Run(make(logits.masked_fill(banned, -INF), config, ref=ref, ids=[2, 299, 3]), splits)
    assert run.stats.isfinite().all()
    assert run.grads.isfinite().all()
    assert (run.grads[banned] == 0).all()
    for row in range(3):  # the same without the banned tokens; the reference's own sum has them
        kept = ~banned[row]
        z, r = logits[row].double(), ref[row].double()
        if softcap is not None:
            z, r = softcap * torch.tanh(z / softcap), softcap * torch.tanh(r / softcap)
        log_p, log_q = z[kept].log_softmax(0), r.log_softmax(0)[kept]
        entropy, kl = -(log_p.exp() * log_p).sum(), (log_p.exp() * (log_p - log_q)).sum()
        within(run.stats[1:3, row].cpu(), torch.stack([entropy, kl]).cpu(), STATISTICS)


@several_splits
def test_a_reference_that_bans_what_the_policy_may_say_has_infinite_kl(splits: int) -> None:
    ref = random_logits(2, 300)
    ref[1, 40] = -INF
    run = Run(make(random_logits(2, 300), PENALTIES, ref=ref), splits)
    assert run.stats[2].isfinite().tolist() == [True, False]
    assert run.stats[2, 1] == INF


@several_splits
def test_a_banned_reference_of_a_probability_that_vanishes_counts_for_nothing(splits: int) -> None:
    """Such a token comes long before the largest: what was summed of it so far is infinite."""
    logits, ref = random_logits(2, 300), random_logits(2, 300)
    logits[:, 290] += 400
    ref[1, 3] = -INF
    run = Run(make(logits, PENALTIES, ref=ref), splits)
    assert run.stats[2].isfinite().all()


@several_splits
def test_equal_logits_of_any_size_are_uniform(splits: int) -> None:
    logits = on_device([-1e30, -3e4, 0.0, 3e4, 1e30])[:, None].expand(5, 300).contiguous()
    run = Run(make(logits, ids=[0, 299, 150, 1, 2]), splits)
    # the log of an exact sum: 4 for a GPU's base-2 log, and one each for ln 2, the product and two sums
    within(run.stats[0].cpu(), torch.full((5,), -math.log(300)), 8 * HALF_ULP * math.log(300))
    within(run.stats[1].cpu(), torch.full((5,), math.log(300)), 8 * HALF_ULP * math.log(300))


@several_splits
def test_a_log_prob_near_0_and_its_gradient_keep_their_relative_accuracy(splits: int) -> None:
    # one token `gap` above 299 equal others: logp = -log(1 + 299 exp(-gap)), down to -5e-33
    gaps = torch.tensor([5.0, 20.0, 40.0, 80.0], dtype=torch.float64)
    logits = torch.zeros(4, 300, device=DEVICE)
    logits[:, 140] = on_device(gaps)
    run = Run(make(logits, ids=[140] * 4), splits)
    odds = 299 * torch.exp(-gaps)
    # exp of a gap errs by up to 2 gap half ulps; the log of the sum, of size 6, and its difference to the gap by more
    # before an exp makes that relative
    bound = (28 + 4 * gaps) * HALF_ULP
    within(run.stats[0].cpu(), -torch.log1p(odds), bound * torch.log1p(odds))
    within(run.grads[:, 140].cpu(), odds / (1 + odds), bound * odds / (1 + odds))


@several_splits
@pytest.mark.parametrize("target", [140, 3])
def test_an_entropy_near_0_keeps_its_relative_accuracy(target: int, splits: int) -> None:
    # one token `gap` above 299 equal others, R = 299 exp(-gap): H = log(1 + R) + gap R / (1 + R). Of the two places
    # that make the logarithm one is for a target at the top, the other for one below it, where 1 + R is rounded
    gaps = torch.tensor([5.0, 20.0, 40.0, 80.0] if target == 140 else [5.0], dtype=torch.float64)
    logits = torch.zeros(len(gaps), 300, device=DEVICE)
    logits[:, 140] = on_device(gaps)
    ref = torch.zeros_like(logits)
    run = Run(make(logits, PENALTIES, ref=ref, ids=[target] * len(gaps)), splits)
    rest = 299 * torch.exp(-gaps)
    entropy = torch.log1p(rest) + gaps * rest / (1 + rest)
    # exp's error as for a log-prob, and a few sums and quotients of terms that all have one sign
    within(run.stats[1].cpu(), entropy, (40 + 4 * gaps) * HALF_ULP * entropy)


def test_an_unlikely_token_keeps_its_log_prob_where_its_probability_underflows() -> None:
    logits = torch.zeros(1, 300, device=DEVICE)
    logits[0, 2] = 500.0
    assert Run(make(logits, ids=[0])).stats[0, 0].item() == -500.0


def test_a_token_that_is_all_there_is_is_certain() -> None:
    run = Run(make(torch.full((1, 1), 2.0, device=DEVICE)))
    assert run.stats[:2, 0].tolist() == [0.0, 0.0]
    assert run.grads.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("others", "target"), [(-INF, -INF), (-INF, NAN), (0.0, -INF), (0.0, INF), (INF, INF)], ids=str
)
@several_splits
def test_a_row_without_a_log_prob_is_never_a_silent_number(others: float, target: float, splits: int) -> None:
    logits = torch.full((1, 300), others, device=DEVICE)
    logits[0, 7] = target
    run = Run(make(logits, ids=[7]), splits)
    assert not run.stats[0].isfinite().any()
    assert run.terms[0].isnan().all()  # the loss


# --- what is compiled


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """What `mock_driver` says; nothing of it needs a device."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("PREFIXLOSS_AUTOTUNE", None)
    program = Path(__file__).parents[1] / "mock_driver.py"
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_computes_its_offsets_in_64_bits(compiler: Compiled) -> None:
    offsets = compiler["offsets"]
    assert set(offsets) == {"row_kernel", "slice_kernel", "combine_kernel", "gradient_kernel", "distill_kernel"}
    for kernel, types in offsets.items():
        assert len(types) > 5, kernel
        assert set(types) == {"i64"}, kernel


@pytest.mark.parametrize(("tensors", "runs_on"), [("cuda:1", 1), ("xpu:1", 1), ("cpu", 0)])
def test_a_kernel_runs_where_its_tensors_are_whatever_device_is_current(
    compiler: Compiled, tensors: str, runs_on: int
) -> None:
    asked = dict(compiler["devices"][tensors])
    assert asked.pop("after") == [0]  # the caller's current device is as it was
    launchers = {name for module in (distill, rows, scale) for name in vars(module) if name.startswith("launch_")}
    assert set(asked) == launchers  # none is forgotten
    assert all(devices == [runs_on] for devices in asked.values()), asked


# 32 warps of 32 lanes, or 16 of 64: more threads no device starts
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_autotuning_tries_no_more_threads_than_a_program_may_have(compiler: Compiled, target: str) -> None:
    assert len(compiler["tuned"][target]) > 2
    assert max(compiler["tuned"][target]) == 1024


def test_a_call_compiles_one_kernel_and_few_rows_three(compiler: Compiled) -> None:
    variants = compiler["variants"]
    assert variants["first"] == ["row_kernel"]
    assert variants["head"] == ["row_kernel"]
    assert variants["few rows"] == ["combine_kernel", "gradient_kernel", "slice_kernel"]


@pytest.mark.parametrize(
    "change",
    [
        "more tokens",
        "another length",
        "another shape",
        "another length of an odd vocabulary",
        "a longer odd vocabulary",
        "head of more tokens",
        "head in other chunks",
        "as few rows",
        "other few rows",
        "distillation of more tokens",
        "another list",
        "a list of one",
    ],
)
def test_another_number_of_tokens_compiles_nothing(compiler: Compiled, change: str) -> None:
    assert compiler["variants"][change] == []


@pytest.mark.parametrize(
    "change",
    [
        "another temperature",
        "other coefficients",
        "another entropy coefficient",
        "another softcap",
        "a whole softcap",
        "another whole softcap",
        "another beta",
    ],
)
def test_another_number_in_the_options_compiles_nothing(compiler: Compiled, change: str) -> None:
    assert compiler["variants"][change] == []


@pytest.mark.parametrize("change", ["entropy", "softcap", "another objective", "another dtype", "an odd vocabulary"])
def test_what_the_kernel_is_compiled_for_compiles_one_more(compiler: Compiled, change: str) -> None:
    assert compiler["variants"][change] == ["row_kernel"]


@pytest.mark.parametrize("change", ["distillation", "another divergence", "a list", "a longer list"])
def test_a_distillation_is_one_kernel(compiler: Compiled, change: str) -> None:
    assert compiler["variants"][change] == ["distill_kernel"]


# --- a gradient times a number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (4096,), (3, 4097), (0, 5), (2, 9, 4096), (17, 4097)], ids=str)
def test_scale_multiplies_in_float32_and_leaves_the_rest_of_the_storage(
    dtype: torch.dtype, shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scale, "processors", lambda device: 1
    )  # eight programs, so the last two have up to three blocks
    count = math.prod(shape)
    storage = on_device(torch.linspace(-3, 3, count + 8), dtype)
    before = storage.clone()
    launch_scale(storage[:count].reshape(shape), on_device(1.7))
    # rounded to nearest on a GPU; the interpreter may take the other neighbour
    bound = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    want = before[:count].float() * on_device(1.7)
    subnormal = 0.0 if dtype == torch.float32 else 2.0**-24
    within(storage[:count].float().cpu(), want.cpu(), bound * want.abs().cpu() + subnormal)
    assert torch.equal(storage[count:], before[count:])


def test_scale_by_1_writes_nothing_and_by_nan_everything() -> None:
    x = on_device(torch.arange(5.0))
    poison = x.clone()
    poison[2] = NAN
    launch_scale(poison, on_device(1.0))
    assert poison.isnan().tolist() == [False, False, True, False, False]
    launch_scale(x, on_device(NAN))
    assert x.isnan().all()
