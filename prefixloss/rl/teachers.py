"""What a teacher says of an update's responses: the arguments of `linear_distill_loss` that are the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixloss.rl.policy import Policy
from prefixloss.rl.rollouts import Sampled
from prefixloss.teacher import ServedTeacher

Teacher = Policy | ServedTeacher
Says = Callable[[Tensor], dict[str, Any]]  # of the responses with these numbers


def says(teacher: Teacher, policy: Policy, sampled: Sampled, weights: Tensor) -> Says:
    """weights: float [B, T], 0 where it is not asked. A served teacher is asked at once, about all of them."""
    if isinstance(teacher, Policy):
        return _whole(teacher, policy, sampled)
    return _listed(teacher, policy, sampled, weights)


def _whole(teacher: Policy, policy: Policy, sampled: Sampled) -> Says:
    """Its whole distribution, computed again with each pass."""
    # the loss has one scale for both
    scale = teacher.logit_scale / policy.logit_scale
    bias = None if teacher.bias is None else scale * teacher.bias

    @torch.no_grad()
    def of(rows: Tensor) -> dict[str, Any]:
        return {
            "teacher_hidden": scale * teacher.hidden(sampled.rows(rows)),
            "teacher_lm_head_weight": teacher.weight,
            "teacher_lm_head_bias": bias,
        }

    return of


def _listed(teacher: ServedTeacher, policy: Policy, sampled: Sampled, weights: Tensor) -> Says:
    """Its likeliest tokens, for each token from a response's first one with a weight on; none for those before it."""
    prompts, lengths = sampled.prompt_lengths.tolist(), sampled.mask.sum(1).tolist()
    sequences = [ids[seen.bool()].tolist() for ids, seen in zip(sampled.ids, sampled.attention, strict=True)]
    weighed = (weights != 0) & sampled.mask
    skipped = torch.where(weighed.any(1), weighed.int().argmax(1), sampled.mask.sum(1)).tolist()
    found = teacher.listed(sequences, [prompt + skip for prompt, skip in zip(prompts, skipped, strict=True)])
    asked = [length - skip for length, skip in zip(lengths, skipped, strict=True)]
    counts = torch.zeros(sampled.mask.shape, dtype=torch.int64)
    for row, some in enumerate(found.teacher_offsets.diff().split(asked)):
        counts[row, skipped[row] : lengths[row]] = some
    sizes = counts.sum(1).tolist()
    ids, logps = found.teacher_ids.split(sizes), found.teacher_logps.split(sizes)

    def of(rows: Tensor) -> dict[str, Any]:
        chosen = rows.tolist()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts[chosen].flatten().cumsum(0)])
        packed = (torch.cat([ids[i] for i in chosen]), torch.cat([logps[i] for i in chosen]), offsets)
        return {name: x.to(policy.device) for name, x in zip(found._fields, packed, strict=True)}

    return of
