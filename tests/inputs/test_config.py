"""Each option's names stand in one table: a new entry is all that the checks, back-ends and registries need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import KLS, RATIO_LEVELS, REDUCTIONS, STATS, of_objective
from torch import Tensor

from prefixloss import LossConfig, advantages, linear_prefix_loss, parallel, prefix_loss
from prefixloss.integrations import skyrl, token_loss, verl
from prefixloss.maths import corrections, objectives, reductions
from prefixloss.maths import kl as estimators

NAMES: dict[str, tuple[str, ...]] = {
    "objective": tuple(objectives.BY_NAME),
    "ratio_level": RATIO_LEVELS,
    "sampler_correction": tuple(corrections.BY_NAME),
    "kl": KLS,
    "reduction": REDUCTIONS,
    "stats": STATS,
}
NEW = "brand-new"


@pytest.fixture
def new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more entry in every table, and nowhere else: twice "reinforce", half of "k1", and so on."""
    twice = objectives.Objective(lambda logp, given: 2 * objectives.reinforce(logp, given))
    monkeypatch.setitem(objectives.BY_NAME, NEW, twice)
    monkeypatch.setitem(corrections.BY_NAME, NEW, lambda q, low, high: q + low)
    half = estimators.Estimator(lambda d: -d / 2, lambda d: torch.full_like(d, 0.5))
    monkeypatch.setitem(estimators.BY_NAME, NEW, half)
    monkeypatch.setitem(reductions.BY_NAME, NEW, reductions.Reduction("response", "tokens"))


@pytest.mark.parametrize("option", NAMES)
def test_an_option_takes_the_names_of_its_table_and_no_other(option: str) -> None:
    for name in NAMES[option]:
        options = of_objective(name) if option == "objective" else {option: name}
        made = LossConfig(**options)
        assert LossConfig.decoded(made.encoded) == made
    with pytest.raises(ValueError, match=rf"^{option}: got '{NEW}', expected .*'{NAMES[option][-1]}'"):
        LossConfig(**{option: NEW})


def loss_with(start: str, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, generator=gen, dtype=torch.float64 if backend != "triton" else None, requires_grad=True)
    tokens, values = torch.randint(7, (2, 3), generator=gen), torch.randn(2, 3, generator=gen)
    given = {"old_logps": values, "sampler_logps": values, "ref_logps": values, "backend": backend}
    if start == "logits":
        loss = prefix_loss(x, tokens, values, config=LossConfig(**options), **given).loss
    else:
        loss = linear_prefix_loss(
            x, torch.eye(7, dtype=x.dtype), tokens, values, config=LossConfig(**options), **given
        ).loss
    return loss, torch.autograd.grad(loss.sum(), x)[0]


# what the new entries are worth in terms of the old ones; values are both old and sampler log-probs, so q = 1
WORTH: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "objective": ({"objective": NEW}, {"objective": "reinforce"}, 2.0),
    "sampler_correction": (
        {"sampler_correction": NEW, "sampler_bounds": (0.5, 2.0)}, {"sampler_correction": "tis"}, 1.5,
    ),
    "reduction": ({"reduction": NEW}, {"reduction": "seq-mean-token-mean"}, 2 / 6),
}  # fmt: skip


# one pass, two stages, and where the results are of every scored token
@pytest.mark.parametrize("more", [{}, {"row_tolerance": 1e-9}, {"stats": "scored"}], ids=str)
@pytest.mark.parametrize("option", WORTH)
@pytest.mark.parametrize("start", ["logits", "hidden"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_new_entry_of_a_table_is_all_that_a_back_end_needs(
    backend: str, start: str, option: str, more: dict[str, Any], new_names: None
) -> None:
    new, old, factor = WORTH[option]
    loss, grad = loss_with(start, backend, **more, **new)
    want_loss, want_grad = loss_with(start, backend, **more, **old)
    torch.testing.assert_close(loss, factor * want_loss)
    torch.testing.assert_close(grad, factor * want_grad)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_new_estimator_is_one_entry(backend: str, new_names: None) -> None:
    loss, grad = loss_with("hidden", backend, kl=NEW, kl_coef=0.5)
    want_loss, want_grad = loss_with("hidden", backend, kl="k1", kl_coef=0.25)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("start", ["logits", "hidden"])
@pytest.mark.parametrize("option", WORTH)
def test_torch_makes_what_the_kernels_have_no_form_of(start: str, option: str, new_names: None) -> None:
    new, old, factor = WORTH[option]
    loss, grad = loss_with(start, "triton", **new)
    want_loss, want_grad = loss_with(start, "triton", **old)
    torch.testing.assert_close(loss, factor * want_loss)
    torch.testing.assert_close(grad, factor * want_grad)


def normalizer_of(config: LossConfig) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "all_reduce", lambda x, group: None)
        patch.setattr(torch.distributed, "get_world_size", lambda group: 1)
        return parallel.global_normalizer(config, torch.zeros(2, 3).long())


def test_the_whole_batch_s_denominator_follows_the_table(new_names: None) -> None:
    assert normalizer_of(LossConfig(reduction=NEW)) == 6
    assert normalizer_of(LossConfig(reduction="seq-mean-token-mean")) == 2


def test_trainers_registries_offer_what_is_in_the_tables() -> None:
    assert set(verl.POLICY_LOSSES) == set(objectives.BY_NAME)
    assert tuple(verl.ESTIMATORS) == token_loss.ESTIMATORS == ("vppo", "cliff", "neutral_prefix")
    settings = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.2)
    x = torch.zeros(1, 2)
    for name in objectives.BY_NAME:
        assert skyrl.policy_loss(x, x, x + 1, settings, objective=name)[0].isfinite()
    with pytest.raises(ValueError, match=rf"objective: got '{NEW}'"):
        skyrl.policy_loss(x, x, x + 1, settings, objective=NEW)


def test_a_new_estimator_needs_its_reference_like_the_others(new_names: None) -> None:
    x = torch.tensor([0.5, -0.5])
    with pytest.raises(ValueError, match="ref_logps"):
        prefix_loss(x.expand(1, 2, 2), torch.zeros(1, 2).long(), x[None], config=LossConfig(kl=NEW))


OUTCOME = advantages.Outcome(
    correct=torch.tensor([True, False, False]),
    lengths=torch.tensor([4, 5, 6]),
    group_ids=torch.zeros(3, dtype=torch.int64),
    first_error=torch.tensor([-1, 3, -1]),
    prompt_lengths=torch.tensor([1, 1, 1]),
    right_steps=torch.tensor([3, 2, 0]),
    total_steps=torch.tensor([3, 4, 4]),
)
PLAIN: dict[str, Callable[[advantages.Outcome], Any]] = {
    "vppo": lambda o: advantages.vppo(
        o.correct, o.lengths, o.first_error, o.group_ids, prompt_lengths=o.prompt_lengths
    ),
    "grpo": lambda o: advantages.grpo(o.correct.float(), o.group_ids),
    "dr-grpo": lambda o: advantages.grpo(o.correct.float(), o.group_ids, std=False),
    "cliff": lambda o: advantages.cliff(o.correct, o.lengths, o.first_error, o.group_ids),
    "neutral_prefix": lambda o: advantages.neutral_prefix(
        advantages.grpo(o.correct.float(), o.group_ids), o.correct, o.first_error
    ),
    "rts": lambda o: advantages.rts(o.correct, o.right_steps, o.total_steps, o.group_ids),
    "mixed": lambda o: advantages.mixed(o.correct.float(), o.right_steps / o.total_steps, o.group_ids),
    "rloo": lambda o: advantages.rloo(o.correct.float(), o.group_ids),
    "opo": lambda o: advantages.opo(o.correct.float(), o.lengths, o.group_ids),
    "reinforce++": lambda o: advantages.reinforce_pp(o.correct.float(), o.lengths),
    "reinforce++-baseline": lambda o: advantages.reinforce_pp_baseline(o.correct.float(), o.lengths, o.group_ids),
}


@pytest.mark.parametrize("name", advantages.BY_NAME)
def test_advantages_by_name_are_those_of_the_functions(name: str) -> None:
    got, want = advantages.assign(name, OUTCOME), PLAIN[name](OUTCOME)
    for a, b in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
        assert torch.equal(a, b)


def test_the_other_spelling_of_neutral_prefix_is_taken_and_no_other() -> None:
    neutral = advantages.assign("neutral", OUTCOME)
    assert torch.equal(neutral[0], advantages.assign("neutral_prefix", OUTCOME)[0])
    with pytest.raises(ValueError, match=r"^advantage: got 'neutral-prefix', expected 'vppo' .*'neutral_prefix'"):
        advantages.assign("neutral-prefix", OUTCOME)


def test_kernels_do_not_compile_for_a_name_that_they_do_not_know(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import json, mock_driver; print(json.dumps(mock_driver.refusals()))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    refused = json.loads(run.stdout)
    assert set(refused) == {"objective", "sampler_correction", "kl"}
    for option, message in refused.items():
        assert f"{option}: no kernel knows brand-new" in message, message


@pytest.mark.parametrize("cap", [0.2, 0.99])
def test_a_cap_below_1_on_the_ratio_of_cispo_is_an_error_that_says_what_it_is(cap: float) -> None:
    with pytest.raises(ValueError, match=rf'^clip_high: got {cap} for objective="cispo", expected a number >= 1.*5\.0'):
        LossConfig(objective="cispo", clip_high=cap)
    assert LossConfig(objective="cispo", clip_high=1).clip_high == 1
    assert LossConfig(clip_high=cap).clip_high == cap


def test_the_default_clip_is_no_cap_for_cispo() -> None:
    with pytest.raises(ValueError, match=r"clip_high: got 0\.2"):
        LossConfig(objective="cispo")
