"""What a gradient tolerance leaves out is within its bound, is the smallest that there is, and is what metrics say.

With the identity as head the gradient of the hidden states is the logits' own, so that what was left out of it can be
seen; where more rows than columns of a head are not needed, that for the head is read off the head's gradient.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import group_of, in_processes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixloss import LossConfig, LossOutput, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends import sparse
from prefixloss.backends.columns import Columns
from prefixloss.backends.tolerance import of_products, resolved
from prefixloss.backends.torch import entries, rows
from prefixloss.backends.torch.entries import Tolerance
from prefixloss.backends.triton import sparse as triton_sparse

V = 40
BANNED = 7
MEAN_ROW = rows.LinearRows._mean_row


@pytest.fixture(autouse=True)
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small matrices here are never dense; and what is left out is seen where nothing is put in its place."""
    monkeypatch.setattr(entries, "_DENSE", 1)
    monkeypatch.setattr(entries, "_LOOKED_AT", 1)
    monkeypatch.setattr(rows.LinearRows, "_mean_row", no_mean_row)


def no_mean_row(self: rows.LinearRows) -> Tensor:
    return torch.zeros(1, self.weight.shape[1], dtype=self.dtype)


def no_mean_row_of_kernels(self: triton_sparse.SparseProducts) -> Tensor:
    return torch.zeros(1, self.chunks.head.weight.shape[1])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(kind: str) -> tuple[Tensor, Tensor]:
    """Logits [n, V] and targets [n] of a chunk that is hard on a bound."""
    n = 12
    logits, tokens = random(n, V, seed=1), torch.arange(n) * 3
    if kind == "flat":
        logits = torch.zeros(n, V, dtype=torch.float64)
    elif kind == "one spike":
        logits[:, 5] = 12.0
    elif kind == "two equal":
        logits[:, :2] = 9.0
    elif kind == "nearly certain":
        logits.scatter_(1, tokens[:, None], 25.0)
    elif kind == "nearly certain but one":
        logits[1:].scatter_(1, tokens[1:, None], 25.0)
    else:
        logits *= 2
        logits[::2].scatter_(1, tokens[::2, None], 15.0)
    return logits, tokens


KINDS = ("flat", "one spike", "two equal", "nearly certain", "nearly certain but one", "mixed")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0, "logit_scale": 1.7},
    "cold": {"temperature": 0.1},
    "hot": {"temperature": 10.0},
    "entropy": {"entropy_coef": 0.3},
    "exact KL": {"kl": "full", "kl_coef": 0.4, "entropy_coef": -0.1, "softcap": 8.0},
    "two stages": {"reduction": "none", "entropy_coef": 0.1},
    "sequence": {"ratio_level": "sequence"},
}


def leaf(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return x.detach().to(dtype).clone().requires_grad_()


class Made(NamedTuple):
    """The logits' gradients that went into those of the hidden states, the head (None where nobody knows) and the bias,
    and what the metrics say."""

    hidden: Tensor
    head: Tensor | None
    bias: Tensor
    left_out: float


def made(kind: str, config: LossConfig, backend: str = "torch", dtype: torch.dtype = torch.float64) -> Made:
    """The head is the identity, so d hidden = G; d head = G^T H has G in it where H has a right inverse. One token is
    banned, by its bias."""
    logits, tokens = rows_of(kind)
    hidden, weight, bias = leaf(logits, dtype), leaf(torch.eye(V), dtype), torch.zeros(V, dtype=dtype)
    bias[BANNED] = -math.inf
    bias.requires_grad_()
    exact = {
        "ref_hidden": random(*logits.shape, seed=3)[None].to(dtype),
        "ref_lm_head_weight": torch.eye(V, dtype=dtype),
    }
    out = linear_prefix_loss(
        hidden[None], weight, tokens[None], random(1, len(tokens), seed=2).to(dtype),
        old_logps=torch.full((1, len(tokens)), -3.0, dtype=dtype), lm_head_bias=bias, config=config, backend=backend,
        **(exact if config.kl == "full" else {}),
    )  # fmt: skip
    out.loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    head = None if kind == "flat" else (weight.grad @ torch.linalg.pinv(hidden.detach())).T
    return Made(hidden.grad.double(), head, bias.grad.double(), float(out.metrics["gradient_left_out"]))


def check_rows(kept: Tensor, exact: Tensor, tolerance: float, slack: float) -> float:
    """The bound and the order in each row; returns which share of the norm was left out."""
    kept = torch.where(kept.abs() <= slack * exact.abs().max(), 0.0, kept)
    with_gradient = exact.abs().sum(1) > 0
    root_mean_square = float(exact[with_gradient].square().sum(1).mean().sqrt())
    left = torch.where(kept == 0, exact, 0.0)
    # sums over a row, and what is left of terms of size 1 where a token is nearly certain
    slack = slack * V * root_mean_square + 2e-16
    assert float(left.norm(dim=1).max()) <= tolerance * root_mean_square + slack
    torch.testing.assert_close(kept + left, exact, rtol=0, atol=slack)  # what stays stays as it is
    smallest_kept = torch.where(kept != 0, exact.abs(), math.inf).amin(1)
    assert bool((left.abs().amax(1) <= smallest_kept + slack).all())
    return float(left.norm() / exact.norm())


def check(kind: str, options: dict[str, Any], hidden: float, head: float) -> Made:
    exact = made(kind, LossConfig(**options), "reference")
    config = LossConfig(**options, gradient_tolerance=hidden, head_gradient_tolerance=head)
    got = made(kind, config)
    share = check_rows(got.hidden, exact.hidden, hidden, 1e-15)
    if got.head is not None:
        # a right inverse has a condition, which its rounding comes with
        share = max(share, check_rows(got.head, exact.hidden, head, 1e-10))
        assert got.left_out == pytest.approx(share, rel=1e-3, abs=1e-9)
    rows = math.sqrt(len(exact.hidden))
    assert float((got.bias - exact.bias).norm()) <= rows * head * float(exact.hidden.norm()) + 1e-12
    return got


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_of_a_row_is_within_the_bound_and_the_smallest(kind: str, options: str) -> None:
    check(kind, OPTIONS[options], 0.02, 0.1)


@given(
    kind=st.sampled_from(KINDS),
    options=st.sampled_from(sorted(OPTIONS)),
    objective=st.sampled_from(["clip", "reinforce", "sapo", "topr"]),
    hidden=st.floats(1e-6, 0.9),
    head=st.sampled_from([0.0, 1e-3, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_for_any_options(kind: str, options: str, objective: str, hidden: float, head: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "_DENSE", 1)
        patch.setattr(entries, "_LOOKED_AT", 1)
        patch.setattr(rows.LinearRows, "_mean_row", no_mean_row)
        check(kind, {**OPTIONS[options], "objective": objective}, hidden, head)


def test_something_is_left_out_and_more_with_a_larger_tolerance() -> None:
    shares = [check("mixed", {}, tolerance, tolerance).left_out for tolerance in (1e-4, 1e-2, 0.1)]
    assert 0 < shares[0] < shares[1] < shares[2]
    # nearly all that the bound allows: 12 rows of 40 entries are not fine grained
    assert shares[2] > 0.03


def test_rows_that_weigh_nothing_beside_the_chunks_others_leave_whole() -> None:
    exact, got = (
        made("nearly certain but one", LossConfig(), "reference"),
        check("nearly certain but one", {}, 1e-6, 0.0),
    )
    assert int((got.hidden != 0).any(1).sum()) == 1
    assert int((exact.hidden != 0).any(1).sum()) > 1
    # beside each other they weigh all there is
    alone = check("nearly certain", {}, 1e-6, 0.0)
    assert int((alone.hidden != 0).any(1).sum()) == int((made("nearly certain", LossConfig()).hidden != 0).any(1).sum())


def test_the_reference_takes_the_options_and_leaves_nothing_out() -> None:
    exact, got = (
        made("mixed", LossConfig(gradient_tolerance=t, head_gradient_tolerance=t), "reference") for t in (0.0, 0.3)
    )
    assert torch.equal(got.hidden, exact.hidden)
    assert got.left_out == 0


def test_nothing_is_left_out_of_the_gradient_of_logits() -> None:
    logits, tokens = rows_of("mixed")
    grads = []
    for tolerance in (0.0, 0.5):
        x = leaf(logits)
        out = prefix_loss(x, tokens, torch.ones(len(tokens)), config=LossConfig(gradient_tolerance=tolerance))
        out.loss.backward()
        grads.append(x.grad)
        assert float(out.metrics["gradient_left_out"]) == 0
    assert torch.equal(*grads)  # type: ignore[arg-type]


def test_flat_rows_keep_their_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    taken: list[str] = []
    monkeypatch.setattr(sparse, "product", lambda *_: taken.append("hidden"))
    monkeypatch.setattr(sparse, "add_transposed", lambda *_: taken.append("head"))
    monkeypatch.setattr(sparse, "put_transposed", lambda *_: taken.append("head"))
    config = LossConfig(gradient_tolerance=1e-2, head_gradient_tolerance=1e-2)
    exact, got = made("flat", LossConfig()), made("flat", config)
    assert taken == []
    assert torch.equal(got.hidden, exact.hidden)
    assert got.left_out == 0


@pytest.mark.parametrize("size", [1e-30, 1e30, math.inf])
def test_what_is_no_measure_leaves_nothing_out(size: float) -> None:
    """Gradients whose squares vanish or are infinite in float32, and infinite ones, which have to be seen."""
    logits, tokens = rows_of("mixed")
    grads = []
    for tolerance in (0.0, 0.5):
        hidden = leaf(logits, torch.float32)
        made = linear_logps(hidden, torch.eye(V), tokens, gradient_tolerance=tolerance, entropy=True)
        (made.logps * size).sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_entries_are_those_of_their_matrix_in_any_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_AT_ONCE", 3 * 5)  # three rows of the head at a time
    monkeypatch.setattr(sparse, "_IN_CACHE", 3 * 5)
    gradient, weight, hidden = random(6, 11).float(), random(11, 5).to(dtype), random(6, 5).float()
    gradient[gradient.abs() < 0.8] = 0
    gradient[2] = 0
    gradient[:, 4] = 0
    row, column = gradient.nonzero().unbind(1)
    some = sparse.Entries(row, column, gradient[row, column])
    # a handful of products of size 1 in another order
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(sparse.product(some, 6, weight, torch.float32), gradient @ weight.float(), **close)
    total = torch.ones(11, 5)
    sparse.add_transposed(total, some, hidden)
    torch.testing.assert_close(total, 1 + gradient.T @ hidden, **close)
    assert torch.equal(total[4], torch.ones(5))
    rounded = torch.zeros(11, 5, dtype=dtype)
    sparse.put_transposed(rounded, some, hidden)
    torch.testing.assert_close(rounded.float(), gradient.T @ hidden, rtol=2.0**-7, atol=1e-6)
    torch.testing.assert_close(sparse.transposed_product(some, 11, hidden), gradient.T @ hidden, **close)
    of_each = (hidden @ weight.float().T)[row, column]
    torch.testing.assert_close(sparse.dots(row, column, hidden, weight, torch.float32), of_each, **close)
    nothing = sparse.Entries.none(hidden)
    assert torch.equal(sparse.transposed_product(nothing, 11, hidden), torch.zeros(11, 5))
    assert torch.equal(sparse.product(nothing, 6, weight, torch.float32), torch.zeros(6, 5))
    sparse.add_transposed(total, nothing, hidden)


def test_auto_is_a_quarter_of_what_rounding_moves() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.exp2(torch.linspace(0, 1, 100_001, dtype=torch.float64))  # even over the logarithm
        moved = ((x.to(dtype).double() - x) / x).square().mean().sqrt()
        assert resolved("auto", dtype) == pytest.approx(float(moved) / 4, rel=0.01)
    assert resolved(0.25, torch.bfloat16) == 0.25


def test_auto_keeps_more_of_a_large_vocabulary_for_the_hidden_states() -> None:
    half, both = (torch.bfloat16, torch.bfloat16), (True, True)
    auto = resolved("auto", torch.bfloat16)
    assert of_products(("auto", "auto"), half, both, 1000) == (auto, auto)
    assert of_products(("auto", "auto"), half, both, 2**16) == (auto / 2, auto)
    assert of_products((0.25, 0.5), half, both, 2**16) == (0.25, 0.5)
    assert of_products((0.25, 0.5), half, (False, True), 2**16) == (0.0, 0.5)


@pytest.mark.parametrize("value", ["Auto", -1.0, math.nan, None, True])
@pytest.mark.parametrize("name", ["gradient_tolerance", "head_gradient_tolerance"])
def test_a_tolerance_is_a_number_or_auto(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, expected 'auto' or a finite number >= 0"):
        LossConfig(**{name: value})
    with pytest.raises(ValueError, match=f"^{name}: got"):
        linear_logps(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), **{name: value})
    assert LossConfig.decoded(LossConfig(**{name: "auto"}).encoded) == LossConfig(**{name: "auto"})


# --- the ways through


SHAPE = (3, 4)
TOKENS = torch.arange(12).reshape(SHAPE) * 3
ADVANTAGES = random(*SHAPE, seed=2)
BOTH = {"gradient_tolerance": 0.05, "head_gradient_tolerance": 0.05}


def run(leaves: tuple[Tensor, Tensor], **more: Any) -> LossOutput:
    config = LossConfig(**{"gradient_tolerance": 0.05, "head_gradient_tolerance": 0.05, **more.pop("options", {})})
    return linear_prefix_loss(
        *leaves, more.pop("tokens", TOKENS), ADVANTAGES.reshape(leaves[0].shape[:-1]), config=config, **more
    )


def leaves() -> tuple[Tensor, Tensor]:
    return leaf(rows_of("mixed")[0].reshape(*SHAPE, V)), leaf(torch.eye(V))


def gradients(of: tuple[Tensor, Tensor], loss: Tensor) -> list[Tensor]:
    loss.sum().backward()
    return [x.grad for x in of if x.grad is not None]


def test_results_do_not_change_from_run_to_run() -> None:
    first, again = (gradients(of := leaves(), run(of).loss) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_packed_checkpointed_and_retained_calls_leave_out_the_same() -> None:
    want = gradients(of := leaves(), run(of).loss)
    packed = leaves()
    out = run((packed[0].reshape(-1, V), packed[1]), tokens=TOKENS.flatten(), cu_seqlens=torch.tensor([0, 4, 8, 12]))
    assert all(map(torch.equal, gradients(packed, out.loss), want))
    again = leaves()
    assert all(map(torch.equal, gradients(again, checkpoint(lambda: run(again).loss, use_reentrant=False)), want))
    kept = leaves()
    loss = run(kept, options={"reduction": "none"}).loss.sum()
    once = torch.autograd.grad(loss, kept, retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(loss, kept)))


def test_log_probs_for_somebody_elses_loss_leave_out_the_same() -> None:
    mine, theirs = leaves(), leaves()
    run(mine, options={"objective": "reinforce"}, normalizer=1.0).loss.backward()
    (-ADVANTAGES * linear_logps(*theirs, TOKENS, **BOTH).logps).sum().backward()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-14)
        assert x.grad is not None
        assert bool((x.grad == 0).any())


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_a_compiled_call_leaves_out_the_same(options: dict[str, Any]) -> None:
    eager, compiled = leaves(), leaves()
    want = run(eager, options=options)
    got = torch.compile(lambda *of: run(of, options=options), backend="aot_eager", fullgraph=True)(*compiled)
    for x, y in zip(gradients(eager, want.loss), gradients(compiled, got.loss), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    # the backward of a graph tells nobody outside
    shares = [float(out.metrics["gradient_left_out"]) for out in (want, got)]
    assert shares[0] > 0
    assert shares[1] == shares[0] if not options else math.isnan(shares[1])


def test_a_tolerance_for_rows_and_one_for_entries_both_hold() -> None:
    rows, both, exact = leaves(), leaves(), leaves()
    run(
        rows, options={"row_tolerance": 1e-3, "gradient_tolerance": 0.0, "head_gradient_tolerance": 0.0}
    ).loss.backward()
    run(both, options={"row_tolerance": 1e-3}).loss.backward()
    run(exact, options={"gradient_tolerance": 0.0, "head_gradient_tolerance": 0.0}).loss.backward()
    assert rows[0].grad is not None
    assert both[0].grad is not None
    assert exact[0].grad is not None
    whole = (rows[0].grad == 0).all(2)
    assert bool((both[0].grad[whole] == 0).all())
    assert 0 < float((both[0].grad - rows[0].grad).norm()) <= 0.05 * float(rows[0].grad.norm())


def split_by_vocabulary(rank: int, size: int, file: str) -> None:
    entries._DENSE = entries._LOOKED_AT = 1
    rows.LinearRows._mean_row = no_mean_row  # type: ignore[method-assign]
    cuts = [0, 13, V] if size == 2 else [0, 13, 30, V]
    with group_of(rank, size, file) as group:
        for options in ({}, {"reduction": "none", "entropy_coef": 0.1}):
            exact, hidden = leaves(), leaf(leaves()[0])
            none = {"gradient_tolerance": 0.0, "head_gradient_tolerance": 0.0}
            run(exact, options={**options, **none}).loss.sum().backward()
            weight = leaf(torch.eye(V)[cuts[rank] : cuts[rank + 1]])
            out = run((hidden, weight), options=options, tp_group=group)
            out.loss.sum().backward()
            assert hidden.grad is not None
            assert exact[0].grad is not None
            kept, all_of_it = hidden.grad.reshape(-1, V), exact[0].grad.reshape(-1, V)
            check_rows_bound(kept, all_of_it, 0.05)
            left = torch.where(kept == 0, all_of_it, 0.0)
            share = float(left.norm() / all_of_it.norm())
            assert 0 < share <= float(out.metrics["gradient_left_out"]) * (1 + 1e-9) <= 0.05
            places = hidden.grad.new_zeros(size, *hidden.grad.shape)
            places[rank] = hidden.grad
            dist.all_reduce(places, group=group)
            assert all(torch.equal(place, hidden.grad) for place in places)


def check_rows_bound(kept: Tensor, exact: Tensor, tolerance: float) -> None:
    norms = exact.norm(dim=1)
    limit = tolerance * float(norms[norms > 0].square().mean().sqrt())
    assert float((kept - exact).norm(dim=1).max()) <= limit


def split_by_position(rank: int, size: int, file: str) -> None:
    entries._DENSE = entries._LOOKED_AT = 1
    rows.LinearRows._mean_row = no_mean_row  # type: ignore[method-assign]
    with group_of(rank, size, file) as group:
        hidden, weight = leaves()
        here = slice(rank * 2, rank * 2 + 2)
        part = leaf(hidden[:, here]), weight
        config = LossConfig(**BOTH, ratio_level="sequence")
        out = linear_prefix_loss(
            *part, TOKENS[:, here], ADVANTAGES[:, here], old_logps=torch.full((3, 2), -3.0).double(),
            config=config, cp_group=group,
        )  # fmt: skip
        out.loss.backward()
        exact = leaves()
        whole = linear_prefix_loss(
            *exact, TOKENS, ADVANTAGES, old_logps=torch.full(SHAPE, -3.0).double(),
            config=LossConfig(ratio_level="sequence"),
        )  # fmt: skip
        whole.loss.backward()
        assert part[0].grad is not None
        assert exact[0].grad is not None
        want = exact[0].grad[:, here].reshape(-1, V)
        check_rows_bound(part[0].grad.reshape(-1, V), want, 0.05)
        assert bool((part[0].grad.reshape(-1, V) != want).any())


@pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk through gloo")
@pytest.mark.parametrize(("way", "size"), [(split_by_vocabulary, 2), (split_by_position, 2)])
def test_the_bound_holds_over_processes(way: Any, size: int, tmp_path: Path) -> None:
    in_processes(way, size, tmp_path)


def test_a_chunk_is_measured_by_itself() -> None:
    """Two chunks of six rows: what is left out of a row has the measure of its own chunk."""
    tolerance = Tolerance(0.3, 0.0, Columns(V))
    small, large = 1e-3 * random(6, V), random(6, V, seed=1)
    for chunk in (small, large):
        chosen, dense = tolerance.split(chunk)
        assert dense is None
        assert chosen is not None
        kept = torch.zeros_like(chunk).index_put_((chosen.row, chosen.column), chosen.value)
        share = check_rows(kept, chunk, 0.3, 1e-15)
        assert share > 0.25
    assert 0.25 < tolerance.left_out() <= 0.3


@pytest.mark.parametrize("few", ["all", "first", "last", "none"])
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_heads_gradient_is_whole_whichever_chunks_have_few_entries(
    few: str, waits: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All entries of a chunk as if they were few, or its dense product; three chunks of rows that lie apart."""
    chunks = {"all": (0, 1, 2), "first": (0,), "last": (2,), "none": ()}[few]
    turn = iter(range(3))  # 9 of 12 rows

    def split(_: Tolerance, gradient: Tensor) -> tuple[None, sparse.Entries | None]:
        if next(turn) not in chunks:
            return None, None
        row, column = gradient.nonzero().unbind(1)
        return None, sparse.Entries(row, column, gradient[row, column])

    advantages = ADVANTAGES.clone()
    advantages.flatten()[::4] = 0
    exact, got = ([leaf(x, dtype) for x in leaves()] for _ in range(2))
    linear_prefix_loss(*exact, TOKENS, advantages, config=LossConfig(chunk_tokens=3)).loss.backward()
    monkeypatch.setattr(Tolerance, "split", split)
    monkeypatch.setattr(rows, "_KEPT", 2**24 if waits else 0)
    config = LossConfig(chunk_tokens=3, head_gradient_tolerance=0.1)
    linear_prefix_loss(*got, TOKENS, advantages, config=config).loss.backward()
    assert next(turn, None) is None
    assert exact[1].grad is not None
    # of bfloat16 both are sums in float32, rounded once
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2.0**-7, "atol": 1e-6}
    torch.testing.assert_close(got[1].grad, exact[1].grad, **close)
    assert float(exact[1].grad.norm()) > 0


def test_a_bad_guess_is_made_good() -> None:
    """Where one column in so many misleads about a row's small entries, they stay within the bound all the same."""
    sizes = torch.full((2, 64 * 40), 1e-9)
    sizes[0, 1::64] = 0.1  # none of the columns that are asked
    sizes[1, ::64] = 0.1  # all of them
    row, column, below = entries._split(sizes, 0.3)
    assert float(below.max()) <= 0.3
    assert (row.bincount() >= 10).all()
    kept = torch.zeros_like(sizes).index_put((row, column), torch.ones(()))
    # a float32 norm of a few thousand numbers
    torch.testing.assert_close(below, (sizes * (1 - kept)).double().square().sum(1), rtol=1e-5, atol=0)
    guessed = sizes.double().square().where(sizes < entries._guess(sizes, 0.3), torch.zeros(()).double()).sum(1)
    assert float(guessed[0]) > 0.3


@pytest.mark.parametrize("options", ["plain", "softcap", "exact KL"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.float32)]
)
def test_what_the_heads_rows_have_in_common_is_not_lost(
    options: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's left out entries stand for their sum times the head's mean row: all there is of a direction that all
    rows share."""
    count, width, vocabulary = 12, 16, 300
    hidden = 4 * random(count, width, seed=5)
    weight = random(vocabulary, width, seed=6) / 4 + 10 * random(1, width, seed=7)
    more = {"ref_hidden": hidden[None] + 0.1, "ref_lm_head_weight": weight} if options == "exact KL" else {}

    def gradient(tolerance: float) -> Tensor:
        of = leaf(hidden[None], dtype), weight.to(dtype)
        config = LossConfig(**OPTIONS[options], gradient_tolerance=tolerance)
        given = {name: x.to(dtype) for name, x in more.items()}
        tokens = torch.arange(count)[None]
        old = torch.full((1, count), -3.0, dtype=dtype)
        out = linear_prefix_loss(
            *of,
            tokens,
            torch.ones(1),
            old_logps=old,
            config=config,
            backend=backend,
            **given,  # type: ignore[arg-type]
        )
        out.loss.backward()
        assert (float(out.metrics["gradient_left_out"]) > 0) == (tolerance > 0)
        assert of[0].grad is not None
        return of[0].grad.double()

    monkeypatch.setattr(triton_sparse, "_DENSE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(triton_sparse.SparseProducts, "_mean_row", no_mean_row_of_kernels)
        exact, plain = gradient(0.0), gradient(0.05)
    monkeypatch.setattr(rows.LinearRows, "_mean_row", MEAN_ROW)
    assert float((gradient(0.05) - exact).norm()) < 0.2 * float((plain - exact).norm())


@pytest.mark.parametrize("tolerance", [1e-13, 1e-10, 1e-7])
def test_a_small_bound_holds_beside_large_rows(tolerance: float) -> None:
    """Sums over all rows have no digits for it."""
    logits = -torch.linspace(0, 36, V, dtype=torch.float64) * torch.ones(64, 1)
    tokens = torch.arange(64)[None] % V

    def gradient(backend: str, tolerance: float) -> Tensor:
        hidden, weight = leaf(logits, torch.float64), torch.eye(V, dtype=torch.float64)
        config = LossConfig(objective="reinforce", gradient_tolerance=tolerance)
        linear_prefix_loss(hidden[None], weight, tokens, torch.ones(1), config=config, backend=backend).loss.backward()
        assert hidden.grad is not None
        return hidden.grad

    exact, got = gradient("reference", 0.0), gradient("torch", tolerance)
    left = torch.where(got == 0, exact, 0.0).norm(dim=1)
    assert 0 < float(left.max()) <= tolerance * float(exact.norm(dim=1).square().mean().sqrt())


def test_all_of_a_chunk_may_be_left_out() -> None:
    got = made("flat", LossConfig(gradient_tolerance=2.0, head_gradient_tolerance=2.0))
    assert not got.hidden.any()
    assert not got.bias.any()
    assert got.left_out == pytest.approx(1.0)
