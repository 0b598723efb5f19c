"""A reference RL loop, top to bottom: sample, check, find the first wrong step, weigh the tokens, update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prefixloss import LossConfig, TokenAdvantages, advantages, linear_logps, linear_prefix_loss
from prefixloss.detect.choose import by_name
from prefixloss.io.files import write_whole_directory
from prefixloss.rl import UsageError, checkpoint, task
from prefixloss.rl.config import Config
from prefixloss.rl.lock import Lock
from prefixloss.rl.policy import Policy, Sampled, load_policy, tiny_policy, token_at
from prefixloss.rl.report import Report
from prefixloss.rl.samples import write_samples
from prefixloss.rl.team import Team
from prefixloss.steps import split

BAD_STEPS_IN_A_ROW = 3

# ---- problems ----------------------------------------------------------------------------------------------

Problems = Callable[[int, int], list[task.Problem]]


def open_problems(config: Config) -> tuple[Problems, list[task.Problem]]:
    """The endless training sequence, as a function of (start, count), and the held-out problems."""
    if config.data:
        try:
            problems = task.load_problems(Path(config.data))
        except ValueError as error:
            raise UsageError(f"--data: {error}") from None
        if len(problems) < 2:
            raise UsageError(f"--data: {config.data} has {len(problems)} different questions, expected at least 2")
        held_out, training = task.split(problems, config.eval_problems)
        return partial(task.shuffled, training, config.seed), held_out
    chains = partial(
        task.chains, min_steps=config.min_steps, max_steps=config.max_steps, free_form=config.model is not None
    )
    return partial(chains, config.seed), chains(0, 0, config.eval_problems, held_out=True)


# ---- supervised start of the built-in model ----------------------------------------------------------------


def warm_start(policy: Policy, config: Config, problems: Problems, report: Report, stop: checkpoint.Stop) -> None:
    """A short time on written solutions, so that some answers are right and there is something to reinforce.

    It ends at a given loss: the loss falls so steeply that a fixed number of steps would start each seed elsewhere.
    """
    smooth = math.inf
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.warm_lr, betas=(0.9, 0.95), weight_decay=0.0)
    with report.phase("warm start", config.warm_steps):
        for step in range(config.warm_steps):
            if stop.asked:
                raise checkpoint.Stopped(stop.number)
            optimizer.param_groups[0]["lr"] = config.warm_lr * min(1.0, (step + 1) / 50)
            batch = problems(step * config.warm_batch, config.warm_batch)
            traces = policy.written([p.question for p in batch], [p.solution for p in batch])
            logps = linear_logps(policy.hidden(traces), tokens=traces.tokens, mask=traces.mask, **policy.head).logps
            loss = -logps.sum() / traces.mask.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            smooth = loss.item() if step == 0 else 0.9 * smooth + 0.1 * loss.item()
            report.advance(loss=smooth)
            if smooth <= config.warm_loss:
                break


# ---- credit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What the checker says of B responses: bool [B], and int64 [B] otherwise; first_error is -1 where not found.

    reasons: for each response what is wrong with its first wrong step, or an empty text.
    """

    correct: Tensor
    first_error: Tensor
    right_steps: Tensor
    total_steps: Tensor
    reasons: Sequence[str] = ()


def check_responses(config: Config, policy: Policy, problems: list[task.Problem], sampled: Sampled) -> Checked:
    """Only wrong answers are searched for their first wrong step; a response that was cut off has no good prefix."""
    finished = sampled.finished.tolist()
    pairs = list(zip(problems, sampled.texts, strict=True))
    correct = [done and task.check_answer(*pair) for done, pair in zip(finished, pairs, strict=True)]
    wrong = [i for i, (done, right) in enumerate(zip(finished, correct, strict=True)) if done and not right]
    found = dict(zip(wrong, find_errors(config, [pairs[i] for i in wrong]), strict=True))
    rows: list[tuple[bool, int, int, int]] = []
    for i, right in enumerate(correct):
        if right:
            rows.append((True, -1, 1, 1))
        elif i not in found or found[i].wrong < 0:
            rows.append((False, -1, 0, task.check_steps(*pairs[i]).total))
        else:
            ids = sampled.tokens[i][sampled.mask[i]].tolist()
            token = token_at(policy.tokenizer, ids, found[i].offset)
            rows.append((False, token, found[i].right, found[i].total))
    outcome, first_error, right_steps, total_steps = (
        torch.tensor(c, device=policy.device) for c in zip(*rows, strict=True)
    )
    reasons = [found[i].reason if i in found else "" for i in range(len(pairs))]
    return Checked(outcome, first_error, right_steps, total_steps, reasons)


def find_errors(config: Config, pairs: list[tuple[task.Problem, str]]) -> list[task.Steps]:
    """The first wrong step of each wrong response: by the detector, or the built-in check."""
    if config.detector is None:
        return [task.check_steps(problem, text) for problem, text in pairs]
    spans = [split(text, config.steps) for _, text in pairs]  # type: ignore[arg-type]
    found = by_name(config.detector).detect_batch(
        [problem.question for problem, _ in pairs],
        [[span.of(text) for span in cut] for cut, (_, text) in zip(spans, pairs, strict=True)],
        [problem.answer for problem, _ in pairs],
    )
    return [
        task.Steps(-1, -1, len(cut), len(cut), reason)
        if step is None
        else task.Steps(step, cut[step].start, step, len(cut), reason)
        for cut, (step, reason, _) in zip(spans, found, strict=True)
    ]


Check = Callable[[Config, Policy, list[task.Problem], Sampled], Checked]


def assign_credit(config: Config, checked: Checked, sampled: Sampled, group_ids: Tensor) -> Tensor | TokenAdvantages:
    """An advantage a response, or two of them split at the first wrong step."""
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
    options = {"alpha": config.alpha, "shorten": cut} if config.advantage == "vppo" else {}
    return advantages.assign(config.advantage, outcome, **options)


# ---- one update --------------------------------------------------------------------------------------------


@dataclass
class State:
    """How far a run has come."""

    update: int = 0
    step: int = 0  # optimiser steps
    skipped: int = 0  # optimiser steps without effect, for a loss or gradient that was not finite
    skipped_in_a_row: int = 0


class NotFiniteError(RuntimeError):
    """The loss or its gradient stayed infinite or NaN."""


def update(
    config: Config,
    policy: Policy,
    reference: Policy,
    optimizer: Any,
    state: State,
    problems: list[task.Problem],
    samples: Path | None = None,
    team: Team = Team(),
    check: Check = check_responses,
) -> dict[str, float]:
    """Sample a group for every problem and learn from it; the metrics are means over the update.

    problems: of all processes together. samples: where to leave the responses. check: what judges them.
    """
    # sample and check this process's share
    problems = team.share(problems)
    repeated = [p for p in problems for _ in range(config.group)]
    sampled = policy.sample([p.question for p in repeated], config.max_tokens)
    checked = check(config, policy, repeated, sampled)

    # weigh every token
    group_ids = torch.arange(len(problems), device=policy.device).repeat_interleave(config.group)
    credit = assign_credit(config, checked, sampled, group_ids)
    if samples:
        by: Any = config.steps if config.detector or not repeated[0].lines else "lines"
        write_samples(samples, policy, repeated, sampled, checked, credit, by)

    # log-probs of the policy that sampled and, for the KL, of the one it started from
    groups = torch.arange(len(repeated), device=policy.device).view(len(problems), config.group)
    old_logps = logps_of(policy, sampled, groups.split(config.micro_prompts))
    ref_logps = logps_of(reference, sampled, groups.split(config.micro_prompts)) if config.kl_coef else None

    # several steps on the same responses: the ratio leaves 1 and the clip begins to act
    loss_config = LossConfig(
        clip_low=config.clip,
        clip_high=config.clip,
        kl="k3" if config.kl_coef else None,
        kl_coef=config.kl_coef,
        reduction="group-token-mean",
        softcap=policy.softcap,
        logit_scale=policy.logit_scale,
    )
    sums = {"tokens": 0.0, "kl": 0.0, "clip_share": 0.0}  # weighted by learning tokens
    for _ in range(config.epochs):
        # groups stay whole, so each minibatch's loss is the mean over its groups
        for minibatch in groups[torch.randperm(len(groups))].tensor_split(config.minibatches):
            optimizer.zero_grad()
            total, (everywhere,) = 0.0, team.sum([len(minibatch)])
            for micro in minibatch.split(config.micro_prompts):
                rows = micro.flatten()
                part = sampled.rows(rows)
                split = isinstance(credit, TokenAdvantages)
                out = linear_prefix_loss(
                    policy.hidden(part),
                    policy.weight,
                    part.tokens,
                    TokenAdvantages(*(x[rows] for x in credit)) if split else credit[rows],
                    mask=part.mask,
                    old_logps=old_logps[rows],
                    ref_logps=None if ref_logps is None else ref_logps[rows],
                    lm_head_bias=policy.bias,
                    group_ids=group_ids[rows],
                    normalizer=everywhere,  # the micro-batches' and processes' losses add up to the minibatch's
                    config=loss_config,
                )
                out.loss.backward()
                total += out.loss.item()
                weight = float(out.metrics["learning_tokens"])
                clipped = float(out.metrics["clip_low"] + out.metrics["clip_high"])
                if math.isfinite(total):
                    for name, value in (("tokens", 1.0), ("kl", float(out.metrics["kl"])), ("clip_share", clipped)):
                        sums[name] += weight * value
            team.sum_gradients(policy.model.parameters())
            (total,) = team.sum([total])  # if it is not finite anywhere, no process takes the step
            norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm))
            take_step(config, optimizer, state, math.isfinite(total) and math.isfinite(norm))

    found = checked.first_error >= 0
    lengths = sampled.mask.sum(1)
    local: dict[str, Any] = {
        "responses": len(repeated), "reward": checked.correct.sum(), "found": found.sum(),
        "good_prefix": checked.first_error[found].sum(), "good_steps": checked.right_steps[found].sum(),
        "length": lengths.sum(), **sums,
    }  # fmt: skip
    of = dict(zip(local, team.sum([float(value) for value in local.values()]), strict=True))
    return {
        "reward": of["reward"] / of["responses"],
        "good_prefix": of["good_prefix"] / max(of["found"], 1),
        "good_steps": of["good_steps"] / max(of["found"], 1),
        "length": of["length"] / of["responses"],
        "kl": of["kl"] / max(of["tokens"], 1.0),
        "clip_share": of["clip_share"] / max(of["tokens"], 1.0),
        "learning_tokens": of["tokens"] / (of["length"] * config.epochs),
        "skipped": state.skipped,
    }


@torch.no_grad()
def logps_of(policy: Policy, sampled: Sampled, micro_batches: Sequence[Tensor]) -> Tensor:
    """Log-probs of the sampled tokens, float [B, T], 0 after the responses' ends."""
    logps = torch.zeros(sampled.mask.shape, device=policy.device)
    for rows in map(Tensor.flatten, micro_batches):
        part = sampled.rows(rows)
        logps[rows] = linear_logps(policy.hidden(part), tokens=part.tokens, mask=part.mask, **policy.head).logps
    return logps


def take_step(config: Config, optimizer: Any, state: State, finite: bool) -> None:
    """One optimiser step; none where the loss or gradient is not finite."""
    if finite:
        state.step, state.skipped_in_a_row = state.step + 1, 0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step)
        optimizer.step()
        return
    state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
    if state.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
        raise NotFiniteError(
            f"the loss or its gradient was not finite {BAD_STEPS_IN_A_ROW} steps in a row, the last in update "
            f"{state.update + 1}; the steps were skipped and the run stopped: try a smaller --lr"
        )


def learning_rate(config: Config, step: int) -> float:
    """It rises for `lr_warmup` steps, then falls in a line to a tenth at the run's end; steps count from 1."""
    progress = step / (config.updates * config.epochs * config.minibatches)
    return config.lr * min(1.0, step / max(config.lr_warmup, 1)) * (1.0 - 0.9 * progress)


# ---- evaluation --------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(config: Config, policy: Policy, problems: list[task.Problem], team: Team = Team()) -> dict[str, float]:
    """pass@1 and pass@k on held-out problems, with random numbers of its own, the same at each evaluation."""
    problems = team.share(problems)
    repeated = [p for p in problems for _ in range(config.eval_samples)]
    size = config.prompts * config.group
    correct: list[bool] = []
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed + team.rank)
        for start in range(0, len(repeated), size):
            chunk = repeated[start : start + size]
            texts = policy.sample([p.question for p in chunk], config.max_tokens).texts
            correct += [task.check_answer(p, text) for p, text in zip(chunk, texts, strict=True)]
    counts = torch.tensor(correct).view(len(problems), config.eval_samples).sum(1).tolist()
    ks = list(dict.fromkeys((1, config.k)))
    count, *rates = team.sum([len(counts), *(sum(pass_at_k(config.eval_samples, c, k) for c in counts) for k in ks)])
    return {f"pass@{k}": rate / count for k, rate in zip(ks, rates, strict=True)}


# ---- the run -----------------------------------------------------------------------------------------------


def train(config: Config, run: Path, report: Report, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Train in the directory `run`, from its checkpoint if it has one. Returns a dict of metrics an update.

    overwrite: remove what is in `run` first. Under torchrun every process calls this, and the first one writes.

    UsageError: an argument cannot work, or another process trains there. NotFiniteError: see there. KeyboardInterrupt:
    stopped, and saved if there was an update to save. OSError: a file cannot be written; the last checkpoint is kept.
    """
    stop = checkpoint.Stop()
    with Lock() as lock, stop.listening():
        # the policy, a frozen copy of it, and the problems
        team = Team.join(config.device, config.timeout)
        if config.prompts // team.size < config.minibatches:
            raise UsageError(f"--prompts: got {config.prompts}, expected at least one a minibatch and process")
        report = report if team.leads else Report(Console(quiet=True))
        torch.set_num_threads(config.threads or torch.get_num_threads())
        torch.manual_seed(config.seed)
        problems, held_out = open_problems(config)
        policy = open_policy(config, team.device)
        saved = open_run(config, run, overwrite, team, lock)
        if saved is None and config.model is None:
            warm_start(policy, config, problems, report, stop)
        team.start_alike(policy.model.state_dict().values())
        reference = frozen(policy)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        modules = {"model": policy.model, "reference": reference.model, "optimizer": optimizer}

        # resume, or evaluate the policy it starts from
        state, history = State(), list[dict[str, Any]]()
        if saved is not None:
            state, history = restore(saved, modules, run / "checkpoint.pt")
        else:
            history = [{"update": 0, **evaluate(config, policy, held_out, team)}]
            save(run, modules, state, history, team)
        if team.leads:
            checkpoint.rewrite_metrics(run / "metrics.jsonl", history)
        report.evaluated(next(m for m in reversed(history) if "pass@1" in m))
        if team.any(stop.asked) and state.update < config.updates:
            raise checkpoint.Stopped(stop.number)

        # the loop: problems follow on from the warm start's
        with report.phase("training", config.updates, done=state.update):
            while state.update < config.updates:
                first = config.warm_steps * config.warm_batch * (config.model is None) + state.update * config.prompts
                last = state.update + 1 == config.updates
                evaluates = last or (state.update + 1) % config.eval_every == 0
                team.seed(config.seed, state.update)
                metrics = update(
                    config, policy, reference, optimizer, state, problems(first, config.prompts),
                    run / "responses.jsonl" if evaluates and team.leads else None, team,
                )  # fmt: skip
                state.update += 1
                history.append({"update": state.update, **metrics})
                if evaluates:
                    history[-1] |= evaluate(config, policy, held_out, team)
                    report.evaluated(history[-1])
                if team.leads:
                    checkpoint.append_metrics(run / "metrics.jsonl", history[-1])
                stopped = team.any(stop.asked)
                if last or stopped or state.update % config.save_every == 0:
                    save(run, modules, state, history, team)
                report.advance(**history[-1])
                if stopped and not last:
                    raise checkpoint.Stopped(stop.number)

        # the trained model, the picture and the table
        finish(config, run, policy, report, history, team)
        return history


def open_policy(config: Config, device: str) -> Policy:
    policy = load_policy(config.model) if config.model else tiny_policy(config.hidden_size, config.layers)
    policy.model.to(device)
    return policy


def frozen(policy: Policy) -> Policy:
    """A copy that stays as it is."""
    reference = copy.deepcopy(policy)
    reference.model.requires_grad_(False)
    return reference


def open_run(config: Config, run: Path, overwrite: bool, team: Team, lock: Lock) -> dict[str, Any] | None:
    """The run's checkpoint, None if it has none yet. The first process locks the directory for all."""
    failure: UsageError | None = None
    if team.leads:
        try:
            lock.take(run)
            if not overwrite and (run / "config.json").exists() and Config.read(run) != config:
                raise UsageError(f"--out: {run} holds a run with other settings")
            checkpoint.open_run(run, asdict(config), overwrite)
        except UsageError as error:
            failure = error
    if team.any(failure is not None):
        raise failure or UsageError(f"--out: the first process cannot work in {run}")
    return checkpoint.load(run / "checkpoint.pt", team.device)


def restore(
    saved: dict[str, Any], modules: dict[str, Any], path: Path = Path("checkpoint.pt")
) -> tuple[State, list[dict[str, Any]]]:
    """Puts back what `save` kept, by however many processes. path: of the file, for errors."""
    try:
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        checkpoint.restore_random(saved["random"])
        return State(**saved["state"]), saved["history"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--resume: {path} does not fit the settings in config.json, put those back it was made with: {reason}"
        ) from None


def finish(
    config: Config, run: Path, policy: Policy, report: Report, history: list[dict[str, Any]], team: Team
) -> None:
    if not team.leads:
        return
    if not (run / "policy").exists():
        write_whole_directory(run / "policy", policy.save)
    report.finish(run, history, config.k)


def save(run: Path, modules: dict[str, Any], state: State, history: list[dict[str, Any]], team: Team) -> None:
    if team.leads:
        states = {name: module.state_dict() for name, module in modules.items()}
        checkpoint.save(run / "checkpoint.pt", {**states, "state": asdict(state), "history": history})
