"""Distillation with kernels against its definition, dense in float64: every divergence and form of teacher."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distill import (
    INF,
    TEACHERS,
    D,
    E,
    Largest,
    N,
    V,
    definition,
    listed,
    options,
    packed,
    randn,
    slopes,
    some_ids,
    without_teacher,
)
from test_distill import case as case_of
from test_distill import student as student_of
from torch import Tensor
from torch.library import CustomOpDef

from prefixloss import LossConfig, distill_loss, linear_distill_loss
from prefixloss.backends.triton import distill
from prefixloss.maths.divergence import BY_NAME

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32 = torch.float32


def on_device(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}


def leaf(x: Tensor) -> Tensor:
    return x.detach().to(DEVICE).clone().requires_grad_()


# float32 scores of size 10, rounded a few times: 1e-6 each of the divergence, and of a slope times the factors below
CLOSE = {"rtol": 3e-5, "atol": 1e-5}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    chosen=options, form=st.sampled_from(["whole", "listed", "packed"]), start=st.sampled_from(["hidden", "logits"]),
    padded=st.booleans(), masked=st.booleans(), weighted=st.booleans(), banned=st.booleans(), own=st.booleans(),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_random_configurations(
    chosen: dict[str, Any], form: str, start: str, padded: bool, masked: bool, weighted: bool, banned: bool, own: bool,
    seed: int,
) -> None:  # fmt: skip
    shape = (2, 3) if padded else (N,)
    hidden, weight, bias = (randn(*s, seed=seed + i).float() for i, s in enumerate(((*shape, D), (V, D), (V,))))
    t_hidden, t_weight, t_bias = (
        randn(*s, seed=seed + 3 + i).float() for i, s in enumerate(((*shape, E), (V, E), (V,)))
    )
    if banned:
        bias[3] = t_bias[3] = -INF
    logits = hidden @ weight.T + bias
    call: dict[str, Any] = dict(chosen)
    ids, logps = some_ids(N, call["vocab_size"] or V, 4, seed + 6)
    logps = logps.float()
    teacher: dict[str, Any] = {"ids": ids, "logps": logps}
    if form == "whole":
        exact = t_hidden.double() @ t_weight.double().T + t_bias.double()
        teacher = {"logits": exact if start == "hidden" else exact.float()}
        if own:
            call["teacher_temperature"] = 1.4
        given_teacher = (
            {"teacher_hidden": t_hidden, "teacher_lm_head_weight": t_weight, "teacher_lm_head_bias": t_bias}
            if start == "hidden"
            else {"teacher_logits": teacher["logits"]}
        )
    elif form == "packed":
        given_teacher = packed(ids, logps)
    else:
        given_teacher = {"teacher_ids": ids.reshape(*shape, 4), "teacher_logps": logps.reshape(*shape, 4)}
    if masked:
        call["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 7)) < 0.7
    if weighted:
        call["weights"] = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(seed + 8)).double()
    if not padded:
        call["cu_seqlens"] = torch.tensor([0, 2, 2, N])
    models = (hidden, weight, bias) if start == "hidden" else (logits,)
    leaves = tuple(leaf(x) for x in models)
    plain = tuple(x.detach().double().requires_grad_() for x in models)
    expected, values = definition(plain[0] if start == "logits" else plain[0] @ plain[1].T + plain[2], teacher, **call)
    made_of = on_device({**given_teacher, **call})
    if start == "hidden":
        out = linear_distill_loss(*leaves[:2], lm_head_bias=leaves[2], backend="triton", **made_of)
    else:
        out = distill_loss(leaves[0], backend="triton", **made_of)
    torch.testing.assert_close(out.divergence.cpu().double(), values.detach(), **CLOSE)
    # infinite divergences with weights of both signs have no sum
    close = {"rtol": 3e-5, "atol": 3e-5, "equal_nan": True}
    torch.testing.assert_close(out.loss.detach().cpu().double(), expected.detach(), **close)
    incoming = torch.arange(1.0, 1 + expected.numel()).reshape(expected.shape)
    got = torch.autograd.grad((out.loss * incoming.to(DEVICE)).sum(), leaves)
    for g, w in zip(got, slopes(expected, incoming, plain), strict=True):
        # weights of up to 2, incoming gradients of up to 6 and sums of up to 9 columns of size 3
        torch.testing.assert_close(g.cpu().double(), w, rtol=3e-5, atol=5e-4)


def test_auto_is_the_kernels_where_they_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    made = distill.distillation
    monkeypatch.setattr(distill, "distillation", lambda asked: called.append(1) or made(asked))
    given = on_device(case_of(F32))
    linear_distill_loss(**given)
    assert bool(called) == (DEVICE == "cuda")
    linear_distill_loss(**given, backend="triton")
    assert called
    with pytest.raises(RuntimeError, match="the kernels compute in float32, the input is float64"):
        linear_distill_loss(**case_of(), backend="triton")


@pytest.mark.parametrize("start", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_half_precision_is_computed_in_float32(start: str, dtype: torch.dtype, name: str) -> None:
    given = case_of(dtype)
    plain = [x.detach().double().requires_grad_() for x in student_of(given)]
    teacher = given["teacher_hidden"].double() @ given["teacher_lm_head_weight"].double().T
    if start == "hidden":
        given = on_device(given)
        leaves = tuple(leaf(x) for x in student_of(given))
        names = ("hidden", "lm_head_weight", "lm_head_bias")
        made_of = {**given, **dict(zip(names, leaves, strict=True))}
        out = linear_distill_loss(**made_of, divergence=name, backend="triton")
        expected, values = definition(plain[0] @ plain[1].T + plain[2], {"logits": teacher}, divergence=name)
    else:
        logits = (plain[0] @ plain[1].T).detach().to(dtype)
        leaves, teacher = (leaf(logits),), teacher.to(dtype)
        out = distill_loss(leaves[0], teacher_logits=teacher.to(DEVICE), divergence=name, backend="triton")
        plain = [logits.double().requires_grad_()]
        expected, values = definition(plain[0], {"logits": teacher}, divergence=name)
    assert out.loss.dtype == out.divergence.dtype == F32
    torch.testing.assert_close(out.divergence.cpu().double(), values.detach(), **CLOSE)
    grads = torch.autograd.grad(out.loss, leaves)
    # on a GPU the logits' gradient is rounded to the head's dtype before its products
    rtol = max(3e-5, (4 if DEVICE == "cuda" else 1) * torch.finfo(dtype).eps)
    for g, x, w in zip(grads, leaves, torch.autograd.grad(expected, plain), strict=True):
        assert g.dtype == x.dtype
        torch.testing.assert_close(g.cpu().double(), w, rtol=rtol, atol=rtol / 10)


def test_small_float16_gradients_survive_until_the_loss_scale_arrives() -> None:
    logits, teacher = leaf(randn(N, V, seed=0).half()), randn(N, V, seed=1).half()
    out = distill_loss(logits, teacher_logits=teacher.to(DEVICE), normalizer=1e7, backend="triton")
    (got,) = torch.autograd.grad(out.loss * 1e7, logits)
    plain = logits.detach().cpu().double().requires_grad_()
    (want,) = torch.autograd.grad(definition(plain, {"logits": teacher}, normalizer=1.0)[0], plain)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", TEACHERS)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_what_does_not_count_is_never_looked_at(form: str, reduction: str) -> None:
    """Nor is it in a product: chunks have the rows that count."""
    given = on_device(
        {name: x.detach().float() if x.is_floating_point() else x for name, x in TEACHERS[form]().items()}
    )
    mask, weights = torch.tensor([1, 1, 0, 1, 1, 1]).bool().to(DEVICE), torch.tensor([1.0, 0, 1, 1, 1, 1]).to(DEVICE)
    found = []
    for broken in (False, True):
        made_of = {name: x.clone() for name, x in given.items()}
        if broken:
            for name in ("hidden", "teacher_hidden", "teacher_logps"):
                if name in made_of:
                    made_of[name][1:3] = math.nan
        student = [made_of[name].requires_grad_() for name in ("hidden", "lm_head_weight", "lm_head_bias")]
        if broken and form == "listed":
            made_of["teacher_logps"][1] = given["teacher_logps"][1]  # within the mask log-probs are checked
        out = linear_distill_loss(
            **made_of, mask=mask, weights=weights, reduction=reduction, divergence="jsd", backend="triton"
        )
        found.append([out.loss.detach(), out.divergence, *torch.autograd.grad(out.loss.sum(), student)])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)
    assert (found[0][1] != 0).tolist() == [True, False, False, True, True, True]


def test_the_backward_makes_only_the_rows_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given, sizes, launch = on_device({name: x.detach() for name, x in case_of(F32).items()}), [], distill.launch_distill
    monkeypatch.setattr(
        distill, "launch_distill", lambda p, *rest: sizes.append(len(p.rows.token_ptr)) or launch(p, *rest)
    )
    given["hidden"].requires_grad_()
    linear_distill_loss(**given, reduction="none", backend="triton").loss[2].backward()
    assert sizes == [N, 1]
    assert given["hidden"].grad.any(1).tolist() == [i == 2 for i in range(N)]


@pytest.mark.parametrize("form", TEACHERS)
@pytest.mark.parametrize("start", ["hidden", "logits"])
def test_nothing_to_learn_is_a_loss_of_0_with_gradients_of_0(form: str, start: str) -> None:
    given = on_device(
        {name: x.detach().float() if x.is_floating_point() else x for name, x in TEACHERS[form]().items()}
    )
    if start == "hidden":
        leaves = [given[name].requires_grad_() for name in ("hidden", "lm_head_weight", "lm_head_bias")]
        out = linear_distill_loss(**given, weights=torch.zeros(N, device=DEVICE), backend="triton")
    else:
        leaves = [leaf(randn(N, V, seed=0).float())]
        teacher = {"teacher_logits": randn(N, V, seed=1).float().to(DEVICE)} if form == "whole" else on_device(listed())
        out = distill_loss(leaves[0], **teacher, weights=torch.zeros(N, device=DEVICE), backend="triton")
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert all(not x.grad.any() for x in leaves)


@pytest.mark.parametrize("form", TEACHERS)
def test_chunks_do_not_change_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = on_device(
        {name: x.detach().float() if x.is_floating_point() else x for name, x in TEACHERS[form]().items()}
    )
    student = [given[name].requires_grad_() for name in ("hidden", "lm_head_weight", "lm_head_bias")]
    sizes = []
    launch = distill.launch_distill
    monkeypatch.setattr(
        distill, "launch_distill", lambda p, *rest: sizes.append(len(p.rows.token_ptr)) or launch(p, *rest)
    )

    def answers() -> list[Tensor]:
        out = linear_distill_loss(**given, divergence="jsd", backend="triton")
        return [out.loss.detach(), out.divergence, *torch.autograd.grad(out.loss, student)]

    whole = answers()
    assert sizes == [N]
    monkeypatch.setenv(
        "PREFIXLOSS_MEMORY", str(4 * 2 * 4 * V * (2 if form == "whole" else 1))
    )  # two rows in a quarter of it
    for g, w in zip(answers(), whole, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    assert sizes == [N, 2, 2, 2]


def test_a_long_list_over_logits_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(N, V, seed=0).float()
    teacher = on_device(listed())
    found = []
    for memory in (None, str(distill._PER_ID * 4 * 4)):
        if memory is not None:
            monkeypatch.setenv("PREFIXLOSS_MEMORY", memory)
        student = leaf(logits)
        out = distill_loss(student, **teacher, backend="triton")
        found.append([out.divergence, *torch.autograd.grad(out.loss, student)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", TEACHERS)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_no_tensor_of_all_tokens_and_the_vocabulary(form: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 32, 64
    given = case_of(F32, rows, vocabulary)
    if form == "listed":
        given = {**without_teacher(given), **listed(rows, vocabulary)}
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(4 * 4 * vocabulary * 4))  # four rows at most
    with Largest() as largest:
        made = linear_distill_loss(**on_device(given), divergence="jsd", reduction=reduction, backend="triton")
        made.loss.sum().backward()
    assert 0 < largest.elements <= rows * vocabulary // 4


def test_a_frozen_head_and_the_teacher_get_no_gradient() -> None:
    given = on_device({name: x.detach() for name, x in case_of(F32).items()})
    given["hidden"].requires_grad_()
    given["teacher_hidden"].requires_grad_()
    linear_distill_loss(**given, backend="triton").loss.backward()
    assert given["hidden"].grad.any()
    assert given["lm_head_weight"].grad is None
    assert given["teacher_hidden"].grad is None


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_kept_graph_may_be_gone_through_again_and_a_second_derivative_is_refused(reduction: str) -> None:
    given = on_device({name: x.detach() for name, x in case_of(F32).items()})
    student = [given[name].requires_grad_() for name in ("hidden", "lm_head_weight", "lm_head_bias")]
    loss = linear_distill_loss(**given, reduction=reduction, backend="triton").loss.sum()
    first = torch.autograd.grad(loss, student, retain_graph=True)
    again = torch.autograd.grad(3 * loss, student, retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="create_graph: got True"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_rows_of_a_longer_batch_and_a_longer_teacher_are_found() -> None:
    """Neither's rows lie one after another, and the student's padding is infinite."""
    logits, teacher = randn(N, V + 5, seed=0).float(), randn(N, V + 9, seed=1).float()
    logits[:, V:] = math.inf
    student = leaf(logits)
    out = distill_loss(student, teacher_logits=teacher.to(DEVICE), vocab_size=V, backend="triton")
    _, values = definition(logits[:, :V].double().requires_grad_(), {"logits": teacher[:, :V]})
    torch.testing.assert_close(out.divergence.cpu().double(), values.detach(), **CLOSE)
    out.loss.backward()
    assert not student.grad[:, V:].any()
    assert student.grad[:, :V].any()


# --- the operators


KIND = ("jsd", 0.3, LossConfig(temperature=0.7).encoded, LossConfig().encoded)


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with each form of teacher."""
    wanted = torch.tensor([True, True, False, True, True, True], device=DEVICE)
    # positive, so that `opcheck`, which differentiates absolute values, changes no sign of a gradient among the outputs
    coefficients = torch.arange(1.0, N + 1, device=DEVICE)
    head = leaf(randn(N, D, seed=0).float()), leaf(randn(V, D, seed=1).float()), leaf(randn(V, seed=2).float())
    logits = leaf(randn(N, V, seed=0).float())
    ids, logps = (x.to(DEVICE) for x in some_ids(N, V, 4, 11))
    whole = [randn(*shape, seed=3 + i).float().to(DEVICE) for i, shape in enumerate(((N, E), (V, E), (V,)))]
    list_ = packed(ids.cpu(), logps.cpu().float()).values()
    beside_head = {
        "whole": (*whole, None, None, None),
        "packed": (None, None, None, *(x.to(DEVICE) for x in list_)),
    }
    beside_logits = {
        "whole": (randn(N, V, seed=3).float().to(DEVICE), None, None, None),
        "listed": (None, ids, logps.float(), None),
    }
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for form, teacher in beside_head.items():
        needs = [True, True, True]
        given = (*head, *teacher, wanted)
        found[f"linear_distillation, {form}"] = distill.linear_distillation, (*given, coefficients, *KIND, needs)
        found[f"linear_divergences, {form}"] = distill.linear_divergences, (*given, *KIND, needs)
    for form, teacher in beside_logits.items():
        given = (logits, *teacher, wanted)
        found[f"logit_distillation, {form}"] = distill.logit_distillation, (*given, coefficients, *KIND, [True])
        found[f"logit_divergences, {form}"] = distill.logit_divergences, (*given, *KIND, [True])
    return found


OPERATORS = [
    f"{operator}, {form}"
    for operator, forms in {
        "linear_distillation": ("whole", "packed"), "linear_divergences": ("whole", "packed"),
        "logit_distillation": ("whole", "listed"), "logit_divergences": ("whole", "listed"),
    }.items()
    for form in forms
]  # fmt: skip


def test_every_operator_is_called() -> None:
    registered = {found._name for found in vars(distill).values() if isinstance(found, CustomOpDef)}
    assert {operator._name for operator, _ in calls().values()} == registered
    assert set(OPERATORS) == set(calls())


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_they_say(name: str) -> None:
    """Schema, fake implementation, autograd registration, and the same under compilation."""
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


def test_a_tensor_changed_before_its_backward_is_noticed() -> None:
    logits, teacher = leaf(randn(N, V, seed=0).float()), randn(N, V, seed=1).float().to(DEVICE)
    loss = distill_loss(logits, teacher_logits=teacher, reduction="none", backend="triton").loss.sum()
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
