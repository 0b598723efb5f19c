"""Distillation against its definition, dense in float64 with plain autograd: every divergence and form of teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefixloss import LossConfig, advantages, distill_loss, linear_distill_loss, linear_prefix_loss
from prefixloss.backends.torch import distill
from prefixloss.maths.divergence import BY_NAME

INF = math.inf
BACKENDS = ("torch", "reference")
N, D, E, V = 6, 4, 5, 9


# --- the definition


def log_probs(logits: Tensor, temperature: float, softcap: float | None, scale: float) -> Tensor:
    z = logits.double() * scale
    banned = z == -INF
    if softcap is not None:
        z = softcap * torch.tanh(z.masked_fill(banned, 0.0) / softcap)
    return (z / temperature).masked_fill(banned, -INF).log_softmax(-1)


def of_row(name: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    """0-d, from probabilities [C]; the gradient only where it is finite."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        if bool(((a > 0) & (b == 0)).any()):
            return torch.tensor(INF, dtype=torch.float64)
        return (a[a > 0] * (a[a > 0] / b[a > 0]).log()).sum()

    m = beta * q + (1 - beta) * p
    return {
        "reverse": lambda: kl(p, q),
        "forward": lambda: kl(q, p),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "skew-forward": lambda: kl(q, m),
        "skew-reverse": lambda: kl(p, m),
    }[name]()


def definition(
    logits: Tensor, teacher: dict[str, Any], *, mask: Tensor | None = None, weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None, normalizer: float | None = None, divergence: str = "reverse", beta: float = 0.5,
    temperature: float = 1.0, teacher_temperature: float | None = None, softcap: float | None = None,
    logit_scale: float = 1.0, reduction: str = "token-mean", vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and the divergences. teacher: {"logits": ...}, or {"ids": ..., "logps": ...} of [.., K]."""
    shape = logits.shape[:-1]
    flat = logits.reshape(-1, logits.shape[-1])[:, :vocab_size]
    count = len(flat)
    scored = torch.ones(count, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    w = torch.ones(count).double() if weights is None else weights.reshape(-1).double()
    values = []
    for i in range(count):
        if not scored[i] or w[i] == 0:
            values.append(torch.zeros((), dtype=torch.float64))
            continue
        p = log_probs(flat[i], temperature, softcap, logit_scale).exp()
        if "logits" in teacher:
            z = teacher["logits"].reshape(count, -1)[i, :vocab_size]
            q = log_probs(z, temperature if teacher_temperature is None else teacher_temperature, softcap, logit_scale)
            values.append(of_row(divergence, beta, p, q.exp()))
        else:
            ids, logps = (teacher[name].reshape(count, -1)[i] for name in ("ids", "logps"))
            used = [(int(j), float(x)) for j, x in zip(ids, logps, strict=True) if j >= 0]
            chosen = [j for j, _ in used]
            others = [j for j in range(len(p)) if j not in chosen]
            q = torch.tensor([math.exp(x) for _, x in used], dtype=torch.float64)
            left = torch.tensor([max(0.0, 1 - math.fsum(q.tolist()))], dtype=torch.float64)
            both = torch.cat([p[chosen], p[others].sum()[None]]), torch.cat([q, left])
            values.append(of_row(divergence, beta, *both))
    value = torch.stack(values)
    losses = value * w * scored
    losses = torch.where(scored & (w != 0), losses, 0.0)
    if reduction == "none":
        return (losses / (normalizer or 1)).reshape(shape), value.reshape(shape)
    if reduction == "token-mean":
        return losses.sum() / (normalizer or max(1, int(scored.sum()))), value.reshape(shape)
    bounds = [i * shape[1] for i in range(shape[0] + 1)] if len(shape) == 2 else cu_seqlens.tolist()
    sums = []
    for a, b in pairwise(bounds):
        tokens = max(1, int(scored[a:b].sum())) if reduction == "seq-mean-token-mean" else 1
        sums.append(losses[a:b].sum() / tokens)
    return torch.stack(sums).sum() / (normalizer or len(sums)), value.reshape(shape)


def slopes(expected: Tensor, incoming: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients of `definition`'s loss, 0 for a leaf of which no finite divergence is made."""
    total = (expected * incoming).sum()
    made = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    # a banned token's log-prob has no slope: NaN in autograd
    return [torch.zeros_like(x) if g is None else g.nan_to_num(nan=0.0) for g, x in zip(made, leaves, strict=True)]


# --- random configurations


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_ids(rows: int, vocabulary: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids [rows, K] with -1 at random places, and log-probs of a distribution over the vocabulary; NaN where unused."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:most] for _ in range(rows)])
    used = torch.rand(rows, most, generator=g) < 0.8
    q = 2 * torch.randn(rows, vocabulary, generator=g, dtype=torch.float64)
    return torch.where(used, ids, -1), torch.where(used, q.log_softmax(1).gather(1, ids), math.nan)


def packed(ids: Tensor, logps: Tensor) -> dict[str, Tensor]:
    rows = [(i[i >= 0], x[i >= 0]) for i, x in zip(ids, logps, strict=True)]
    offsets = torch.tensor([0, *(len(i) for i, _ in rows)]).cumsum(0)
    return {
        "teacher_ids": torch.cat([i for i, _ in rows]), "teacher_logps": torch.cat([x for _, x in rows]),
        "teacher_offsets": offsets,
    }  # fmt: skip


options = st.fixed_dictionaries(
    {
        "divergence": st.sampled_from(list(BY_NAME)),
        "beta": st.sampled_from([0.1, 0.5, 0.75]),
        "temperature": st.sampled_from([1.0, 0.6, 2.0]),
        "softcap": st.sampled_from([None, 2.5]),
        "logit_scale": st.sampled_from([1.0, 0.3]),
        "reduction": st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "none"]),
        "normalizer": st.sampled_from([None, 3.5]),
        "vocab_size": st.sampled_from([None, V - 2]),
    }
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    chosen=options, form=st.sampled_from(["whole", "listed", "packed"]), start=st.sampled_from(["hidden", "logits"]),
    padded=st.booleans(), masked=st.booleans(), weighted=st.booleans(), banned=st.booleans(), own=st.booleans(),
    bias=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_random_configurations(  # noqa: PLR0912 (a branch an option)
    backend: str, chosen: dict[str, Any], form: str, start: str, padded: bool, masked: bool, weighted: bool,
    banned: bool, own: bool, bias: bool, seed: int,
) -> None:  # fmt: skip
    shape = (2, 3) if padded else (N,)
    hidden, weight, b = randn(*shape, D, seed=seed), randn(V, D, seed=seed + 1), randn(V, seed=seed + 2)
    if banned:
        b[3] = -INF
    logits = (hidden @ weight.T + b) if bias or banned else hidden @ weight.T
    call: dict[str, Any] = dict(chosen)
    teacher: dict[str, Any]
    if form == "whole":
        th, tw, tb = randn(*shape, E, seed=seed + 3), randn(V, E, seed=seed + 4), randn(V, seed=seed + 5)
        if banned:
            tb[3] = -INF
        teacher = {"logits": th @ tw.T + tb}
        if own:
            call["teacher_temperature"] = 1.4
        given_teacher = (
            {"teacher_hidden": th, "teacher_lm_head_weight": tw, "teacher_lm_head_bias": tb}
            if start == "hidden"
            else {"teacher_logits": teacher["logits"]}
        )
    else:
        ids, logps = some_ids(N, call["vocab_size"] or V, 4, seed + 6)
        teacher = {"ids": ids, "logps": logps}
        if form == "packed":
            given_teacher = packed(ids, logps)
        else:
            given_teacher = {"teacher_ids": ids.reshape(*shape, 4), "teacher_logps": logps.reshape(*shape, 4)}
    if masked:
        call["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 7)) < 0.7
    if weighted:
        call["weights"] = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(seed + 8)).double()
    if not padded:
        call["cu_seqlens"] = torch.tensor([0, 2, 2, N])
    leaves = (hidden, weight, *([b] if bias or banned else [])) if start == "hidden" else (logits,)
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    plain = tuple(x.detach().clone().requires_grad_() for x in leaves)
    expected, values = definition(
        plain[0] if start == "logits" else plain[0] @ plain[1].T + (plain[2] if len(plain) > 2 else 0), teacher, **call
    )
    if start == "hidden":
        out = linear_distill_loss(
            *leaves[:2], lm_head_bias=leaves[2] if len(leaves) > 2 else None, backend=backend, **given_teacher, **call
        )
    else:
        out = distill_loss(leaves[0], backend=backend, **given_teacher, **call)
    incoming = torch.arange(1.0, 1 + expected.numel(), dtype=torch.float64).reshape(expected.shape)
    # float64 sums over 9 classes and 6 tokens; the tail of a list is a difference of sums near 1
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out.divergence, values.detach(), **close)
    # infinite divergences with weights of both signs have no sum
    torch.testing.assert_close(out.loss.detach(), expected.detach(), **close, equal_nan=True)
    got = torch.autograd.grad((out.loss * incoming).sum(), leaves)
    for g, w in zip(got, slopes(expected, incoming, plain), strict=True):
        torch.testing.assert_close(g, w, **close)


# --- each of its properties


def case(dtype: torch.dtype = torch.float64, rows: int = N, vocabulary: int = V) -> dict[str, Tensor]:
    return {
        "hidden": randn(rows, D, seed=0, dtype=dtype).requires_grad_(),
        "lm_head_weight": randn(vocabulary, D, seed=1, dtype=dtype).requires_grad_(),
        "lm_head_bias": randn(vocabulary, seed=2, dtype=dtype).requires_grad_(),
        "teacher_hidden": randn(rows, E, seed=3, dtype=dtype),
        "teacher_lm_head_weight": randn(vocabulary, E, seed=4, dtype=dtype),
    }


def student(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(given[name] for name in ("hidden", "lm_head_weight", "lm_head_bias"))


def listed(rows: int = N, vocabulary: int = V, most: int = 4) -> dict[str, Tensor]:
    ids, logps = some_ids(rows, vocabulary, most, 11)
    return {"teacher_ids": ids, "teacher_logps": logps}


def without_teacher(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in given.items() if not name.startswith("teacher")}


TEACHERS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "whole": case, "listed": lambda: {**without_teacher(case()), **listed()},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", TEACHERS)
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_gradcheck(backend: str, form: str, name: str, reduction: str) -> None:
    given = TEACHERS[form]()
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0]).double()

    def loss(*leaves: Tensor) -> Tensor:
        call = {**given, **dict(zip(("hidden", "lm_head_weight", "lm_head_bias"), leaves, strict=True))}
        return linear_distill_loss(
            **call, divergence=name, softcap=4.0, weights=weights, reduction=reduction, backend=backend
        ).loss

    assert torch.autograd.gradcheck(loss, student(given), atol=1e-7)


def test_reverse_is_the_policy_losss_exact_kl_and_the_two_add_up() -> None:
    given = case()
    torch.manual_seed(0)
    tokens, a, mask = torch.randint(V, (N,)), torch.randn(N), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    head = {"lm_head_bias": given["lm_head_bias"]}
    reference = {"ref_hidden": given["teacher_hidden"], "ref_lm_head_weight": given["teacher_lm_head_weight"]}
    config = LossConfig(kl="full", kl_coef=0.3)
    both = linear_prefix_loss(*student(given)[:2], tokens, a, mask=mask, **head, **reference, config=config)
    policy = linear_prefix_loss(*student(given)[:2], tokens, a, mask=mask, **head)
    teacher = linear_distill_loss(**given, mask=mask)
    torch.testing.assert_close(teacher.divergence, both.kl, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(policy.loss + 0.3 * teacher.loss, student(given))
    for g, w in zip(got, torch.autograd.grad(both.loss, student(given)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("form", ["listed", "packed"])
def test_a_rounded_list_of_the_whole_vocabulary_is_the_whole_teacher(backend: str, name: str, form: str) -> None:
    """What float32 log-probs leave of 1 is their rounding, and nobody has it."""
    logits, teacher = randn(40, V, seed=1), randn(40, V, seed=2)
    ids, logps = torch.arange(V).expand(40, V), teacher.log_softmax(1).float()
    said = {"teacher_ids": ids, "teacher_logps": logps} if form == "listed" else packed(ids, logps)
    made = []
    for either in (said, {"teacher_logits": teacher}):
        leaf = logits.clone().requires_grad_()
        out = distill_loss(leaf, **either, divergence=name, backend=backend)
        out.loss.backward()
        made.append((out.divergence, leaf.grad))
    for got, want in zip(*made, strict=True):
        # of the log-probs: half of eps times 8
        torch.testing.assert_close(got, want, rtol=0, atol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_teacher_that_is_sure_but_for_rounding_is_not_infinitely_far(backend: str, name: str) -> None:
    """Of log-probs rounded to float32 the listed ones may have all of 1, or more, where others have a little."""
    teacher = randn(20, V, seed=2)
    teacher[:, 0] += 30
    top = teacher.float().log_softmax(1).topk(4)
    assert (top.values.double().exp().sum(1) >= 1).any()
    leaf = randn(20, V, seed=1).requires_grad_()
    out = distill_loss(leaf, teacher_ids=top.indices, teacher_logps=top.values, divergence=name, backend=backend)
    out.loss.backward()
    assert out.divergence.isfinite().all()
    assert (leaf.grad[:, 0] < 0).all()  # more of what the teacher is sure of


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_one_side_cannot_have(backend: str, name: str, dtype: torch.dtype) -> None:
    logits, teacher = randn(4, V, seed=1, dtype=dtype), randn(4, V, seed=2, dtype=dtype)
    logits[0, 1] = teacher[1, 1] = -INF
    logits[2, :5], teacher[2, 5:] = -INF, -INF  # nothing in common
    infinite = {"reverse": [False, True, True, False], "forward": [True, False, True, False]}.get(name, [False] * 4)
    leaf = logits.clone().requires_grad_()
    out = distill_loss(leaf, teacher_logits=teacher, divergence=name, backend=backend)
    assert (out.divergence == INF).tolist() == infinite
    assert not out.divergence.isnan().any()
    assert float(out.loss.detach()) == INF if any(infinite) else out.loss.isfinite()
    out.loss.backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[3].any()
    assert not leaf.grad[torch.tensor(infinite)].any()
    # a list: an id of which the teacher is sure, and one that it never has
    ids, logps = torch.tensor([[0, 1]] * 4), torch.tensor([[0.0, -INF]] * 4)
    out = distill_loss(logits, teacher_ids=ids, teacher_logps=logps, divergence=name, backend=backend)
    assert not out.divergence.isnan().any()
    # the first and third row cannot have the second id, which never is; the third not the one that is sure either
    assert (out.divergence == INF).tolist() == {
        "reverse": [False, True, False, True], "forward": [False, False, True, False],
    }.get(name, [False] * 4)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_count_is_never_looked_at(backend: str) -> None:
    given = case()
    mask, weights = torch.tensor([1, 1, 0, 1, 1, 1]).bool(), torch.tensor([1.0, 0, 1, 1, 1, 1])
    clean = linear_distill_loss(**given, mask=mask, weights=weights, backend=backend)
    want = torch.autograd.grad(clean.loss, student(given))
    for name in ("hidden", "teacher_hidden"):
        given[name] = given[name].detach().clone()
        given[name][1:3] = math.nan
    given["hidden"].requires_grad_()
    out = linear_distill_loss(**given, mask=mask, weights=weights, backend=backend)
    got = torch.autograd.grad(out.loss, student(given))
    torch.testing.assert_close(out.loss, clean.loss, rtol=0, atol=0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)
    assert out.divergence[1:3].tolist() == [0, 0]
    assert out.metrics["scored_tokens"] == 5
    assert out.metrics["learning_tokens"] == 4
    torch.testing.assert_close(out.metrics["divergence"], out.divergence.sum() / 4)
    torch.testing.assert_close(out.metrics["loss"], out.loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", TEACHERS)
def test_nothing_to_learn_is_a_loss_of_0_with_gradients_of_0(backend: str, form: str) -> None:
    given = TEACHERS[form]()
    out = linear_distill_loss(**given, weights=torch.zeros(N), backend=backend)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert all(not x.grad.any() for x in student(given))


@pytest.mark.parametrize("form", TEACHERS)
def test_chunks_and_blocks_do_not_change_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = TEACHERS[form]()
    whole = linear_distill_loss(**given, divergence="jsd")
    want = torch.autograd.grad(whole.loss, student(given))
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(2 * 8 * V * 2))  # two rows
    monkeypatch.setattr(distill, "_IN_CACHE", V)  # one row
    out = linear_distill_loss(**given, divergence="jsd")
    for g, w in zip(torch.autograd.grad(out.loss, student(given)), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.divergence, whole.divergence, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("form", TEACHERS)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_no_tensor_of_all_tokens_and_the_vocabulary(form: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 256, 512
    given = case(torch.float32, rows, vocabulary)
    if form == "listed":
        given = {**without_teacher(given), **listed(rows, vocabulary)}
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(4 * 2 * 4 * vocabulary * 8))
    with Largest() as largest:
        linear_distill_loss(**given, divergence="jsd", reduction=reduction).loss.sum().backward()
    # heads have 512 x 5 elements, chunks 52 rows at most
    assert 0 < largest.elements <= rows * vocabulary // 4


def test_a_listed_teacher_at_its_limits() -> None:
    """1,024 ids a row beside one; rows that list nothing say nothing."""
    vocabulary = 2048
    logits = randn(3, vocabulary, seed=0)
    ids, logps = some_ids(3, vocabulary, 1024, 5)
    ids[1, 1:], ids[2] = -1, -1
    ids[1, 0] = 7
    logps[1, 0] = math.log(0.3)
    _, values = definition(logits, {"ids": ids, "logps": logps}, divergence="forward")
    for teacher in ({"teacher_ids": ids, "teacher_logps": logps}, packed(ids, logps)):
        out = distill_loss(logits, **teacher, divergence="forward")
        torch.testing.assert_close(out.divergence, values, rtol=1e-9, atol=1e-12)
        assert out.divergence[2] == 0


@pytest.mark.parametrize("start", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_half_precision_is_computed_in_float32(start: str, dtype: torch.dtype, name: str) -> None:
    given = case(dtype)
    head = student(given)
    plain = [x.detach().double().requires_grad_() for x in head]
    teacher = (given["teacher_hidden"].double() @ given["teacher_lm_head_weight"].double().T).to(dtype)
    logits = (head[0].detach().double() @ head[1].detach().double().T).to(dtype).requires_grad_()
    if start == "hidden":
        out, leaves = linear_distill_loss(**given, divergence=name), head
        teacher = given["teacher_hidden"].double() @ given["teacher_lm_head_weight"].double().T
        expected, values = definition(plain[0] @ plain[1].T + plain[2], {"logits": teacher}, divergence=name)
    else:
        out, leaves = distill_loss(logits, teacher_logits=teacher, divergence=name), (logits,)
        plain = [logits.detach().double().requires_grad_()]
        expected, values = definition(plain[0], {"logits": teacher}, divergence=name)
    assert out.loss.dtype == out.divergence.dtype == torch.float32
    # float32 sums of terms of size 1; gradients are rounded to their dtype once
    torch.testing.assert_close(out.divergence.double(), values.detach(), rtol=1e-5, atol=2e-6)
    for leaf, g, w in zip(
        leaves, torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, plain), strict=True
    ):
        assert g.dtype == leaf.dtype
        torch.testing.assert_close(g.double(), w, rtol=max(1e-5, torch.finfo(dtype).eps), atol=2e-6)


def test_small_float16_gradients_survive_until_the_loss_scale_arrives() -> None:
    logits = randn(N, V, seed=0).half().requires_grad_()
    out = distill_loss(logits, teacher_logits=randn(N, V, seed=1).half(), normalizer=1e7)
    (got,) = torch.autograd.grad(out.loss * 1e7, logits)
    plain = logits.detach().double().requires_grad_()
    expected, _ = definition(plain, {"logits": randn(N, V, seed=1).half()}, normalizer=1.0)
    (want,) = torch.autograd.grad(expected, plain)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_kept_graph_may_be_gone_through_again_and_a_second_derivative_is_refused(reduction: str) -> None:
    given = case()
    loss = linear_distill_loss(**given, reduction=reduction).loss.sum()
    first = torch.autograd.grad(loss, student(given), retain_graph=True)
    again = torch.autograd.grad(3 * loss, student(given), retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b)
    with pytest.raises(RuntimeError, match="create_graph: got True"):
        torch.autograd.grad(loss, student(given), create_graph=True)
    plain = linear_distill_loss(**given, reduction=reduction, backend="reference").loss.sum()
    assert torch.autograd.grad(plain, student(given), create_graph=True)[0].requires_grad


def test_a_frozen_head_and_the_teacher_get_no_gradient() -> None:
    given = case()
    given["lm_head_weight"].requires_grad_(False)
    given["teacher_hidden"].requires_grad_()
    linear_distill_loss(**given).loss.backward()
    assert given["hidden"].grad.any()
    assert given["lm_head_weight"].grad is None
    assert given["teacher_hidden"].grad is None


def test_compiled_around_it_nothing_changes() -> None:
    given = case()
    names = ("hidden", "lm_head_weight", "lm_head_bias")

    def loss(*leaves: Tensor) -> Tensor:
        return linear_distill_loss(**{**given, **dict(zip(names, leaves, strict=True))}, divergence="jsd").loss * 2

    want = torch.autograd.grad(loss(*student(given)), student(given))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager")
    for _ in range(2):
        for g, w in zip(torch.autograd.grad(compiled(*student(given)), student(given)), want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_under_autocast_it_is_still_float32() -> None:
    given = case(torch.float32)
    plain = linear_distill_loss(**given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_distill_loss(**given).divergence, plain.divergence)


def test_a_longer_teacher_where_the_padding_is_named() -> None:
    given = case()
    longer = randn(V + 3, E, seed=4)
    out = linear_distill_loss(**{**given, "teacher_lm_head_weight": longer}, vocab_size=V)
    cut = linear_distill_loss(**{**given, "teacher_lm_head_weight": longer[:V]})
    torch.testing.assert_close(out.loss, cut.loss, rtol=0, atol=0)


# --- from the first error on


def test_weights_begin_at_the_first_error() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]).bool()
    first_error = torch.tensor([1, -1, 2])
    weights = advantages.from_first_error(first_error, mask, mask)
    assert weights.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert weights.dtype == torch.float32
    offsets = torch.tensor([0, 5, 10, 15])
    assert advantages.from_first_error(first_error, mask.reshape(-1), mask.reshape(-1), offsets).tolist() == (
        weights.reshape(-1).tolist()
    )
    given = case(rows=15)
    rows = {name: given[name].detach().reshape(3, 5, -1) for name in ("hidden", "teacher_hidden")}
    out = linear_distill_loss(**{**given, **rows}, mask=mask, weights=weights)
    assert (out.divergence != 0).tolist() == (weights != 0).tolist()
    # over all scored tokens, as the policy loss divides
    torch.testing.assert_close(out.loss.detach(), out.divergence.sum() / 11)


@pytest.mark.parametrize(
    ("first_error", "message"),
    [
        (torch.tensor([5, -1]), r"first_error: got 5 for response 0, expected an index below the response's length, 3"),
        (torch.tensor([-2, -1]), "first_error: got -2 for response 0"),
        (torch.tensor([1]), r"first_error: got shape \[1\], expected \[B\] = \[2\]"),
        (torch.tensor([1.0, 2.0]), "first_error: got float32"),
    ],
)
def test_a_first_error_that_cannot_be_is_named(first_error: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        advantages.from_first_error(first_error, torch.zeros(2, 3))


# --- errors


def no_teacher(**changes: Any) -> dict[str, Any]:
    return {"teacher_hidden": None, "teacher_lm_head_weight": None, **changes}


IDS, LOGPS = torch.tensor([[0, 1]] * N), torch.full((N, 2), -1.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"divergence": "js"}, ValueError, "divergence: got 'js', expected one of \"reverse\""),
        ({"divergence": ["jsd"]}, ValueError, "divergence: got"),
        ({"beta": 0.0}, ValueError, "beta: got 0.0, expected a number between 0 and 1"),
        ({"beta": math.nan}, ValueError, "beta: got nan"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature: got -1.0"),
        ({"softcap": -2.0}, ValueError, "softcap: got -2.0"),
        ({"reduction": "group-token-mean"}, ValueError, "reduction: got 'group-token-mean'"),
        ({"reduction": "seq-mean-token-mean"}, ValueError, "without cu_seqlens"),
        ({"normalizer": 0.0}, ValueError, "normalizer: got 0.0"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"hidden": torch.zeros(N)}, ValueError, r"hidden: got shape \[6\], expected \[B, T, D\] or \[N, D\]"),
        ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, TypeError, "hidden: got int64"),
        ({"lm_head_weight": torch.zeros(V, D + 1)}, ValueError, "lm_head_weight: got shape"),
        ({"mask": torch.ones(N + 1)}, ValueError, "mask: got shape"),
        ({"weights": torch.ones(N, 1)}, ValueError, "weights: got shape"),
        ({"weights": torch.ones(N, dtype=torch.int64)}, TypeError, "weights: got int64"),
        ({"weights": torch.full((N,), math.inf)}, ValueError, "weights: got inf at position 0"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size: got 10 with 9 columns"),
        ({"teacher_hidden": None}, ValueError, "teacher_hidden: got None, expected either teacher_hidden and"),
        ({"teacher_lm_head_weight": None}, ValueError, "teacher_lm_head_weight: got None"),
        (no_teacher(), ValueError, "teacher_hidden: got None"),
        ({"teacher_ids": IDS, "teacher_logps": LOGPS}, ValueError, "teacher_hidden: got a second teacher"),
        ({"teacher_hidden": torch.zeros(N - 1, E)}, ValueError, "teacher_hidden: got shape"),
        ({"teacher_lm_head_weight": torch.zeros(V + 1, E)}, ValueError, "weight: got a vocabulary of 10"),
        (no_teacher(teacher_ids=IDS), ValueError, "teacher_logps: got None"),
        (no_teacher(teacher_lm_head_bias=torch.zeros(V), teacher_ids=IDS, teacher_logps=LOGPS), ValueError, "second"),
        (no_teacher(teacher_ids=IDS.float(), teacher_logps=LOGPS), TypeError, "teacher_ids: got float32"),
        (no_teacher(teacher_ids=IDS[:2], teacher_logps=LOGPS), ValueError, "teacher_ids: got shape"),
        (no_teacher(teacher_ids=IDS, teacher_logps=LOGPS[:, :1]), ValueError, "teacher_logps: got shape"),
        (no_teacher(teacher_ids=IDS + V, teacher_logps=LOGPS), ValueError, "teacher_ids: got 9 at position 0"),
        (no_teacher(teacher_ids=IDS - 2, teacher_logps=LOGPS), ValueError, "teacher_ids: got -2 at position 0"),
        (no_teacher(teacher_ids=IDS * 0, teacher_logps=LOGPS), ValueError, "got 0 at position 0, expected each"),
        (no_teacher(teacher_ids=IDS, teacher_logps=-LOGPS), ValueError, "teacher_logps: got 1.0 at position 0"),
        (no_teacher(teacher_ids=IDS, teacher_logps=LOGPS * math.nan), ValueError, "teacher_logps: got nan"),
        (no_teacher(teacher_ids=IDS, teacher_logps=LOGPS / 4), ValueError, "add up to 1.5576 at position 0"),
        (
            no_teacher(teacher_ids=IDS, teacher_logps=LOGPS, teacher_temperature=2.0), ValueError,
            "teacher_temperature: got 2.0, expected None",
        ),
        (
            no_teacher(teacher_ids=IDS[0], teacher_logps=LOGPS[0], teacher_offsets=torch.tensor([0, 2])), ValueError,
            r"teacher_offsets: got shape \[2\], expected \[N \+ 1\] = \[7\]",
        ),
        (
            no_teacher(teacher_ids=IDS[0], teacher_logps=LOGPS[0], teacher_offsets=torch.tensor([0, 2, 1, 2, 2, 2, 2])),
            ValueError, "teacher_offsets: got offsets from 0 to 2, expected increasing ones",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {name: x.detach() for name, x in case(torch.float32).items()}
    with pytest.raises(error, match=message):
        linear_distill_loss(**{**given, **changes})


def test_errors_of_logits() -> None:
    logits = torch.zeros(N, V)
    with pytest.raises(ValueError, match="teacher_logits: got None, expected either teacher_logits, or teacher_ids"):
        distill_loss(logits)
    with pytest.raises(ValueError, match="teacher_logits: got a vocabulary of 10"):
        distill_loss(logits, teacher_logits=torch.zeros(N, V + 1))
    with pytest.raises(ValueError, match="teacher_logits: got shape"):
        distill_loss(logits, teacher_logits=torch.zeros(N + 1, V))
    with pytest.raises(RuntimeError, match="vmap: got a call inside it"):
        torch.func.vmap(lambda x: distill_loss(x[None], teacher_logits=x[None]).loss)(logits)


def test_wrong_values_at_tokens_outside_the_mask_are_never_looked_at() -> None:
    ids, logps, mask = IDS.clone(), LOGPS.clone(), torch.ones(N).bool()
    ids[2], logps[2], mask[2] = V + 5, 7.0, False
    out = distill_loss(torch.zeros(N, V), teacher_ids=ids, teacher_logps=logps, mask=mask)
    assert out.divergence[2] == 0
    assert out.loss.isfinite()


# --- a vocabulary shared in part

W = 7  # ids of the teacher
SHARED = torch.tensor([4, -1, 0, 6, -1, -1, 2, 1, -1])  # of the student's 9; the teacher's 3 and 5 are its own


def over_shared(z: Tensor, index: list[int]) -> Tensor:
    """Probabilities of the chosen columns and of all others, from scores of one row."""
    p = z.softmax(-1)
    return torch.cat([p[index], p[[j for j in range(len(p)) if j not in index]].sum()[None]])


def by_hand(logits: Tensor, teacher: Tensor, vocabulary: Tensor, name: str, temperature: float = 1.0) -> Tensor:
    own = [j for j, other in enumerate(vocabulary.tolist()) if other >= 0]
    theirs = [other for other in vocabulary.tolist() if other >= 0]
    rows = [
        of_row(name, 0.3, over_shared(a / temperature, own), over_shared(b / temperature, theirs))
        for a, b in zip(logits, teacher, strict=True)
    ]
    return torch.stack(rows)


def other_vocabulary(**changes: Any) -> dict[str, Any]:
    return {**case(), "teacher_lm_head_weight": randn(W, E, seed=4), "teacher_vocabulary": SHARED, **changes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("form", ["hidden", "logits", "listed"])
def test_a_vocabulary_shared_in_part(backend: str, name: str, form: str) -> None:
    """The ids that both have, and each side's rest as one class; a list of all of the teacher's ids says the same."""
    given = other_vocabulary()
    theirs = given["teacher_hidden"] @ given["teacher_lm_head_weight"].T
    plain = tuple(x.detach().clone().requires_grad_() for x in student(given))
    call: dict[str, Any] = {"divergence": name, "beta": 0.3, "backend": backend}
    scale = 0.7
    if form == "listed":
        given = without_teacher(given)
        order = torch.stack([torch.randperm(W, generator=torch.Generator().manual_seed(i)) for i in range(N)])
        call |= {"teacher_ids": order, "teacher_logps": (theirs / scale).log_softmax(-1).gather(1, order)}
        call["teacher_vocabulary"] = SHARED
    if form == "logits":
        logits = (plain[0] @ plain[1].T + plain[2]).detach().requires_grad_()
        leaves, plain = (logits,), (logits.detach().clone().requires_grad_(),)
        out = distill_loss(logits, teacher_logits=theirs, teacher_vocabulary=SHARED, temperature=scale, **call)
        values = by_hand(plain[0], theirs, SHARED, name, scale)
    else:
        leaves = student(given)
        out = linear_distill_loss(**given, temperature=scale, **call)
        values = by_hand(plain[0] @ plain[1].T + plain[2], theirs, SHARED, name, scale)
    # float64 sums over 9 classes; the tail of a list is a difference of sums near 1
    torch.testing.assert_close(out.divergence, values.detach(), rtol=1e-9, atol=1e-11)
    got, want = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(values.mean(), plain)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_mapping_of_every_id_is_the_whole_vocabulary_in_another_order(backend: str, name: str) -> None:
    given, order = case(), torch.randperm(V, generator=torch.Generator().manual_seed(3))
    whole = linear_distill_loss(**given, divergence=name)
    turned = {**given, "teacher_lm_head_weight": torch.empty(V, E).double().index_copy_(
        0, order, given["teacher_lm_head_weight"])}  # fmt: skip
    out = linear_distill_loss(**turned, teacher_vocabulary=order, divergence=name, backend=backend)
    torch.testing.assert_close(out.divergence, whole.divergence, rtol=1e-9, atol=1e-12)
    got, want = (torch.autograd.grad(x.loss, student(given)) for x in (out, whole))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_rest_that_one_side_cannot_have_is_never_nan(backend: str, name: str) -> None:
    """The student's own ids are banned: its rest is impossible, and only the teacher has one."""
    given = other_vocabulary()
    bias = given["lm_head_bias"].detach().masked_fill(SHARED < 0, -INF).requires_grad_()
    out = linear_distill_loss(**{**given, "lm_head_bias": bias}, divergence=name, backend=backend)
    assert bool(out.divergence.isinf().all()) == (name == "forward")
    grads = torch.autograd.grad(out.loss, (given["hidden"], given["lm_head_weight"], bias))
    assert not any(g.isnan().any() for g in grads)
    assert all(bool(g.any()) == (name != "forward") for g in grads)


def test_a_longer_vocabulary_of_the_teacher_never_holds_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary, theirs = 256, 128, 512
    given = {**case(torch.float32, rows, vocabulary), "teacher_lm_head_weight": randn(theirs, E, seed=4).float()}
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(4 * (theirs + vocabulary) * 32))
    with Largest() as largest:
        mapping = torch.arange(vocabulary) * 4
        linear_distill_loss(**given, teacher_vocabulary=mapping, divergence="jsd").loss.backward()
    # the teacher's head has 512 x 5 elements, a chunk 24 rows of its logits
    assert 0 < largest.elements <= rows * theirs // 8


def test_ids_of_the_teacher_that_the_student_has_not_are_left_to_the_rest() -> None:
    """Beyond the mapping's largest too; packed, with unused places, and with tokens that do not count."""
    ids = torch.tensor([[4, 3, 100, -1]] * N)
    logps = torch.tensor([0.3, 0.2, 0.4, 1.0]).log().expand(N, 4).double()
    logits, mask = randn(N, V, seed=0), torch.arange(N) != 2
    ids[2] = -1000
    out = distill_loss(logits, teacher_ids=ids, teacher_logps=logps, teacher_vocabulary=SHARED, mask=mask)
    only = distill_loss(logits, teacher_ids=torch.zeros(N, 1).long(), teacher_logps=logps[:, :1], mask=mask)
    torch.testing.assert_close(out.divergence, only.divergence)


def test_a_mapping_to_an_id_of_any_size_takes_no_room() -> None:
    given = {"teacher_ids": torch.zeros(N, 1).long(), "teacher_logps": torch.full((N, 1), -1.0)}
    far = torch.where(SHARED.max() == SHARED, 2**60, SHARED)
    logits = randn(N, V, seed=0)
    got = distill_loss(logits, **given, teacher_vocabulary=far)
    assert torch.equal(got.divergence, distill_loss(logits, **given, teacher_vocabulary=SHARED).divergence)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_teacher_that_lists_nothing_at_all_says_nothing(backend: str) -> None:
    nothing = {"teacher_ids": torch.zeros(N, 0).long(), "teacher_logps": torch.zeros(N, 0)}
    logits = randn(N, V, seed=0, dtype=torch.float32).requires_grad_()
    out = distill_loss(logits, **nothing, backend=backend)
    out.loss.backward()
    # the log of a sum of probabilities is off by a rounding or two of 1
    assert out.divergence.tolist() == pytest.approx([0.0] * N, abs=4e-7)
    assert logits.grad is not None
    assert logits.grad.abs().max() <= 4e-7


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher_vocabulary": SHARED.float()}, TypeError, "teacher_vocabulary: got float32"),
        ({"teacher_vocabulary": SHARED[1:]}, ValueError, r"teacher_vocabulary: got shape \[8\], expected \[V\]"),
        ({"teacher_vocabulary": SHARED + 1}, ValueError, "teacher_vocabulary: got 7 for id 3, expected the teacher's"),
        ({"teacher_vocabulary": SHARED - 1}, ValueError, "teacher_vocabulary: got -2 for id 1"),
        ({"teacher_vocabulary": SHARED * 0}, ValueError, "teacher_vocabulary: got an id of the teacher twice"),
        ({"teacher_vocabulary": SHARED * 0 - 1}, ValueError, "teacher_vocabulary: got -1 for every id"),
        ({"vocab_size": V - 1}, ValueError, r"teacher_vocabulary: got shape \[9\], expected .* = \[8\]"),
        ({"backend": "triton"}, RuntimeError, 'backend: got "triton" with teacher_vocabulary'),
        (
            no_teacher(teacher_lm_head_weight=None, teacher_ids=IDS - 2, teacher_logps=LOGPS), ValueError,
            "teacher_ids: got -2 at position 0",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_mapping(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {name: x.detach() for name, x in other_vocabulary().items()}
    with pytest.raises(error, match=message):
        linear_distill_loss(**{**given, **changes})
