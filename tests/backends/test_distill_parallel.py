"""Distillation with a vocabulary split over processes: what one process gives, on all of them, to the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import group_of, in_processes
from torch import Tensor

from prefixloss import distill_loss, linear_distill_loss
from prefixloss.maths.divergence import BY_NAME

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk through gloo")

N, D, E, V = 6, 4, 5, 11
# columns of each rank, uneven; of 13 the last 2 are padding, all that one of three has
SPLITS = [(7, 4), (1, 10), (5, 6, 2)]


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calls() -> list[dict[str, Any]]:
    every = [{"divergence": name, "temperature": 0.7} for name in BY_NAME]
    return [*every, {"reduction": "none", "softcap": 3.0, "weights": torch.arange(N).double()}]


def given(columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A banned token for each side, and ids that lie on every rank."""
    made = {
        "hidden": tensor(N, D, seed=0), "weight": tensor(columns, D, seed=1), "bias": tensor(columns, seed=2),
        "t_hidden": tensor(N, E, seed=3), "t_weight": tensor(columns, E, seed=4), "t_bias": tensor(columns, seed=5),
        "logps": tensor(N, V, seed=6).log_softmax(1)[:, :4],
    }  # fmt: skip
    made["bias"][3] = made["t_bias"][3] = -math.inf
    made = {name: x.to(dtype) for name, x in made.items()}
    made["ids"] = torch.tensor(
        [[0, 10, 5, -1], [9, 2, -1, 1], [-1, -1, -1, -1], [4, 6, 8, 10], [7, 0, 1, 2], [6, -1, 5, 0]]
    )
    return made


def answers(x: dict[str, Tensor], part: slice, options: dict[str, Any], **group: Any) -> list[Tensor]:
    """Loss, divergences and gradients of three calls: a head, a list, logits beside logits; the columns of `part`."""
    out = []
    head = x["weight"][part].clone().requires_grad_(), x["bias"][part].clone().requires_grad_()
    hidden = x["hidden"].clone().requires_grad_()
    names = ("teacher_hidden", "teacher_lm_head_weight", "teacher_lm_head_bias")
    whole = dict(zip(names, (x["t_hidden"], x["t_weight"][part], x["t_bias"][part]), strict=True))
    for teacher in (whole, {"teacher_ids": x["ids"], "teacher_logps": x["logps"]}):
        made = linear_distill_loss(hidden, head[0], lm_head_bias=head[1], **teacher, **options, **group)
        out += [made.loss.detach(), made.divergence, *torch.autograd.grad(made.loss.sum(), (hidden, *head))]
    logits = (x["hidden"] @ x["weight"].T + x["bias"])[:, part].clone().requires_grad_()
    teacher = (x["t_hidden"] @ x["t_weight"].T + x["t_bias"])[:, part]
    made = distill_loss(logits, teacher_logits=teacher, **options, **group)
    return [*out, made.loss.detach(), made.divergence, *torch.autograd.grad(made.loss.sum(), logits)]


def same_answers(rank: int, size: int, file: str, split: tuple[int, ...]) -> None:
    columns, first = sum(split), sum(split[:rank])
    part = slice(first, first + split[rank])
    with group_of(rank, size, file) as group:
        for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            x = given(columns, dtype)
            for options in calls():
                vocab = {} if columns == V else {"vocab_size": V}
                want = answers(x, slice(None), options, **vocab)
                got = answers(x, part, options, tp_group=group, **vocab)
                for i, (g, w) in enumerate(zip(got, want, strict=True)):
                    last = i == len(want) - 1  # logits, with this rank's columns; the head and its bias have its rows
                    mine = w if g.shape == w.shape else w[:, part] if last else w[part]
                    # sums in another order
                    torch.testing.assert_close(g, mine, rtol=rtol, atol=rtol / 10, msg=f"{i} {options}")
                for g in got[:3]:
                    everywhere = [torch.empty_like(g) for _ in range(size)]
                    dist.all_gather(everywhere, g.contiguous(), group=group)
                    assert all(torch.equal(g, other) for other in everywhere)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_parts_of_a_vocabulary_give_what_the_whole_gives(split: tuple[int, ...], tmp_path: Path) -> None:
    in_processes(same_answers, len(split), tmp_path, split)
