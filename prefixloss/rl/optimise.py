"""Optimiser steps: the learning rate, gradients summed over the processes, and steps that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from prefixloss.rl.config import Config
from prefixloss.rl.team import Team

BAD_STEPS_IN_A_ROW = 3


@dataclass
class State:
    """How far a run has come."""

    update: int = 0
    step: int = 0  # optimiser steps
    skipped: int = 0  # optimiser steps without effect, for a loss or gradient that was not finite
    skipped_in_a_row: int = 0


class NotFiniteError(RuntimeError):
    """The loss or its gradient stayed infinite or NaN."""


@dataclass
class Stepper:
    """An optimiser of `model` that all processes of the team step alike."""

    config: Config
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    state: State = field(default_factory=State)
    team: Team = field(default_factory=Team)

    @classmethod
    def adamw(cls, config: Config, model: torch.nn.Module, team: Team = Team()) -> Stepper:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        return cls(config, model, optimizer, team=team)

    def begin(self, groups: int) -> float:
        """No gradients yet. Returns the groups of all processes' minibatches: what a mean over them divides by."""
        self.optimizer.zero_grad()
        return self.team.sum([groups])[0]

    def step(self, loss: float) -> None:
        """With the gradients of all; where their loss or norm is not finite, no process takes the step."""
        self.team.sum_gradients(self.model.parameters())
        (loss,) = self.team.sum([loss])
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            self._take()
        else:
            self._skip()

    def _take(self) -> None:
        self.state.step, self.state.skipped_in_a_row = self.state.step + 1, 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step)
        self.optimizer.step()

    def _skip(self) -> None:
        state = self.state
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
