"""The names of the options stand in one place, and a name that a piece of code does not know is an error there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from cases import CORRECTIONS, KLS, OBJECTIVES, RATIO_LEVELS, REDUCTIONS, STATS, of_objective
from torch import Tensor
from triton.runtime.errors import TritonError

from prefixloss import LossConfig, linear_prefix_loss, parallel, prefix_loss
from prefixloss import config as config_module
from prefixloss.backends import reference
from prefixloss.config import KL, Objective
from prefixloss.inputs.layout import Layout
from prefixloss.inputs.reduction import token_weights
from prefixloss.integrations import skyrl, token_loss
from prefixloss.maths import objective

NAMES: dict[str, tuple[str, ...]] = {
    "objective": OBJECTIVES,
    "ratio_level": RATIO_LEVELS,
    "sampler_correction": CORRECTIONS,
    "kl": KLS,
    "reduction": REDUCTIONS,
    "stats": STATS,
}
NEW = "brand-new"


@pytest.fixture
def new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more name in every option's check, as if somebody had added it there and nowhere else."""
    for option, (accepts, wants) in config_module._RULES.items():
        if option in NAMES:
            rule = (lambda v, accepts=accepts: v == NEW or accepts(v), wants)
            monkeypatch.setitem(config_module._RULES, option, rule)


@pytest.mark.parametrize("option", NAMES)
def test_an_option_takes_the_names_of_its_literal_and_no_other(option: str) -> None:
    hinted = [name for part in get_args(get_type_hints(LossConfig)[option]) for name in get_args(part) or [part]]
    assert tuple(name for name in hinted if name is not type(None)) == NAMES[option]
    for name in NAMES[option]:
        options = of_objective(name) if option == "objective" else {option: name}
        made = LossConfig(**options)
        assert LossConfig.decoded(made.encoded) == made
    with pytest.raises(ValueError, match=rf"^{option}: got '{NEW}', expected .*'{NAMES[option][-1]}'"):
        LossConfig(**{option: NEW})


def loss_with(start: str, backend: str, **options: Any) -> Tensor:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, generator=gen, requires_grad=True)
    tokens, values = torch.randint(7, (2, 3), generator=gen), torch.randn(2, 3, generator=gen)
    given = {"old_logps": values, "sampler_logps": values, "ref_logps": values, "backend": backend}
    if start == "logits":
        return prefix_loss(x, tokens, values, config=LossConfig(**options), **given).loss
    return linear_prefix_loss(x, torch.eye(7), tokens, values, config=LossConfig(**options), **given).loss


# one pass, two stages, and where the results are of every scored token
@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"row_tolerance": 0.1}, {"stats": "scored"}], ids=str)
@pytest.mark.parametrize("option", NAMES)
@pytest.mark.parametrize("start", ["logits", "hidden"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_name_that_only_the_config_knows_is_an_error_in_every_back_end(
    backend: str, start: str, option: str, more: dict[str, Any], new_names: None
) -> None:
    assert loss_with(start, backend, **more).isfinite().all()
    # the kernels' own error comes from where they are compiled or, here, interpreted
    with pytest.raises((ValueError, TritonError), match=rf"{option}.*{NEW}"):
        loss_with(start, backend, **{**more, option: NEW})


def normalizer_of(config: LossConfig) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        return parallel.global_normalizer(config, torch.zeros(2, 1).long())


X = torch.tensor([0.5, -0.5])
KNOWN = objective.Given(X, X, X, X)
CHOICES: dict[str, tuple[str, Callable[[LossConfig], Any]]] = {
    "objective._policy": ("objective", lambda c: objective._policy(c, X, X, X)),
    "objective.clipped": ("objective", lambda c: objective.clipped(c, X, X)),
    "objective._sampler_weight": ("sampler_correction", lambda c: objective._sampler_weight(c, KNOWN, X)),
    "objective._kl": ("kl", lambda c: objective._kl(c, KNOWN, X, X)),
    "reference.policy_loss": ("objective", lambda c: reference.policy_loss(c, X, X, X)),
    "reference.sampler_weight": ("sampler_correction", lambda c: reference.sampler_weight(c, X)),
    "reference.kl_estimate": ("kl", lambda c: reference.kl_estimate(c, X)),
    "reference.reduce": ("reduction", lambda c: reference.reduce(c, None, X, X)),  # type: ignore[arg-type]
    "reduction.token_weights": ("reduction", lambda c: token_weights(c, layout(), None, None, X.dtype)),
    "reduction.token_weights, given": ("reduction", lambda c: token_weights(c, layout(), None, 3.0, X.dtype)),
    "parallel.global_normalizer": ("reduction", normalizer_of),
    "config.sequence_ratio": ("ratio_level", lambda c: c.sequence_ratio),
    "config.shows_every_scored": ("stats", lambda c: c.shows_every_scored),
    "token_loss.policy_loss": ("objective", lambda c: token_loss.policy_loss(X, X, X, None, c)),
}


def layout() -> Layout:
    return Layout.of(torch.Size([2, 1]), X.device, None, None)


@pytest.mark.parametrize("where", CHOICES)
def test_every_choice_by_name_ends_in_an_error(where: str, new_names: None) -> None:
    option, choose = CHOICES[where]
    with pytest.raises(ValueError, match=rf"^{option}: got '{NEW}'"):
        choose(LossConfig(**{option: NEW}))


def test_a_trainer_s_registry_offers_no_loss_that_would_be_another_one_s(new_names: None) -> None:
    settings = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.2)
    x = torch.zeros(1, 2)
    for name in get_args(Objective):
        assert skyrl.policy_loss(x, x, x + 1, settings, objective=name)[0].isfinite()
    with pytest.raises(ValueError, match=rf"objective: got '{NEW}'"):
        skyrl.policy_loss(x, x, x + 1, settings, objective=NEW)  # type: ignore[arg-type]


def test_an_unknown_estimator_needs_its_reference_like_the_others(new_names: None) -> None:
    assert "full" in get_args(KL)
    with pytest.raises(ValueError, match="ref_logps"):
        prefix_loss(X.expand(1, 2, 2), torch.zeros(1, 2).long(), X[None], config=LossConfig(kl=NEW))  # type: ignore[arg-type]


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
