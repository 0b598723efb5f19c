"""TRL's GRPO trainer with credit that knows where a response goes wrong, and with the fused loss if asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.grpo_trainer import is_peft_model

from prefixloss import LossConfig, TokenAdvantages, advantages, check
from prefixloss.detect.base import Detector
from prefixloss.detect.choose import by_name
from prefixloss.integrations.models.heads import unwrapped
from prefixloss.integrations.models.positions import position_ids, takes_positions
from prefixloss.integrations.token_loss import ESTIMATORS
from prefixloss.integrations.trl.head import per_token_logps
from prefixloss.integrations.trl.logps import FusedLoss, LogProbs, add_fused_loss, scored_by
from prefixloss.integrations.trl.versions import check_version, has_fused_head, refuse_losses
from prefixloss.maths.objective import clipped
from prefixloss.steps import SEGMENTERS, Segmenter, step_tokens, turn_tokens

# those that need no more than outcomes and first errors; "grpo" is TRL's own, without a detector
ADVANTAGES = (*ESTIMATORS, "grpo")
Correct = float | str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What the rewards and the detector say about a batch.

    correct, judged: bool, over all processes; not judged: the reward function that says it gave none for this response.
    first_token: int64, of this process's responses: the first token of the first wrong step, -1 where none was found.
    """

    correct: Tensor
    judged: Tensor
    first_token: Tensor


class PrefixGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` whose advantages are per token: the good prefix of a wrong answer keeps its credit.

    Takes all of `GRPOTrainer`'s arguments, and:
        detector: a `prefixloss.detect` Detector, or its name ("auto", "maths", "prm:MODEL", ...).
        threshold: the detector's confidence, from 0 to 1, below which its find counts as none: such a response is wrong
            from its first token on. `first_error/found` counts what is left.
        segmenter: how a response is cut into steps, see `prefixloss.steps`; or "turns", an agent's, between what its
            tools wrote (TRL's tools and environments, or `env_mask` of a rollout_func). A step is then a turn and what
            its tools answered, and the first wrong turn is where credit ends.
        advantage: "vppo"; "cliff"; "neutral_prefix" (TRL's advantages, 0 on good prefixes; "neutral" is taken as well);
            "grpo" (TRL's, no detector).
        flawed: for "vppo", what a right answer is worth from its own first error on, see `advantages.vppo`; right
            ones are then searched too, and `first_error/flawed` is the share of them in which one is found. None: not.
        alpha, shorten: as in `advantages.vppo`, whose advantages like cliff's are not divided by a standard deviation:
            TRL's `scale_rewards` counts for "neutral_prefix" and "grpo", and "batch" is refused with the others.
        correct: which responses are right. A number: those whose weighted sum of rewards is above it. The name of a
            reward function: those to which it alone gives more than 0.5. A function: rewards [B, functions], NaN where
            one gave None, -> bool [B], or 1, 0 and NaN. None: the only reward function; with several an error asks
            which one it is.
            There is no verdict where that function gave None or NaN, yours gave NaN, or all gave None. Such a response
            has no credit to split: it keeps TRL's advantage, and is no part of the baseline of the others.
        answer: the dataset's column with the right answer, for the detector; rows may lack it.
        fused_loss: every log-prob of this trainer comes from prefixloss, and no [tokens, vocabulary] is held. Loss and
            gradient are made in one pass over the head (`linear_prefix_loss`) where TRL's loss is of each token by
            itself: grpo, bnpo, dr_grpo, dapo, luspo, cispo and sapo. Where it looks at whole responses or batches
            (vespo, sequence level, the off-policy mask, the entropy quantile and bonus), or is one that we do not
            know, TRL makes it from our log-probs and entropies, and a second pass the gradient. Same loss either way.
        stats: "scored" logs what TRL logs; "learning" saves the head's product for tokens without advantage, and logs
            entropy and clipping over the others. For losses of one pass only.
        backend: as in `linear_prefix_loss`.

    Only responses that ended by themselves are searched, and without `flawed` only wrong ones: one that was cut off has
    no good prefix.

    Tokens are scored at the positions at which they were generated, with or without `fused_loss`. TRL leaves positions
    to the model: one with absolute positions (GPT-2, GPT-Neo) counts the padding before a prompt, and TRL's log-probs
    are then not those of the policy that spoke. With such a model this trainer's differ from TRL's, and are right.
    """

    def __init__(
        self,
        *args: Any,
        detector: Detector | str | None = "auto",
        threshold: float = 0.0,
        segmenter: Segmenter | Literal["turns"] = "markers",
        advantage: str = "vppo",
        alpha: float = 0.5,
        shorten: Literal["prompt"] | int | float = "prompt",
        flawed: float | None = None,
        correct: Correct | None = None,
        answer: str = "answer",
        fused_loss: bool = False,
        stats: Literal["scored", "learning"] = "scored",
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        check_version()
        for name, value, known in (
            ("segmenter", segmenter, (*SEGMENTERS, "turns")),
            ("advantage", advantages.ALIASES.get(advantage, advantage), ADVANTAGES),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected {' | '.join(map(repr, known))}")
        if detector is None and advantage != "grpo":
            raise ValueError(f'detector: got None, expected a detector or its name for advantage="{advantage}"')
        check.number("alpha", alpha, 0.0, 1.0)
        check.number("threshold", threshold, 0.0, 1.0)
        if flawed is not None:
            check.number("flawed", flawed, 0.0, 1.0)
            if advantage != "vppo":
                raise ValueError(f'flawed: got {flawed!r}, expected advantage="vppo" with it')
        check.shorten(shorten, torch.ones(1), torch.ones(1, dtype=torch.int64))  # the lengths come with the responses
        if advantage == "grpo":
            self.detector = None
        else:
            self.detector = by_name(detector) if isinstance(detector, str) else detector
        super().__init__(*args, **kwargs)
        advantage = advantages.named("advantage", advantage, ADVANTAGES)
        if advantage not in ("neutral_prefix", "grpo") and self.scale_rewards == "batch":
            raise ValueError(f'scale_rewards: got "batch", expected "group" or "none" for advantage="{advantage}"')
        self.threshold, self.flawed = threshold, flawed
        self.segmenter, self.advantage, self.alpha, self.shorten = segmenter, advantage, alpha, shorten
        self.correct = self._checked_correct(correct)
        self.answer, self.stats, self.backend = answer, stats, backend
        self.fused_loss = fused_loss
        if fused_loss:
            refuse_losses(self.loss_type)
            self._one_pass = _one_pass_config(self)
            add_fused_loss(self.model.get_base_model() if is_peft_model(self.model) else self.model)

    def _checked_correct(self, correct: Correct | None) -> Correct:
        names = self.reward_func_names
        if isinstance(correct, str) and correct not in names:
            raise ValueError(f"correct: got {correct!r}, expected the name of a reward function: {', '.join(names)}")
        if correct is None and len(names) > 1 and self.advantage != "grpo":
            raise ValueError(
                f"correct: got None with {len(names)} reward functions, expected which one says that a response is "
                f"right ({', '.join(names)}), a threshold on their weighted sum, or a function"
            )
        return names[0] if correct is None else correct

    # ---- first errors ----

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> Tensor:
        """TRL's rewards, [B of all processes, functions]; on the way, the first wrong step of the wrong responses."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        if self.advantage != "grpo":
            verdicts = self._verdicts(rewards)
            correct, judged = verdicts == 1, ~verdicts.isnan()
            here = self._local(len(prompts))
            searched = judged if self.flawed is not None else judged & ~correct
            first = self._first_wrong_tokens(inputs, prompts, completion_ids, searched[here].tolist())
            self._count(first, (judged & ~correct)[here].tolist(), "found")
            if self.flawed is not None:
                self._count(first, correct[here].tolist(), "flawed")
            self._outcome = Outcome(correct, judged, torch.tensor(first, device=rewards.device))
        return rewards

    def _verdicts(self, rewards: Tensor) -> Tensor:
        """float [B]: 1 for right, 0 for wrong, NaN where nothing says which."""
        silent = rewards.isnan().all(1)
        if callable(self.correct):
            said = self.correct(rewards).to(rewards.device)
            silent |= said.isnan()
            right = said != 0
        elif isinstance(self.correct, str):
            reward = rewards[:, self.reward_func_names.index(self.correct)]
            silent |= reward.isnan()
            right = reward > 0.5
        else:
            right = (rewards * self.reward_weights.to(rewards.device)).nansum(1) > self.correct
        return right.float().masked_fill(silent, torch.nan)

    def _first_wrong_tokens(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completion_ids: list[list[int]], searched: list[bool]
    ) -> list[int]:
        """For each response the index of its first wrong step's first token, -1 for none and where not `searched`."""
        assert self.detector is not None
        # TRL before 1.15 knows one
        ends = {*getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id]), self._tokenizer.pad_token_id}
        which = [i for i, ids in enumerate(completion_ids) if searched[i] and ids and ids[-1] in ends]
        cuts = [self._steps(i, completion_ids[i]) for i in which]
        answers = [inputs[i].get(self.answer) for i in which]
        found = self.detector.detect_batch(
            [_question(prompts[i]) for i in which],
            [steps for steps, _ in cuts],
            [None if a is None else str(a) for a in answers],
        )
        first, reasons = [-1] * len(prompts), [""] * len(prompts)
        for i, (_, starts), error in zip(which, cuts, (f.at_least(self.threshold) for f in found), strict=True):
            first[i] = -1 if error.step is None else starts[error.step]
            reasons[i] = error.reason
        self._log_completion_extra("first_error", first)
        self._log_completion_extra("first_error_reason", reasons)
        return first

    def _count(self, first: list[int], among: list[bool], name: str) -> None:
        """Logs the share of these responses in which a first error was found."""
        if any(among):
            found = sum(t >= 0 for t, counted in zip(first, among, strict=True) if counted)
            self._log_metric(f"first_error/{name}", found / sum(among))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; on the way, which tokens are the model's own, where there are others."""
        made = super()._generate(*args, **kwargs)
        self._own = made[2]
        return made

    def _steps(self, i: int, ids: list[int]) -> tuple[list[str], list[int]]:
        """The steps of this process's response `i`, and the index of each one's first token."""
        if self.segmenter == "turns":
            return turn_tokens(self._tokenizer, ids, [1] * len(ids) if self._own is None else self._own[i])
        return step_tokens(self._tokenizer, ids, self.segmenter)

    # ---- advantages ----

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.advantage != "grpo":
            output["advantages"] = self._token_advantages(output)
        return output

    def _token_advantages(self, batch: dict[str, Any]) -> Tensor:
        """float [B, T]: the advantage of every completion token of this process, 0 outside the loss."""
        mask, outcome = _loss_mask(batch), self._outcome
        here = self._local(len(mask))
        first_error = _scored_index(outcome.first_token, mask)
        if self.advantage == "neutral_prefix":
            by_token = advantages.neutral_prefix(batch["advantages"], outcome.correct[here], first_error)
        else:
            # a group may lie on several processes
            sizes = torch.stack([mask.sum(1), first_error, batch["prompt_mask"].sum(1)], 1)
            lengths, everywhere, prompt_lengths = self.accelerator.gather(sizes).unbind(1)
            own: Any = {"alpha": self.alpha, "shorten": self.shorten, "flawed": self.flawed}
            options = own if self.advantage == "vppo" else {}
            known = advantages.Outcome(
                outcome.correct, lengths, self._groups(len(lengths)), everywhere, prompt_lengths=prompt_lengths,
                judged=outcome.judged,
            )  # fmt: skip
            everyone = advantages.assign(self.advantage, known, **options)
            assert isinstance(everyone, TokenAdvantages)
            by_token = TokenAdvantages(*(x[here] for x in everyone))
            suffix = torch.where(outcome.judged[here], by_token.suffix, batch["advantages"].to(by_token.suffix))
            by_token = by_token._replace(suffix=suffix)  # without a verdict there is no prefix
        return by_token.per_token(batch["completion_ids"], mask)

    def _groups(self, responses: int) -> Tensor:
        """int64 [B of all processes]: which prompt each answers."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        return torch.arange(responses, device=self.accelerator.device) // size

    def _local(self, responses: int) -> slice:
        """This process's part of what was gathered."""
        start = self.accelerator.process_index * responses
        return slice(start, start + responses)

    # ---- the fused loss ----

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        placed = _with_positions(model)
        if not self.fused_loss:
            return super()._get_per_token_logps_and_entropies(placed, *args, **kwargs)
        # or the ratios would compare two roundings of the same policy
        with scored_by(LogProbs(self.backend)):
            return self._from_the_head(placed, *args, **kwargs)

    def _from_the_head(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's log-probs, entropies and router loss, where its models have a fused head; else those of ours."""
        score = GRPOTrainer._get_per_token_logps_and_entropies if has_fused_head() else per_token_logps
        return score(self, model, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss, or with `fused_loss` the same number from one pass over the head, if it can be had so."""
        if not self.fused_loss or self._one_pass is None:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        accumulated = float(self.current_gradient_accumulation_steps) if mode == "train" else 1.0
        mask, advantage = _loss_mask(inputs), inputs["advantages"]
        advantage = (advantage if advantage.dim() == 2 else advantage[:, None]).expand(mask.shape)
        correction = inputs.get("importance_sampling_ratio")
        request = FusedLoss(
            config=self._one_pass,
            completions=inputs["completion_mask"],
            mask=mask,
            # a weight >= 0 of the policy term may as well weigh the advantage
            advantages=advantage if correction is None else advantage * correction,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs["ref_per_token_logps"] if self.beta else None,
            normalizer=self._normalizer(inputs, mask, accumulated, mode),
            backend=self.backend,
        )
        made: list[Any] = []
        placed = _with_positions(model)

        def scored(**model_inputs: Any) -> Any:
            made.append(placed(**model_inputs, prefix_loss=request))
            return made[-1]

        # TRL prepares the model's inputs, images included, and takes log-probs and entropies out for the metrics
        ids = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        scored.module = model  # type: ignore[attr-defined]
        logps, entropies, aux_loss = self._from_the_head(
            scored, *ids, mask.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _IMAGES},
        )  # fmt: skip
        loss: Tensor = made[0].loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        computed = mask if self.stats == "scored" or self.beta else mask * (request.advantages != 0)
        self._log_loss(mode, inputs, logps.detach(), entropies, computed)
        return loss

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor, accumulated: float, mode: str) -> Tensor | float:
        """What TRL divides the summed loss by, micro-batches included."""
        if self.loss_type in ("dapo", "cispo"):
            # the generation batch's tokens, as a share for each process and each of its optimiser steps
            share = accumulated / self.args.steps_per_generation if mode == "train" else 1.0
            return inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * accumulated
        tokens = self.max_completion_length if self.loss_type == "dr_grpo" else 1
        return len(mask) * tokens * accumulated

    @torch.no_grad()
    def _log_loss(self, mode: str, inputs: dict[str, Any], logps: Tensor, entropies: Tensor, mask: Tensor) -> None:
        """The metrics that TRL's own loss logs, over the tokens in `mask`."""
        old, metrics = inputs.get("old_per_token_logps"), self._metrics[mode]
        ratio = torch.ones_like(logps) if old is None else torch.exp(logps - old)

        def mean(x: Tensor) -> float:
            total, count = self.accelerator.reduce(torch.stack([(x * mask).sum(), mask.sum().float()]), reduction="sum")
            return (total / count.clamp(min=1)).item()

        def extreme(x: Tensor, largest: bool) -> float:
            """Of the responses' means; those without a token have none."""
            means = self.accelerator.gather((x * mask).sum(1) / mask.sum(1))
            means = means[~means.isnan()]
            return (means.max() if largest else means.min()).item() if len(means) else float("nan")

        if self.beta:
            difference = inputs["ref_per_token_logps"] - logps
            kl = torch.expm1(difference) - difference
            metrics["kl"].append(mean(kl * ratio if self.args.use_bias_correction_kl else kl))
        metrics["entropy"].append(mean(entropies))
        # TRL names the clip of all these losses alike
        named = "cispo" if self.loss_type == "cispo" else "clip"
        advantage = inputs["advantages"]
        advantage = advantage if advantage.dim() == 2 else advantage[:, None]
        capped = ratio if self.args.delta is None else ratio.clamp(max=self.args.delta)
        assert self._one_pass is not None
        low, high = clipped(replace(self._one_pass, objective=named), advantage, capped)
        if self.loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(mean(high.float()))
        elif self.loss_type != "sapo":
            for name, held in (("low", low), ("high", high), ("region", low | high)):
                metrics[f"clip_ratio/{name}_mean"].append(mean(held.float()))
            metrics["clip_ratio/low_min"].append(extreme(low.float(), largest=False))
            metrics["clip_ratio/high_max"].append(extreme(high.float(), largest=True))


_IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def _with_positions(model: Any) -> Callable[..., Any]:
    """The model, with the positions that generation gave its tokens: TRL lets it count the padding too."""
    if not takes_positions(unwrapped(model)):
        return model

    def placed(*, attention_mask: Tensor, **inputs: Any) -> Any:
        ids = position_ids(attention_mask, attention_mask.shape[1])
        return model(attention_mask=attention_mask, position_ids=ids, **inputs)

    placed.module = model  # type: ignore[attr-defined]
    return placed


def _question(prompt: Any) -> str:
    """The problem's text: the prompt, or the last thing the user said."""
    if isinstance(prompt, str):
        return prompt
    content = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """[B, T], 0 or 1: completion tokens of the model's own, not of its tools."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _scored_index(first_token: Tensor, mask: Tensor) -> Tensor:
    """int64 [B]: indices into completions [B, T] counted in the tokens of `mask`; -1 stays, as does what has none."""
    before = torch.arange(mask.shape[1], device=mask.device) < first_token[:, None]
    index = torch.minimum((mask * before).sum(1), mask.sum(1) - 1)
    return torch.where(first_token >= 0, index, -1).long()


# ---- the fused loss ----------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Any] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "bnpo": "token-mean",
    "dr_grpo": "token-mean",  # over its own normaliser
    "dapo": "token-mean",
    "cispo": "token-mean",
}


def _one_pass_config(trainer: Any) -> LossConfig | None:
    """The trainer's loss in our terms, or None where it is not of each token by itself, or we have no equal."""
    args = trainer.args
    objective = trainer.loss_type if trainer.loss_type in ("cispo", "sapo") else "clip"
    of_more_than_a_token = (
        trainer.importance_sampling_level != "token"
        or trainer.off_policy_mask_threshold is not None
        or trainer.top_entropy_quantile < 1
        or getattr(trainer, "_entropy_bonus_enabled", False)  # not in every TRL
    )
    no_equal = (
        trainer.loss_type not in _REDUCTIONS
        or (objective == "cispo" and trainer.epsilon_high < 1)
        # TRL's clip then has a bound below it
        or (objective == "clip" and args.delta is not None and args.delta < 1 + trainer.epsilon_high)
    )
    if of_more_than_a_token or no_equal:
        return None
    return LossConfig(
        objective=objective,
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        ratio_cap=args.delta if objective == "clip" else None,
        sapo_tau=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        kl="k3" if trainer.beta else None,
        kl_coef=trainer.beta,
        kl_importance=bool(trainer.beta and args.use_bias_correction_kl),
        reduction=_REDUCTIONS[trainer.loss_type],
        stats=trainer.stats,
    )
