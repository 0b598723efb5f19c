"""Data parallel: the denominator of the whole batch, so that the ranks' gradients are those of one process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.config import LossConfig
from prefixloss.inputs.layout import Layout

# in place of a count of 0: a denominator that adds nothing to other micro-batches' counts
_NOTHING = 1e-30


def global_normalizer(
    config: LossConfig,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group_ids: Tensor | None = None,
    group: Any = None,
    cp_group: Any = None,
    averaged: bool = True,
) -> Tensor:
    """What to pass as `normalizer` on every rank: 0-d, float64. A collective over `group` (None: all processes).

    tokens, mask, cu_seqlens, group_ids: this rank's, as for the loss; a rank may have no token. cp_group: as for the
    loss, a part of `group`: its processes have parts of the same responses, which count once. averaged: whether the
    ranks' gradients are averaged, as DDP and FSDP do, or summed. With gradient accumulation pass the sum of the
    micro-batches' results, and let each backward run without averaging by their number (for "none", which has no
    denominator, one of them).

    ValueError: reduction="group-token-mean" with a group on several ranks, whose tokens no rank could count.
    """
    check.config(config, LossConfig)
    check.tokens(tokens)
    check.process_group("group", group)
    check.process_group("cp_group", cp_group)
    check.flag("averaged", averaged)
    if not torch.distributed.is_initialized():
        check.fail("group", "no process group in this process", "torch.distributed.init_process_group() before")
    counts = cp_group is None or torch.distributed.get_rank(cp_group) == 0
    layout = Layout.of(tokens.shape, tokens.device, mask, cu_seqlens)
    reduction, argument = config.summed, f'reduction="{config.reduction}"'
    if reduction.per is None:
        count = 1 / torch.distributed.get_world_size(group)
    elif reduction.per == "tokens":
        count = float(layout.scored.sum())
    elif reduction.per == "groups":
        if group_ids is None:
            check.fail("group_ids", "None", f"int64 [B], since {argument}")
        assert group_ids is not None
        check.tensor("group_ids", group_ids, "integer")
        check.shape("group_ids", group_ids, (layout.responses("group_ids"),), "[B]")
        count = float(_own_groups(group_ids if counts else group_ids[:0], group))
    else:
        count = float(layout.responses(argument)) if counts else 0.0
    if reduction.times_max_length:
        if config.max_length is None:
            check.fail("max_length", "None", f"a number of tokens, since {argument}")
        count *= config.max_length or 1
    total = torch.tensor(count, dtype=torch.float64, device=tokens.device)
    torch.distributed.all_reduce(total, group=group)
    total.clamp_(min=_NOTHING)
    return total / torch.distributed.get_world_size(group) if averaged else total


def _own_groups(group_ids: Tensor, group: Any) -> int:
    """How many groups are here, none of which may be elsewhere too."""
    mine = set(group_ids.tolist())
    ranks: list[set[int]] = [set()] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(ranks, mine, group=group)
    # of all ranks: those without such a group have to hear of it too
    shared = [label for label, count in Counter(label for labels in ranks for label in labels).items() if count > 1]
    if shared:
        check.fail("group_ids", f"group {min(shared)} on several ranks", "all responses of a group on one rank")
    return len(mine)
