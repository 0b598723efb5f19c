"""verl 0.9: policy losses, advantage estimators, a reward manager and the fused head, through its own registries.

Loaded by verl itself in every process through the entry point group "verl.plugins"; a user then writes

    python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=vppo +algorithm.vppo.alpha=0.5 \\
        actor_rollout_ref.actor.policy_loss.loss_mode=prefix_clip \\
        reward.reward_manager.name=prefixloss +reward.prefixloss.detector=maths +reward.prefixloss.steps=markers \\
        actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \\
        ...

with PREFIXLOSS_VERL_HEAD=1 in the environment of the workers to have our head under `use_fused_kernels`. The same
settings are in `verl_vppo.yaml` beside this file. The command needs Ray and GPUs and was not run here.

verl hands an estimator one reward a response. The reward manager puts the first error into it: 1 for a correct
response, -(first_error + 1) for a wrong one, 0 where no error was found, NaN where the reward function gave no verdict
(None or NaN; `token_loss.signed_score`); a reward function of your own may return the same. A find with less confidence
than `+reward.prefixloss.threshold` counts as none; docs/detectors.md says which to choose. With
`+reward.prefixloss.flawed=True` and `+algorithm.vppo.flawed=0.25` right answers are searched too, and one with a first
error is first_error + 2; `first_error` and `correct` among verl's own figures say how many there are. first_error
counts all of the response's tokens here, those that tools wrote as well: verl's reward loop does not say which those
are, and the estimator finds out. So `algorithm.use_kl_in_reward` has to stay off.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixloss import check
from prefixloss.advantages import turn_level
from prefixloss.config import LossConfig
from prefixloss.inputs.turns import Numbered
from prefixloss.integrations import installed
from prefixloss.integrations.token_loss import (
    ESTIMATORS as NAMES,
)
from prefixloss.integrations.token_loss import (
    clip_high,
    first_error_of,
    gradient_shared,
    logged,
    put,
    shared_by_many,
    signed_score,
    token_advantages,
)
from prefixloss.integrations.token_loss import policy_loss as loss_of
from prefixloss.loss import linear_logps
from prefixloss.maths import objectives


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    objective: str = "clip",
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss in verl's signature, registered as prefix_clip, prefix_cispo, ...; tensors [B, T].

    config: verl's ActorConfig. clip_ratio_low, clip_ratio_high and clip_ratio_c (dual clip) are those of "clip", and
    1 + clip_ratio_high is the cap on the ratio of "cispo" (which has no lower one); tau_pos and tau_neg those of
    "sapo", policy_loss.clip_cov_*, kl_cov_ratio and ppo_kl_coef those of "clip-cov" and "kl-cov". Entropy and KL terms
    are added by verl.
    """
    shape = log_prob.shape
    reduction, normalizer = _reduction(loss_agg_mode, response_mask, config.global_batch_info)
    if rollout_is_weights is not None:
        # every objective is linear in its advantage; those that choose tokens by it see it weighed
        advantages = advantages * rollout_is_weights
    out = loss_of(
        log_prob,
        old_log_prob,
        advantages.expand(shape),
        response_mask,
        _loss_config(objective, config, reduction),
        normalizer=normalizer,
    )
    seen = logged(out.metrics)
    return out.loss, {"actor/pg_clipfrac": seen.pop("clip_ratio")} | {f"actor/{k}": v for k, v in seen.items()}


def _loss_config(objective: str, config: Any, reduction: Any) -> LossConfig:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return LossConfig(
        objective=objective,
        clip_low=float(low),
        clip_high=clip_high(objective, high),
        dual_clip=float(config.get("clip_ratio_c", 3.0)) if objective == "clip" else None,
        sapo_tau=(float(config.get("tau_pos", 1.0)), float(config.get("tau_neg", 1.05))),
        reduction=reduction,
        **_by_covariance(objective, config.get("policy_loss", None)),
    )


def _by_covariance(objective: str, given: Any) -> dict[str, Any]:
    """verl's own settings of Clip-Cov and KL-Cov, in our terms."""
    if given is None or objective not in ("clip-cov", "kl-cov"):
        return {}
    if objective == "kl-cov":
        return {"cov_share": float(given.kl_cov_ratio), "cov_kl_coef": float(given.ppo_kl_coef)}
    bounds = (float(given.clip_cov_lb), float(given.clip_cov_ub))
    return {"cov_share": float(given.clip_cov_ratio), "cov_bounds": bounds}


def _reduction(mode: str, mask: Tensor, info: Any) -> tuple[str, float | Tensor]:
    """verl's aggregation as our reduction and normalizer. verl averages over ranks, so theirs is a rank's share."""
    ranks = info.get("dp_size") or 1
    tokens, responses = info.get("batch_num_tokens"), info.get("global_batch_size")
    if ranks > 1 and (tokens if mode == "token-mean" else responses if mode.startswith("seq-mean") else 1) is None:
        raise ValueError(f"global_batch_info: got no count of the whole batch, expected one for {mode!r} on many ranks")
    if responses is None:
        responses = mask.bool().any(1).sum().clamp(min=1)  # an empty response is none
    if mode == "token-mean":
        return mode, (mask.sum().clamp(min=1) if tokens is None else tokens) / ranks
    if mode == "token-sum":
        return "token-mean", 1 / ranks
    if mode in ("seq-mean-token-mean", "seq-mean-token-sum"):
        return mode, responses / ranks
    if mode == "seq-mean-token-sum-norm":
        return "constant", responses / ranks * (info.get("loss_scale_factor") or mask.shape[-1])
    raise ValueError(f"loss_agg_mode: got {mode!r}, expected one of verl's")


def advantage_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, *, index: Any, estimator: str, **_: Any
) -> tuple[Tensor, Tensor]:
    """An advantage estimator in verl's signature: (advantages, returns), [B, T] both, the same tensor.

    token_level_rewards: [B, T], a response's sum is its signed score, at whatever token verl put it: the last one that
    was attended to may be a tool's. index: [B], equal for answers to one prompt. config: verl's AlgoConfig;
    `algorithm.<estimator>` holds the options of `prefixloss.advantages`. A prompt's length does not reach an estimator:
    `shorten` is a number here, 0 unless set. `norm_adv_by_std_in_grpo` is for neutral_prefix; vppo has an option `std`
    of its own, off unless set, and cliff has none.
    """
    options = dict((config.get(estimator) if config is not None else None) or {})
    if estimator == "neutral_prefix" and options.get("of", "grpo") == "grpo" and config is not None:
        options.setdefault("std", config.get("norm_adv_by_std_in_grpo", True))
    scores = _in_scored_tokens(token_level_rewards, response_mask.bool(), options.get("flawed") is not None)
    spread = token_advantages(scores, response_mask.bool().sum(-1), index, estimator, **options)
    of_token = spread.per_token(response_mask, response_mask)
    return of_token, of_token


def turn_level_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, *, index: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """`prefixloss.advantages.turn_level` in verl's signature, registered as turn_level: (advantages, returns), [B, T].

    token_level_rewards: [B, T]. What stands at a turn's tokens, or at those that a tool wrote behind it, is that turn's
    reward; at the last turn it is the outcome. response_mask: verl's, 0 for what tools wrote. config: verl's
    AlgoConfig; `algorithm.turn_level` holds the options, and `std` is `norm_adv_by_std_in_grpo` unless set.
    """
    options = dict((config.get("turn_level") if config is not None else None) or {})
    if config is not None:
        options.setdefault("std", config.get("norm_adv_by_std_in_grpo", True))
    by_turn = Numbered.of(response_mask, None)
    counts, number = by_turn.counts, by_turn.number.reshape(response_mask.shape)
    place = number.cummax(1).values.clamp(min=0)  # a tool's tokens are of the turn before
    earned = token_level_rewards.new_zeros(len(counts), int(counts.max().clamp(min=1)))
    earned = earned.scatter_add(1, place, token_level_rewards)
    outcome = earned.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    groups = torch.as_tensor(np.unique(np.asarray(index), return_inverse=True)[1], device=outcome.device)
    of_token = turn_level(outcome, earned, groups.long(), response_mask, **options)
    return of_token, of_token


def _in_scored_tokens(rewards: Tensor, scored: Tensor, flawed: bool) -> Tensor:
    """The signed scores [B] in rewards [B, T], their first errors counted in scored tokens alone. flawed: those of
    right responses too."""
    scores = rewards.sum(-1)
    right = (scores > 1) & (scores == scores.round()) & scores.isfinite() & flawed
    column = torch.where(right, scores - 2, -scores - 1)
    end = (rewards != 0).int().cumsum(1).argmax(1)  # where the score was put: the response's last token
    beyond = ((scores < 0) | right) & (column > end)
    if beyond.any():
        at = int(beyond.nonzero()[0])
        got = f"{scores[at]:g} for response {at}, whose score is at token {int(end[at])}"
        form = "first_error + 2" if right[at] else "-(first_error + 1)"
        check.fail("token_level_rewards", got, f"{form}, first_error counting from 0 the response's tokens")
    before = scored & (torch.arange(rewards.shape[1], device=rewards.device) < column[:, None])
    # an error that begins behind the last scored token leaves that one in doubt
    kept = torch.minimum(before.sum(1), (scored.sum(1) - 1).clamp(min=0))
    return torch.where(scores < 0, -(kept + 1.0), torch.where(right, kept + 2.0, scores))


def fused_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in the signature of verl's `linear_cross_entropy`, shaped like `labels`.

    hidden: [.., D] over the tokens of `labels`; weight: [V, D], or this rank's rows of it with `dist_process_group`.
    The gradients of hidden then add up over the ranks, as verl's do. A weight that FSDP2 has sharded is gathered.
    """
    if reduction != "none":
        raise ValueError(f"reduction: got {reduction!r}, expected 'none': verl reduces per token")
    group = shared_by_many(dist_process_group)
    if [n for n in hidden.shape[:-1] if n > 1] == [n for n in labels.shape if n > 1]:
        hidden = hidden.reshape(*labels.shape, hidden.shape[-1])  # Megatron has [T, 1, D] for labels [1, T]
    hidden = gradient_shared(hidden, group)
    weight = weight if group is not None else _averaged(weight)
    out = linear_logps(hidden, weight, labels, temperature=float(temperature), entropy=True, tp_group=group)
    assert out.entropy is not None
    return out.logps, out.entropy


def _averaged(weight: Any) -> Tensor:
    """A DTensor whole, whose gradient is the ranks' mean, as FSDP2's is of all other weights."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial  # noqa: PLC0415 (slow to import, seldom needed)

    ranks = weight.device_mesh.size()
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / ranks)
    return whole


def patch_head() -> Callable[[], None]:
    """Puts `fused_logps` under verl's `use_fused_kernels`, for impl_backend "torch", "liger" and "triton" alike.

    Returns what undoes it. ImportError: verl is missing or older than 0.9, or its head takes other arguments.
    """
    installed.check_version("verl", "0.9")
    from verl.utils.experimental import torch_functional  # noqa: PLC0415
    from verl.utils.kernel import linear_cross_entropy as kernel  # noqa: PLC0415

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return fused_logps(hidden_states, vocab_weights, input_ids, temperature)

    head = torch_functional.FusedLinearForPPO.forward
    installed.check_takes("verl.FusedLinearForPPO.forward", head, list(inspect.signature(forward).parameters))
    theirs = kernel.linear_cross_entropy
    # the Megatron models bind the name when they are imported
    models = [m for name, m in list(sys.modules.items()) if name.startswith("verl.models.mcore.")]
    bound = [m for m in models if getattr(m, "linear_cross_entropy", None) is theirs]
    return put(
        (torch_functional.FusedLinearForPPO, "forward", forward),
        *((module, "linear_cross_entropy", fused_logps) for module in (kernel, *bound)),
    )


def register() -> None:
    """Adds everything here to verl's registries; more than once does no harm. ImportError: verl is older than 0.9."""
    installed.check_version("verl", "0.9")
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss  # noqa: PLC0415

    for objective, loss in POLICY_LOSSES.items():
        register_policy_loss(f"prefix_{objective}")(loss)
    for estimator, compute in {**ESTIMATORS, "turn_level": turn_level_estimator}.items():
        register_adv_est(estimator)(compute)
    _register_reward_manager()
    if os.environ.get("PREFIXLOSS_VERL_HEAD") == "1":
        patch_head()


def _register_reward_manager() -> None:
    from verl.experimental.reward_loop.reward_manager import register as register_manager  # noqa: PLC0415
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager  # noqa: PLC0415
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER  # noqa: PLC0415

    if "prefixloss" in REWARD_MANAGER:
        return

    @register_manager("prefixloss")
    class PrefixRewardManager(NaiveRewardManager):  # type: ignore[misc]
        """verl's own reward, turned into a signed score: above 0 is correct, else a detector finds the first error."""

        async def run_single(self, data: Any) -> dict[str, Any]:
            result = await super().run_single(data)
            item = data[-1:][0]
            correct = _verdict(result["reward_score"])
            options = dict(self.config.reward.get("prefixloss") or {})
            find = partial(_searched, correct, self.tokenizer, item, options)
            first_error = await self.loop.run_in_executor(None, find)
            # verl averages what is here: None would end the run
            extra = {name: math.nan if x is None else x for name, x in result["reward_extra_info"].items()}
            extra |= {"correct": math.nan if correct is None else float(correct), "first_error": first_error}
            return {"reward_score": signed_score(correct, first_error), "reward_extra_info": extra}


def _verdict(reward: Any) -> bool | None:
    """Whether a reward says that a response is right; None where a reward function gave no verdict."""
    return None if reward is None or math.isnan(reward) else bool(reward > 0)


def _searched(correct: bool | None, tokenizer: Any, item: Any, options: dict[str, Any]) -> int:
    """The first error of a response that is searched, else -1.

    options: those of `first_error_of`, and `flawed`, whether right responses are searched too.
    """
    rest = {name: value for name, value in options.items() if name != "flawed"}
    searched = correct is False or (correct is True and options.get("flawed", False))
    return _first_error(tokenizer, item, **rest) if searched else -1


def _first_error(tokenizer: Any, item: Any, **options: Any) -> int:
    """Among all tokens of a response. item: a DataProtoItem of verl."""
    ids, others = item.batch["responses"], item.non_tensor_batch
    # of several outputs padded together, the mask's last columns are not the response's
    valid = int(others.get("response_len", item.batch["attention_mask"][-len(ids) :].sum()))
    problem = next((m["content"] for m in reversed(others["raw_prompt"]) if m["role"] == "user"), "")
    return first_error_of(
        tokenizer, ids[:valid].tolist(), problem, str(others["reward_model"]["ground_truth"]), **options
    )


POLICY_LOSSES = {name: partial(policy_loss, objective=name) for name in objectives.BY_NAME}
ESTIMATORS = {name: partial(advantage_estimator, estimator=name) for name in NAMES}

# verl only loads an entry point: whoever imports this with verl at hand wants it registered
if find_spec("verl") is not None:
    register()
