"""A head in half precision as a GPU multiplies it, on a CPU: narrow gradients, float16's scales, float32 results.

A CPU's library has no product of half-precision inputs with a float32 result, so the kernels' half-precision way never
runs there. Here `torch.mm` and `torch.addmm` have one, made by multiplying in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import allowed, leaf_names, representable, small_case, solve_with_grads, within
from oracle import Case
from torch import Tensor

from prefixloss import LossConfig, linear_logps, linear_prefix_loss
from prefixloss._kernels import launch
from prefixloss.backends import products
from prefixloss.backends.triton import chunks

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def with_float32_result(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def multiply(*inputs: Tensor, out_dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        if out_dtype is None:
            return function(*inputs, **more)
        assert out_dtype == torch.float32
        assert inputs[-1].dtype in HALVES, "only half-precision inputs come this way"
        assert inputs[-1].dtype == inputs[-2].dtype
        return function(*(x.float() for x in inputs), **more)

    return multiply


@pytest.fixture(autouse=True)
def products_of_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's library has them."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(torch, "mm", with_float32_result(torch.mm))
    monkeypatch.setattr(torch, "addmm", with_float32_result(torch.addmm))
    monkeypatch.setattr(products, "_has_float32_result", lambda device, dtype: True)


def half_case(dtype: torch.dtype, **options: Any) -> Case:
    """12 tokens, of which 10 are scored, with a vocabulary and a width that no block divides."""
    return representable(small_case("linear", width=24, vocab=300, scale=0.2, **options), dtype)


def run(case: Case, dtype: torch.dtype, outer: float, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def there(x: Tensor | None, kind: torch.dtype | None = None) -> Any:
        return None if x is None else x.to(device, kind or x.dtype)

    leaves = {name: there(getattr(case, name), dtype).requires_grad_() for name in leaf_names(case)}
    out = linear_prefix_loss(
        leaves["hidden"], leaves["weight"], there(case.tokens), there(case.advantages, torch.float32),
        lm_head_bias=leaves["bias"], mask=there(case.mask), old_logps=there(case.old_logps, torch.float32),
        ref_hidden=there(case.ref_hidden, dtype), ref_lm_head_weight=there(case.ref_weight, dtype),
        config=LossConfig(**case.options, **more), backend="triton",
    )  # fmt: skip
    (out.loss * outer).sum().backward()
    return out, {name: leaf.grad.cpu() for name, leaf in leaves.items()}


def narrow(case: Case, dtype: torch.dtype, outer: float) -> dict[str, Tensor]:
    """What rounding every logit gradient to `dtype` before the products, and the head's float16 share, may add."""
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    raw = case.hidden @ case.weight.t() + case.bias
    leaf = raw.detach().requires_grad_()
    changes: dict[str, Any] = dict.fromkeys(("hidden", "weight", "bias", "ref_hidden", "ref_weight"))
    if case.ref_hidden is not None:
        changes["ref_logits"] = case.ref_hidden @ case.ref_weight.t()
    total = (oracle.solve(case.but(logits=leaf, **changes)).loss * outer).sum()
    dz = torch.autograd.grad(total, leaf)[0].abs().reshape(-1, raw.shape[-1])
    # a row's own scale keeps its largest gradient above 2^13 2^-5: below 2^-25 of that float16 has nothing
    error = 2 * unit * dz + 2.0**-24 * dz.amax(1, keepdim=True)
    hidden = case.hidden.reshape(-1, case.hidden.shape[-1]).abs()
    made = {"hidden": error @ case.weight.abs(), "weight": error.t() @ hidden, "bias": error.sum(0)}
    return {name: x.reshape(getattr(case, name).shape) for name, x in made.items()}


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "none"},
    {"kl": "full", "kl_coef": 0.5, "entropy_coef": 0.1},
    {"ratio_level": "sequence", "entropy_coef": 0.1, "softcap": 5.0},
)


@halves
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("split", [False, True])
def test_half_precision_products_give_float64_s_loss_and_gradients(
    dtype: torch.dtype, options: dict[str, Any], chunk_tokens: int | None, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:  # several programs a row: the narrow gradients then lie apart
        monkeypatch.setattr(launch, "processors", lambda _: 10**6)
    case = half_case(dtype, **options)
    case = case if "kl" in options else case.but(ref_hidden=None, ref_weight=None)
    # sizes of rows that differ a thousandfold, in falling order: later chunks have larger scales of their own
    case.advantages = case.advantages * torch.logspace(0, -3, 12).double().reshape(3, 4).float().double()
    want, want_grads = solve_with_grads(case, 1024.0)
    out, grads = run(case, dtype, 1024.0, chunk_tokens=chunk_tokens)
    allow, more = allowed(case, want, 1024.0, dtype), narrow(case, dtype, 1024.0)
    within(out.loss.detach().cpu(), want.loss, allow.loss, "loss")
    for name, grad in grads.items():
        assert grad.dtype == dtype
        within(grad, want_grads[name], allow.grads[name] + more[name], name)


@halves
def test_the_gradients_are_narrow_and_float16_s_are_scaled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: a way around the narrow buffers would let it pass for nothing."""
    seen: list[chunks.HeadChunks] = []
    shares: list[Tensor] = []
    add, share = chunks.HeadChunks.add_gradient, chunks.HeadChunks._share_of_sum

    def added(self: chunks.HeadChunks, chunk: chunks.Chunk, grads: Tensor) -> None:
        seen.append(self)
        assert grads.dtype == dtype
        assert chunk.logits.dtype == torch.float32
        add(self, chunk, grads)

    monkeypatch.setattr(chunks.HeadChunks, "add_gradient", added)
    monkeypatch.setattr(
        chunks.HeadChunks, "_share_of_sum", lambda self, scales: shares.append(share(self, scales)) or shares[-1]
    )
    run(half_case(dtype).but(ref_hidden=None, ref_weight=None), dtype, 1.0, chunk_tokens=3)
    assert len(seen) > 1
    assert all(x.scaled == (dtype == torch.float16) for x in seen)
    assert len(shares) == (len(seen) if dtype == torch.float16 else 0)
    assert all(0 < float(x.max()) <= 1 for x in shares)


@halves
def test_rows_that_grow_by_chunks_add_up_in_the_head_s_gradient(dtype: torch.dtype) -> None:
    # each chunk's rows a hundred times larger than the last one's: the sum's scale falls, and what is in it with it
    case = half_case(dtype).but(ref_hidden=None, ref_weight=None)
    case.advantages = case.advantages.sign() * torch.logspace(-6, 2, 12).double().reshape(3, 4).float().double()
    want, want_grads = solve_with_grads(case)
    _, grads = run(case, dtype, 1.0, chunk_tokens=3)
    allow, more = allowed(case, want, 1.0, dtype), narrow(case, dtype, 1.0)
    for name, grad in grads.items():
        within(grad, want_grads[name], allow.grads[name] + more[name], name)


@halves
def test_log_probs_of_a_half_precision_head_follow_it_both_ways(dtype: torch.dtype) -> None:
    case = half_case(dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
    (exact[0] @ exact[1].t()).log_softmax(-1).gather(-1, case.tokens[..., None]).sum().backward()
    for frozen in (False, True):
        hidden = case.hidden.to(device, dtype).requires_grad_()
        weight = case.weight.to(device, dtype).requires_grad_(not frozen)
        linear_logps(hidden, weight, case.tokens.to(device), backend="triton").logps.sum().backward()
        # logit gradients, products and results are rounded once each: 8 bits of bfloat16 leave 1 % of the largest
        for got, want in ((hidden, exact[0]), (weight, exact[1])):
            if got.requires_grad:
                size = float(want.grad.abs().max())
                torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=0.0, atol=0.01 * size)
