"""Advantages that know where a response goes wrong.

Every function takes a flat batch of B responses in any order; `group_ids` [B] (int64, any labels) says which responses
answer the same prompt. `correct` [B] is bool, `lengths` [B] counts scored tokens, and `first_error` [B] is the 0-based
index, among the scored tokens, of the first token of the first wrong step, -1 where none was found (int64 both). A
response that is wrong without a known first error is penalised from its first token on: never treated as all good.
Means and standard deviations are over the responses of a group; the latter are sample standard deviations (divisor
G - 1, as in TRL and verl) with nothing added (`std_floor` is the least that is divided by), and a group whose standard
deviation is 0 gets advantage 0.

Rewards that differ by their rounding alone are equal: they are taken to be known to one rounding of their own dtype, as
sums of a few such numbers. NaN and infinite ones are refused. Where nobody can say how good a response is (a verifier
timed out), say so: `judged` [B] (bool; None: all) is False there. Such a response is no part of any mean or standard
deviation, G counts the others, and it gets advantage 0 everywhere; its other values are not looked at. A group of which
one response is judged is a group of one, and one without any gets 0.
"""

from __future__ import annotations

from prefixloss.advantages.first_error import cliff, from_first_error, mixed, neutral_prefix, rts, vppo
from prefixloss.advantages.outcomes import grpo, opo, reinforce_pp, reinforce_pp_baseline, rloo, varied
from prefixloss.advantages.table import ALIASES, BY_NAME, OF_RESPONSES, Outcome, assign, named, needs, splits
from prefixloss.advantages.turns import turn_level
from prefixloss.advantages.values import gae, value_loss
from prefixloss.inputs.token_advantages import TokenAdvantages

__all__ = [
    "ALIASES",
    "BY_NAME",
    "OF_RESPONSES",
    "Outcome",
    "TokenAdvantages",
    "assign",
    "cliff",
    "from_first_error",
    "gae",
    "grpo",
    "mixed",
    "named",
    "needs",
    "neutral_prefix",
    "opo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "rloo",
    "rts",
    "splits",
    "turn_level",
    "value_loss",
    "varied",
    "vppo",
]
