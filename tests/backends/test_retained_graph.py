"""Gradients asked for more than once, of a graph that is kept: each is what plain autograd gives, and nobody else's.

The saved gradient may be scaled in place, and handed out as `.grad`, only where no second backward can come.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixloss import LossConfig, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends import autograd
from prefixloss.backends.torch import eager
from prefixloss.backends.triton import scaling

B, T, D, V = 2, 5, 8, 23
BACKENDS = ("torch", "triton")


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
ADVANTAGES = random(B, T, seed=2)
OLD = random(B, T, seed=3, scale=0.1) - math.log(V)
WEIGHTS = random(B, T, seed=4)
GIVEN = {"mask": MASK, "old_logps": OLD}
PENALISED = {"entropy_coef": 0.1, "kl": "k3", "kl_coef": 0.2}


def leaves(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    hidden, weight, bias = random(B, T, D, seed=5), random(V, D, seed=6), random(V, seed=7)
    made = {"hidden": hidden, "weight": weight, "bias": bias, "logits": hidden @ weight.t() + bias}
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def linear(x: dict[str, Tensor], backend: str, **options: Any) -> Tensor:
    ref_logps = OLD + 0.2 if "kl" in options else None
    return linear_prefix_loss(
        x["hidden"], x["weight"], TOKENS, ADVANTAGES, lm_head_bias=x["bias"], ref_logps=ref_logps, backend=backend,
        config=LossConfig(**options), **GIVEN,
    ).loss  # fmt: skip


def frozen(x: dict[str, Tensor], backend: str, **options: Any) -> Tensor:
    return linear({**x, "weight": x["weight"].detach(), "bias": x["bias"].detach()}, backend, **options)


def from_logits(x: dict[str, Tensor], backend: str, inplace: bool = False, **options: Any) -> Tensor:
    # a copy, as a model's output is; in place the leaf itself would be overwritten
    logits = x["logits"] * 1 if inplace else x["logits"]
    return prefix_loss(
        logits, TOKENS, ADVANTAGES, ref_logps=OLD + 0.2 if "kl" in options else None, inplace=inplace,
        backend=backend, config=LossConfig(**options), **GIVEN,
    ).loss  # fmt: skip


def log_probs(x: dict[str, Tensor], backend: str, entropy: bool = True) -> Tensor:
    made = linear_logps(
        x["hidden"], x["weight"], TOKENS, mask=MASK, lm_head_bias=x["bias"], entropy=entropy, backend=backend
    )
    return ((made.logps if made.entropy is None else made.logps + 0.3 * made.entropy) * WEIGHTS).sum()


def frozen_log_probs(x: dict[str, Tensor], backend: str) -> Tensor:
    return log_probs({**x, "weight": x["weight"].detach(), "bias": x["bias"].detach()}, backend, entropy=False)


def per_token(call: Callable[..., Tensor], **more: Any) -> Callable[..., Tensor]:
    return lambda x, backend: (call(x, backend, reduction="none", **more) * WEIGHTS).sum()


# every way through a back-end, and the leaves that it has gradients for
HEAD, HIDDEN, LOGITS = ("hidden", "weight", "bias"), ("hidden",), ("logits",)
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "fused": (lambda x, b: linear(x, b, **PENALISED), HEAD),
    "fused, frozen head": (frozen, HIDDEN),
    "sequence ratio": (lambda x, b: linear(x, b, ratio_level="sequence"), HEAD),
    "sequence ratio, frozen head": (lambda x, b: frozen(x, b, ratio_level="sequence"), HIDDEN),
    "row tolerance": (lambda x, b: linear(x, b, row_tolerance=1e-6), HEAD),
    "per token": (per_token(linear), HEAD),
    "logits": (lambda x, b: from_logits(x, b, **PENALISED), LOGITS),
    "logits per token": (per_token(from_logits), LOGITS),
    "logits in place": (lambda x, b: from_logits(x, b, inplace=True), LOGITS),
    "logits in place, sequence ratio": (lambda x, b: from_logits(x, b, inplace=True, ratio_level="sequence"), LOGITS),
    "logits in place, per token": (per_token(from_logits, inplace=True), LOGITS),
    "log-probs": (log_probs, HEAD),
    "log-probs, frozen head": (frozen_log_probs, HIDDEN),
}

SMALL, INF, NAN = 1e-42, math.inf, math.nan
SEQUENCES = [
    (0.0, 1.0, 1.0), (SMALL, 1.0, SMALL), (INF, 1.0, 0.0), (NAN, 1.0, INF), (1.0, -2.5, 1.0), (1e30, 1e-30, 1.0),
    (-0.0, NAN, 3.0),
]  # fmt: skip


@pytest.mark.parametrize("factors", SEQUENCES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_sequence_of_factors_gives_what_plain_autograd_gives(
    backend: str, name: str, factors: tuple[float, ...]
) -> None:
    call, names = CALLS[name]
    x, plain = leaves(), leaves(torch.float64)
    ours, theirs = call(x, backend), call(plain, "reference")
    wrt, wrt_plain = [x[n] for n in names], [plain[n] for n in names]
    unit = torch.autograd.grad(theirs, wrt_plain, retain_graph=True)
    for i, factor in enumerate(factors):
        kept = i + 1 < len(factors)  # the last one may have the saved memory itself
        got = torch.autograd.grad(ours * factor, wrt, retain_graph=kept)
        # the factor as float32 has it
        want = torch.autograd.grad(theirs * torch.tensor(factor).item(), wrt_plain, retain_graph=True)
        for g, w, u in zip(got, want, unit, strict=True):
            if math.isfinite(factor):
                # sums of V + D float32 products; and the grain of subnormals, to which 7 tokens' coefficients are
                # rounded before they meet hidden states and weights of up to 3
                tolerance = 1e-5 * abs(factor) * u.abs().max().item() + 3 * 7 * 2**-149
                torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=tolerance)
            else:
                # what overflows in plain autograd is not finite here either, so that a loss scaler skips the step
                assert not g[~w.float().isfinite()].isfinite().any()
                assert (~g.isfinite()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_scaled_in_float32(backend: str, name: str, dtype: torch.dtype) -> None:
    """1.3 is 1.296875 in bfloat16: the factor itself must not be rounded, in the copy or in place."""
    call, names = CALLS[name]
    x = leaves(dtype)
    wrt, loss = [x[n] for n in names], call(x, backend)
    unit = torch.autograd.grad(loss, wrt, retain_graph=True)
    first = torch.autograd.grad(loss * 1.3, wrt, retain_graph=True)
    torch.autograd.grad(loss * 0.0, wrt, retain_graph=True)
    last = torch.autograd.grad(loss * 1.3, wrt)
    # two roundings to the dtype, of the saved gradient and of the product; float16's smallest number
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    unlike = False
    for u, a, b in zip(unit, first, last, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), 1.3 * u.float(), rtol=1.01 * eps, atol=4 * least)
        assert torch.equal(a, b)
        unlike |= not torch.equal(a, u * torch.tensor(1.3).to(dtype))
    assert unlike


def gradients(x: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    made = [x[n].grad for n in names]
    return [g for g in made if g is not None]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_three_times_adds_up(backend: str, name: str) -> None:
    call, names = CALLS[name]
    x = leaves()
    loss = call(x, backend)
    want = [3 * g for g in torch.autograd.grad(loss, [x[n] for n in names], retain_graph=True)]
    for kept in (True, True, False):
        loss.backward(retain_graph=kept)
    # two additions
    torch.testing.assert_close(gradients(x, names), want, rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("between", ["clipped", "changed and dropped", "zeroed in place"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_happens_to_a_grad_does_not_reach_the_next_backward(backend: str, name: str, between: str) -> None:
    call, names = CALLS[name]
    x = leaves()
    loss = call(x, backend)
    want = torch.autograd.grad(loss, [x[n] for n in names], retain_graph=True)
    loss.backward(retain_graph=True)
    if between == "clipped":
        torch.nn.utils.clip_grad_norm_([x[n] for n in names], 1e-3)
        want = tuple(w + g for w, g in zip(want, [g.clone() for g in gradients(x, names)], strict=True))
    for n in names:
        leaf = x[n]
        assert leaf.grad is not None
        if between == "changed and dropped":
            leaf.grad.data.mul_(5)
            leaf.grad = None
        elif between == "zeroed in place":
            leaf.grad.zero_()
    loss.backward()
    assert all(torch.equal(g, w) for g, w in zip(gradients(x, names), want, strict=True))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_used_twice_get_both_gradients(backend: str, name: str) -> None:
    call, names = CALLS[name]
    x, alone = leaves(), leaves()
    want = torch.autograd.grad(call(alone, backend), [alone[n] for n in names])
    total = call(x, backend) + 2 * call(x, backend) + sum(x[n].sum() for n in names)
    for kept in (True, False):
        got = torch.autograd.grad(total, [x[n] for n in names], retain_graph=kept)
        for g, w in zip(got, want, strict=True):
            # three additions to numbers around 1
            torch.testing.assert_close(g, 3 * w + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in CALLS if "in place" not in n])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_makes_them_anew_each_time(backend: str, name: str) -> None:
    call, names = CALLS[name]
    x = leaves()
    want = torch.autograd.grad(call(x, backend), [x[n] for n in names])
    loss = checkpoint(lambda *_: call(x, backend), *x.values(), use_reentrant=False)
    for factor, kept in ((0.0, True), (SMALL, True), (1.0, True), (1.0, False)):
        got = torch.autograd.grad(loss * factor, [x[n] for n in names], retain_graph=kept)
        if factor == 1:
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# --- the ordinary backward copies nothing


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("name", ["fused", "logits", "logits in place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_only_backward_hands_out_the_saved_memory(
    backend: str, name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, names = CALLS[name]
    x = leaves()
    saved: set[int] = set()

    def seen(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        loss = call(x, backend)
    for kept in (True, False):
        made = torch.autograd.grad(loss * factor, [x[n] for n in names], retain_graph=kept)
        # behind `logits * 1` the gradient of the logits themselves is out of sight
        if "in place" not in name:
            assert all((g.untyped_storage().data_ptr() in saved) != kept for g in made)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(ratio_level="sequence")], ids=["fused", "two stages"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leaf_in_place_becomes_its_own_gradient_and_keeps_it_apart_on_a_kept_graph(
    backend: str, config: LossConfig
) -> None:
    want = torch.autograd.grad(
        prefix_loss((y := leaves()["logits"]), TOKENS, ADVANTAGES, config=config, **GIVEN).loss, y
    )
    for kept in (True, False):
        logits = leaves()["logits"]
        out = prefix_loss(logits, TOKENS, ADVANTAGES, inplace=True, backend=backend, config=config, **GIVEN)
        out.loss.backward(retain_graph=kept)
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, want[0])
        assert (logits.grad.data_ptr() == logits.data_ptr()) != kept


@pytest.mark.parametrize("name", ["fused", "logits", "logits in place", "logits in place, sequence ratio"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_torch_that_does_not_say_whether_the_graph_is_kept_gets_copies(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "_KEPT", None)
    call, names = CALLS[name]
    x = leaves()
    want = torch.autograd.grad(call(x, backend), [x[n] for n in names])
    loss = call(x, backend)
    torch.autograd.grad(loss * 0, [x[n] for n in names], retain_graph=True)
    loss.backward(retain_graph=True)
    for g in gradients(x, names):
        g.mul_(5)
    got = torch.autograd.grad(loss, [x[n] for n in names])
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_this_torch_says_whether_the_graph_is_kept() -> None:
    """Else every backward would copy."""
    said = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            said.append(autograd.graph_is_kept())
            return grad

    y = Asks.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert said == [True, False]


@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_apart_are_scaled_in_float32(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(scaling, "_UPCAST", 100)  # two rows at a time
    whole = random(*shape, seed=8).to(dtype)
    x = whole[..., :-3]
    want = (x.float() * 1.3).to(dtype)
    scaling.scale_(x, torch.tensor(1.3))
    assert torch.equal(x, want)
    assert torch.equal(whole[..., -3:], random(*shape, seed=8).to(dtype)[..., -3:])


def test_the_factor_of_the_torch_back_end_may_be_any_float32() -> None:
    saved = torch.tensor([1.0, 2**-126])
    for factor in torch.tensor([SMALL, 1.3, -3e38]):
        assert torch.equal(eager._times(saved, factor.item()), saved * factor)
