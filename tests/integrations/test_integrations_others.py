"""verl, OpenRLHF, SkyRL and slime: our adapters against each one's formula, and against the package where it imports.

Published formulas are re-stated here in their plainest form (`clipped_surrogate`, `mean_of`), so that every adapter is
tested without its trainer. The tests named `..._itself` need the trainer's package and are skipped without it.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import CORRECTIONS, KLS, OBJECTIVES, RATIO_LEVELS, REDUCTIONS, of_objective
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import group_of, in_processes
from torch import Tensor

from prefixloss import LossConfig, advantages, linear_prefix_loss, prefix_loss
from prefixloss.integrations import openrlhf, skyrl, slime, token_loss
from prefixloss.loss import linear_logps

NAN = float("nan")


@dataclass
class Case:
    """B ragged responses to two prompts, [B, T] in float64; response 1 is good up to its first error."""

    logps: Tensor
    old: Tensor
    sampler: Tensor
    mask: Tensor
    advantages: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, seed: int = 0, responses: int = 4, tokens: int = 9) -> Case:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        lengths = torch.randint(1, tokens + 1, (responses,), generator=g)
        lengths[0] = tokens
        mask = torch.arange(tokens) < lengths[:, None]
        old = normal(responses, tokens) - 2
        uniform = normal(responses, 1).expand(-1, tokens).clone()
        ours = torch.where(torch.arange(tokens) < lengths[:, None] // 2, 0.0, uniform)
        logps = (old + 0.4 * normal(responses, tokens)).requires_grad_()
        return cls(logps, old, old + 0.4 * normal(responses, tokens), mask, ours * mask, uniform * mask)

    def grad(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logps, retain_graph=True)[0]


def clipped_surrogate(case: Case, a: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """PPO's per-token loss; with `dual`, at most -dual A where A < 0."""
    ratio = torch.exp(case.logps - case.old)
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


def mean_of(losses: Tensor, mask: Tensor, mode: str) -> Tensor:
    """The four aggregations of a batch that everybody has."""
    by_response = (losses * mask).sum(1)
    if mode == "token-mean":
        return by_response.sum() / mask.sum()
    if mode == "seq-mean-token-sum":
        return by_response.mean()
    if mode == "seq-mean-token-mean":
        return (by_response / mask.sum(1)).mean()
    return by_response.mean() / mask.shape[1]  # seq-mean-token-sum-norm


def same(ours: Tensor, theirs: Tensor, case: Case, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=atol)
    torch.testing.assert_close(case.grad(ours), case.grad(theirs), rtol=1e-9, atol=atol)
    assert case.grad(ours).abs().max() > 0


def without_init(*packages: str) -> None:
    """Packages as empty ones with their files: what they import in `__init__` (CUDA kernels, servers) is not needed."""
    for name in packages:
        if name in sys.modules:
            continue
        parent, _, leaf = name.rpartition(".")
        module = types.ModuleType(name)
        if parent:
            module.__path__ = [f"{path}/{leaf}" for path in sys.modules[parent].__path__]
        else:
            spec = importlib.util.find_spec(name)
            if spec is None:
                pytest.skip(f"{name} is not installed")
            module.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[name] = module


# --- the loss from log-probs ---


def logits_case(seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    b, t, v = 4, 7, 11
    logits = torch.randn(b, t, v, generator=g, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(v, (b, t), generator=g)
    mask = torch.arange(t) < torch.tensor([7, 1, 4, 6])[:, None]
    a = torch.randn(b, t, generator=g, dtype=torch.float64)
    a = torch.where(torch.rand(b, t, generator=g) < 0.4, 0.0, a)
    old = torch.randn(b, t, generator=g, dtype=torch.float64) * 0.5 - 2.4
    other = old + 0.3 * torch.randn(b, t, generator=g, dtype=torch.float64)
    return {"logits": logits, "tokens": tokens, "mask": mask, "a": a, "old": old, "other": other}


def logps_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    objective=st.sampled_from(OBJECTIVES),
    reduction=st.sampled_from(REDUCTIONS),
    level=st.sampled_from(RATIO_LEVELS),
    kl=st.sampled_from([None, *(kl for kl in KLS if kl != "full")]),
    correction=st.sampled_from([None, *CORRECTIONS]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    on_policy=st.booleans(),
)
def test_the_loss_from_log_probs_is_prefix_loss_to_the_gradient(
    seed: int,
    objective: Any,
    reduction: Any,
    level: Any,
    kl: Any,
    correction: Any,
    entropy_coef: float,
    on_policy: bool,
) -> None:
    x = logits_case(seed)
    config = LossConfig(
        **of_objective(objective),
        reduction=reduction,
        ratio_level=level,
        kl=kl,
        kl_coef=0.2 if kl else 0.0,
        sampler_correction=correction,
        sampler_bounds=(0.8, 1.2),
        entropy_coef=entropy_coef,
        max_length=7,
    )
    given_values = {
        "sampler_logps": x["other"] if correction else None,
        "ref_logps": x["other"] if kl else None,
        "group_ids": torch.tensor([3, 3, 5, 5]),
    }
    old = None if on_policy else x["old"]
    want = prefix_loss(x["logits"], x["tokens"], x["a"], mask=x["mask"], old_logps=old, config=config, **given_values)
    logps, entropy = logps_and_entropy(x["logits"], x["tokens"])
    # what lies outside the mask is never read
    poisoned = torch.where(x["mask"], logps, NAN)
    got = token_loss.policy_loss(
        poisoned, old, torch.where(x["mask"], x["a"], NAN), x["mask"], config, entropy=entropy, **given_values
    )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    weights = torch.arange(1, want.loss.numel() + 1).reshape(want.loss.shape)
    grads = [torch.autograd.grad((out.loss * weights).sum(), x["logits"])[0] for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    # what a tolerance left out is not known behind log-probs
    assert set(want.metrics) - set(got.metrics) == {"gradient_left_out"}
    for name, value in got.metrics.items():
        torch.testing.assert_close(value, want.metrics[name], rtol=1e-9, atol=1e-12, check_dtype=False, msg=name)


def test_with_linear_logps_the_model_gets_the_gradient_of_linear_prefix_loss() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 8, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(20, 8, generator=g, dtype=torch.float64, requires_grad=True)
    tokens, starts = torch.randint(20, (12,), generator=g), torch.tensor([0, 5, 12])
    spread = advantages.TokenAdvantages(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]), torch.tensor([0, 3]))
    old = torch.randn(12, generator=g, dtype=torch.float64) - 3
    config = LossConfig(reduction="seq-mean-token-mean")
    want = linear_prefix_loss(hidden, head, tokens, spread, cu_seqlens=starts, old_logps=old, config=config).loss
    got = token_loss.policy_loss(
        linear_logps(hidden, head, tokens).logps, old, spread, None, config, cu_seqlens=starts
    ).loss
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0


def test_what_log_probs_cannot_give_is_refused() -> None:
    case = Case.of()
    with pytest.raises(ValueError, match="kl: got 'full'"):
        token_loss.policy_loss(case.logps, None, case.advantages, case.mask, LossConfig(kl="full", kl_coef=0.1))
    with pytest.raises(ValueError, match="entropy: got None"):
        token_loss.policy_loss(case.logps, None, case.advantages, case.mask, LossConfig(entropy_coef=0.1))


# --- credit from plain rewards ---


@given(st.lists(st.one_of(st.just((True, -1)), st.tuples(st.just(False), st.integers(-1, 2**20))), min_size=1))
def test_an_outcome_and_a_first_error_survive_as_one_number(items: list[tuple[bool, int]]) -> None:
    scores = torch.tensor([token_loss.signed_score(*item) for item in items])
    correct, first_error = token_loss.outcomes(scores)
    assert list(zip(correct.tolist(), first_error.tolist(), strict=True)) == items


@pytest.mark.parametrize("score", [0.5, 2.0, -1.5, NAN, float("inf")])
def test_a_reward_with_something_added_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="response 1"):
        token_loss.outcomes(torch.tensor([1.0, score]))


SCORES = [1.0, -4.0, 0.0, 1.0, -1.0, -2.0]  # right; wrong from token 3; wrong, unknown; right; wrong from 0; from 1
LABELS = ["b", "a", "b", "a", "b", "a"]
LENGTHS = torch.tensor([6, 7, 3, 5, 4, 2])


def vppo(shorten: float = 0, alpha: float = 0.5) -> advantages.TokenAdvantages:
    return advantages.vppo(
        torch.tensor([True, False, False, True, False, False]),
        LENGTHS,
        torch.tensor([-1, 3, -1, -1, 0, 1]),
        torch.tensor([1, 0, 1, 0, 1, 0]),
        shorten=shorten,
        alpha=alpha,
    )


def reward_case() -> tuple[Tensor, Tensor]:
    """Token-level rewards [6, 7], the score at the last scored token, and the mask."""
    mask = torch.arange(7) < LENGTHS[:, None]
    rewards = torch.zeros(6, 7)
    rewards[torch.arange(6), LENGTHS - 1] = torch.tensor(SCORES)
    return rewards, mask


@pytest.mark.parametrize("estimator", ["vppo", "cliff", "neutral_prefix"])
def test_a_response_without_a_verdict_learns_nothing_and_moves_no_baseline(estimator: str) -> None:
    """NaN scores: those of the other responses are as if it were not there."""
    scores = torch.tensor([*SCORES, NAN, NAN])
    lengths, labels = torch.cat([LENGTHS, torch.tensor([5, 3])]), [*LABELS, "a", "c"]
    got = token_loss.token_advantages(scores, lengths, labels, estimator)
    want = token_loss.token_advantages(torch.tensor(SCORES), LENGTHS, LABELS, estimator)
    for ours, others in zip(got, want, strict=True):
        assert torch.equal(ours[:6], others)
    assert got.suffix[6:].tolist() == got.prefix_lengths[6:].tolist() == [0, 0]


def test_estimators_are_those_of_the_package() -> None:
    scores = torch.tensor(SCORES)
    for got, want in zip(token_loss.token_advantages(scores, LENGTHS, LABELS), vppo(), strict=True):
        assert torch.equal(got, want)
    neutral = token_loss.token_advantages(scores, LENGTHS, LABELS, "neutral_prefix", std=False)
    assert neutral.prefix_lengths.tolist() == [0, 3, 0, 0, 0, 1]
    assert neutral.prefix.tolist()[1] == 0
    assert neutral.suffix.tolist()[1] == pytest.approx(-1 / 3)
    assert token_loss.token_advantages(scores, LENGTHS, LABELS, "cliff").suffix[1] < 0
    with pytest.raises(ValueError, match="estimator: got 'grpo'"):
        token_loss.token_advantages(scores, LENGTHS, LABELS, "grpo")


class Characters:
    """A tokenizer of one character a token."""

    is_fast = True

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i)) for i in ids)


RIGHT, WRONG = "Step 1: 2 + 2 = 4\nStep 2: 4 * 3 = 12", "Step 1: 2 + 2 = 4\nStep 2: 4 * 3 = 13"


def test_a_detector_names_the_first_token_of_the_first_wrong_step() -> None:
    ids = [ord(c) for c in WRONG]
    assert token_loss.first_error_of(Characters(), ids, "", None, "maths") == WRONG.index("Step 2")
    assert token_loss.first_error_of(Characters(), [ord(c) for c in RIGHT], "", None, "maths") == -1


def test_a_find_below_the_threshold_splits_no_credit() -> None:
    """WRONG's error is found with a confidence of 0.68. Below the threshold it is a wrong response without a known
    first error: one advantage for all of its tokens, in every trainer that takes signed scores."""
    ids = [ord(c) for c in WRONG]
    firsts = [token_loss.first_error_of(Characters(), ids, "", None, "maths", threshold=t) for t in (0.0, 0.68, 0.69)]
    assert firsts == [WRONG.index("Step 2"), WRONG.index("Step 2"), -1]
    scores = torch.tensor([token_loss.signed_score(False, first) for first in firsts] + [1.0])
    spread = token_loss.token_advantages(scores, torch.full((4,), len(ids)), [0] * 4)
    assert spread.prefix_lengths.tolist() == [firsts[0], firsts[1], 0, 0]
    with pytest.raises(ValueError, match=r"threshold: got 1\.5, expected a finite number between 0 and 1"):
        token_loss.first_error_of(Characters(), ids, "", None, "maths", threshold=1.5)


def test_a_group_of_one_process_is_no_group(tmp_path: Any) -> None:
    assert token_loss.shared_by_many(None) is None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert token_loss.shared_by_many(torch.distributed.group.WORLD) is None
    finally:
        torch.distributed.destroy_process_group()


class Gathered(torch.autograd.Function):
    """Megatron's `gather_from_sequence_parallel_region`: all processes' tokens; their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        parts = [torch.empty_like(hidden) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, hidden)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        whole = grad.clone()
        torch.distributed.all_reduce(whole)
        return whole.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def heads_of_megatron(rank: int, size: int, file: str) -> None:
    from prefixloss.integrations import verl  # noqa: PLC0415

    with group_of(rank, size, file) as group:
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 4), (10, 4)))
        tokens = torch.randint(10, (6,), generator=g)
        exact, leaf = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps_and_entropy(exact @ leaf.T, tokens)[0].square().sum().backward()
        assert exact.grad is not None
        assert leaf.grad is not None
        heads = (
            lambda h, w: verl.fused_logps(h[:, None], w, tokens[None], 1.0, "none", group)[0],
            lambda h, w: skyrl.fused_logps("torch", h[None], w, tokens[None], 0, 0, 6, group, False)[0],
        )
        for head in heads:
            mine, rows = hidden.chunk(size)[rank].clone(), weight.chunk(size)[rank].clone()
            head(Gathered.apply(mine.requires_grad_()), rows.requires_grad_()).square().sum().backward()
            torch.testing.assert_close(mine.grad, exact.grad.chunk(size)[rank])
            torch.testing.assert_close(rows.grad, leaf.grad.chunk(size)[rank])


def test_under_megatrons_sequence_parallelism_hidden_states_get_their_gradient_once(tmp_path: Any) -> None:
    in_processes(heads_of_megatron, 2, tmp_path)


# --- a model's own head ---


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_a_head_of_log_probs_is_the_models_own_to_the_gradient() -> None:
    model = tiny_llama()
    ids = torch.randint(31, (2, 6))
    targets, mask = ids.roll(-1, 1), torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    logps, entropy = logps_and_entropy(model(ids).logits / 0.7, targets)
    weights = torch.randn(2, 2, 6) * mask
    params = list(model.parameters())
    want = torch.autograd.grad((logps * weights[0] + entropy * weights[1]).sum(), params)
    with token_loss.head_of_logps(model, targets, mask, 0.7, entropy=True):
        got = model(ids).logits
    assert got.shape == (2, 6, 2)
    torch.testing.assert_close(got[..., 0], logps * mask)
    torch.testing.assert_close(got[..., 1], entropy * mask)
    grads = torch.autograd.grad((got * weights.movedim(0, -1)).sum(), params)
    for ours, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert model(ids).logits.shape == (2, 6, 31)


def test_a_head_is_given_back_after_an_error_and_one_that_is_not_the_last_word_is_refused() -> None:
    model = tiny_llama()
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ZeroDivisionError), token_loss.head_of_logps(model, ids, ids == 0):
        raise ZeroDivisionError
    assert model(ids).logits.shape[-1] == 31
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM"), token_loss.head_of_logps(model, ids, ids == 0):
        pass


# --- verl ---


def verl_config(**given: Any) -> Any:
    """verl's ActorConfig as far as a policy loss reads it."""

    class Config(SimpleNamespace):
        def get(self, name: str, default: Any = None) -> Any:
            return getattr(self, name, default)

    defaults = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    return Config(**{**defaults, "global_batch_info": {}, **given})


@pytest.fixture(scope="module")
def verl() -> Any:
    """The adapter; without verl's package it registers nothing."""
    from prefixloss.integrations import verl as adapter  # noqa: PLC0415

    return adapter


VERL_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("mode", VERL_MODES)
@pytest.mark.parametrize("kind", ["uniform", "advantages"])
def test_verl_gets_its_dual_clip_loss_in_every_aggregation(verl: Any, mode: str, kind: str) -> None:
    case = Case.of()
    a = getattr(case, kind)
    loss, seen = verl.policy_loss(case.old, case.logps, a, case.mask, mode, verl_config())
    same(loss, mean_of(clipped_surrogate(case, a, 0.2, 0.28, 3.0), case.mask, mode), case)
    assert all(isinstance(value, float) for value in seen.values())
    assert seen["actor/learning_share"] == pytest.approx(float((a != 0).sum() / case.mask.sum()))


def test_verl_weights_of_a_sampler_scale_each_tokens_loss(verl: Any) -> None:
    case = Case.of(3)
    weights = torch.exp(case.old - case.sampler).clamp(max=1.1)
    weights[0, 0] = 0  # a rejected token
    for objective in OBJECTIVES:
        config = verl_config(policy_loss=None)
        loss = verl.policy_loss(
            case.old, case.logps, case.uniform, case.mask, "token-sum", config, weights, objective=objective
        )[0]
        each = torch.stack(
            [
                verl.policy_loss(
                    case.old, case.logps, case.uniform, case.mask & at, "token-sum", config, objective=objective
                )[0]
                for at in torch.eye(case.mask.numel(), dtype=torch.bool).view(-1, *case.mask.shape)
            ]
        )
        same(loss, (each.view_as(weights) * weights).sum(), case)


def chosen_by_covariance(case: Case, objective: str, share: float, coef: float, low: float, high: float) -> Tensor:
    """The losses of the scored tokens as verl and SkyRL have them, but for chance: the largest of those open to it."""
    x, old, a = (v.detach()[case.mask] for v in (case.logps, case.old, case.uniform))
    ratio, most = torch.exp(x - old), max(1, int(share * len(x)))
    covariance = (a - a.mean()) * (x - x.mean())
    held = ratio.clamp(0.8, 1.28)
    if objective == "kl-cov":
        chosen = torch.zeros_like(x).index_fill(0, covariance.topk(most).indices, 1.0)
        return -ratio * a + chosen * coef * (x - old).abs()
    open_to = (covariance > low) & (covariance < high) & ~(-held * a > -ratio * a)
    ordered = torch.where(open_to, covariance, -torch.inf).topk(min(most, int(open_to.sum()))).indices
    return torch.maximum(-ratio * a, -held * a).index_fill(0, ordered, 0.0)


@pytest.mark.parametrize("objective", ["clip-cov", "kl-cov"])
def test_settings_of_clip_cov_and_kl_cov_are_the_trainers_own(verl: Any, objective: str) -> None:
    case = Case.of(4)
    share, coef, low, high = 0.3, 0.7, 0.05, 2.0
    want = chosen_by_covariance(case, objective, share, coef, low, high)
    assert not torch.allclose(want, chosen_by_covariance(case, objective, 0.0002, 0.0, 1.0, 5.0))
    theirs = SimpleNamespace(
        clip_cov_ratio=share, kl_cov_ratio=share, ppo_kl_coef=coef, clip_cov_lb=low, clip_cov_ub=high,
        kl_cov_frac=share, clip_ratio=share,
    )  # fmt: skip
    config = verl_config(policy_loss=theirs)
    loss = verl.policy_loss(case.old, case.logps, case.uniform, case.mask, "token-sum", config, objective=objective)[0]
    torch.testing.assert_close(loss.detach(), want.sum())
    settings = skyrl_config(clip_cov=theirs, kl_cov=theirs, eps_clip_high=0.28)
    loss = skyrl.policy_loss(case.logps, case.old, case.uniform, settings, case.mask.long(), objective=objective)[0]
    torch.testing.assert_close(loss.detach(), want.sum())


@pytest.mark.parametrize("mode", VERL_MODES)
def test_verl_ranks_average_to_the_whole_batch(verl: Any, mode: str) -> None:
    case = Case.of(1)
    whole = verl.policy_loss(case.old, case.logps, case.uniform, case.mask, mode, verl_config())[0]
    info = {"dp_size": 2, "batch_num_tokens": int(case.mask.sum()), "global_batch_size": 4, "loss_scale_factor": None}
    parts = [
        verl.policy_loss(
            case.old[rows],
            case.logps[rows],
            case.uniform[rows],
            case.mask[rows],
            mode,
            verl_config(global_batch_info=info),
        )[0]
        for rows in (slice(0, 1), slice(1, 4))
    ]
    same(torch.stack(parts).mean(), whole, case)
    del info["batch_num_tokens"], info["global_batch_size"]
    with pytest.raises(ValueError, match="global_batch_info"):
        verl.policy_loss(case.old, case.logps, case.uniform, case.mask, mode, verl_config(global_batch_info=info))


def test_verl_empty_responses_and_nan_padding_change_nothing(verl: Any) -> None:
    case = Case.of(2)
    case.mask[2] = False
    kept = [0, 1, 3]
    want = mean_of(clipped_surrogate(case, case.uniform, 0.2, 0.28, 3.0)[kept], case.mask[kept], "seq-mean-token-mean")
    dirty = [torch.where(case.mask, x, NAN) for x in (case.old, case.logps, case.uniform)]
    same(verl.policy_loss(*dirty, case.mask, "seq-mean-token-mean", verl_config())[0], want, case)


def test_verl_estimators_spread_credit_up_to_the_first_error(verl: Any) -> None:
    rewards, mask = reward_case()
    config = verl_config(vppo={"alpha": 0.25, "shorten": 1})
    given_by = {
        "token_level_rewards": rewards,
        "response_mask": mask.long(),
        "config": config,
        "index": np.array(LABELS),
    }
    got, returns = verl.ESTIMATORS["vppo"](**given_by, reward_baselines=None)
    want = vppo(shorten=1, alpha=0.25).per_token(mask, mask)
    assert torch.equal(got, want)
    assert torch.equal(returns, want)
    good, bad = got[1, :2].unique(), got[1, 2:].unique()  # wrong from token 3, one trimmed
    assert len(good) == len(bad) == 1
    assert good > bad


def test_verl_puts_a_score_behind_what_a_tool_wrote(verl: Any) -> None:
    """As verl 0.9.1 does: at the last token that was attended to. Row 0 is right: 1 - (1 + 0.5 * 2 / 6) / 2."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1] * 6])
    rewards = torch.zeros(2, 6)
    rewards[:, 5] = torch.tensor([1.0, -3.0])
    got, _ = verl.advantage_estimator(rewards, mask, index=["a", "a"], estimator="vppo")
    baseline = (1 + 0.5 * 2 / 6) / 2
    assert 1 - baseline == pytest.approx(0.417, abs=1e-3)
    right = [1 - baseline] * 6
    right[2] = right[5] = 0
    wrong = [0.5 - baseline] * 2 + [-baseline] * 4
    torch.testing.assert_close(got, torch.tensor([right, wrong]))


def test_verl_right_answers_with_an_error_are_told_by_a_score_of_their_own(verl: Any) -> None:
    """Row 0 is right with an error at token 4, the third of the model's own; row 1 is right, row 2 wrong from 1 on."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1] * 6, [1] * 6])
    rewards = torch.zeros(3, 6)
    rewards[:, 5] = torch.tensor([token_loss.signed_score(True, 4), 1.0, token_loss.signed_score(False, 1)])
    assert rewards[:, 5].tolist() == [6.0, 1.0, -2.0]
    config = verl_config(vppo={"flawed": 0.25})
    got, _ = verl.advantage_estimator(rewards, mask, config, index=["a"] * 3, estimator="vppo")
    want = advantages.vppo(
        torch.tensor([True, True, False]), mask.sum(1), torch.tensor([2, -1, 1]), torch.zeros(3, dtype=torch.int64),
        shorten=0, flawed=0.25,
    )  # fmt: skip
    assert torch.equal(got, want.per_token(mask, mask))
    assert got[0, 0] > got[0, 4]
    with pytest.raises(ValueError, match=r"^scores: got 6 for response 0"):
        verl.advantage_estimator(rewards, mask, index=["a"] * 3, estimator="vppo")
    for score, says in [
        (8.0, "first_error \\+ 2, first_error counting"),
        (1.5, "first_error \\+ 2 .right"),
        (float("inf"), "inf"),
    ]:
        rewards[0, 5] = score
        with pytest.raises(ValueError, match=says):
            verl.advantage_estimator(rewards, mask, config, index=["a"] * 3, estimator="vppo")


def test_verl_rewards_of_turns_become_advantages_of_their_tokens(verl: Any) -> None:
    """Row 0 has two turns, the first rewarded at its tool's last token, the outcome behind the second's tool. Row 1 has
    the same turns, its first earned at its own token. Two of a kind: +-1/sqrt(2) each."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0]])
    rewards = torch.tensor([[0, 0, 0, 0.25, 0, 1.0], [0.75, 0, 0, 0, 0, 0]])
    made, returns = verl.turn_level_estimator(rewards, mask, index=["a", "a"])
    half = 0.5**0.5
    want = torch.tensor([[0, 0, 0, 0, half, 0], [0, 0, -half, -half, 0, 0]])
    torch.testing.assert_close(made, want)
    assert torch.equal(made, returns)
    config = verl_config(turn_level={"weight": 3.0}, norm_adv_by_std_in_grpo=False)
    made, _ = verl.turn_level_estimator(rewards, mask, config, index=["a", "a"])
    # 0.5 - 3 * 0.25 and 0.5; -0.5 + 3 * 0.25 and -0.5
    torch.testing.assert_close(made, torch.tensor([[-0.25, -0.25, 0, 0, 0.5, 0], [0.25, 0, -0.5, -0.5, 0, 0]]))


def test_verl_first_errors_count_what_tools_wrote(verl: Any) -> None:
    """verl's reward loop sees no mask: the fifth token (4) is the third of the model's own (2). The wrong response of
    row 1 breaks only in what its tool says: its last own token is in doubt. Row 2 was rejected by its sampler."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7, [1] * 7])
    rewards = torch.zeros(4, 7)
    rewards[[0, 1, 2, 3], [5, 4, 6, 6]] = torch.tensor([-5.0, -5.0, -4.0, 1.0])
    got, _ = verl.advantage_estimator(rewards, mask, index=["a"] * 4, estimator="vppo")
    want = advantages.vppo(
        torch.tensor([False, False, False, True]),
        mask.sum(1),
        torch.tensor([2, 2, -1, -1]),
        torch.zeros(4, dtype=torch.int64),
        shorten=0,
    )
    assert torch.equal(got, want.per_token(mask, mask))
    assert got[0, :2].unique().item() > got[0, 4].item()
    rewards[1, 4] = -6.0  # token 5 of a response that ends with token 4
    with pytest.raises(ValueError, match=r"^token_level_rewards: got -6 for response 1, whose score is at token 4"):
        verl.advantage_estimator(rewards, mask, index=["a"] * 4, estimator="vppo")


@pytest.mark.parametrize(
    ("reward", "said", "score"),
    [
        (None, None, NAN),
        (NAN, None, NAN),
        (torch.tensor(NAN), None, NAN),
        (-1, False, 0),
        (0.0, False, 0),
        (0.3, True, 1),
    ],
)
def test_verl_a_reward_function_without_a_verdict_gives_none(verl: Any, reward: Any, said: Any, score: float) -> None:
    assert verl._verdict(reward) is said
    assert token_loss.signed_score(said, -1) == pytest.approx(score, nan_ok=True)


def test_verl_finds_first_errors_among_all_tokens_of_the_last_output(verl: Any) -> None:
    """The shapes of verl 0.9.1's `_compute_score`: several outputs padded together, their lengths beside them; the last
    columns of the mask are then those of a longer prompt's row."""
    ids = [ord(c) for c in WRONG]
    responses = torch.tensor(ids + [ord("7")] * 3)
    item = SimpleNamespace(
        batch={"responses": responses, "attention_mask": torch.ones(len(ids) + 9, dtype=torch.long)},
        non_tensor_batch={
            "response_len": len(ids),
            "raw_prompt": [{"role": "user", "content": "(2 + 2) * 3"}],
            "reward_model": {"ground_truth": "12"},
        },
    )

    class Seen(Characters):
        def decode(self, ids: Any, **_: Any) -> str:
            assert len(ids) <= len(WRONG)
            return super().decode(ids)

    assert verl._first_error(Seen(), item, detector="maths") == WRONG.index("Step 2")
    assert verl._first_error(Seen(), item, detector="maths", threshold=0.96) == -1
    del item.non_tensor_batch["response_len"]  # older batches
    item.batch = {"responses": responses, "attention_mask": torch.tensor([1] * (4 + len(ids)) + [0] * 3)}
    assert verl._first_error(Seen(), item, detector="maths") == WRONG.index("Step 2")


def test_verl_fused_head_has_log_probs_and_entropies_with_gradients(verl: Any) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(13, (2, 5))
    got = verl.fused_logps(hidden, weight, labels, 0.6)
    want = logps_and_entropy(hidden @ weight.T / 0.6, labels)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        *(torch.autograd.grad((x[0] + 0.5 * x[1]).sum(), (hidden, weight)) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Headed(torch.nn.Module):
    """Calls its head as verl's fused forward does: by its weight, which FSDP2 has not gathered."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 13, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        from prefixloss.integrations.verl import fused_logps  # noqa: PLC0415

        return fused_logps(self.body(x), self.head.weight, labels)[0].sum()


def sharded_head(rank: int, size: int, file: str) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    with group_of(rank, size, file):
        torch.manual_seed(1)
        x, labels = torch.randn(size, 1, 5, 8), torch.randint(13, (size, 1, 5))
        whole, model = Headed(), Headed()
        (sum(whole(*given) for given in zip(x, labels, strict=True)) / size).backward()
        for module in (model.body, model.head, model):
            fully_shard(module)
        model(x[rank], labels[rank]).backward()
        for (name, got), want in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(got.grad.full_tensor(), want.grad, msg=lambda said, of=name: f"{of}: {said}")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="the processes talk through gloo")
def test_verl_fused_head_that_fsdp2_shards_has_the_mean_gradient_as_all_else(verl: Any, tmp_path: Path) -> None:
    in_processes(sharded_head, 2, tmp_path)


@pytest.fixture(scope="module")
def verl_itself(verl: Any) -> Any:
    pytest.importorskip("verl")
    from verl.trainer.ppo import core_algos  # noqa: PLC0415

    verl.register()  # a second time: no harm
    return core_algos


def actor_config(**given: Any) -> Any:
    from verl.workers.config import ActorConfig  # noqa: PLC0415

    options = {"strategy": "fsdp", "rollout_n": 2, "ppo_micro_batch_size_per_gpu": 1, "clip_ratio_high": 0.28, **given}
    return ActorConfig(**options)


@pytest.mark.parametrize("mode", [*VERL_MODES, "token-sum"])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("prefix_clip", "vanilla", {}),
        ("prefix_sapo", "sapo", {}),
        ("prefix_cispo", "cispo", {"clip_ratio_low": 1.0}),
    ],
)
def test_verl_losses_are_those_of_verl_itself(
    verl_itself: Any, ours: str, theirs: str, options: dict[str, Any], mode: str
) -> None:
    if theirs == "sapo":
        mode = "seq-mean-token-mean"  # it has no other
    case = Case.of(4)
    arguments = {
        "old_log_prob": case.old,
        "log_prob": case.logps,
        "response_mask": case.mask,
        "loss_agg_mode": mode,
        "config": actor_config(**options),
        "rollout_is_weights": torch.exp(case.old - case.sampler).clamp(max=2),
    }
    for a in (case.uniform, case.advantages):
        got, want = (verl_itself.get_policy_loss_fn(x)(advantages=a, **arguments)[0] for x in (ours, theirs))
        same(got, want, case, atol=1e-7)  # verl adds 1e-8 to the length of a response


def test_verl_itself_computes_our_advantages_from_its_batch(verl_itself: Any) -> None:
    from omegaconf import OmegaConf  # noqa: PLC0415
    from verl import DataProto  # noqa: PLC0415
    from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: PLC0415

    rewards, mask = reward_case()
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask.long()},
        non_tensors={"uid": np.array(LABELS, dtype=object)},
    )
    config = OmegaConf.create({"adv_estimator": "vppo", "vppo": {"alpha": 0.25}})
    batch = compute_advantage(data, adv_estimator="vppo", config=config).batch
    assert torch.equal(batch["advantages"], vppo(alpha=0.25).per_token(mask, mask))


def test_verl_itself_computes_advantages_of_turns_from_its_batch(verl_itself: Any) -> None:
    from omegaconf import OmegaConf  # noqa: PLC0415
    from verl import DataProto  # noqa: PLC0415
    from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: PLC0415

    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0]])
    rewards = torch.tensor([[0, 0, 0, 0.25, 0, 1.0], [0.75, 0, 0, 0, 0, 0]])
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask},
        non_tensors={"uid": np.array(["a", "a"], dtype=object)},
    )
    config = OmegaConf.create({"turn_level": {"weight": 3.0}, "norm_adv_by_std_in_grpo": False})
    made = compute_advantage(data, adv_estimator="turn_level", config=config)
    want = torch.tensor([[-0.25, -0.25, 0, 0, 0.5, 0], [0.25, 0, -0.5, -0.5, 0, 0]])
    torch.testing.assert_close(made.batch["advantages"], want)


def test_verl_itself_puts_scores_behind_what_tools_wrote(verl_itself: Any) -> None:
    from tensordict import TensorDict  # noqa: PLC0415
    from verl import DataProto  # noqa: PLC0415
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase  # noqa: PLC0415
    from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: PLC0415

    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]])
    attended = torch.arange(9) < torch.tensor([8, 8, 4])[:, None]  # two tokens of a prompt, then the response
    tensors = {"prompts": mask[:, :2], "responses": mask, "attention_mask": attended.long()}
    scores = [1.0, -3.0, NAN]
    rewards = RewardManagerBase.assemble_rm_scores(DataProto(batch=TensorDict(tensors, batch_size=3)), scores)
    assert rewards[0, 5] == 1
    assert mask[0, 5] == 0
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask},
        non_tensors={"uid": np.array(["a"] * 3, dtype=object)},
    )
    got = compute_advantage(data, adv_estimator="vppo").batch["advantages"]
    correct, first_error, group = torch.tensor([True, False]), torch.tensor([-1, 2]), torch.tensor([0, 0])
    want = advantages.vppo(correct, mask[:2].sum(1), first_error, group, shorten=0)
    assert torch.equal(got[:2], want.per_token(mask[:2], mask[:2]))
    assert not got[2].any()


def test_verl_itself_composes_the_configuration_file(verl_itself: Any, verl: Any) -> None:
    from omegaconf import OmegaConf  # noqa: PLC0415
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn  # noqa: PLC0415

    here = str(Path(verl.__file__).parent)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", here, "--config-name", "verl_vppo"]
    shown = subprocess.run([*command, "--cfg", "job"], check=True, capture_output=True, text=True, timeout=500)
    config = OmegaConf.create(shown.stdout)
    loss = get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    assert loss is verl.POLICY_LOSSES["clip"]
    rewards, mask = reward_case()
    estimator = get_adv_estimator_fn(config.algorithm.adv_estimator)
    got, _ = estimator(rewards, mask.long(), config=config.algorithm, index=np.array(LABELS, dtype=object))
    assert torch.equal(got, vppo(shorten=0.1).per_token(mask, mask))
    assert config.reward.prefixloss.detector == "maths"


def test_verl_itself_calls_the_loss_from_its_worker(verl_itself: Any) -> None:
    from tensordict import TensorDict  # noqa: PLC0415
    from verl.utils import tensordict_utils  # noqa: PLC0415
    from verl.workers.utils.losses import ppo_loss  # noqa: PLC0415

    case = Case.of(5)
    lengths = case.mask.sum(1).tolist()
    prompts = torch.tensor([2, 1, 3, 2])

    def nested(values: Tensor) -> Tensor:
        parts = [v[:n] for v, n in zip(values, lengths, strict=True)]
        return torch.nested.nested_tensor(parts, layout=torch.jagged)

    def with_prompt(values: Tensor) -> Tensor:
        # the model's output covers prompt and response; position t predicts token t + 1
        parts = [
            torch.cat([v.new_zeros(int(p) - 1), v[:n], v.new_zeros(1)])
            for v, n, p in zip(values, lengths, prompts, strict=True)
        ]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    data = TensorDict(
        {
            "prompts": torch.nested.nested_tensor([torch.zeros(int(p)) for p in prompts], layout=torch.jagged),
            "responses": nested(torch.zeros_like(case.old)),
            "response_mask": nested(case.mask.long()),
            "old_log_probs": nested(case.old),
            "advantages": nested(case.advantages),
        },
        batch_size=4,
    )
    tensordict_utils.assign_non_tensor(
        data, dp_size=1, batch_num_tokens=int(case.mask.sum()), global_batch_size=4, max_response_len=9
    )
    from verl.workers.config import PolicyLossConfig  # noqa: PLC0415

    config = actor_config(policy_loss=PolicyLossConfig(loss_mode="prefix_clip"))
    loss, seen = ppo_loss(config, {"log_probs": with_prompt(case.logps)}, data)
    same(loss, mean_of(clipped_surrogate(case, case.advantages, 0.2, 0.28, 3.0), case.mask, "token-mean"), case)
    assert "actor/learning_share" in seen


def test_verl_itself_runs_our_head_under_its_fused_forward(verl_itself: Any, verl: Any, monkeypatch: Any) -> None:
    from verl.models.transformers import dense_common  # noqa: PLC0415
    from verl.utils.experimental import torch_functional  # noqa: PLC0415
    from verl.utils.kernel import linear_cross_entropy as kernel  # noqa: PLC0415

    before = (torch_functional.FusedLinearForPPO.forward, kernel.linear_cross_entropy)
    monkeypatch.setattr(torch_functional.FusedLinearForPPO, "forward", before[0])
    monkeypatch.setattr(kernel, "linear_cross_entropy", before[1])
    model = tiny_llama()
    call = {"self": model, "input_ids": torch.randint(31, (1, 9)), "return_dict": True, "temperature": 0.8}
    theirs = dense_common.forward_with_torch_backend(**call)
    undo = verl.patch_head()
    for forward in (dense_common.forward_with_torch_backend, dense_common.forward_with_triton_backend):
        ours = forward(**call)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs)
        torch.testing.assert_close(ours.entropy, theirs.entropy)
        grads = [
            torch.autograd.grad((x.log_probs - 0.1 * x.entropy).sum(), list(model.parameters()), retain_graph=True)
            for x in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch_functional.FusedLinearForPPO.forward.__module__ == verl.__name__
    assert kernel.linear_cross_entropy is verl.fused_logps
    undo()
    assert (torch_functional.FusedLinearForPPO.forward, kernel.linear_cross_entropy) == before


@pytest.mark.parametrize(("text", "score"), [(RIGHT, 1.0), (WRONG, -(WRONG.index("Step 2") + 1.0)), (WRONG + "?", NAN)])
def test_verl_itself_rewards_with_the_first_error(verl_itself: Any, text: str, score: float) -> None:
    from omegaconf import OmegaConf  # noqa: PLC0415
    from verl import DataProto  # noqa: PLC0415
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls  # noqa: PLC0415

    async def rewarded() -> dict[str, Any]:
        manager = get_reward_manager_cls("prefixloss")(
            OmegaConf.create({"reward": {"prefixloss": {"detector": "maths"}}}),
            Characters(),
            lambda data_source, solution_str, ground_truth, extra_info: (
                None if "?" in solution_str else float(solution_str.endswith(ground_truth))
            ),
        )
        ids = torch.tensor([[ord(c) for c in text] + [0, 0]])
        objects = {
            "data_source": ["x"],
            "reward_model": [{"ground_truth": "12"}],
            "raw_prompt": [[{"role": "user", "content": "(2 + 2) * 3"}]],
        }
        data = DataProto.from_dict(
            tensors={"responses": ids, "attention_mask": (ids > 0).long(), "response_mask": (ids > 0).long()},
            non_tensors={k: np.array([*v, None], dtype=object)[:1] for k, v in objects.items()},
        )
        return await manager.run_single(data)

    result = asyncio.run(rewarded())
    assert result["reward_score"] == pytest.approx(score, nan_ok=True)
    extra = result["reward_extra_info"]
    assert extra["first_error"] == (-score - 1 if score < 0 else -1)
    assert extra["correct"] == pytest.approx(NAN if text.endswith("?") else float(score == 1), nan_ok=True)
    assert all(isinstance(x, (int, float)) for x in extra.values())


@pytest.mark.parametrize(("correct", "flawed", "asked"), [(False, False, 1), (True, False, 0), (True, True, 1)])
def test_verl_searches_right_answers_only_where_it_is_told_to(
    verl: Any, monkeypatch: pytest.MonkeyPatch, correct: bool, flawed: bool, asked: int
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(verl, "_first_error", lambda *_, **options: seen.append(options) or 3)
    options = {"detector": "maths", "flawed": flawed}
    first = verl._searched(correct, None, None, options)
    assert seen == [{"detector": "maths"}] * asked
    assert first == (3 if asked else -1)
    assert verl._searched(None, None, None, options) == -1  # without a verdict nothing is searched


# --- OpenRLHF ---

OPENRLHF_KINDS: list[dict[str, Any]] = [
    {},
    {"dual_clip": 1.5},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.0, 1.1)},
]


@pytest.mark.parametrize("kind", ["uniform", "advantages"])
def test_openrlhf_gets_its_clipped_loss_over_tokens_and_over_responses(kind: str) -> None:
    case = Case.of(6)
    a = getattr(case, kind)
    dirty = [torch.where(case.mask, x, NAN) for x in (case.logps, case.old, a)]
    for by_token, mode in ((True, "token-mean"), (False, "seq-mean-token-mean")):
        loss, clip_ratio, ppo_kl, *rest = openrlhf.PolicyLoss(0.2, 0.3, token_level_loss=by_token)(*dirty, case.mask)
        same(loss, mean_of(clipped_surrogate(case, a, 0.2, 0.3), case.mask, mode), case)
        assert rest == [None, None]
        assert 0 <= clip_ratio <= 1
        torch.testing.assert_close(ppo_kl, (case.old - case.logps).detach()[case.mask].mean())


def test_openrlhf_ranks_average_to_the_whole_batch() -> None:
    case = Case.of(7)
    for by_token in (True, False):
        loss = openrlhf.PolicyLoss(token_level_loss=by_token)
        whole = loss(case.logps, case.old, case.uniform, case.mask)[0]
        counts = {"dp_size": 2, "batch_num_tokens": float(case.mask.sum()), "global_batch_size": 4.0}
        parts = [
            loss(case.logps[r], case.old[r], case.uniform[r], case.mask[r], **counts)[0]
            for r in (slice(0, 3), slice(3, 4))
        ]
        same(torch.stack(parts).mean(), whole, case)


def test_openrlhf_credit_from_its_experiences_with_turns_of_a_tool() -> None:
    """Action masks as OpenRLHF makes them: over all tokens but the first, prompt and tools not in it; a reward a
    response, in no token. Response 1 gave no verdict."""
    masks = [torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]), torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0, 1, 1, 0]])]
    rewards = [torch.tensor([-4.0]), torch.tensor([NAN]), torch.tensor([1.0])]
    experiences = [
        SimpleNamespace(rewards=reward, action_mask=mask, index=[i], info={}, kl=0)
        for i, (reward, mask) in enumerate(zip(rewards, masks, strict=True))
    ]
    openrlhf.compute_advantages(experiences, 3)
    # averages 0.5 * 3 / 4 and 1
    baseline = (0.375 + 1) / 2
    good, bad, right = 0.5 - baseline, -baseline, 1 - baseline
    for experience, want in zip(
        experiences, ([0, 0, good, good, 0, 0, good, bad], [0, 0, 0], [0, right, 0, right, right, 0]), strict=True
    ):
        torch.testing.assert_close(experience.advantages, torch.tensor([want], dtype=torch.float32))


def test_openrlhf_corrections_that_are_not_here_are_refused() -> None:
    for options in (
        {"is_correction_level": "seq"},
        {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)},
        {"is_correction_level": "token", "policy_loss_type": "gspo"},
        {"is_correction_level": "token", "is_correction_mode": "clip"},
    ):
        with pytest.raises(ValueError, match="is_correction"):
            openrlhf.PolicyLoss(**options)  # type: ignore[arg-type]


def test_openrlhf_experiences_in_any_order_get_the_advantages_of_their_prompts() -> None:
    order = [4, 1, 0, 3, 5, 2]  # where each response of SCORES stands among the prompts, three each
    labels = [place // 3 for place in order]
    mask = reward_case()[1]
    want = token_loss.token_advantages(torch.tensor(SCORES), LENGTHS, labels).per_token(mask, mask)
    experiences = [
        SimpleNamespace(rewards=torch.tensor(SCORES)[r], action_mask=mask[r], index=order[r], info={}, kl=0)
        for r in (slice(0, 2), slice(2, 6))
    ]
    openrlhf.compute_advantages(experiences, 3)
    for r, experience in zip((slice(0, 2), slice(2, 6)), experiences, strict=True):
        assert torch.equal(experience.advantages, want[r])
        assert torch.equal(experience.returns, want[r])
        assert torch.equal(experience.info["return"], torch.tensor(SCORES)[r])


def openrlhf_args(init_coef: float = 0.01, use_loss: bool = False, **reward: Any) -> Any:
    """OpenRLHF's arguments as far as its advantages read them, with its defaults."""
    kl = SimpleNamespace(init_coef=init_coef, use_loss=use_loss)
    rollout = SimpleNamespace(n_samples_per_prompt=3)
    algo = SimpleNamespace(kl=kl, advantage=SimpleNamespace(no_std_norm=False))
    return SimpleNamespace(rollout=rollout, algo=algo, reward=SimpleNamespace(**reward))


def test_openrlhf_penalties_in_the_reward_are_refused_by_name() -> None:
    for given_args, name in (
        ({}, r"algo\.kl\.init_coef: got 0\.01 in the reward"),
        ({"use_loss": True, "overlong_buffer_len": 100}, r"reward\.overlong_buffer_len: got 100"),
        ({"init_coef": 0.0, "stop_properly_penalty_coef": 0.0}, r"reward\.stop_properly_penalty_coef: got 0\.0"),
    ):
        with pytest.raises(ValueError, match=name):
            openrlhf._refuse_penalties(openrlhf_args(**given_args))
    openrlhf._refuse_penalties(openrlhf_args(use_loss=True, overlong_buffer_len=None))


def actor_call() -> tuple[Any, dict[str, Any]]:
    """An actor as far as its forward reads it, and a padded batch: prompts left-padded, responses right-padded."""
    torch.manual_seed(0)
    actor = SimpleNamespace(model=tiny_llama(), temperature=0.7, packing_samples=False, is_vlm=False)
    attention = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    actions = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    return actor, {"sequences": torch.randint(31, (2, 7)), "action_mask": actions, "attention_mask": attention}


def test_openrlhf_actor_makes_log_probs_of_action_tokens_alone() -> None:
    actor, call = actor_call()
    forward = openrlhf.actor_forward(lambda *_, **__: "theirs")
    got, output = forward(actor, **call, return_output=True, return_entropy=True)
    positions = (call["attention_mask"].cumsum(1) - 1).masked_fill(call["attention_mask"] == 0, 1)
    logits = actor.model(call["sequences"], attention_mask=call["attention_mask"], position_ids=positions).logits / 0.7
    logps, entropy = logps_and_entropy(logits[:, 2:-1], call["sequences"][:, 3:])
    torch.testing.assert_close(got, logps * call["action_mask"])
    torch.testing.assert_close(output.entropy[:, -4:], entropy * call["action_mask"])
    params = list(actor.model.parameters())
    grads = [torch.autograd.grad(x[call["action_mask"].bool()].sum(), params) for x in (got, logps)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert forward(actor, call["sequences"], attention_mask=call["attention_mask"], return_logprobs=True) == "theirs"
    actor.packing_samples = True
    assert forward(actor, **call) == "theirs"


def test_openrlhf_a_model_that_changes_its_heads_logits_is_refused() -> None:
    actor, call = actor_call()
    inner = actor.model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output["logits"] = 2 * output["logits"]
        return output

    actor.model.forward = doubled
    with pytest.raises(ValueError, match="head: got a model that changes its head's logits, expected head=False"):
        openrlhf.actor_forward(None)(actor, **call)
    assert actor.model(call["sequences"]).logits.shape[-1] == 31


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports packages that are not installed as empty ones, whose every name is an empty class."""

    def __init__(self, *packages: str) -> None:
        self.packages = [name for name in packages if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, *_: Any) -> Any:
        wanted = name.partition(".")[0] in self.packages and not name.startswith("flash_attn.ops")  # has a fallback
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def exec_module(self, module: types.ModuleType) -> None:
        def absent(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = absent  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def openrlhf_itself() -> Any:
    """Its own modules; what they import for GPUs, and these tests do not call, may be missing."""
    pytest.importorskip("openrlhf")
    pytest.importorskip("transformers").PreTrainedModel  # noqa: B018 (looks for DeepSpeed: before it is stood in for)
    absent = Absent("deepspeed", "flash_attn", "vllm")
    sys.meta_path.append(absent)
    from openrlhf.models import actor, loss  # noqa: PLC0415
    from openrlhf.trainer.ppo_utils import experience_maker  # noqa: PLC0415
    from openrlhf.trainer.ray import ppo_actor  # noqa: PLC0415

    yield SimpleNamespace(actor=actor, loss=loss, experience_maker=experience_maker, ppo_actor=ppo_actor)
    sys.meta_path.remove(absent)
    for name in [name for name in sys.modules if name.partition(".")[0] in absent.packages]:
        del sys.modules[name]


@pytest.mark.parametrize("options", OPENRLHF_KINDS, ids=str)
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 7.0}], ids=str)
def test_openrlhf_loss_is_that_of_openrlhf_itself(
    openrlhf_itself: Any, options: dict[str, Any], counts: dict[str, Any]
) -> None:
    case = Case.of(8)
    arguments = (case.logps, case.old, case.uniform, case.mask, case.sampler)
    want = openrlhf_itself.loss.PolicyLoss(0.2, 0.3, **options)(*arguments, **counts)
    got = openrlhf.PolicyLoss(0.2, 0.3, **options)(*arguments, **counts)
    same(got[0], want[0], case, atol=1e-7)  # OpenRLHF adds 1e-8 to the length of a response
    torch.testing.assert_close(got[2], want[2])
    for ours, theirs in zip(got[3:], want[3:], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, check_dtype=False)


def test_openrlhf_log_probs_are_those_of_its_actor_itself(openrlhf_itself: Any) -> None:
    actor, call = actor_call()
    theirs = openrlhf_itself.actor.Actor.forward
    want, output = theirs(actor, **call, return_output=True, return_entropy=True)
    got, ours = openrlhf.actor_forward(theirs)(actor, **call, return_output=True, return_entropy=True)
    torch.testing.assert_close(got, want)
    scored = call["action_mask"].bool()
    torch.testing.assert_close(ours.entropy[:, -4:][scored], output.entropy[:, -4:][scored])
    again = openrlhf.actor_forward(theirs)(
        actor, call["sequences"], attention_mask=call["attention_mask"], return_logprobs=True
    )
    assert again.shape == (2, 6)


def test_openrlhf_itself_trains_with_what_patch_puts_there(openrlhf_itself: Any, monkeypatch: Any) -> None:
    actor, maker = openrlhf_itself.actor.Actor, openrlhf_itself.experience_maker.RemoteExperienceMaker
    monkeypatch.setattr(openrlhf_itself.ppo_actor, "PolicyLoss", openrlhf_itself.ppo_actor.PolicyLoss)
    monkeypatch.setattr(actor, "forward", actor.forward)
    monkeypatch.setattr(maker, "compute_advantages_and_returns", maker.compute_advantages_and_returns)
    before = (openrlhf_itself.ppo_actor.PolicyLoss, actor.forward, maker.compute_advantages_and_returns)
    undo = openrlhf.patch("sapo", "cliff", keep=0.5)
    assert openrlhf_itself.ppo_actor.PolicyLoss(clip_eps_low=0.2).config.objective == "sapo"
    stand_in, call = actor_call()
    assert actor.forward(stand_in, **call).shape == (2, 4)
    mask = reward_case()[1]
    experience = openrlhf_itself.experience_maker.Experience(
        rewards=torch.tensor(SCORES), action_mask=mask, index=list(range(6)), info={}
    )
    this = SimpleNamespace(strategy=SimpleNamespace(args=openrlhf_args(init_coef=0.0)))
    maker.compute_advantages_and_returns(this, [experience])
    want = token_loss.token_advantages(torch.tensor(SCORES), LENGTHS, [0, 0, 0, 1, 1, 1], "cliff", keep=0.5)
    assert torch.equal(experience.advantages, want.per_token(mask, mask))
    undo()
    assert (openrlhf_itself.ppo_actor.PolicyLoss, actor.forward, maker.compute_advantages_and_returns) == before


# --- SkyRL ---


def skyrl_config(**given: Any) -> Any:
    return SimpleNamespace(**{"eps_clip_low": 0.2, "eps_clip_high": 0.3, "cispo": None, "sapo": None, **given})


@pytest.mark.parametrize("kind", ["uniform", "advantages"])
def test_skyrl_gets_a_sum_over_its_mask_with_the_reduction_in_the_advantages(kind: str) -> None:
    case = Case.of(9)
    a = getattr(case, kind) / case.mask.sum()
    dirty = [torch.where(case.mask, x, NAN) for x in (case.logps, case.old, a)]
    loss, seen = skyrl.policy_loss(*dirty, skyrl_config(), case.mask.long(), rollout_logprobs=None)
    same(loss, mean_of(clipped_surrogate(case, a * case.mask.sum(), 0.2, 0.3), case.mask, "token-mean"), case)
    assert 0 <= seen["clip_ratio"] <= 1
    every = skyrl.policy_loss(case.logps, case.old, a, skyrl_config())[0]
    same(every, clipped_surrogate(case, a, 0.2, 0.3).sum(), case)


def test_skyrl_estimators_spread_credit_up_to_the_first_error() -> None:
    rewards, mask = reward_case()
    got, returns = skyrl.advantage_estimator(
        token_level_rewards=rewards,
        response_mask=mask.float(),
        index=LABELS,
        values=None,
        grpo_norm_by_std=True,
        gamma=1.0,
        lambd=1.0,
        config=None,
        options={"alpha": 0.25},
    )
    assert torch.equal(got, vppo(alpha=0.25).per_token(mask, mask))
    assert torch.equal(returns, got)


def test_skyrl_gives_credit_to_responses_at_the_right_of_its_batch() -> None:
    """The shapes of SkyRL 0.3.0: responses right-aligned, rewards at the ends of turns, a mask over all tokens of a
    response, tools' as well, and a copy of row 0 under a label of its own to fill the batch up."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    rewards = torch.zeros(4, 6)
    rewards[[0, 3], 5] = -4.0
    rewards[1, 2], rewards[1, 5] = 0.25, 0.75  # the score is the sum of the turns
    rewards[2, 5] = NAN
    got = skyrl.advantage_estimator(rewards, mask, np.array(["a", "a", "a", "pad0"]))[0]
    # averages 0.5 * 3 / 5 and 1
    baseline = (0.3 + 1) / 2
    torch.testing.assert_close(got[0], torch.tensor([0] + [0.5 - baseline] * 3 + [-baseline] * 2))
    torch.testing.assert_close(got[1], torch.full((6,), 1 - baseline))
    assert not got[2].any()


@pytest.mark.parametrize("std", [True, False])
def test_a_trainer_s_own_switch_for_the_standard_deviation_counts_for_neutral_prefixes(verl: Any, std: bool) -> None:
    rewards, mask = reward_case()
    want = token_loss.token_advantages(torch.tensor(SCORES), LENGTHS, LABELS, "neutral_prefix", std=std)
    call = {"token_level_rewards": rewards, "response_mask": mask.float(), "index": LABELS}
    switched = (
        verl.advantage_estimator(**call, config={"norm_adv_by_std_in_grpo": std}, estimator="neutral_prefix"),
        skyrl.advantage_estimator(**call, grpo_norm_by_std=std, estimator="neutral_prefix"),
    )
    for got, _ in switched:
        assert torch.equal(got, want.per_token(mask, mask))
    chosen = skyrl.advantage_estimator(
        **call, grpo_norm_by_std=not std, estimator="neutral_prefix", options={"std": std}
    )
    assert torch.equal(chosen[0], switched[1][0])


def test_what_was_put_somewhere_is_taken_back_unless_it_was_replaced() -> None:
    place = SimpleNamespace(a=1, b=2)
    undo = token_loss.put((place, "a", 10), (place, "b", 20))
    assert (place.a, place.b) == (10, 20)
    place.b = 30
    undo()
    undo()
    assert (place.a, place.b) == (1, 30)


def test_skyrl_fused_log_probs_and_their_gradient() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    target = torch.randint(13, (2, 5))
    got = skyrl.fused_logps("triton", hidden, weight, target, 0, 13, 4, None, False)
    want = logps_and_entropy(hidden @ weight.T, target)[0]
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.square().sum(), (hidden, weight)) for x in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def skyrl_itself() -> Any:
    pytest.importorskip("skyrl")
    without_init("skyrl.backends", "skyrl.backends.skyrl_train")
    from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: PLC0415

    skyrl.register(alpha=0.25)
    skyrl.register()  # a second time: no harm
    yield ppo_utils
    for registry, prefix in ((ppo_utils.PolicyLossRegistry, "prefix_"), (ppo_utils.AdvantageEstimatorRegistry, "")):
        for name in registry.list_available():
            if name.startswith(prefix or ("vppo", "cliff", "neutral_prefix")):
                registry.unregister(name)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("prefix_clip", "regular", {}),
        ("prefix_sapo", "sapo", {}),
        ("prefix_cispo", "cispo", {"cispo_eps_clip_low": 1.0, "cispo_eps_clip_high": 0.3}),
        ("prefix_clip", "regular", {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.1}),
        ("prefix_clip", "regular", {"token_mask_is_threshold_high": 1.2, "token_mask_is_threshold_low": 0.8}),
    ],
)
def test_skyrl_losses_are_those_of_skyrl_itself(
    skyrl_itself: Any, ours: str, theirs: str, options: dict[str, Any]
) -> None:
    from skyrl.train.config.config import AlgorithmConfig, CISPOConfig, OffPolicyCorrectionConfig  # noqa: PLC0415

    case = Case.of(10)
    mask = case.mask.double()
    a = skyrl_itself.apply_loss_reduction_to_advantages_minibatch(case.uniform, mask, "sequence_mean", 4, 9)
    off_policy = OffPolicyCorrectionConfig(**({} if "cispo" in theirs else options))
    cispo = CISPOConfig(**(options if "cispo" in theirs else {}))
    results = []
    for name in (ours, theirs):
        config = AlgorithmConfig(policy_loss_type=name, off_policy_correction=off_policy, cispo=cispo)
        loss = skyrl_itself.PolicyLossRegistry.get(name)
        results.append(loss(case.logps, case.old, a, config=config, loss_mask=mask, rollout_logprobs=case.sampler)[0])
    same(*results, case, atol=1e-7)  # SkyRL's ratio is in float32


def test_skyrl_itself_computes_our_advantages(skyrl_itself: Any) -> None:
    rewards, mask = reward_case()
    got = skyrl_itself.compute_advantages_and_returns(
        token_level_rewards=rewards,
        response_mask=mask.long(),
        index=np.array(LABELS),
        adv_estimator="vppo",
        config=None,
    )[0]
    assert torch.equal(got, vppo(alpha=0.25).per_token(mask, mask))


# --- slime ---


def slime_args(**given: Any) -> Any:
    defaults = {
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": 0.3,
        "eps_clip_c": None,
        "entropy_coef": 0.0,
        "use_kl_loss": False,
        "kl_loss_type": "low_var_kl",
        "kl_loss_coef": 0.0,
        "use_unbiased_kl": False,
        "use_tis": False,
        "tis_clip": 1.1,
        "tis_clip_low": 0.0,
        "use_rollout_logprobs": False,
    }
    return SimpleNamespace(**{**defaults, **given})


def test_slime_credit_goes_from_all_samples_to_the_tokens_of_a_rank() -> None:
    mask = reward_case()[1]
    rows = [row[row].tolist() for row in mask]
    rows[1][4] = False  # a tool's token
    samples = [
        SimpleNamespace(
            get_reward_value=lambda _, s=score: s,
            response_length=int(length),
            loss_mask=None if i == 0 else [int(x) for x in row],
            group_index=label,
        )
        for i, (score, length, row, label) in enumerate(zip(SCORES, LENGTHS, rows, LABELS, strict=True))
    ]
    args = SimpleNamespace(prefixloss_estimator_options={"alpha": 0.25})
    raw, rewards = slime.reward_post_process(args, samples)
    assert raw == [1, 0, 0, 1, 0, 0]
    mask[1, 4] = False
    want = token_loss.token_advantages(torch.tensor(SCORES), mask.sum(1), LABELS, alpha=0.25).per_token(mask, mask)
    here = [4, 1, 2]  # the samples of one rank
    data: dict[str, Any] = {
        "rewards": [rewards[i] for i in here],
        "loss_masks": [torch.tensor(rows[i]) for i in here],
        "kl": [torch.zeros(int(LENGTHS[i])) for i in here],
    }
    slime.advantages(args, data)
    for i, got, returns in zip(here, data["advantages"], data["returns"], strict=True):
        torch.testing.assert_close(got, want[i, : LENGTHS[i]])
        assert torch.equal(got, returns)
    assert all(isinstance(reward, float) for reward in data["rewards"])


def test_slime_samples_without_a_verdict_and_removed_ones() -> None:
    """Removed ones are part of the baseline, as in slime, which clears their masks afterwards; None and NaN are not."""
    samples = [
        SimpleNamespace(
            get_reward_value=lambda _, s=score: s,
            response_length=4,
            loss_mask=[1] * 4,
            group_index=0,
            remove_sample=gone,
        )
        for score, gone in ((1.0, False), (-3.0, True), (None, False), (NAN, False))
    ]
    raw, rewards = slime.reward_post_process(SimpleNamespace(), samples)
    assert str(raw) == "[1.0, 0.0, nan, nan]"
    # averages 1 and 0.5 * 2 / 4
    assert rewards[0] == pytest.approx([1 - 0.625, 1 - 0.625, 0])
    data: dict[str, Any] = {
        "rewards": rewards,
        "loss_masks": [torch.ones(4), torch.zeros(4), torch.ones(4), torch.ones(4)],
        "kl": [torch.zeros(4)] * 4,
    }
    slime.advantages(SimpleNamespace(), data)
    assert data["advantages"][0].tolist() == pytest.approx([0.375] * 4)
    assert not any(x.any() for x in data["advantages"][1:])
    assert rewards[1][2] == 0  # a prefix of no more tokens than are left


def slime_batch(case: Case, a: Tensor) -> tuple[dict[str, Any], list[Tensor], list[Tensor], Any]:
    """A micro-batch of lists, the policy's log-probs and entropies, and slime's sum of sample means."""
    lengths = case.mask.sum(1).tolist()

    def lists(values: Tensor) -> list[Tensor]:
        return [v[:n] for v, n in zip(values, lengths, strict=True)]

    batch = {
        "advantages": lists(a),
        "log_probs": lists(case.old),
        "rollout_log_probs": lists(case.sampler),
        "ref_log_probs": lists(case.sampler + 0.1),
        "loss_masks": lists(case.mask.long()),
    }
    return batch, lists(case.logps), lists(-case.logps), lambda x: sum(part.mean() for part in x.split(lengths))


@pytest.mark.parametrize("kind", ["uniform", "advantages"])
@pytest.mark.parametrize(
    "given_args",
    [
        {},
        {"eps_clip_c": 1.5},
        {"use_tis": True},
        {"use_rollout_logprobs": True},
        {"use_kl_loss": True, "kl_loss_coef": 0.1},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "use_unbiased_kl": True, "entropy_coef": 0.05},
    ],
    ids=str,
)
def test_slime_gets_the_sum_of_what_its_arguments_say(given_args: dict[str, Any], kind: str) -> None:
    case, args = Case.of(11), slime_args(**given_args)
    a = getattr(case, kind)
    batch, logps, entropy, reduce = slime_batch(case, a)
    loss, seen = slime.loss_of_log_probs(args, batch, logps, entropy, reduce)
    if args.use_rollout_logprobs:
        case.old = case.sampler
    want = clipped_surrogate(case, a, 0.2, 0.3, args.eps_clip_c)
    if args.use_tis:
        want = want * torch.exp(case.old - case.sampler).clamp(max=1.1)
    d = case.sampler + 0.1 - case.logps
    ratio = torch.exp(case.logps - case.old) if args.use_unbiased_kl else 1
    want = want + args.kl_loss_coef * ratio * (torch.exp(d) - 1 - d) + args.entropy_coef * case.logps
    same(loss, 4 * mean_of(want, case.mask, "seq-mean-token-mean"), case)
    assert all(value.dim() == 0 for value in seen.values())
    learning = 4 * mean_of((a != 0).double(), case.mask, "seq-mean-token-mean")
    torch.testing.assert_close(seen["learning_share"], learning)


def test_every_trainer_s_epsilon_is_the_same_cap_on_the_ratio_of_cispo(verl: Any) -> None:
    # 1 + 0.3, for A of either sign; ratios of up to exp(3)
    case = Case.of(13)
    a = case.advantages
    capped = torch.exp(case.logps - case.old).detach().clamp(max=1.3)
    want = mean_of(-capped * a * case.logps, case.mask, "token-mean")
    settings = verl_config(clip_ratio_high=0.3)
    made = verl.policy_loss(case.old, case.logps, a, case.mask, "token-mean", settings, objective="cispo")[0]
    same(made, want, case)
    for given_config in ({}, {"cispo": SimpleNamespace(cispo_eps_clip_high=0.3), "eps_clip_high": 9.0}):
        config = skyrl_config(**given_config)
        made = skyrl.policy_loss(case.logps, case.old, a, config, case.mask.double(), objective="cispo")[0]
        same(made / case.mask.sum(), want, case)
    made = openrlhf.PolicyLoss(0.2, 0.3, objective="cispo")(case.logps, case.old, a, case.mask)[0]
    same(made, want, case)
    for given_args in ({"advantage_estimator": "cispo"}, {"prefixloss_loss": {"objective": "cispo"}}):
        assert slime.loss_config(slime_args(**given_args)).clip_high == 1.3
    assert slime.loss_config(slime_args(prefixloss_loss={"objective": "cispo", "clip_high": 4.0})).clip_high == 4.0


@pytest.mark.parametrize("name", ["policy_loss_type", "is_correction_mode"])
def test_openrlhf_s_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got 'new'"):
        openrlhf.PolicyLoss(**{name: "new"})


def test_slime_s_unknown_kl_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kl_loss_type: got 'k9'"):
        slime.loss_config(slime_args(use_kl_loss=True, kl_loss_type="k9"))


def test_slime_settings_of_ours_come_on_top_and_what_is_not_here_is_refused() -> None:
    assert slime.loss_config(slime_args(prefixloss_loss={"objective": "sapo"})).objective == "sapo"
    assert slime.loss_config(slime_args(advantage_estimator="gspo")).ratio_level == "sequence"
    cispo = slime.loss_config(slime_args(advantage_estimator="cispo", eps_clip_high=4.0))
    assert (cispo.objective, cispo.clip_high) == ("cispo", 5.0)
    for given_args in ({"use_opsm": True}, {"custom_tis_function_path": "a.b"}, {"use_tis": True, "tis_clip_low": 0.5}):
        with pytest.raises(ValueError, match="expected"):
            slime.loss_config(slime_args(**given_args))


def test_slime_makes_the_log_probs_and_gets_the_loss(monkeypatch: Any) -> None:
    """Against its documented functions, stood in for: no package of slime is on PyPI."""
    case = Case.of(12)
    batch, logps, entropy, reduce = slime_batch(case, case.advantages)
    batch |= {"unconcat_tokens": [], "total_lengths": [], "response_lengths": []}
    stood_in = types.ModuleType("slime.backends.megatron_utils.loss")
    made: list[Any] = []

    def get_log_probs_and_entropy(logits: Tensor, **given: Any) -> Any:
        made.append(given)
        return torch.empty(0), {"log_probs": logps, "entropy": entropy}

    stood_in.get_log_probs_and_entropy = get_log_probs_and_entropy  # type: ignore[attr-defined]
    stood_in.get_rollout_top_p_logprob_kwargs = lambda *_: {}  # type: ignore[attr-defined]
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stood_in.__name__, stood_in)
    loss, _ = slime.policy_loss(slime_args(), batch, torch.zeros(1, 3, 5), reduce)
    want = 4 * mean_of(clipped_surrogate(case, case.advantages, 0.2, 0.3), case.mask, "seq-mean-token-mean")
    same(loss, want, case)
    assert made[0]["with_entropy"] is True
