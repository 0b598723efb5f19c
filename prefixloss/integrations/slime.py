"""slime: reward post-processing, advantages and a loss, by its own command-line hooks.

    --custom-reward-post-process-path prefixloss.integrations.slime.reward_post_process
    --custom-advantage-function-path prefixloss.integrations.slime.advantages
    --loss-type custom_loss --custom-loss-function-path prefixloss.integrations.slime.policy_loss
    --custom-config-path prefixloss.yaml

with settings, all optional, in prefixloss.yaml:

    prefixloss_estimator: vppo          # cliff, neutral_prefix
    prefixloss_estimator_options: {alpha: 0.5}
    prefixloss_loss: {objective: clip}  # fields of LossConfig, over what --eps-clip and the like say

slime needs Megatron, SGLang and GPUs: no command was run here. PyPI does not have it, so these functions follow the
signatures in its repository (2026). A sample's reward has to be a signed score (`token_loss.signed_score`): 1 for a
correct response, -(first_error + 1) for a wrong one, 0 where no error was found, NaN or None where the verifier gave no
verdict. `token_loss.first_error_of` finds a response's first error, and with its `threshold` leaves out what the
detector is not sure of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.config import LossConfig
from prefixloss.inputs.token_advantages import TokenAdvantages
from prefixloss.integrations.token_loss import clip_high, outcomes, token_advantages
from prefixloss.integrations.token_loss import policy_loss as loss_of
from prefixloss.maths.objective import clipped


def reward_post_process(args: Any, samples: list[Any]) -> tuple[list[float], list[list[float]]]:
    """(raw_rewards, rewards) of slime's Samples, while a group's are still in one process.

    A raw reward is 1 or 0, for logs, NaN without a verdict. A reward is [prefix, suffix, prefix_length] of
    `TokenAdvantages`, which `advantages` spreads over the tokens on the ranks that train.
    """
    given = [s.get_reward_value(args) for s in samples]
    scores = torch.tensor([math.nan if x is None else float(x) for x in given])
    lengths = torch.tensor([s.response_length if s.loss_mask is None else sum(s.loss_mask) for s in samples])
    estimator = getattr(args, "prefixloss_estimator", "vppo")
    options = getattr(args, "prefixloss_estimator_options", None) or {}
    spread = token_advantages(scores, lengths, [s.group_index for s in samples], estimator, **options)
    # slime takes all tokens of these out of the loss, once this has returned
    removed = torch.tensor([bool(getattr(s, "remove_sample", False)) for s in samples])
    spread = spread._replace(prefix_lengths=spread.prefix_lengths.masked_fill(removed, 0))
    judged = ~scores.isnan()
    raw = torch.where(judged, outcomes(torch.where(judged, scores, 0))[0].float(), scores)
    return raw.tolist(), torch.stack([x.double() for x in spread], 1).tolist()


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Sets "advantages" and "returns", lists of [tokens here], from what `reward_post_process` made.

    Advantages as slime holds them: with context parallelism a rank has its part of each response.
    """
    of_token: list[Tensor] = []
    rewards = [[float(x) for x in reward] for reward in rollout_data["rewards"]]
    for i, (reward, mask) in enumerate(zip(rewards, rollout_data["loss_masks"], strict=True)):
        here = rollout_data["kl"][i]
        prefix, suffix, length = (torch.tensor([x], device=here.device) for x in reward)
        scored = mask.to(here.device)[None]
        whole = TokenAdvantages(prefix, suffix, length.long()).per_token(scored, scored)[0]
        if len(here) != len(whole):
            from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp  # noqa: PLC0415

            lengths = rollout_data["total_lengths"][i], rollout_data["response_lengths"][i]
            whole = slice_log_prob_with_cp(whole, *lengths)
        of_token.append(whole)
    rollout_data["advantages"] = of_token
    rollout_data["returns"] = [x.clone() for x in of_token]
    rollout_data["rewards"] = [suffix for _, suffix, _ in rewards]  # numbers again, for slime's logs


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss in slime's signature, on the log-probs that slime makes of `logits`, [1, T, vocabulary here].

    The objective, KL, entropy and sampler correction follow slime's arguments; the reduction is `sum_of_sample_mean`.
    """
    from slime.backends.megatron_utils.loss import (  # noqa: PLC0415
        get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs,
    )

    made = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )[1]
    loss, seen = loss_of_log_probs(args, batch, made["log_probs"], made["entropy"], sum_of_sample_mean)
    # every rank's backward has to reach the model, also one without response tokens
    return loss + 0 * logits.sum() if not sum(map(len, made["log_probs"])) else loss, seen


def loss_of_log_probs(
    args: Any,
    batch: dict[str, Any],
    log_probs: list[Tensor],
    entropy: list[Tensor],
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and slime's metrics, 0-d; log_probs, entropy: a tensor a response, of its tokens here."""
    config = loss_config(args)
    new = torch.cat(log_probs)

    def joined(name: str) -> Tensor:
        return torch.cat(list(batch[name])).to(new.device)

    recorded = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    old = joined(recorded) if batch.get(recorded) else new.detach()
    masks, credit, entropies = joined("loss_masks"), joined("advantages"), torch.cat(entropy)
    whole = len(masks) == len(new)  # with context parallelism only sum_of_sample_mean knows which part is here
    if config.sequence_ratio and not whole:
        raise ValueError("ratio_level: got 'sequence' with context parallelism, expected 'token'")
    out = loss_of(
        new,
        old,
        credit,
        masks if whole else None,
        config,
        entropy=entropies,
        sampler_logps=joined("rollout_log_probs") if config.sampler_correction else None,
        ref_logps=joined("ref_log_probs") if config.kl is not None else None,
        cu_seqlens=torch.tensor([0, *map(len, log_probs)], device=new.device).cumsum(0),
    )
    loss = sum_of_sample_mean(out.loss)
    log_ratio = (new - old).detach()
    low, high = clipped(config, credit, log_ratio.exp())
    seen = {"entropy_loss": entropies, "ppo_kl": -log_ratio, "pg_clipfrac": low | high, "learning_share": credit != 0}
    return loss, {"loss": loss.detach()} | {k: sum_of_sample_mean(v.detach().to(new.dtype)) for k, v in seen.items()}


def loss_config(args: Any) -> LossConfig:
    """What slime's arguments say, with `prefixloss_loss` over them."""
    for name in ("use_opsm", "use_score_centering", "custom_tis_function_path", "custom_pg_loss_reducer_function_path"):
        if getattr(args, name, None):
            raise ValueError(f"{name}: got {getattr(args, name)!r}, expected it unset: this loss does not have it")
    kinds = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
    ours = getattr(args, "prefixloss_loss", None) or {}
    objective = ours.get("objective", "cispo" if args.advantage_estimator == "cispo" else "clip")
    options: dict[str, Any] = {
        "objective": objective,
        "clip_low": args.eps_clip,
        "clip_high": clip_high(objective, args.eps_clip_high),
        "dual_clip": args.eps_clip_c,
        "ratio_level": "sequence" if args.advantage_estimator == "gspo" else "token",
        "entropy_coef": args.entropy_coef,
    }
    if args.use_kl_loss:
        if args.kl_loss_type not in kinds:
            check.fail("kl_loss_type", repr(args.kl_loss_type), " | ".join(map(repr, kinds)))
        options |= {"kl": kinds[args.kl_loss_type], "kl_coef": float(args.kl_loss_coef)}
        options["kl_importance"] = bool(args.use_unbiased_kl)
    if args.use_tis:
        if args.tis_clip_low > 0:
            raise ValueError(f"tis_clip_low: got {args.tis_clip_low:g}, expected 0")
        options |= {"sampler_correction": "tis", "sampler_bounds": (float(args.tis_clip_low), float(args.tis_clip))}
    return LossConfig(**{**options, **ours, "reduction": "none"})
