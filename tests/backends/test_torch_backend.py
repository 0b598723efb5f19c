"""What the torch back-end pays for, its matrix products and its memory; and its exactness where that is subtle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefixloss import LossConfig, LossOutput, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends import memory

N, D, V = 12, 8, 40
ROW = 48  # numbers a row of logits takes: whole tiles of 16


class Counter(TorchDispatchMode):
    """Multiply-adds of the matrix products in units of D * V (one token, one product), and the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        if isinstance(result, Tensor) and "view" not in name and result.dim() == 2:
            self.largest = max(self.largest, result.numel())
        return result

    @property
    def tokens_times_products(self) -> float:
        return self.multiply_adds / (D * V)


def inputs(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    tokens = torch.randint(V, (n,), generator=generator)
    advantages = torch.randn(n, generator=generator)
    return hidden, weight, tokens, advantages


def count(step: Callable[[], None]) -> float:
    with Counter() as counter:
        step()
    return counter.tokens_times_products


@pytest.mark.parametrize("learning", [0, 5, N])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_three_products_for_the_tokens_that_learn_and_none_for_the_rest(learning: int, dtype: torch.dtype) -> None:
    hidden, weight, tokens, advantages = inputs(dtype)
    advantages[learning:] = 0
    assert count(lambda: linear_prefix_loss(hidden, weight, tokens, advantages).loss.backward()) == 3 * learning


def test_scored_statistics_cost_one_product_a_token_more() -> None:
    hidden, weight, tokens, advantages = inputs()
    advantages[5:] = 0
    config = LossConfig(stats="scored")
    step = lambda: linear_prefix_loss(hidden, weight, tokens, advantages, config=config).loss.backward()
    assert count(step) == 3 * 5 + (N - 5)


def test_clipped_tokens_leave_the_products_of_the_backward() -> None:
    hidden, weight, tokens, advantages = inputs()
    logps = linear_logps(hidden, weight, tokens).logps.detach()
    old = logps.clone()
    old[:4] -= advantages[:4].sign() * 1.0  # a ratio e or 1/e against the bound on the advantage's side
    step = lambda: linear_prefix_loss(hidden, weight, tokens, advantages, old_logps=old).loss.backward()
    assert count(step) == N + 2 * (N - 4)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_costs_no_product(frozen: str) -> None:
    hidden, weight, tokens, advantages = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    assert count(lambda: linear_prefix_loss(hidden, weight, tokens, advantages).loss.backward()) == 2 * N


def test_without_gradient_only_the_logits_are_made() -> None:
    hidden, weight, tokens, advantages = inputs()
    with torch.no_grad():
        assert count(lambda: linear_prefix_loss(hidden, weight, tokens, advantages) and None) == N
        assert count(lambda: linear_logps(hidden, weight, tokens) and None) == N


@pytest.mark.parametrize(
    "config",
    [LossConfig(ratio_level="sequence"), LossConfig(reduction="none"), LossConfig(row_tolerance=1e-9)],
    ids=str,
)
def test_coefficients_known_late_cost_one_statistics_pass(config: LossConfig) -> None:
    hidden, weight, tokens, advantages = inputs()
    cu_seqlens = torch.tensor([0, 5, N])

    def step() -> None:
        out = linear_prefix_loss(hidden, weight, tokens, advantages, cu_seqlens=cu_seqlens, config=config)
        out.loss.sum().backward()

    assert count(step) == 4 * N


def test_logps_skip_rows_without_incoming_gradient_in_the_backward() -> None:
    hidden, weight, tokens, advantages = inputs()
    advantages[3:] = 0
    logps = linear_logps(hidden, weight, tokens).logps
    assert count(lambda: (logps * advantages).sum().backward()) == 3 * 3


def test_logps_with_a_frozen_head_take_two_products_in_all() -> None:
    hidden, weight, tokens, advantages = inputs()
    weight.requires_grad_(False)
    assert count(lambda: (linear_logps(hidden, weight, tokens).logps * advantages).sum().backward()) == 2 * N


def test_no_tensor_of_all_the_logits_is_ever_made() -> None:
    hidden, weight, tokens, advantages = inputs(n=4 * N)
    with Counter() as counter:
        linear_prefix_loss(hidden, weight, tokens, advantages, config=LossConfig(chunk_tokens=N)).loss.backward()
    # the chunk's rows come in whole tiles of 16
    tile = -(-N // 16) * 16
    assert counter.largest == max(tile * ROW, V * D, 4 * N * D) < 4 * N * V


@pytest.mark.parametrize("vocabulary", [16, 1000, 1024, 32_768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_logits_are_aligned_and_never_whole_pages_apart(vocabulary: int, dtype: torch.dtype) -> None:
    made = memory.room(2, vocabulary, dtype, torch.device("cpu"))
    assert made.shape == (2, vocabulary)
    assert made.dtype == dtype
    assert made.stride(0) % memory.ALIGNED == 0
    assert made.stride(0) * dtype.itemsize % 4096


# 64 bytes a token go to its statistics, the rest of the budget to rows of logits
@pytest.mark.parametrize("budget", [1, 64 * N + 3 * V * 8, 10**9])
def test_memory_budget_bounds_a_chunk(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(budget))
    hidden, weight, tokens, advantages = inputs()
    with Counter() as counter:
        loss = linear_prefix_loss(hidden, weight, tokens, advantages).loss
    rows = min(N, max(1, (budget - 64 * N) // (8 * V)))
    assert counter.largest == max(rows * ROW, V * D)
    monkeypatch.delenv("PREFIXLOSS_MEMORY")
    torch.testing.assert_close(linear_prefix_loss(hidden, weight, tokens, advantages).loss, loss)


def test_a_large_vocabulary_still_has_chunks_worth_a_pass_over_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIXLOSS_MEMORY", raising=False)
    cpu, row = torch.device("cpu"), 2**20
    assert memory.chunk_rows(1300, 1300, row, cpu, None) == 512
    assert memory.chunk_rows(1060, 1060, row, cpu, None) == 384  # three even chunks, in whole tiles
    assert memory.chunk_rows(256, 256, row, cpu, None) == 256
    assert memory.chunk_rows(256, 256, row, cpu, 100) == 100
    # a budget that somebody set is kept
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(2**27))
    assert memory.chunk_rows(256, 256, row, cpu, None) < 128


def test_memory_budget_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXLOSS_MEMORY", "1GB")
    with pytest.raises(ValueError, match="PREFIXLOSS_MEMORY: got '1GB', expected a whole number of bytes"):
        linear_prefix_loss(*inputs())


def gradients(out: LossOutput, *leaves: Tensor, scale: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(out.loss.sum() * scale, leaves, retain_graph=True))


def test_graph_can_be_walked_twice_with_different_scales() -> None:
    hidden, weight, tokens, advantages = inputs()
    out = linear_prefix_loss(hidden, weight, tokens, advantages)
    once, thrice = gradients(out, hidden, weight), gradients(out, hidden, weight, scale=3.0)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_row_tolerance_drops_only_rows_below_it_and_bounds_the_error() -> None:
    hidden, weight, tokens, _ = inputs()
    advantages = torch.logspace(0, -11, N)  # row i's gradient is about 10^-i of the largest
    exact = linear_prefix_loss(hidden, weight, tokens, advantages)
    (want,) = gradients(exact, hidden)
    config = LossConfig(row_tolerance=1e-6)
    (got,) = gradients(linear_prefix_loss(hidden, weight, tokens, advantages, config=config), hidden)
    dropped = (got == 0).all(1)
    assert dropped.tolist() == [False] * 6 + dropped.tolist()[6:8] + [True] * (N - 8)
    torch.testing.assert_close(got[~dropped], want[~dropped])
    # a dropped row's hidden gradient is at most its logit gradient's L1 norm times the head's largest entry
    largest = (2 * advantages[0] * -torch.expm1(exact.logps[0]) / N).item()
    assert want[dropped].abs().max() <= 1e-6 * largest * weight.abs().max() * 10


def test_float16_gradient_waits_for_the_loss_scale() -> None:
    # 2e-9 is far below float16's smallest number, 6e-8; times a loss scale of 65,536 it is 1e-4
    hidden, weight, tokens, advantages = inputs(torch.float16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for make in (
        lambda h, w: linear_prefix_loss(h, w, tokens, advantages, normalizer=5e8).loss,
        lambda h, w: prefix_loss(h @ w.T, tokens, advantages, normalizer=5e8).loss,
        lambda h, w: (linear_logps(h, w, tokens).logps * advantages).sum() / 5e8,
    ):
        got = torch.autograd.grad(make(hidden, weight) * 65536, (hidden, weight))
        want = torch.autograd.grad(make(*exact) * 65536, exact)
        for g, w in zip(got, want, strict=True):
            # one rounding to float16 (2^-11), near its subnormals an absolute 2^-25; logits in float16 for prefix_loss
            torch.testing.assert_close(g.double(), w, rtol=4e-3, atol=4e-7)
            assert bool((g != 0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    hidden, weight, tokens, advantages = inputs(dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    got = gradients(linear_prefix_loss(hidden, weight, tokens, advantages), hidden, weight)
    want = gradients(linear_prefix_loss(*exact, tokens, advantages), *exact)
    half_ulp = torch.finfo(dtype).eps / 2
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        # float32 work before the one rounding adds far less than half an ulp, but may tip a tie
        torch.testing.assert_close(g.double(), w, rtol=1.01 * half_ulp, atol=1e-6)


def test_wider_head_than_hidden_states_keeps_each_dtype() -> None:
    hidden, weight, tokens, advantages = inputs(torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    d_hidden, d_weight = gradients(linear_prefix_loss(hidden, weight, tokens, advantages), hidden, weight)
    assert (d_hidden.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)


def test_inplace_turns_the_logits_into_their_gradient() -> None:
    hidden, weight, tokens, advantages = inputs()
    advantages[::3] = 0
    leaf = (hidden @ weight.T).detach().requires_grad_()
    (want,) = gradients(prefix_loss(leaf, tokens, advantages), leaf)
    logits = leaf.detach().clone().requires_grad_()
    before = logits.detach().clone()
    out = prefix_loss(logits, tokens, advantages, inplace=True)
    assert torch.equal(logits, before)  # the forward leaves them alone
    out.loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, want)
    torch.testing.assert_close(logits.detach(), want)


def test_single_float32_log_prob_is_as_good_as_its_inputs() -> None:
    hidden, weight, tokens, _ = inputs(torch.float32)
    exact = linear_logps(hidden.double(), weight.double(), tokens).logps
    got = linear_logps(hidden, weight, tokens).logps
    # D products and V exponentials in float32: sqrt(D) + sqrt(log2 V) roundings of logits up to 10
    assert (got - exact).abs().max() < 10 * 2**-24 * (math.sqrt(D) + 3)


def test_row_tolerance_keeps_the_largest_gradient_whatever_its_bounds_say() -> None:
    # a saturated softcap: the first row's bound is the largest, its gradient 0; the other rows must stay
    logits = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0] = 400.0
    logits.requires_grad_()
    tokens, advantages = torch.tensor([0, 1, 2]), torch.tensor([100.0, 1.0, 1.0])
    options = {"objective": "reinforce", "softcap": 5.0}
    want = gradients(prefix_loss(logits, tokens, advantages, config=LossConfig(**options)), logits)
    config = LossConfig(**options, row_tolerance=0.05)
    torch.testing.assert_close(gradients(prefix_loss(logits, tokens, advantages, config=config), logits), want)
    # an entropy bonus: uniform logits have the largest entropy and no gradient
    flat = torch.zeros(2, 50, dtype=torch.float64)
    flat[1, 0] = 6.0
    flat.requires_grad_()
    exact, rough = LossConfig(entropy_coef=1.0), LossConfig(entropy_coef=1.0, row_tolerance=0.3)
    arguments = (flat, torch.tensor([0, 0]), torch.zeros(2))
    want = gradients(prefix_loss(*arguments, config=exact), flat)
    torch.testing.assert_close(gradients(prefix_loss(*arguments, config=rough), flat), want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    hidden, weight, tokens, advantages = inputs(torch.float32)
    config = LossConfig(entropy_coef=0.1)
    plain = linear_prefix_loss(hidden, weight, tokens, advantages, config=config, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_prefix_loss(hidden, weight, tokens, advantages, config=config, backend=backend)
        logps = linear_logps(hidden, weight, tokens, backend=backend).logps
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast.logps, plain.logps)
    torch.testing.assert_close(logps, plain.logps)
    got, want = gradients(cast, hidden, weight), gradients(plain, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_tokens_changed_before_the_backward_are_noticed() -> None:
    hidden, weight, tokens, _ = inputs()
    logps = linear_logps(hidden, weight, tokens).logps
    tokens.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_reference_logits_may_not_be_the_logits_that_inplace_overwrites() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    config = LossConfig(kl="full", kl_coef=0.1)
    with pytest.raises(ValueError, match="ref_logits: got the storage of logits"):
        prefix_loss(
            logits, torch.zeros(3).long(), torch.ones(3), ref_logits=logits.detach(), inplace=True, config=config
        )


def test_learning_is_not_the_callers_mask() -> None:
    hidden, weight, tokens, advantages = inputs()
    mask = torch.ones(N, dtype=torch.bool)
    out = linear_prefix_loss(hidden, weight, tokens, advantages, mask=mask, config=LossConfig(entropy_coef=0.1))
    out.learning.fill_(False)
    assert bool(mask.all())


def test_no_token_of_a_half_precision_head_means_no_look_at_the_head() -> None:
    hidden, weight, tokens, advantages = inputs(torch.bfloat16)
    with Counter() as counter:
        linear_prefix_loss(hidden, weight, tokens, advantages * 0).loss.backward()
    assert counter.largest == V * D  # the gradient of the head itself
    assert counter.multiply_adds == 0


@pytest.mark.parametrize("config", [{"kl": "k3"}, None])
def test_config_of_another_type_is_named(config: object) -> None:
    with pytest.raises(TypeError, match=r"config: got (dict|NoneType), expected a LossConfig"):
        linear_prefix_loss(*inputs(), config=config)  # type: ignore[arg-type]


def test_inplace_of_logits_that_are_not_contiguous_overwrites_only_a_copy() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    tokens, advantages = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2)
    before = logits.detach().clone()
    got = gradients(prefix_loss(logits[:, :-1], tokens, advantages, inplace=True), logits)
    assert torch.equal(logits, before)
    torch.testing.assert_close(got, gradients(prefix_loss(logits[:, :-1], tokens, advantages), logits))
