"""A reference RL loop, top to bottom: sample, check the answers, find first wrong steps, weigh the tokens, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import (
    DistillOutput,
    LossConfig,
    TokenAdvantages,
    advantages,
    linear_distill_loss,
    linear_prefix_loss,
)
from prefixloss.detect.choose import by_name
from prefixloss.detect.models.rollouts import OwnRollouts, sampler_of
from prefixloss.rl import run, task
from prefixloss.rl.config import Config
from prefixloss.rl.engine import Sampler
from prefixloss.rl.metrics import Learned, metrics_of
from prefixloss.rl.optimise import Stepper
from prefixloss.rl.policy import Policy, token_at
from prefixloss.rl.report import Report
from prefixloss.rl.rollouts import Checked, Sampled
from prefixloss.rl.teachers import Says, Teacher, says
from prefixloss.steps import split

ROUNDS = 16  # of a search by rollouts: enough for any number of steps

Judge = Callable[[Config, Policy, list[task.Problem], Sampled], Checked]
Credit = Tensor | TokenAdvantages


# ---- 1. sample


def sample(config: Config, sampler: Sampler, problems: list[task.Problem]) -> tuple[list[task.Problem], Sampled]:
    """A group of responses to every problem, one group behind the other, and the problem of each response."""
    repeated = [problem for problem in problems for _ in range(config.group)]
    return repeated, sampler.sample([problem.question for problem in repeated], config.max_tokens)


# ---- 2. check


def check(problems: list[task.Problem], sampled: Sampled) -> list[bool]:
    """Whether each answer is right; a response that was cut off has none."""
    responses = zip(problems, sampled.texts, sampled.finished.tolist(), strict=True)
    return [finished and task.check_answer(problem, text) for problem, text, finished in responses]


# ---- 3. find


def find(
    config: Config, policy: Policy, problems: list[task.Problem], sampled: Sampled, correct: list[bool]
) -> Checked:
    """The first wrong step of each wrong answer (with `flawed` of right ones too), as a token; none if cut off."""
    pairs = list(zip(problems, sampled.texts, strict=True))
    finished = sampled.finished.tolist()
    searched = [i for i, right in enumerate(correct) if finished[i] and (not right or config.flawed is not None)]
    found = dict(zip(searched, first_wrong_steps(config, policy, [pairs[i] for i in searched]), strict=True))
    rows: list[tuple[int, int, int]] = []
    for i, right in enumerate(correct):
        if i not in found or found[i].wrong < 0:
            rows.append((-1, 1, 1) if right else (-1, 0, task.check_steps(*pairs[i]).total))
        else:
            ids = sampled.tokens[i][sampled.mask[i]].tolist()
            rows.append((token_at(policy.tokenizer, ids, found[i].offset), found[i].right, found[i].total))
    first_error, right_steps, total_steps = (torch.tensor(c, device=policy.device) for c in zip(*rows, strict=True))
    reasons = [found[i].reason if i in found else "" for i in range(len(pairs))]
    return Checked(torch.tensor(correct, device=policy.device), first_error, right_steps, total_steps, reasons)


def first_wrong_steps(config: Config, policy: Policy, pairs: list[tuple[task.Problem, str]]) -> list[task.Steps]:
    """By the detector, or by the built-in check."""
    if config.detector is None:
        return [task.check_steps(problem, text) for problem, text in pairs]
    spans = [split(text, config.steps) for _, text in pairs]  # type: ignore[arg-type]
    found = by_name(config.detector, rollouts=own_rollouts(config, policy)).detect_batch(
        [problem.question for problem, _ in pairs],
        [[span.of(text) for span in cut] for cut, (_, text) in zip(spans, pairs, strict=True)],
        [problem.answer for problem, _ in pairs],
    )
    return [
        task.Steps(-1, -1, len(cut), len(cut), reason)
        if step is None
        else task.Steps(step, cut[step].start, step, len(cut), reason)
        for cut, (step, reason, _) in zip(spans, (f.at_least(config.threshold) for f in found), strict=True)
    ]


def own_rollouts(config: Config, policy: Policy) -> OwnRollouts:
    """The policy goes on from its own prefixes."""
    size = config.prompts * config.group
    sampler = sampler_of(policy.model, policy.tokenizer, policy.instruction, config.max_tokens, 1.0, size, config.seed)
    return OwnRollouts(sampler, samples=config.continuations, budget=ROUNDS * config.continuations)


def judge(config: Config, policy: Policy, problems: list[task.Problem], sampled: Sampled) -> Checked:
    """Check, then find."""
    return find(config, policy, problems, sampled, check(problems, sampled))


# ---- 4. weigh


def weigh(config: Config, checked: Checked, sampled: Sampled, group_ids: Tensor) -> Credit:
    """An advantage a response, or two of them split at the first wrong step."""
    if config.advantage == "none":
        return torch.zeros(len(checked.correct), device=checked.correct.device)
    outcome = advantages.Outcome(
        checked.correct,
        sampled.mask.sum(1),
        group_ids,
        first_error=checked.first_error,
        prompt_lengths=sampled.prompt_lengths,
        right_steps=checked.right_steps,
        total_steps=checked.total_steps,
    )
    cut: Any = config.shorten
    options = {"alpha": config.alpha, "shorten": cut, "flawed": config.flawed} if config.advantage == "vppo" else {}
    return advantages.assign(config.advantage, outcome, **options)


def lessons(config: Config, checked: Checked, sampled: Sampled, group_ids: Tensor) -> Tensor:
    """A weight a token, float [B, T], for what a teacher says of it: a group's tokens count as they do in the loss."""
    mask = sampled.mask
    if config.distill_from == "first-error":
        chosen = advantages.from_first_error(checked.first_error, mask, mask)
    elif config.distill_from == "wrong":
        chosen = (mask & ~checked.correct[:, None]).float()
    elif config.distill_from == "all":
        chosen = mask.float()
    else:
        raise ValueError(f"distill_from: got {config.distill_from!r}, expected one that weights are made for here")
    of_group = torch.zeros(len(mask), device=mask.device).index_add_(0, group_ids, mask.sum(1).float())
    return config.distill_coef * chosen / of_group[group_ids].clamp(min=1)[:, None]


# ---- 5. update


class Taught(NamedTuple):
    """What a teacher says of responses, and the weight of that for each token, float [B, T]."""

    says: Says
    weights: Tensor


def update(
    config: Config, policy: Policy, reference: Policy, stepper: Stepper, sampled: Sampled, credit: Credit,
    group_ids: Tensor, taught: Taught | None = None,
) -> Learned:  # fmt: skip
    """Several optimiser steps on the same responses: the ratio leaves 1 and the clip begins to act."""
    groups = torch.arange(len(group_ids), device=policy.device).view(-1, config.group)
    # log-probs of the policy that sampled and, for the KL, of the one it started from
    old_logps = logps_of(policy, sampled, groups.split(config.micro_prompts))
    ref_logps = logps_of(reference, sampled, groups.split(config.micro_prompts)) if config.kl_coef else None
    options = loss_config(config, policy, sampled)
    learned = Learned()
    if sampled.logps is not None:
        learned.sampler_gap = float((old_logps - sampled.logps).abs().sum())
    for _ in range(config.epochs):
        # groups stay whole, so each minibatch's loss is the mean over its groups
        for minibatch in groups[torch.randperm(len(groups))].tensor_split(config.minibatches):
            total, count = 0.0, stepper.begin(len(minibatch))
            for rows in map(Tensor.flatten, minibatch.split(config.micro_prompts)):
                part = sampled.rows(rows)
                hidden = policy.hidden(part)
                out = linear_prefix_loss(
                    hidden, policy.weight, part.tokens, rows_of(credit, rows), mask=part.mask,
                    old_logps=old_logps[rows], sampler_logps=part.logps,
                    ref_logps=None if ref_logps is None else ref_logps[rows], lm_head_bias=policy.bias,
                    group_ids=group_ids[rows],
                    normalizer=count,  # the micro-batches' and processes' losses add up to the minibatch's
                    config=options,
                )  # fmt: skip
                beside = None if taught is None else distillation(config, policy, hidden, part, taught, rows, count)
                loss = out.loss if beside is None else out.loss + beside.loss
                loss.backward()
                total += loss.item()
                if math.isfinite(total):
                    learned.add(out, beside)
            stepper.step(total)
    return learned


def distillation(
    config: Config, policy: Policy, hidden: Tensor, part: Sampled, taught: Taught, rows: Tensor, count: float
) -> DistillOutput:
    """What the teacher says of the responses `rows`, whose hidden states are [b, T, D]. count: as for the policy."""
    # both distributions as each model makes them
    return linear_distill_loss(
        hidden, policy.weight, lm_head_bias=policy.bias, mask=part.mask, weights=taught.weights[rows],
        normalizer=count, divergence=config.divergence, softcap=policy.softcap, logit_scale=policy.logit_scale,
        **taught.says(rows),
    )  # fmt: skip


def loss_config(config: Config, policy: Policy, sampled: Sampled) -> LossConfig:
    hidden: Any = config.gradient_tolerance
    head: Any = config.head_gradient_tolerance
    return LossConfig(
        clip_low=config.clip,
        clip_high=config.clip,
        kl="k3" if config.kl_coef else None,
        kl_coef=config.kl_coef,
        reduction="group-token-mean",
        gradient_tolerance=hidden,
        head_gradient_tolerance=head,
        # an engine's log-probs are not the policy's to the last digit
        sampler_correction=None if sampled.logps is None else "tis",
        softcap=policy.softcap,
        logit_scale=policy.logit_scale,
    )


def rows_of(credit: Credit, rows: Tensor) -> Credit:
    return TokenAdvantages(*(x[rows] for x in credit)) if isinstance(credit, TokenAdvantages) else credit[rows]


@torch.no_grad()
def logps_of(policy: Policy, sampled: Sampled, micro_batches: Sequence[Tensor]) -> Tensor:
    """Log-probs of the sampled tokens, float [B, T], 0 after the responses' ends."""
    logps = torch.zeros(sampled.mask.shape, device=policy.device)
    for rows in map(Tensor.flatten, micro_batches):
        logps[rows] = policy.logps(sampled.rows(rows))
    return logps


# ---- all five, again and again


def learn(
    config: Config,
    policy: Policy,
    reference: Policy,
    stepper: Stepper,
    problems: list[task.Problem],
    judge: Judge = judge,
    keep: Callable[[list[task.Problem], Sampled, Checked, Credit], None] = lambda *_: None,
    teacher: Teacher | None = None,
    sampler: Sampler | None = None,
) -> dict[str, float]:
    """One update; its metrics. problems: this process's. judge: checks and finds. keep: is handed the responses.
    sampler: has the policy's weights; None: the policy itself.
    """
    repeated, sampled = sample(config, sampler or policy, problems)
    checked = judge(config, policy, repeated, sampled)
    group_ids = torch.arange(len(problems), device=policy.device).repeat_interleave(config.group)
    credit = weigh(config, checked, sampled, group_ids)
    keep(repeated, sampled, checked, credit)
    taught = None
    if teacher is not None:
        weights = lessons(config, checked, sampled, group_ids)
        taught = Taught(says(teacher, policy, sampled, weights), weights)
    learned = update(config, policy, reference, stepper, sampled, credit, group_ids, taught)
    return {**metrics_of(config, sampled, checked, learned, stepper.team), "skipped": stepper.state.skipped}


def train(config: Config, directory: Path, report: Report, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Train in `directory`, from its checkpoint if it has one. Returns a dict of metrics an update.

    overwrite: remove what is there first. Under torchrun every process calls this, and the first one writes.

    UsageError: an argument cannot work, or another process trains there. NotFiniteError: see there. KeyboardInterrupt:
    stopped, and saved if there was an update to save. OSError: a file cannot be written; the last checkpoint is kept.
    UnansweredError: a server gives no answer that fits; likewise.
    """
    with run.opened(config, directory, report, overwrite) as here, here.phase():
        while here.update < config.updates:
            problems = here.next_problems()
            given = (config, here.policy, here.reference, here.stepper, problems)
            here.updated(learn(*given, keep=here.keep, teacher=here.teacher, sampler=here.sampler))
    return here.history
