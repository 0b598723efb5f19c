"""The back-ends against each other where the oracle says nothing: what a tolerance leaves out, NaN, wrong offsets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import call, call_with_grads, close, leaf_names, random_case, representable, small_case, without_ref
from oracle import Case
from torch import Tensor

from prefixloss import LossConfig, check, linear_prefix_loss, prefix_loss
from prefixloss.inputs.layout import Layout

NAN = float("nan")
BACKENDS = ("reference", "torch", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)


# What a tolerance leaves out


FROZEN = [(), ("weight", "bias"), ("hidden",), ("weight",)]
TOLERANT: tuple[dict[str, Any], ...] = (
    {},
    {"entropy_coef": 0.05},
    {"kl": "full", "kl_coef": 0.05},
    {"reduction": "none", "softcap": 4.0},
    {"ratio_level": "sequence", "kl": "k2", "kl_coef": 0.05},
)


def of_many_sizes(level: str, **options: Any) -> Case:
    """24 tokens with gradients of many sizes; float32's rounding decides nothing."""
    case = small_case(level, batch=4, length=6, scale=2.0, seed=3, **options)
    case.advantages = case.advantages * torch.linspace(0.05, 1, 24).double().reshape(4, 6)
    return representable(case if options.get("kl") else without_ref(case))


def rows_with_gradient(case: Case, grads: dict[str, Tensor]) -> list[bool]:
    return (grads[leaf_names(case)[0]].flatten(0, -2) != 0).any(-1).tolist()


@pytest.mark.parametrize(("level", "frozen"), [("linear", ()), ("linear", ("weight", "bias")), ("logits", ())], ids=str)
@pytest.mark.parametrize("options", TOLERANT, ids=str)
def test_every_back_end_leaves_out_the_same_rows(level: str, options: dict[str, Any], frozen: tuple[str, ...]) -> None:
    case = of_many_sizes(level, **options)
    name = leaf_names(case)[0]
    _, exact = call_with_grads(case, "torch", dtype=torch.float32, frozen=frozen)
    kept = {}
    for backend in ("torch", "triton"):
        _, grads = call_with_grads(case, backend, dtype=torch.float32, frozen=frozen, row_tolerance=0.4)
        kept[backend] = rows_with_gradient(case, grads)
        # neither all nor nothing, or they would agree for nothing
        assert 1 < sum(kept[backend]) < sum(rows_with_gradient(case, exact))
        rows = torch.tensor(kept[backend])
        # what stays is what it was; the same float32 sums in another order
        close(grads[name].flatten(0, -2)[rows], exact[name].flatten(0, -2)[rows], name, rtol=1e-4, atol=1e-6)
    assert kept["torch"] == kept["triton"]


def test_a_frozen_head_changes_nothing_about_the_rows_left_out() -> None:
    case = of_many_sizes("linear")
    kept = [
        rows_with_gradient(case, call_with_grads(case, backend, dtype=torch.float32, frozen=f, row_tolerance=0.5)[1])
        for backend in ("torch", "triton")
        for f in FROZEN[:2]
    ]
    assert all(rows == kept[0] for rows in kept)


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_the_head_s_gradient_misses_the_same_rows(frozen: tuple[str, ...]) -> None:
    case = of_many_sizes("linear")
    (_, torch_grads), (_, triton_grads) = (
        call_with_grads(case, backend, dtype=torch.float32, frozen=frozen, row_tolerance=0.5)
        for backend in ("torch", "triton")
    )
    for name, grad in torch_grads.items():
        close(triton_grads[name], grad, name, rtol=1e-4, atol=1e-5)


# Everything that a call returns, on random cases


def outcome(case: Case, backend: str, frozen: tuple[str, ...]) -> dict[str, Tensor]:
    out, grads = call_with_grads(case, backend, dtype=torch.float32, frozen=frozen)
    shown = {name: getattr(out, name).detach() for name in ("loss", "logps", "entropy", "kl", "learning")}
    return {**shown, **{f"metric {k}": v for k, v in out.metrics.items()}, **{f"d {k}": v for k, v in grads.items()}}


@pytest.mark.parametrize("block", range(4))
def test_torch_triton_and_reference_return_the_same_on_random_cases(block: int) -> None:
    for seed in range(50_000 + 10 * block, 50_010 + 10 * block):
        case = representable(random_case(seed))
        frozen = tuple(name for name in FROZEN[seed % 4] if name in leaf_names(case))
        want = outcome(case, "reference", frozen)
        for backend in ("torch", "triton"):
            got = outcome(case, backend, frozen)
            assert got.keys() == want.keys()
            for name, value in got.items():
                # float32 against float32: log-probs err by ~1e-5, ratios and KLs of up to ~100 in proportion
                close(value, want[name], f"seed {seed}, {case.options}, {backend} {name}", rtol=2e-3, atol=2e-4)


# Values that are not numbers


@backends
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"objective": "sapo", "row_tolerance": 0.1}], ids=str)
@pytest.mark.parametrize("stats", ["learning", "scored"])
@pytest.mark.parametrize("level", ["linear", "logits"])
def test_a_token_that_does_not_learn_has_no_gradient_whatever_its_values(
    level: str, stats: str, options: dict[str, Any], backend: str
) -> None:
    case = without_ref(small_case(level, stats=stats, **options)).but(sampler_logps=None)
    case.advantages[1] = 0.0
    want = call_with_grads(case, backend, dtype=torch.float32)[1]
    (case.logits if level == "logits" else case.hidden)[1, 2] = NAN
    out, grads = call_with_grads(case, backend, dtype=torch.float32)
    assert not out.learning[1].any()
    # where its statistics are shown, so is that they are none
    assert out.logps[1, 2].isnan() == (stats == "scored")
    assert out.loss.isnan().any() == (stats == "scored")
    for name, grad in grads.items():
        close(grad, want[name], name, rtol=1e-5, atol=1e-6)


@backends
def test_a_token_that_the_sampler_s_bounds_drop_counts_0_though_its_ratio_overflows(backend: str) -> None:
    # log ratio 200, A < 0: without the bounds a loss of inf in float32
    case = without_ref(small_case("logits", sampler_correction="icepop", sampler_bounds=(0.5, 2.0))).but(mask=None)
    case.advantages = -torch.ones(3, 4).double()
    case.sampler_logps = case.old_logps.clone()
    others = case.but(mask=torch.arange(12).reshape(3, 4) != 5, normalizer=12)
    want, want_grads = call_with_grads(others, backend, dtype=torch.float32)
    case.old_logps[1, 1] -= 200
    out, grads = call_with_grads(case, backend, dtype=torch.float32)
    close(out.loss, want.loss, "loss", rtol=1e-5, atol=1e-6)
    close(grads["logits"], want_grads["logits"], "logits", rtol=1e-4, atol=1e-6)


@backends
def test_an_infinite_loss_of_one_token_is_an_infinite_mean(backend: str) -> None:
    for reduction in ("token-mean", "seq-mean-token-mean", "group-token-mean"):
        case = without_ref(small_case("logits", reduction=reduction)).but(sampler_logps=None, mask=None)
        case.advantages, case.old_logps = -torch.ones(3, 4).double(), case.old_logps.clone()
        case.old_logps[1, 1] = -300
        assert call(case, backend, dtype=torch.float32)[0].loss == float("inf")


# Offsets that nobody looked at


@pytest.mark.parametrize("wrong", [[0, 3, 9], [0, -4, 6], [2, 3, 6], [0, 5, 3], [0, 4, 2**40], [7, 7, 7]], ids=str)
def test_wrong_offsets_stay_inside_where_nobody_looks(wrong: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU without PREFIXLOSS_CHECK
    monkeypatch.setattr(check, "readable", lambda _: False)
    offsets = Layout.of(torch.Size([6]), torch.device("cpu"), None, torch.tensor(wrong)).offsets
    assert offsets is not None
    assert offsets[0] == 0
    assert offsets[-1] == 6
    assert (offsets.diff() >= 0).all()
    for backend in ("torch", "triton"):
        options = {"ratio_level": "sequence", "reduction": "seq-mean-token-mean"}
        given = {"cu_seqlens": torch.tensor(wrong), "config": LossConfig(**options), "backend": backend}
        tokens, advantages = torch.zeros(6, dtype=torch.int64), torch.ones(2)
        assert linear_prefix_loss(torch.ones(6, 2), torch.ones(4, 2), tokens, advantages, **given).loss.isfinite()
        assert prefix_loss(torch.ones(6, 4), tokens, advantages, **given).loss.isfinite()


def test_right_offsets_are_taken_as_they_are_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "readable", lambda _: False)
    made = Layout.of(torch.Size([6]), torch.device("cpu"), None, torch.tensor([0, 2, 2, 6])).offsets
    assert made is not None
    assert made.tolist() == [0, 2, 2, 6]


# One meaning of the clip's metrics


@backends
def test_clip_metrics_count_the_tokens_that_the_objective_s_bounds_hold_back(backend: str) -> None:
    # each objective on ratios 0.5, 1.1, 6 for A = 1 and for A = -1; six learning tokens
    logps = torch.full((2, 3), 0.25).double().log()
    old = logps - torch.tensor([0.5, 1.1, 6.0]).double().log()
    advantages = torch.tensor([[1.0], [-1.0]]).double().expand(2, 3)
    counts = Counter[tuple[str, str]]()
    for objective, high in (("clip", 0.2), ("cispo", 5.0), ("topr", 0.2), ("sapo", 0.2), ("reinforce", 0.2)):
        config = LossConfig(objective=objective, clip_high=high)  # type: ignore[arg-type]
        seen = prefix_loss(
            torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), advantages, old_logps=old, config=config, backend=backend
        ).metrics
        for side in ("low", "high"):
            counts[objective, side] = round(float(seen[f"clip_{side}"]) * 6)
    # "clip": A = -1 at 0.5, A = 1 at 6. "cispo": A = 1 at 6. "topr": A = -1 at 1.1 and 6
    assert +counts == {("clip", "low"): 1, ("clip", "high"): 1, ("cispo", "high"): 1, ("topr", "high"): 2}


# The importance of a KL under a response's ratio


@backends
def test_kl_importance_with_a_sequence_ratio_is_its_token_form(backend: str) -> None:
    # loss_t = s k_t: value with s = exp(mean of the log ratios), gradient s (k_t + dk_t / dlogp) d logp_t per token
    case = small_case("logits", ratio_level="sequence", kl="k2", kl_coef=0.7, kl_importance=True, objective="reinforce")
    case = case.but(mask=None, sampler_logps=None, ref_logits=None, advantages=torch.zeros(3, 4).double())
    leaf = case.logits.clone().requires_grad_()
    log_p = leaf.log_softmax(-1)
    logp = log_p.gather(-1, case.tokens[..., None]).squeeze(-1)
    s = (logp.detach() - case.old_logps).mean(1, keepdim=True).exp()
    d = case.ref_logps - logp.detach()
    exact = backend != "triton"  # which computes in float32
    out, grads = call_with_grads(case, backend, dtype=None if exact else torch.float32)
    close(out.loss, 0.7 * (s * d * d / 2).mean(), "loss", rtol=1e-12 if exact else 1e-5, atol=1e-14)
    (want,) = torch.autograd.grad((0.7 / 12 * s * (d * d / 2 - d) * logp).sum(), leaf, retain_graph=True)
    close(grads["logits"], want, "gradient", rtol=1e-9 if exact else 1e-5, atol=1e-12 if exact else 1e-7)
    # through the mean, as TRL and Liger go, each token would get the mean of the response's KLs instead
    mean = (d * d / 2).mean(1, keepdim=True)
    (theirs,) = torch.autograd.grad((0.7 / 12 * s * (mean - d) * logp).sum(), leaf)
    assert (grads["logits"] - theirs).abs().max() > 1e-3
