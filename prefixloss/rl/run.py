"""A run in its directory: opened or resumed by one process or several, evaluated, saved, stopped and finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prefixloss import TokenAdvantages
from prefixloss.io import checkpoint
from prefixloss.io.files import write_whole_directory
from prefixloss.io.lock import Lock
from prefixloss.rl import UsageError, journal, task, trackers
from prefixloss.rl.config import Config
from prefixloss.rl.engine import Engine, Sampler
from prefixloss.rl.evaluate import evaluate
from prefixloss.rl.optimise import State, Stepper
from prefixloss.rl.policy import Policy
from prefixloss.rl.report import Report
from prefixloss.rl.rollouts import Checked, Sampled
from prefixloss.rl.samples import write_page, write_samples
from prefixloss.rl.start import (
    Problems,
    frozen,
    load_detector,
    open_engine,
    open_policy,
    open_problems,
    open_teacher,
    warm_start,
)
from prefixloss.rl.teachers import Teacher
from prefixloss.rl.team import Team


@contextmanager
def opened(config: Config, directory: Path, report: Report, overwrite: bool) -> Iterator[Run]:
    """The run, from its checkpoint if it has one; locked, and listening to signals, as long as it is open."""
    stop = checkpoint.Stop()
    with Lock() as lock, stop.listening():
        team = Team.join(config.device, config.timeout)
        if config.prompts // team.size < config.minibatches:
            raise UsageError(f"--prompts: got {config.prompts}, expected at least one a minibatch and process")
        report = report if team.leads else Report(Console(quiet=True))
        torch.set_num_threads(config.threads or torch.get_num_threads())
        torch.manual_seed(config.seed)
        problems, held_out = open_problems(config)
        policy = open_policy(config, team.device)
        teacher = open_teacher(config, policy, team.device)
        load_detector(config)
        engine = open_engine(config, policy, directory, held_out, team)
        saved = open_run(config, directory, overwrite, team, lock)
        if saved is None and config.model is None:
            warm_start(policy, config, problems, report, stop)
        team.start_alike(policy.model.state_dict().values())
        run = Run(config, directory, report, team, stop, problems, held_out, policy, teacher, engine)
        if saved is not None:
            run.stepper.state, run.history = restore(saved, run.modules, directory / "checkpoint.pt")
        tracker = config.log_to if team.leads else None
        with trackers.opened(tracker, directory, asdict(config), run.update) as run.log:
            run.begin()
            yield run
            run.finish()


class Run:
    """The policy, its frozen copy, its teacher, its optimiser, and what is left on disk on the way."""

    def __init__(
        self, config: Config, directory: Path, report: Report, team: Team, stop: checkpoint.Stop, problems: Problems,
        held_out: list[task.Problem], policy: Policy, teacher: Teacher | None, engine: Engine | None = None,
    ) -> None:  # fmt: skip
        self.config, self.directory, self.report, self.team, self.stop = config, directory, report, team, stop
        self.problems, self.held_out, self.policy = problems, held_out, policy
        self.reference, self.teacher, self.engine = frozen(policy), teacher, engine
        self.stepper = Stepper.adamw(config, policy.model, team)
        # what a checkpoint keeps; of adapters nothing else moves, and they start as no change
        models = {"model": policy.model, "reference": self.reference.model}
        trained: dict[str, Any] = {"model": Adapters(policy.model)} if config.lora else models
        self.modules = {**trained, "optimizer": self.stepper.optimizer}
        self.log: trackers.Log = lambda metrics: None
        self.history: list[dict[str, Any]] = []

    @property
    def update(self) -> int:
        return self.stepper.state.update

    @property
    def sampler(self) -> Sampler:
        return self.engine or self.policy

    @property
    def evaluates(self) -> bool:
        """Whether the update to come is one that is evaluated."""
        return self.update + 1 == self.config.updates or (self.update + 1) % self.config.eval_every == 0

    def begin(self) -> None:
        """Evaluates the policy that the run starts from, if it does not resume."""
        if not self.history:
            self.history = [{"update": 0, **self.evaluation()}]
            self.save()
            self.log(self.history[0])
        if self.team.leads:
            journal.rewrite_metrics(self.directory / "metrics.jsonl", self.history)
        self.report.evaluated(next(m for m in reversed(self.history) if "pass@1" in m))
        if self.team.any(self.stop.asked) and self.update < self.config.updates:
            raise checkpoint.Stopped(self.stop.number)

    def evaluation(self) -> dict[str, float]:
        self.serve()
        return evaluate(self.config, self.policy, self.held_out, self.team, self.sampler)

    def serve(self) -> None:
        """What samples has the policy's weights from here on."""
        if self.engine is not None:
            self.engine.load(self.update)

    def phase(self) -> AbstractContextManager[None]:
        """The progress of the updates."""
        return self.report.phase("training", self.config.updates, done=self.update)

    def next_problems(self) -> list[task.Problem]:
        """This process's, for the update to come; they follow on from the warm start's."""
        config = self.config
        used = config.warm_steps * config.warm_batch * (config.model is None)
        self.team.seed(config.seed, self.update)
        self.serve()
        return self.team.share(self.problems(used + self.update * config.prompts, config.prompts))

    def keep(
        self, problems: list[task.Problem], sampled: Sampled, checked: Checked, credit: Tensor | TokenAdvantages
    ) -> None:
        """Leaves the responses of updates that are evaluated."""
        if self.evaluates and self.team.leads:
            by: Any = self.config.steps if self.config.detector or not problems[0].lines else "lines"
            lines = self.directory / "responses.jsonl"
            write_samples(lines, self.policy, problems, sampled, checked, credit, by)
            write_page(lines, self.directory / "pages" / f"update-{self.update + 1}.html")

    def updated(self, metrics: dict[str, float]) -> None:
        """Notes an update, evaluates and saves where it is time to, and stops where that was asked for."""
        evaluates, state = self.evaluates, self.stepper.state
        state.update += 1
        last = state.update == self.config.updates
        self.history.append({"update": state.update, **metrics})
        if evaluates:
            self.history[-1] |= self.evaluation()
            self.report.evaluated(self.history[-1])
        if self.team.leads:
            journal.append_metrics(self.directory / "metrics.jsonl", self.history[-1])
            self.log(self.history[-1])
        stopped = self.team.any(self.stop.asked)
        if last or stopped or state.update % self.config.save_every == 0:
            self.save()
        self.report.advance(**self.history[-1])
        if stopped and not last:
            raise checkpoint.Stopped(self.stop.number)

    def save(self) -> None:
        if self.team.leads:
            states = {name: module.state_dict() for name, module in self.modules.items()}
            progress = {"state": asdict(self.stepper.state), "history": self.history}
            checkpoint.save(self.directory / "checkpoint.pt", {**states, **progress})

    def finish(self) -> None:
        """The trained model, the picture and the table."""
        if self.team.leads:
            if not (self.directory / "policy").exists():
                write_whole_directory(self.directory / "policy", self.policy.save)
            self.report.finish(self.directory, self.history, self.config.k)


class Adapters:
    """A LoRA model's adapters alone, kept and put back as a module's state is."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self.state_dict().items():
                own.copy_(saved[name])


def open_run(config: Config, directory: Path, overwrite: bool, team: Team, lock: Lock) -> dict[str, Any] | None:
    """The run's checkpoint, None if it has none yet. The first process locks the directory for all."""
    failure: UsageError | None = None
    if team.leads:
        try:
            lock.take(directory)
            if not overwrite and (directory / "config.json").exists() and Config.read(directory) != config:
                raise UsageError(f"--out: {directory} holds a run with other settings")
            journal.open_run(directory, asdict(config), overwrite)
        except UsageError as error:
            failure = error
    if team.any(failure is not None):
        raise failure or UsageError(f"--out: the first process cannot work in {directory}")
    return checkpoint.load(directory / "checkpoint.pt", team.device)


def restore(saved: dict[str, Any], modules: dict[str, Any], path: Path) -> tuple[State, list[dict[str, Any]]]:
    """Puts back what `save` kept, by however many processes. path: of the file, for errors."""
    with checkpoint.fitting(path):
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        checkpoint.restore_random(saved["random"])
        return State(**saved["state"]), saved["history"]
