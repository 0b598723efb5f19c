"""backend="triton" with gradient tolerances: the bound, against float64, and which products are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_gradient_tolerance import (
    ADVANTAGES,
    BOTH,
    KINDS,
    OPTIONS,
    SHAPE,
    TOKENS,
    V,
    check_rows,
    leaf,
    leaves,
    made,
    no_mean_row_of_kernels,
    random,
    rows_of,
)  # fmt: skip
from torch import Tensor

from prefixloss import LossConfig, linear_logps, linear_prefix_loss
from prefixloss._kernels import entries
from prefixloss.backends.triton import sparse
from prefixloss.backends.triton.chunks import HeadChunks

# float32 statistics, and logits up to 250 at temperature 0.1 whose rounding the softmax makes relative
SLACK = 3e-5


CASES = [*((kind, "plain") for kind in KINDS), *(("mixed", name) for name in OPTIONS if name != "plain")]
QUICK = {("mixed", "plain"), ("nearly certain but one", "plain"), ("mixed", "softcap"), ("mixed", "exact KL")}
SHARED = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small matrices here are never dense; short lists are quick in the interpreter; and what is left out is seen
    where nothing is put in its place."""
    monkeypatch.setattr(entries, "CAPACITY", 64)
    monkeypatch.setattr(sparse, "_DENSE", 1)
    monkeypatch.setattr(sparse, "_OVERFLOWS", 1)
    monkeypatch.setattr(sparse.SparseProducts, "_mean_row", no_mean_row_of_kernels)


@pytest.mark.parametrize(("kind", "options"), SHARED)
def test_what_is_left_out_of_a_row_is_within_the_bound_and_the_smallest(kind: str, options: str) -> None:
    exact = made(kind, LossConfig(**OPTIONS[options]), "reference")
    config = LossConfig(**OPTIONS[options], gradient_tolerance=0.02, head_gradient_tolerance=0.1)
    got = made(kind, config, "triton", torch.float32)
    check_rows(got.hidden, exact.hidden, 0.02, SLACK)
    if got.head is not None:
        left = torch.where(got.head.abs() <= 1e-4 * exact.hidden.abs().max(), exact.hidden, 0.0)
        norms = exact.hidden.norm(dim=1)
        assert float(left.norm(dim=1).max()) <= 0.1 * float(norms[norms > 0].square().mean().sqrt()) + 1e-3
    assert 0 <= got.left_out <= 0.1


def run(of: tuple[Tensor, Tensor], options: dict[str, Any] = BOTH, **more: Any) -> Any:
    return linear_prefix_loss(*of, TOKENS, ADVANTAGES, config=LossConfig(**options), backend="triton", **more)


def float32() -> tuple[Tensor, Tensor]:
    hidden, weight = leaves()
    return leaf(hidden, torch.float32), leaf(weight, torch.float32)


def gradients(of: tuple[Tensor, Tensor], loss: Tensor) -> list[Tensor]:
    loss.sum().backward()
    return [x.grad for x in of if x.grad is not None]


def left_share(got: Tensor, exact: Tensor) -> float:
    left = torch.where(got == 0, exact, 0.0)
    torch.testing.assert_close(got + left, exact, rtol=1e-5, atol=1e-7)
    return float(left.norm() / exact.norm())


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "entropy_coef": 0.1}])
def test_the_metric_says_what_was_left_out(options: dict[str, Any]) -> None:
    exact = gradients(of := float32(), run(of, options).loss)
    got = gradients(of := float32(), (out := run(of, {**BOTH, **options})).loss)
    share = left_share(got[0], exact[0])
    assert 0.01 < share <= 0.05
    assert float(out.metrics["gradient_left_out"]) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("alone", [0, 1])
def test_either_product_may_be_exact(alone: int) -> None:
    exact = gradients(of := float32(), run(of, {}).loss)
    names = list(BOTH)
    out = run(of := float32(), {names[alone]: 0.05})
    got = gradients(of, out.loss)
    torch.testing.assert_close(got[1 - alone], exact[1 - alone], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(got[alone], exact[alone], rtol=1e-3, atol=1e-6)
    assert float(out.metrics["gradient_left_out"]) > 0.01


def test_rows_without_room_are_multiplied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"entropy_coef": 0.2, **BOTH}
    roomy = gradients(of := float32(), run(of, options).loss)
    most = (roomy[0] != 0).sum(-1).flatten().sort().values
    monkeypatch.setattr(entries, "CAPACITY", 16)
    assert int(most[0]) <= 16 < int(most[-1])
    exact = gradients(of := float32(), run(of, {"entropy_coef": 0.2}).loss)
    got = gradients(of := float32(), run(of, options).loss)
    whole = (exact[0] != 0).sum(-1) == (got[0] != 0).sum(-1)
    assert 0 < int(whole.sum()) < whole.numel()
    torch.testing.assert_close(got[0][whole], exact[0][whole], rtol=1e-5, atol=1e-7)
    assert 0.001 < left_share(got[0], exact[0]) <= 0.05
    norm = float(exact[1].norm())
    assert 0 < float((got[1] - exact[1]).norm()) <= 0.05 * norm * float(of[0].detach().norm())


def test_flat_rows_keep_their_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    taken: list[str] = []
    monkeypatch.setattr(entries, "launch_gather", lambda *_: taken.append("hidden"))
    monkeypatch.setattr(entries, "launch_scatter", lambda *_: taken.append("head"))
    exact = made("flat", LossConfig(), "triton", torch.float32)
    config = LossConfig(gradient_tolerance=1e-2, head_gradient_tolerance=1e-2)
    got = made("flat", config, "triton", torch.float32)
    assert taken == []
    torch.testing.assert_close(got.hidden, exact.hidden, rtol=1e-6, atol=1e-9)
    assert got.left_out == 0


def test_chunks_are_measured_by_themselves_and_results_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    first = gradients(of := float32(), run(of).loss)
    again = gradients(of := float32(), run(of).loss)
    assert all(map(torch.equal, first, again))
    whole, mine = float32(), float32()
    chunks = run(mine, {**BOTH, "chunk_tokens": 4})
    gradients(mine, chunks.loss)
    exact = gradients(whole, run(whole, {}).loss)[0].reshape(3, 4, V)
    assert mine[0].grad is not None
    left = torch.where(mine[0].grad == 0, exact, 0.0)
    for part, of_all in zip(left, exact, strict=True):
        assert float(part.norm(dim=1).max()) <= 0.05 * float(of_all.norm(dim=1).square().mean().sqrt()) * (1 + 1e-5)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_gradient_is_made_of_all_chunks_at_once(
    kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a limit, and then without a float32 sum, also beside a bias and hidden states that lie by columns."""
    totals: list[torch.dtype] = []
    launch = entries.launch_scatter
    monkeypatch.setattr(entries, "launch_scatter", lambda *of: (totals.append(of[-1].dtype), launch(*of)))

    def gradient(backend: str, options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
        logits, weight = leaves()
        hidden, of = logits.detach()[0].T.contiguous().T[None].to(dtype), leaf(weight, dtype)
        bias = leaf(random(V, seed=4), torch.float32 if backend == "triton" else dtype)
        config = LossConfig(chunk_tokens=2, **options)
        arguments = TOKENS[:1], ADVANTAGES[:1].to(bias.dtype)
        linear_prefix_loss(hidden, of, *arguments, lm_head_bias=bias, config=config, backend=backend).loss.backward()
        assert of.grad is not None
        assert bias.grad is not None
        return [of.grad.double(), bias.grad.double()]

    monkeypatch.setattr(sparse, "_KEPT", kept)
    tolerances = {"gradient_tolerance": 0.0, "head_gradient_tolerance": 1e-4}
    want, got = gradient("reference", {}, torch.float64), gradient("triton", tolerances, dtype)
    for x, y in zip(got, want, strict=True):
        # inputs and the result are rounded; 1e-4 of the logits' gradient is left out
        assert float((x - y).norm()) <= (1e-3 + 4 * torch.finfo(dtype).eps) * float(y.norm())
    assert totals == ([torch.float32] * 4 if kept == 0 else [dtype, torch.float32])


def test_where_nothing_may_wait_nothing_is_left_out() -> None:
    exact = gradients(of := float32(), run(of, {}).loss)
    out = run(of := float32(), max_learning_tokens=12)
    for got, want in zip(gradients(of, out.loss), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert float(out.metrics["gradient_left_out"]) == 0


@pytest.mark.parametrize("size", [1e-30, 1e30, math.inf])
def test_what_is_no_measure_leaves_nothing_out(size: float) -> None:
    logits, tokens = rows_of("mixed")
    grads = []
    for tolerance in (0.0, 0.5):
        hidden = leaf(logits, torch.float32)
        out = linear_logps(hidden, torch.eye(V), tokens, gradient_tolerance=tolerance, entropy=True, backend="triton")
        (out.logps * size).sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow  # the compiler's own time
def test_a_compiled_call_leaves_out_the_same() -> None:
    for options in ({}, {"reduction": "none"}):
        eager, compiled = float32(), float32()
        want = run(eager, {**BOTH, **options})
        call = torch.compile(lambda *of, options=options: run(of, {**BOTH, **options}), backend="aot_eager")
        got = call(*compiled)
        for x, y in zip(gradients(eager, want.loss), gradients(compiled, got.loss), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
        shares = [float(out.metrics["gradient_left_out"]) for out in (want, got)]
        assert shares[0] > 0
        assert shares[1] == shares[0] if not options else math.isnan(shares[1])


def test_a_graph_that_is_kept_is_gone_through_twice() -> None:
    of = float32()
    loss = run(of, {**BOTH, "reduction": "none"}).loss.sum()
    once = torch.autograd.grad(loss, of, retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(loss, of)))


def test_masked_tokens_and_those_without_advantage_have_no_entries() -> None:
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 2:] = False
    of, advantages = float32(), ADVANTAGES.clone()
    advantages[0, 0] = 0
    with torch.no_grad():
        of[0][1, 2:] = math.nan
    out = linear_prefix_loss(*of, TOKENS, advantages, mask=mask, config=LossConfig(**BOTH), backend="triton")
    d_hidden, d_weight = gradients(of, out.loss)
    assert bool((d_hidden[1, 2:] == 0).all())
    assert bool((d_hidden[0, 0] == 0).all())
    assert 0 < float(d_weight.norm()) < math.inf
    assert float(out.metrics["gradient_left_out"]) > 0


def test_float16_products_whose_sums_are_scaled_stay_exact() -> None:
    chunks = HeadChunks.__new__(HeadChunks)
    chunks.size, chunks.scaled = 4, True
    config = LossConfig(**BOTH)
    assert sparse.SparseProducts.wanted(chunks, config, [True, True, True], True) is None
