"""OpenRLHF 0.11: its policy loss, its advantages and its actor's log-probs, replaced in place; it has no registries.

`patch()` has to run in every process before the trainer does. Ray can call it wherever it starts one:

    ray job submit --runtime-env-json='{"worker_process_setup_hook": "prefixloss.integrations.openrlhf.patch"}' \\
        -- python3 -m openrlhf.cli.train_ppo_ray ...

OpenRLHF's own command line stays as it is, but for its KL penalty in the reward, which is on unless told otherwise: say
`--algo.kl.init_coef 0`, or `--algo.kl.use_loss`. That command needs Ray and GPUs and was not run here. The reward has
to be a signed score (`token_loss.signed_score`): 1 for a correct response, -(first_error + 1) for a wrong one, 0 where
no error was found, NaN where the verifier gave no verdict. `token_loss.first_error_of` finds a first error, and with
its `threshold` leaves out what is not sure. Anything added to the score, and OpenRLHF's own penalties, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefixloss import check
from prefixloss.config import LossConfig, RatioLevel
from prefixloss.integrations import installed
from prefixloss.integrations.token_loss import clip_high, head_of_logps, logged, put, token_advantages
from prefixloss.integrations.token_loss import policy_loss as loss_of

# OpenRLHF's names and ours
_RATIO_LEVELS: dict[str, RatioLevel] = {"ppo": "token", "gspo": "sequence"}
_CORRECTIONS: dict[str, str] = {"mask": "icepop", "clip": "tis"}


class PolicyLoss(nn.Module):
    """`openrlhf.models.PolicyLoss` with another objective, and only learning tokens counted in the clip ratio.

    The arguments are OpenRLHF's; objective is ours, and 1 + clip_eps_high is the cap on the ratio of "cispo". Of its
    corrections of a mismatch between trainer and sampler, those of single tokens by their ratio are here: "mask"
    (IcePop) and "clip" (TIS, without a lower bound).
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
        *,
        objective: str = "clip",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("policy_loss_type", policy_loss_type, _RATIO_LEVELS),
            ("is_correction_mode", is_correction_mode, _CORRECTIONS),
        ):
            if value not in known:
                check.fail(name, repr(value), " | ".join(map(repr, known)))
        sequence = policy_loss_type == "gspo"
        corrected = is_correction_level != "off"
        chosen = (policy_loss_type, is_correction_level, is_correction_gating)
        if corrected and chosen != ("ppo", "token", "ratio"):
            raise ValueError(
                "policy_loss_type, is_correction_level, is_correction_gating: "
                f"got {chosen}, expected ('ppo', 'token', 'ratio')"
            )
        low, high = map(float, is_correction_threshold)
        if corrected and is_correction_mode == "clip" and low > 0:
            raise ValueError(f"is_correction_threshold: got {low:g} for the lower bound of 'clip', expected 0")
        self.config = LossConfig(
            objective=objective,
            clip_low=clip_eps_low,
            clip_high=clip_high(objective, clip_eps_high),
            dual_clip=dual_clip,
            ratio_level=_RATIO_LEVELS[policy_loss_type],
            sampler_correction=_CORRECTIONS[is_correction_mode] if corrected else None,
            sampler_bounds=(low, high),
            reduction="token-mean" if token_level_loss and not sequence else "seq-mean-token-mean",
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """loss, clip ratio, KL(old || policy), KL(old || sampler) and the share of dropped tokens; tensors [B, A]."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        whole: Any = batch_num_tokens if self.config.reduction == "token-mean" else global_batch_size
        if whole is None and self.config.reduction != "token-mean":
            whole = mask.any(1).sum().clamp(min=1)  # an empty response is none
        out = loss_of(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            self.config,
            sampler_logps=rollout_log_probs if self.config.sampler_correction else None,
            normalizer=None if whole is None else whole / dp_size,  # the gradients are averaged over ranks
        )
        clip_ratio = log_probs.new_tensor(logged(out.metrics)["clip_ratio"])
        ppo_kl = _mean(old_log_probs - log_probs.detach(), mask)
        if self.config.sampler_correction is None or rollout_log_probs is None:
            return out.loss, clip_ratio, ppo_kl, None, None
        low, high = self.config.sampler_bounds
        weight = torch.exp(old_log_probs - rollout_log_probs)
        filtered = _mean(((weight < low) | (weight > high)).float(), mask)
        return out.loss, clip_ratio, ppo_kl, _mean(rollout_log_probs - old_log_probs, mask), filtered


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def compute_advantages(
    experiences: list[Any], n_samples_per_prompt: int, estimator: str = "vppo", **options: Any
) -> list[Any]:
    """Sets `advantages` and `returns`, [b, A] each, of OpenRLHF's Experiences, whose rewards [b] are signed scores.

    An Experience's `index` [b] is the place of its responses in the order of the prompts, n_samples_per_prompt each.
    """
    scores = torch.cat([e.rewards for e in experiences])
    lengths = torch.cat([e.action_mask.bool().sum(-1) for e in experiences])
    index = torch.tensor([i for e in experiences for i in e.index], device=scores.device)
    spread = token_advantages(scores, lengths, (index // n_samples_per_prompt).cpu(), estimator, **options)
    done = 0
    for experience in experiences:
        mask = experience.action_mask
        rows = slice(done, done + len(mask))
        of_token = type(spread)(*(x[rows] for x in spread)).per_token(mask, mask)
        experience.advantages, experience.returns = of_token, of_token.clone()
        experience.info["return"] = experience.rewards
        experience.kl = None
        done += len(mask)
    return experiences


def patch(objective: str = "clip", estimator: str = "vppo", head: bool = True, **options: Any) -> Callable[[], None]:
    """Puts the loss, the advantages and, with `head`, the log-probs into OpenRLHF. Returns what undoes it.

    options: of the estimator. `--algo.advantage.no_std_norm` is for neutral_prefix; vppo has an option `std` of its
    own, off unless set, and cliff has none.

    ImportError: OpenRLHF is missing or older than 0.11, or its actor takes other arguments.
    """
    installed.check_version("openrlhf", "0.11")
    from openrlhf.models import actor  # noqa: PLC0415
    from openrlhf.trainer.ppo_utils import experience_maker  # noqa: PLC0415
    from openrlhf.trainer.ray import ppo_actor  # noqa: PLC0415

    def loss(*args: Any, **kwargs: Any) -> PolicyLoss:
        return PolicyLoss(*args, objective=objective, **kwargs)

    def compute(self: Any, experiences: list[Any]) -> list[Any]:
        args = self.strategy.args
        _refuse_penalties(args)
        chosen = {"std": not args.algo.advantage.no_std_norm} if estimator == "neutral_prefix" else {}
        return compute_advantages(experiences, args.rollout.n_samples_per_prompt, estimator, **(chosen | options))

    places = [
        (ppo_actor, "PolicyLoss", loss),
        (experience_maker.RemoteExperienceMaker, "compute_advantages_and_returns", torch.no_grad()(compute)),
    ]
    if head:
        takes = ["self", "sequences", "action_mask", "attention_mask", "return_output"]
        installed.check_takes("openrlhf.models.Actor.forward", actor.Actor.forward, takes)
        places.append((actor.Actor, "forward", actor_forward(actor.Actor.forward)))
    return put(*places)


def _refuse_penalties(args: Any) -> None:
    """ValueError for what OpenRLHF would add to a reward after it was given."""
    if args.algo.kl.init_coef > 0 and not args.algo.kl.use_loss:
        check.fail("algo.kl.init_coef", f"{args.algo.kl.init_coef:g} in the reward", "0, or --algo.kl.use_loss")
    for name in ("overlong_buffer_len", "stop_properly_penalty_coef"):
        if getattr(args.reward, name, None) is not None:
            check.fail(f"reward.{name}", getattr(args.reward, name), "None: a reward is a signed score")


def actor_forward(theirs: Any) -> Any:
    """`Actor.forward` that makes log-probs of the action tokens alone; all other calls go to `theirs`.

    The actor's LM head gives log-probs and entropies in place of logits while the model runs, so that whatever wraps
    the model (DeepSpeed, PEFT) still sees its head called. Packed samples and vision models are left to OpenRLHF.
    """

    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        *args: Any,
        return_entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        wanted = kwargs.get("return_logprobs", False) or kwargs.get("allgather_logits", False) or args
        if action_mask is None or wanted or self.packing_samples or getattr(self, "is_vlm", False):
            call = {"action_mask": action_mask, "attention_mask": attention_mask, "return_output": return_output}
            return theirs(self, sequences, *args, **call, return_entropy=return_entropy, **kwargs)
        assert attention_mask is not None
        actions = action_mask.shape[1]
        # position t predicts token t + 1; the last one predicts nothing
        targets = sequences.roll(-1, 1)
        scored = torch.zeros_like(sequences, dtype=torch.bool)
        scored[:, -actions - 1 : -1] = action_mask.bool()
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        with head_of_logps(self.model, targets, scored, self.temperature, return_entropy) as made:
            output = self.model(sequences, attention_mask=attention_mask, position_ids=positions)
        if not made or not torch.equal(output["logits"], made[-1]):
            check.fail("head", "a model that changes its head's logits", "head=False in patch() for this model")
        log_probs, *entropy = output["logits"][:, :-1].unbind(-1)
        if return_entropy:
            output.entropy = entropy[0]
        return (log_probs[:, -actions:], output) if return_output else log_probs[:, -actions:]

    return forward
