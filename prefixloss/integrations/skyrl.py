"""SkyRL 0.3: policy losses and advantage estimators through its registries, and log-probs under its fused LM head.

In the script that starts a run, before Ray does (SkyRL sends what is registered to its workers, which need prefixloss
installed):

    from prefixloss.integrations import skyrl
    skyrl.register()

    trainer.algorithm.advantage_estimator=vppo trainer.algorithm.policy_loss_type=prefix_clip

That command line needs Ray and GPUs and was not run here. `patch_head` replaces the fused head of the Megatron back-end
(`fused_lm_head_logprob`); it has to run in every worker, as Ray's `worker_process_setup_hook` for one. A trajectory's
reward has to be a signed score (`token_loss.signed_score`): 1 for a correct response, -(first_error + 1) for a wrong
one, 0 where no error was found, NaN (not None, which ends SkyRL's run) where the verifier gave no verdict.
`token_loss.first_error_of` finds a first error, and with its `threshold` leaves out what is not sure. SkyRL's
estimators are not told which tokens tools wrote, so first_error counts those as well, and so do all lengths. And
`use_kl_in_reward` has to stay off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from prefixloss.config import LossConfig
from prefixloss.integrations import installed
from prefixloss.integrations.token_loss import (
    ESTIMATORS,
    clip_high,
    gradient_shared,
    logged,
    put,
    shared_by_many,
    token_advantages,
)
from prefixloss.integrations.token_loss import policy_loss as loss_of
from prefixloss.loss import linear_logps
from prefixloss.maths import objectives


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    objective: str = "clip",
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss in SkyRL's signature, registered as prefix_clip, prefix_cispo, ...; tensors [B, T].

    config: its AlgorithmConfig. eps_clip_low and eps_clip_high are those of "clip"; 1 + cispo.cispo_eps_clip_high is
    the cap on the ratio of "cispo" (which has no lower one); sapo.tau_pos and tau_neg are those of "sapo", clip_cov and
    kl_cov those of "clip-cov" and "kl-cov". SkyRL has put the reduction into the advantages, so this is a sum over the
    mask; entropy and KL terms are added by SkyRL, its off-policy correction is made by its own function.
    """
    cispo, sapo = getattr(config, "cispo", None), getattr(config, "sapo", None)
    high = cispo.cispo_eps_clip_high if objective == "cispo" and cispo else config.eps_clip_high
    options = LossConfig(
        objective=objective,
        clip_low=float(config.eps_clip_low),
        clip_high=clip_high(objective, high),
        sapo_tau=(float(sapo.tau_pos), float(sapo.tau_neg)) if sapo else (1.0, 1.05),
        reduction="none",
        **_by_covariance(objective, config),
    )
    mask = None if loss_mask is None else loss_mask != 0
    out = loss_of(log_probs, old_log_probs, advantages, mask, options)
    seen = logged(out.metrics)
    losses, correction = out.loss, getattr(config, "off_policy_correction", None)
    if correction is not None:
        from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (  # noqa: PLC0415
            apply_off_policy_correction,
        )

        losses, loss_mask, extra = apply_off_policy_correction(
            losses, old_log_probs, rollout_logprobs, loss_mask, correction
        )
        seen |= extra
    return (losses if loss_mask is None else losses * loss_mask).sum(), seen


def _by_covariance(objective: str, config: Any) -> dict[str, Any]:
    """SkyRL's own settings of Clip-Cov and KL-Cov, in our terms."""
    given = getattr(config, objective.replace("-", "_"), None)
    if given is None or objective not in ("clip-cov", "kl-cov"):
        return {}
    if objective == "kl-cov":
        return {"cov_share": float(given.kl_cov_frac), "cov_kl_coef": float(given.ppo_kl_coef)}
    bounds = (float(given.clip_cov_lb), float(given.clip_cov_ub))
    return {"cov_share": float(given.clip_ratio), "cov_bounds": bounds}


def advantage_estimator(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    *,
    estimator: str = "vppo",
    options: dict[str, Any] | None = None,
    grpo_norm_by_std: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """An advantage estimator in SkyRL's signature: (advantages, returns), [B, T] both.

    token_level_rewards: [B, T], a response's sum is its signed score. index: [B], equal for answers to one prompt.
    grpo_norm_by_std is for neutral_prefix; vppo has an option `std` of its own, off unless set, and cliff has none.
    `generator.step_wise_trajectories` is not for this: SkyRL gives every step the credit of the last one's positions.
    """
    options = dict(options or {})
    if estimator == "neutral_prefix" and options.get("of", "grpo") == "grpo":
        options.setdefault("std", grpo_norm_by_std)
    spread = token_advantages(token_level_rewards.sum(-1), response_mask.bool().sum(-1), index, estimator, **options)
    of_token = spread.per_token(response_mask, response_mask)
    return of_token, of_token.clone()


def fused_logps(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    chunk_size: int,
    tp_group: Any,
    inference_only: bool,
) -> Tensor:
    """Log-probs [B, S] in the signature of SkyRL's `_fused_lm_head_logprob_apply`.

    hidden: [B, S, D]; weight: [V / ranks, D], already divided by the temperature; target: [B, S]. The gradients of
    hidden add up over the ranks, as SkyRL's do.
    """
    group = shared_by_many(tp_group)
    return linear_logps(gradient_shared(hidden, group), weight, target, tp_group=group).logps


def patch_head() -> Callable[[], None]:
    """Puts `fused_logps` under SkyRL's fused LM head, in this process. Returns what undoes it.

    ImportError: SkyRL is missing or older than 0.3, or its function takes other arguments.
    """
    installed.check_version("skyrl", "0.3")
    from skyrl.backends.skyrl_train.distributed.megatron import model_utils  # noqa: PLC0415

    theirs = model_utils._fused_lm_head_logprob_apply
    installed.check_takes("skyrl._fused_lm_head_logprob_apply", theirs, list(inspect.signature(fused_logps).parameters))
    return put((model_utils, "_fused_lm_head_logprob_apply", fused_logps))


def register(**options: Any) -> None:
    """Adds the losses and the estimators of `token_loss.ESTIMATORS`, once; options: of the estimators.

    ImportError: SkyRL is missing or older than 0.3.
    """
    installed.check_version("skyrl", "0.3")
    from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: PLC0415
        AdvantageEstimatorRegistry,
        PolicyLossRegistry,
    )

    losses = {f"prefix_{name}": partial(policy_loss, objective=name) for name in objectives.BY_NAME}
    estimators = {name: partial(advantage_estimator, estimator=name, options=options) for name in ESTIMATORS}
    for registry, ours in ((PolicyLossRegistry, losses), (AdvantageEstimatorRegistry, estimators)):
        for name in ours.keys() - set(registry.list_available()):
            registry.register(name, ours[name])
