"""An update's figures: means over the responses and the learning tokens of all processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefixloss import DistillOutput, LossOutput
from prefixloss.rl.config import Config
from prefixloss.rl.rollouts import Checked, Sampled
from prefixloss.rl.team import Team


@dataclass
class Learned:
    """Sums over the learning tokens of an update's passes."""

    tokens: float = 0.0
    kl: float = 0.0
    clip_share: float = 0.0
    left_out: float = 0.0  # of the logits' gradient, by a tolerance
    sampler_gap: float = 0.0  # nats that a served engine's log-probs are away from the policy's
    taught: float = 0.0  # tokens that a teacher was asked about
    divergence: float = 0.0

    def add(self, out: LossOutput, taught: DistillOutput | None) -> None:
        tokens = float(out.metrics["learning_tokens"])
        self.tokens += tokens
        self.kl += tokens * float(out.metrics["kl"])
        self.left_out += tokens * float(out.metrics["gradient_left_out"])
        self.clip_share += tokens * float(out.metrics["clip_low"] + out.metrics["clip_high"])
        if taught is not None:
            tokens = float(taught.metrics["learning_tokens"])
            self.taught += tokens
            self.divergence += tokens * float(taught.metrics["divergence"])


def metrics_of(config: Config, sampled: Sampled, checked: Checked, learned: Learned, team: Team) -> dict[str, float]:
    """One dict for all processes, each with its own responses."""
    found = ~checked.correct & (checked.first_error >= 0)
    flawed = checked.correct & (checked.first_error >= 0)
    local: dict[str, Any] = {
        "responses": len(sampled.mask), "reward": checked.correct.sum(), "found": found.sum(),
        "flawed": flawed.sum(),
        "good_prefix": checked.first_error[found].sum(), "good_steps": checked.right_steps[found].sum(),
        "length": sampled.mask.sum(), **vars(learned),
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
        **({"gradient_left_out": of["left_out"] / max(of["tokens"], 1.0)} if config.tolerant else {}),
        # of the right answers
        **({"flawed": of["flawed"] / max(of["reward"], 1.0)} if config.flawed is not None else {}),
        **({"sampler_gap": of["sampler_gap"] / of["length"]} if config.rollouts else {}),
        **({"divergence": of["divergence"] / max(of["taught"], 1.0)} if config.teacher else {}),
    }
