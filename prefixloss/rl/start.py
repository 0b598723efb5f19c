"""What a run starts from: its problems, its policy and, for the built-in one, a short time on written solutions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from prefixloss import linear_logps
from prefixloss.check import first_line
from prefixloss.detect.choose import by_name
from prefixloss.io import checkpoint
from prefixloss.io.address import Address
from prefixloss.io.endpoint import UnansweredError
from prefixloss.rl import UsageError, task
from prefixloss.rl.config import Config
from prefixloss.rl.engine import Engine, Place
from prefixloss.rl.policy import Policy, add_checkpoints, add_lora, load_policy, set_chat, tiny_policy
from prefixloss.rl.reload import BY_NAME
from prefixloss.rl.report import Report
from prefixloss.rl.teachers import Teacher
from prefixloss.rl.team import Team
from prefixloss.steps import INSTRUCTION
from prefixloss.teacher import ServedTeacher

PROBES = 8  # questions
TEXT = f"Step 1: 12*3=36\n{INSTRUCTION}"  # that two tokenizers cut alike only if they are one

Problems = Callable[[int, int], list[task.Problem]]


def open_problems(config: Config) -> tuple[Problems, list[task.Problem]]:
    """The endless training sequence, as a function of (start, count), and the held-out problems."""
    if config.data:
        try:
            problems, held_out = task.load_split(Path(config.data), config.eval_problems)
        except ValueError as error:
            raise UsageError(f"--data: {error}") from None
        return partial(task.shuffled, problems, config.seed), held_out
    chains = partial(
        task.chains, min_steps=config.min_steps, max_steps=config.max_steps, free_form=config.model is not None
    )
    return partial(chains, config.seed), chains(0, 0, config.eval_problems, held_out=True)


def open_policy(config: Config, device: str) -> Policy:
    policy = load_policy(config.model) if config.model else tiny_policy(config.hidden_size, config.layers)
    if config.model:
        set_chat(policy, config.chat, config.model)
    policy.dtype = getattr(torch, config.dtype)
    if config.lora:
        add_lora(policy, config.lora)
    if config.gradient_checkpointing:
        add_checkpoints(policy)
    policy.model.to(device)
    return policy


def load_detector(config: Config) -> None:
    """The models that it asks: what fails here would fail for every response. The policy is there already."""
    if config.detector is None:
        return
    try:
        by_name(config.detector, rollouts=by_name("auto")).load()
    except Exception as error:  # whatever a checkpoint, its code or a device brings
        got = f"got {config.detector!r}, which cannot be loaded"
        raise UsageError(f"--detector: {got}: {first_line(error)}") from None


def open_teacher(config: Config, policy: Policy, device: str) -> Teacher | None:
    """The frozen teacher, which has to read the policy's own tokens."""
    if config.teacher is None:
        return None
    if Address.of(config.teacher):
        return served_teacher(config, policy)
    teacher = load_policy(config.teacher, "--teacher")
    if teacher.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UsageError(f"--teacher: {config.teacher!r} has another tokenizer than the policy")
    if len(teacher.weight) != len(policy.weight):
        sizes = f"{len(teacher.weight)} tokens, the policy {len(policy.weight)}"
        raise UsageError(f"--teacher: {config.teacher!r} has a head for {sizes}")
    if teacher.softcap != policy.softcap:
        caps = f"{teacher.softcap}, the policy's at {policy.softcap}: the loss has one cap for both"
        raise UsageError(f"--teacher: {config.teacher!r} has logits capped at {caps}")
    teacher.dtype = policy.dtype
    teacher.model.to(device).requires_grad_(False)
    return teacher


def served_teacher(config: Config, policy: Policy) -> ServedTeacher:
    """One behind a server, which has to cut a text into the policy's own tokens too."""
    address = named(str(config.teacher), config.timeout, "--teacher")
    own = policy.tokenizer.encode(TEXT, add_special_tokens=False)
    try:
        theirs = address.tokens(TEXT, config.timeout)
    except UnansweredError as error:
        raise UsageError(f"--teacher: {error}") from None
    if theirs != own:
        raise UsageError(f"--teacher: {address.model!r} has another tokenizer than the policy")
    size = len(policy.lm_head.weight)
    return ServedTeacher(address.url, str(address.model), size, config.teacher_top, seconds=config.timeout)


def open_engine(
    config: Config, policy: Policy, directory: Path, held_out: list[task.Problem], team: Team
) -> Engine | None:
    """The engine that samples, without weights yet; None where the policy does that itself."""
    if config.rollouts is None:
        return None
    place = Place(named(config.rollouts, config.timeout, "--rollouts"), directory / "served", config.timeout)
    return Engine(policy, place, BY_NAME[config.reload], [p.question for p in held_out[:PROBES]], team)


def named(text: str, seconds: float, option: str) -> Address:
    """A server's address from URL or MODEL@URL, with the model's name there; UsageError where it is not there."""
    address = Address.of(text)
    assert address is not None
    try:
        return address.named(seconds)
    except UnansweredError as error:
        raise UsageError(f"{option}: {error}") from None


def frozen(policy: Policy) -> Policy:
    """A copy that stays as it is; weights that are not trained are shared with it."""
    reference = copy.deepcopy(policy, {id(p): p for p in policy.model.parameters() if not p.requires_grad})
    reference.model.requires_grad_(False)
    return reference


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
