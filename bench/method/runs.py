"""Training runs that compare credit assignments on the built-in task, from one warm start a seed.

A run is `prefixloss train` at a smaller size, with what judges the responses (`check`) as a parameter: the built-in
check, one with errors, or a loose one that takes every true equation for a right step.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prefixloss.backends.tolerance import resolved
from prefixloss.io.checkpoint import Stop
from prefixloss.io.files import write_whole, write_whole_directory
from prefixloss.rl import task, train
from prefixloss.rl.config import Config
from prefixloss.rl.evaluate import evaluate
from prefixloss.rl.optimise import Stepper
from prefixloss.rl.policy import Policy, tiny_policy
from prefixloss.rl.report import Report
from prefixloss.rl.rollouts import Checked, Sampled
from prefixloss.rl.start import frozen, open_problems, open_teacher, warm_start

from ..tolerance import leaving_out
from . import judge as method_judge

# a sixth of the demo's rollouts: a run takes about a minute on one core
SMALL = Config(updates=40, prompts=16, eval_every=10, eval_problems=64, eval_samples=8, k=4, lr_warmup=10)
# makes what judges the responses of a run, for a seed
Judge = Callable[[int], train.Judge]


def exact(seed: int) -> train.Judge:
    """The built-in check."""
    return train.judge


@dataclass(frozen=True)
class Noisy:
    """The built-in check with mistakes: a share `rate` of the first errors it finds is moved to an earlier or later
    step (chosen evenly; one that cannot move stays), or missed."""

    kind: str
    rate: float

    def __call__(self, seed: int) -> train.Judge:
        return partial(self._check, random.Random(f"{self.kind} {self.rate} {seed}"))

    def _check(
        self, rng: random.Random, config: Config, policy: Policy, problems: list[task.Problem], sampled: Sampled
    ) -> Checked:
        checked = train.judge(config, policy, problems, sampled)
        moved = checked.first_error.clone()
        for i, error in enumerate(checked.first_error.tolist()):
            if error < 0 or rng.random() >= self.rate:
                continue
            starts = line_starts(policy, sampled.tokens[i][sampled.mask[i]])
            choices = {
                "early": [s for s in starts if s < error],
                "late": [s for s in starts if s > error],
                "missed": [-1],
            }[self.kind]
            moved[i] = rng.choice(choices) if choices else error
        return replace(checked, first_error=moved)


def line_starts(policy: Policy, ids: Tensor) -> list[int]:
    """The first token of every line of a response of the tiny model, which has a token for a line's end."""
    end = policy.tokenizer.convert_tokens_to_ids("\n")
    return [0, *(i + 1 for i, token in enumerate(ids[:-1].tolist()) if token == end)]


_STEP = re.compile(r"Step ([1-9]): ([0-9]{1,4})([-+*])([0-9]{1,4})=([0-9]{1,6})")


def true_steps(text: str) -> int:
    """How many lines from the first on are "Step k: a+b=c" in order, and true."""
    count = 0
    for line in text.split("\n"):
        match = _STEP.fullmatch(line)
        if match is None or int(match[1]) != count + 1:
            break
        a, b, c = int(match[2]), int(match[4]), int(match[5])
        if {"+": a + b, "-": a - b, "*": a * b}[match[3]] != c:
            break
        count += 1
    return count


def loose(seed: int) -> train.Judge:
    """A judge that a policy can please with steps that do not help: the first error of a wrong response is its first
    line that is not a true equation."""

    def check(config: Config, policy: Policy, problems: list[task.Problem], sampled: Sampled) -> Checked:
        checked = train.judge(config, policy, problems, sampled)
        first = checked.first_error.clone()
        for i, text in enumerate(sampled.texts):
            if not checked.correct[i] and sampled.finished[i]:
                starts = line_starts(policy, sampled.tokens[i][sampled.mask[i]])
                first[i] = starts[min(true_steps(text), len(starts) - 1)]
        return replace(checked, first_error=first)

    return check


JUDGED = "prm:judge"  # stands for the directory of the trained judge


@dataclass(frozen=True)
class Condition:
    """One line of a comparison: options of `Config` over SMALL, and a judge."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    judge: Judge = exact

    @property
    def tolerant(self) -> bool:
        """Whether it is run `leaving_out`."""
        return any(name.endswith("gradient_tolerance") for name in self.options)

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return "distill_from" in self.options

    @property
    def judged(self) -> bool:
        """Whether the trained judge finds the first errors."""
        return self.options.get("detector") == JUDGED

    @property
    def key(self) -> str:
        """What the run does, whatever it is called: equal runs of two comparisons are made once."""
        options = {**{"advantage": "vppo", "alpha": SMALL.alpha, "shorten": SMALL.shorten}, **self.options}
        if options["advantage"] != "vppo":
            options = {name: value for name, value in options.items() if name not in ("alpha", "shorten")}
        judge = getattr(self.judge, "__name__", repr(self.judge))
        return f"{judge} " + " ".join(f"{name}={value}" for name, value in sorted(options.items()))


# what gradient_tolerance="auto" is where gradients are bfloat16; these runs have float32, whose own is next to nothing
AUTO = round(resolved("auto", torch.bfloat16), 5)
MUCH = round(100 * AUTO, 5)
# seeds of each comparison
SEEDS = {"compare": 10, "inflation": 5, "alpha": 5, "noise": 5, "teacher": 10, "tolerance": 10, "judge": 10}
EXPERIMENTS: dict[str, list[Condition]] = {
    "compare": [
        Condition("VPPO"),
        Condition("GRPO", {"advantage": "grpo"}),
        Condition("GRPO without std", {"advantage": "dr-grpo"}),
        Condition("RTS", {"advantage": "rts"}),
        Condition("Mixed", {"advantage": "mixed"}),
    ],
    # with room for nine steps where five or six are needed
    "inflation": [
        Condition("nothing cut", {"shorten": 0, "max_tokens": 96}, loose),
        Condition("8 tokens cut", {"shorten": 8, "max_tokens": 96}, loose),
        Condition("a tenth cut", {"shorten": 0.1, "max_tokens": 96}, loose),
    ],
    "alpha": [Condition(f"{alpha:g}", {"alpha": alpha}) for alpha in (0.0, 0.25, 0.5, 1.0)],
    "noise": [
        Condition("none"),
        *(
            Condition(f"{kind} {rate:.0%}", judge=Noisy(kind, rate))
            for kind in ("early", "late", "missed")
            for rate in (0.25, 0.5)
        ),
        Condition("GRPO", {"advantage": "grpo"}),
    ],
    "teacher": [
        Condition("VPPO"),
        Condition("GRPO", {"advantage": "grpo"}),
        Condition("VPPO, teacher from the first error", {"distill_from": "first-error"}),
        Condition("teacher alone, from the first error", {"advantage": "none", "distill_from": "first-error"}),
        Condition("teacher alone, wrong responses", {"advantage": "none", "distill_from": "wrong"}),
        Condition("teacher alone, all responses", {"advantage": "none", "distill_from": "all"}),
    ],
    "tolerance": [
        Condition("VPPO"),
        Condition("auto, the hidden states alone", {"gradient_tolerance": AUTO}),
        Condition("auto, both", {"gradient_tolerance": AUTO, "head_gradient_tolerance": AUTO}),
        Condition("100 x auto, both", {"gradient_tolerance": MUCH, "head_gradient_tolerance": MUCH}),
    ],
    "judge": [
        Condition("exact check"),
        Condition("trained judge", {"detector": JUDGED, "steps": "lines"}),
        Condition("own rollouts", {"detector": "rollouts", "steps": "lines", "continuations": 4}),
        Condition("GRPO", {"advantage": "grpo"}),
    ],
}
# the teacher: another model of the policy's size, on written solutions for longer
STRONGER = replace(SMALL, seed=1000, warm_steps=1500, warm_loss=0.03)

# whose responses the judge is trained on: a policy as those of the runs start from, of a seed that no run has
WRITER = replace(SMALL, seed=2000)


def warm(seed: int, directory: Path) -> Path:
    """The policy that all runs of a seed start from, made once."""
    path = directory / f"warm-{seed}.pt"
    if not path.exists():
        write_whole(path, partial(torch.save, _started(replace(SMALL, seed=seed)).model.state_dict()))
    return path


def teacher(directory: Path) -> Path:
    """The directory of the teacher that all taught runs have, made once."""
    path = directory / "teacher"
    if not path.exists():
        write_whole_directory(path, _started(STRONGER).save)
    return path


def trained_judge(directory: Path) -> Path:
    """The directory of the judge that all judged runs have, made once."""
    return method_judge.trained(directory, teacher(directory), writer(directory), WRITER)


def writer(directory: Path) -> Callable[[], Policy]:
    """Makes the policy whose responses the judge is trained on."""

    def make() -> Policy:
        policy = tiny_policy(WRITER.hidden_size, WRITER.layers)
        policy.model.load_state_dict(torch.load(warm(WRITER.seed, directory), weights_only=True))
        return policy

    return make


def _started(config: Config) -> Policy:
    """A new policy after its time on written solutions."""
    torch.manual_seed(config.seed)
    policy = tiny_policy(config.hidden_size, config.layers)
    problems, _ = open_problems(config)
    warm_start(policy, config, problems, Report(Console(quiet=True)), Stop())
    return policy


def run(condition: Condition, seed: int, start: Path, base: Config = SMALL) -> dict[str, Any]:
    """One training run: a curve with a point an evaluation, the rest means over the updates since the last one."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    beside: dict[str, Any] = {"teacher": str(teacher(start.parent))} if condition.taught else {}
    if condition.judged:
        beside["detector"] = f"prm:{trained_judge(start.parent)}"
    config = replace(base, seed=seed, **{**condition.options, **beside})
    problems, held_out = open_problems(config)
    policy = tiny_policy(config.hidden_size, config.layers)
    policy.model.load_state_dict(torch.load(start, weights_only=True))
    reference, taught_by = frozen(policy), open_teacher(config, policy, "cpu")
    stepper = Stepper.adamw(config, policy.model)
    steps: list[float] = []  # that the responses of an update have, on average
    judge = condition.judge(seed)

    def check(config: Config, policy: Policy, problems: list[task.Problem], sampled: Sampled) -> Checked:
        steps.append(statistics.fmean(text.count("Step ") for text in sampled.texts))
        return judge(config, policy, problems, sampled)

    kept = ["reward", "length", "kl", *(["gradient_left_out"] if condition.tolerant else [])]
    curve: list[dict[str, float]] = [{"update": 0, **evaluate(config, policy, held_out)}]
    since: list[dict[str, float]] = []
    for number in range(1, config.updates + 1):
        torch.manual_seed(1_000_003 * seed + number)
        first = config.warm_steps * config.warm_batch + (number - 1) * config.prompts
        batch = problems(first, config.prompts)
        with leaving_out() if condition.tolerant else nullcontext():
            metrics = train.learn(config, policy, reference, stepper, batch, check, teacher=taught_by)
        since.append({"steps": steps[-1], **{name: metrics[name] for name in kept}})
        if number % config.eval_every == 0 or number == config.updates:
            means = {name: statistics.fmean(point[name] for point in since) for name in since[0]}
            curve.append({"update": number, **means, **evaluate(config, policy, held_out)})
            since = []
    seconds = round(time.perf_counter() - began)
    points = [
        {name: round(value, 7 if name == "gradient_left_out" else 5) for name, value in point.items()}
        for point in curve
    ]
    return {"key": condition.key, "seed": seed, "seconds": seconds, "curve": points}
