"""Advantages by name, for command lines, registries and trainers. Those of a value head (`gae`) and of turns
(`turn_level`) are called directly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from prefixloss import check
from prefixloss.advantages.first_error import cliff, mixed, neutral_prefix, rts, vppo
from prefixloss.advantages.outcomes import grpo, opo, reinforce_pp, reinforce_pp_baseline, rloo
from prefixloss.inputs.token_advantages import TokenAdvantages


@dataclass(frozen=True)
class Outcome:
    """What is known of a batch of responses: [B] each, as in this package's functions; None where it is not known.

    rewards: None takes `correct` for them. mean_step_scores: None takes the share of right steps.
    """

    correct: Tensor
    lengths: Tensor
    group_ids: Tensor
    first_error: Tensor | None = None
    rewards: Tensor | None = None
    prompt_lengths: Tensor | None = None
    right_steps: Tensor | None = None
    total_steps: Tensor | None = None
    mean_step_scores: Tensor | None = None
    judged: Tensor | None = None


def _neutral(
    rewards: Tensor,
    group_ids: Tensor,
    correct: Tensor,
    first_error: Tensor,
    lengths: Tensor,
    *,
    of: str = "grpo",
    judged: Tensor | None = None,
    **options: Any,
) -> TokenAdvantages:
    """One of `OF_RESPONSES`, GRPO by default, with its options; 0 on the good prefix of wrong responses."""
    if of not in OF_RESPONSES:
        check.fail("of", repr(of), " | ".join(map(repr, OF_RESPONSES)))
    known = {"rewards": rewards, "group_ids": group_ids, "lengths": lengths, "judged": judged}
    made = OF_RESPONSES[of](**{name: known[name] for name in known.keys() & _parameters(OF_RESPONSES[of])}, **options)
    return neutral_prefix(made, correct, first_error, judged=judged)


# from rewards alone, a number a response
OF_RESPONSES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "dr-grpo": partial(grpo, std=False),
    "rloo": rloo,
    "opo": opo,
    "reinforce++": reinforce_pp,
    "reinforce++-baseline": reinforce_pp_baseline,
}
BY_NAME: dict[str, Callable[..., Tensor | TokenAdvantages]] = {
    "vppo": vppo,
    "cliff": cliff,
    "neutral_prefix": _neutral,
    "rts": rts,
    "mixed": mixed,
    **OF_RESPONSES,
}
# other spellings that are taken
ALIASES = {"neutral": "neutral_prefix"}
# what `assign` makes of the rest where it is not given
_DERIVED = {"rewards": "correct", "mean_step_scores": "right_steps"}


def named(argument: str, name: Any, names: Collection[str] = tuple(BY_NAME)) -> str:
    """The name as the table has it, or the error for the argument: `names` are expected."""
    found = ALIASES.get(name, name) if isinstance(name, str) else name
    if found not in names:
        check.fail(argument, repr(name), " | ".join(map(repr, names)))
    return str(found)


def _arguments(name: str) -> set[str]:
    """The fields of `Outcome` that a function of the table takes."""
    return _parameters(BY_NAME[name]) & set(Outcome.__dataclass_fields__)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def needs(name: str) -> set[str]:
    """Beside outcomes, lengths and groups: the fields of `Outcome` without which this one cannot be had."""
    asked = {_DERIVED.get(field, field) for field in _arguments(name)}
    return asked - {"correct", "lengths", "group_ids", "judged", "prompt_lengths"}


def splits(name: str) -> bool:
    """Whether the tokens before a first error get an advantage of their own."""
    return "first_error" in _arguments(name)


def assign(name: str, outcome: Outcome, **options: Any) -> Tensor | TokenAdvantages:
    """Advantages by name: one of `BY_NAME`, given what of the outcome it takes, with its own options."""
    name = named("advantage", name)
    known = {**vars(outcome)}
    if outcome.rewards is None:
        known["rewards"] = outcome.correct.float()
    if outcome.mean_step_scores is None and outcome.right_steps is not None and outcome.total_steps is not None:
        known["mean_step_scores"] = outcome.right_steps / outcome.total_steps.clamp(min=1)
    return BY_NAME[name](**{field: known[field] for field in _arguments(name)}, **options)
