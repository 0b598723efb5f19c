"""A function of the caller's own as the objective: one loss on every back-end, one pass where it may, clear errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Counter, call_with_grads, packed, small_case, without_ref
from oracle import Case
from processes import group_of, in_processes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixloss import LossConfig, linear_prefix_loss
from prefixloss.backends import two_stages
from prefixloss.maths.objectives import View


def my_clip(logp: Tensor, given: View) -> Tensor:
    """PPO's, as a paper has it."""
    a = given.advantages
    return -torch.minimum(given.ratio * a, given.ratio.clamp(0.8, 1.2) * a)


def whole(logp: Tensor, given: View) -> Tensor:
    """Uses every reducer, and every token of a response."""
    log_ratio = torch.log(given.ratio)
    size = given.response.sum(given.advantages**2)
    strength = given.response.sum(given.advantages * logp) + given.response.max(logp) * size
    return -torch.exp(given.response.mean(log_ratio)) * given.advantages + 0.1 * strength


def imitate(logp: Tensor, given: View) -> Tensor:
    """Looks at no advantage: every scored token learns."""
    return -logp


def with_extras(logp: Tensor, given: View) -> Tensor:
    assert given.entropy is not None
    assert given.kl is not None
    return -given.advantages * logp + 0.3 * given.kl**2 - 0.2 * given.entropy * given.ratio


# one pass, two stages for three reasons, and the two layouts
WAYS: list[dict[str, Any]] = [{}, {"reduction": "none"}, {"stats": "scored", "row_tolerance": 1e-12}]


def unlike(case: Case) -> Case:
    """With no two tokens' ratios alike."""
    spread = 0.003 * torch.arange(case.tokens.numel()).reshape(case.tokens.shape)
    return case.but(old_logps=case.old_logps + spread)


def above_average(logp: Tensor, given: View) -> Tensor:
    """Those whose ratio is above the batch's mean; the largest one not."""
    ratio = given.ratio.detach()
    top = given.batch.descending(ratio)[0]
    return torch.where((ratio > given.batch.mean(ratio)) & (ratio < top), -given.advantages * logp, 0.0)


@pytest.mark.parametrize("more", WAYS, ids=str)
@pytest.mark.parametrize("level", ["linear", "logits"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", None), ("torch", None), ("triton", torch.float32)])
def test_a_function_of_the_built_in_s_maths_is_the_built_in(
    backend: str, dtype: Any, level: str, more: dict[str, Any]
) -> None:
    case = without_ref(small_case(level))
    case.advantages[:, 1] = 0
    want, want_grads = call_with_grads(case, "reference", **more)
    got, grads = call_with_grads(case, backend, dtype=dtype, objective=my_clip, **more)
    near = {"rtol": 1e-10, "atol": 1e-12} if dtype is None else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.loss.double(), want.loss, **near)
    assert torch.equal(got.learning, want.learning)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), want_grads[name], **near)


@pytest.mark.parametrize("more", WAYS, ids=str)
@pytest.mark.parametrize("level", ["linear", "logits"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("backend", "dtype"), [("torch", None), ("triton", torch.float32)])
@pytest.mark.parametrize("objective", [whole, imitate, above_average])
def test_back_ends_agree_on_whole_responses_and_on_what_needs_no_advantage(
    objective: Callable[..., Tensor], backend: str, dtype: Any, layout: str, level: str, more: dict[str, Any]
) -> None:
    case = unlike(without_ref(small_case(level)))
    case.advantages[0] = 0
    case = packed(case) if layout == "packed" else case
    want, want_grads = call_with_grads(case, "reference", objective=objective, **more)
    got, grads = call_with_grads(case, backend, dtype=dtype, objective=objective, **more)
    near = {"rtol": 1e-10, "atol": 1e-12} if dtype is None else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.loss.double(), want.loss, **near)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), want_grads[name], **near)
    # a response without advantages is still learned from, but not by the first
    assert bool(got.learning.reshape(3, -1)[0].any()) == (objective is not whole)


def test_the_reference_s_gradient_is_the_formula_s_own() -> None:
    case = without_ref(small_case("linear"))
    _, grads = call_with_grads(case, "reference", objective=whole)
    leaf = case.hidden.clone().requires_grad_()
    logp_all = (leaf @ case.weight.t() + case.bias).log_softmax(-1)
    logp = logp_all.gather(-1, case.tokens[..., None])[..., 0]
    log_ratio, mask, a = logp - case.old_logps, case.mask, case.advantages
    count = mask.sum(1, keepdim=True)
    size = (a**2 * mask).sum(1, keepdim=True)
    strength = (a * logp * mask).sum(1, keepdim=True)
    strength = strength + logp.masked_fill(~mask, -99.0).amax(1, keepdim=True) * size
    mean = (log_ratio * mask).sum(1, keepdim=True) / count
    ((-mean.exp() * a + 0.1 * strength) * mask).sum().div(mask.sum()).backward()
    torch.testing.assert_close(grads["hidden"], leaf.grad)


@pytest.mark.parametrize("level", ["linear", "logits"])
@pytest.mark.parametrize("kl_coef", [0.2, 0.0])  # with 0 the function's own use of it is all there is
@pytest.mark.parametrize(("backend", "dtype"), [("torch", None), ("triton", torch.float32)])
def test_entropy_and_exact_kl_are_there_where_they_were_asked_for_and_carry_gradients(
    backend: str, dtype: Any, kl_coef: float, level: str
) -> None:
    case = small_case(level, kl="full", entropy_coef=0.1, kl_coef=kl_coef)
    want, want_grads = call_with_grads(case, "reference", objective=with_extras)
    got, grads = call_with_grads(case, backend, dtype=dtype, objective=with_extras)
    near = {"rtol": 1e-9, "atol": 1e-11} if dtype is None else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(got.loss.double(), want.loss, **near)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), want_grads[name], **near)

    def sees_nothing(logp: Tensor, given: View) -> Tensor:
        assert given.entropy is None
        assert given.kl is None
        return -logp * given.advantages

    call_with_grads(without_ref(small_case(level)), backend, dtype=dtype, objective=sees_nothing)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", None), ("triton", torch.float32)])
def test_own_token_functions_keep_the_single_pass_and_others_do_not(
    backend: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged: list[LossConfig] = []
    loss = two_stages.loss
    monkeypatch.setattr(two_stages, "loss", lambda s, batch, config: staged.append(config) or loss(s, batch, config))
    case = without_ref(small_case("linear"))
    products = []
    for objective in ("clip", my_clip, whole):
        with Counter() as counter:
            call_with_grads(case, backend, dtype=dtype, objective=objective)
        products.append(counter.products)
    assert [config.objective for config in staged] == [whole]
    if backend == "torch":  # the other's lie inside its operators
        assert products[0] == products[1] < products[2]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_that_is_shown_but_does_not_learn_has_no_gradient_whatever_it_is(backend: str) -> None:
    """In one pass with those that do: its log-prob is -inf, and so its derivative no number."""
    case = without_ref(small_case("linear"))
    case.mask[:] = True
    case.advantages[:] = 1.0
    case.advantages[0, 1] = 0
    case.tokens[:] = case.tokens % 6
    case.tokens[0, 1] = 6
    case.bias[6] = -math.inf
    found = []
    for objective in ("clip", my_clip):
        hidden = case.hidden.float().requires_grad_()
        out = linear_prefix_loss(
            hidden, case.weight.float(), case.tokens, case.advantages, lm_head_bias=case.bias.float(),
            old_logps=case.old_logps.float(), config=LossConfig(objective=objective, stats="scored"), backend=backend,
            max_learning_tokens=12,
        )  # fmt: skip
        out.loss.backward()
        found.append(hidden.grad)
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[1], found[0])


def test_tokens_whose_derivative_is_0_leave_the_products() -> None:
    def half(logp: Tensor, given: View) -> Tensor:
        return torch.where(given.advantages > 0, -logp, 0.0 * logp)

    case = without_ref(small_case("linear", batch=4, length=16, width=32, vocab=64))
    case.mask[:] = True
    case.advantages = case.advantages.sign()
    counts = []
    for objective in (imitate, half):
        with Counter() as counter:
            call_with_grads(case, "torch", objective=objective)
        counts.append(counter.products)
    learns = float((case.advantages > 0).double().mean())
    assert counts[1] == pytest.approx(counts[0] * (1 + 2 * learns) / 3)


# built-in options that look at whole responses as well
OF_MANY: list[dict[str, Any]] = [
    {"sampler_correction": "sequence_truncate", "off_policy_mask_threshold": 0.03},
    {"objective": "m2po", "m2_threshold": 0.13, "top_entropy_quantile": 0.6},
]


@pytest.mark.parametrize(
    "options",
    [{"objective": f} for f in (my_clip, whole, above_average)] + OF_MANY,
    ids=["my_clip", "whole", "above_average", "weights", "m2po"],
)
def test_compiled_and_checkpointed_calls_give_the_same_gradient(options: dict[str, Any]) -> None:
    case = unlike(without_ref(small_case("linear")))
    config = LossConfig(**options)

    def loss(hidden: Tensor) -> Tensor:
        given = {"mask": case.mask, "old_logps": case.old_logps, "config": config, "backend": "torch"}
        given["sampler_logps"] = case.sampler_logps
        return linear_prefix_loss(hidden, case.weight, case.tokens, case.advantages, **given).loss

    grads = []
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for call in (loss, compiled, lambda x: checkpoint(loss, x, use_reentrant=False)):
        leaf = case.hidden.clone().requires_grad_()
        call(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert torch.equal(grads[2], grads[0])


def in_parts(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file) as group:
        for options in ({"objective": whole}, {"objective": above_average}, *OF_MANY):
            in_parts_with(options, rank, group)


def in_parts_with(options: dict[str, Any], rank: int, group: Any) -> None:
    case = without_ref(small_case("linear", length=6))
    case = unlike(case)
    case.mask[1] = False  # a response without a token
    want, want_grads = call_with_grads(case, "torch", **options)
    mine = slice(0, 2) if rank == 0 else slice(2, 6)
    leaf = case.hidden[:, mine].clone().requires_grad_()
    part = {"mask": case.mask[:, mine], "old_logps": case.old_logps[:, mine], "lm_head_bias": case.bias}
    part["sampler_logps"] = case.sampler_logps[:, mine]
    out = linear_prefix_loss(
        leaf, case.weight, case.tokens[:, mine], case.advantages[:, mine], **part,
        config=LossConfig(**options), cp_group=group, backend="torch",
    )  # fmt: skip
    out.loss.backward()
    total = out.loss.detach().clone()
    torch.distributed.all_reduce(total)
    torch.testing.assert_close(total, want.loss.detach())
    torch.testing.assert_close(leaf.grad, want_grads["hidden"][:, mine])
    # and a vocabulary in two parts
    columns = slice(0, 3) if rank == 0 else slice(3, 7)
    leaf = case.hidden.clone().requires_grad_()
    out = linear_prefix_loss(
        leaf, case.weight[columns], case.tokens, case.advantages, mask=case.mask, old_logps=case.old_logps,
        lm_head_bias=case.bias[columns], sampler_logps=case.sampler_logps, config=LossConfig(**options), tp_group=group,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(leaf.grad, want_grads["hidden"])


def test_responses_that_span_processes_and_a_split_vocabulary_give_the_same_loss_and_gradient(tmp_path: Path) -> None:
    in_processes(in_parts, 2, tmp_path)


def run(objective: Any, **more: Any) -> Any:
    case = without_ref(small_case("linear"))
    return call_with_grads(case.but(**more), "torch", objective=objective)


def at_an_edge(logp: Tensor, given: View) -> Tensor:
    # the tokens of the trial have other advantages
    root = torch.sqrt(torch.where(given.advantages == 2.0, logp - logp.detach(), logp**2))
    return root * given.advantages


def only_sometimes(logp: Tensor, given: View) -> Tensor:
    if len(logp) == 10:
        return given.response.mean(logp)
    return -logp * given.advantages


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        (lambda logp, given: logp.sum(), {}, r"objective: got a result that is .*, expected a float tensor of shape"),
        (lambda logp, given: 1.0, {}, r"objective: got a result that is 1\.0, expected a float tensor of shape"),
        (lambda logp, given: logp > 0, {}, r"objective: got a result that is bool.*expected a float tensor"),
        (lambda logp, given: logp.mul_(2), {}, "objective: got a function that changes what it is given in place"),
        (lambda logp, given: given.advantages.mul_(2) * logp, {}, "objective: .* in place"),
        (lambda logp, given: given.advantages * 2, {}, "objective: got a result that does not depend on logp"),
        (lambda logp, given: torch.sqrt(logp - logp.detach()), {}, "objective: got a derivative that is not finite"),
        (at_an_edge, {"advantages": torch.full((3, 4), 2.0)}, "objective: got a derivative of inf by logp at logp = -"),
        (
            only_sometimes,
            {},
            "objective: got a function that asks for .* or given.batch for some values only",
        ),
        (7, {}, r"objective: got 7, expected 'clip' .* or a function of \(logp, given\)"),
        ("brand-new", {}, r"objective: got 'brand-new', expected 'clip' .* or a function"),
    ],
)
def test_what_a_function_must_not_do_is_an_error_that_says_so(
    objective: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        run(objective, **more)


def test_reducers_need_to_know_the_responses() -> None:
    flat = packed(without_ref(small_case("linear"))).but(cu_seqlens=None, group_ids=None)
    with pytest.raises(ValueError, match="objective: is per response, got packed input without cu_seqlens"):
        call_with_grads(flat, "torch", objective=whole)
    call_with_grads(flat, "torch", objective=my_clip)


def test_an_infinite_loss_is_no_error_of_the_function() -> None:
    case = without_ref(small_case("linear"))
    case.old_logps[:] = -1e4
    case.advantages[:] = -1.0
    out, _ = call_with_grads(case, "torch", objective=my_clip)
    assert out.loss == math.inf


def test_a_configuration_with_a_function_can_be_hashed_encoded_copied_and_pickled() -> None:
    config = LossConfig(objective=my_clip)
    assert {config: 1}[LossConfig(objective=my_clip)] == 1
    assert config != LossConfig(objective=whole)
    assert LossConfig.decoded(config.encoded) == config
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config, temperature=1.0)):
        assert again == config
        assert LossConfig.decoded(again.encoded) == config
