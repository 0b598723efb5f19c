"""Several responses in one row of a model: positions that start again at 0 tell `transformers` where the next one
begins, and its masks then keep them apart, as in Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination" (arXiv 2107.02027).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss.check import first_line
from prefixloss.detect.models.reading import Marked, padded

_APART = 1e-3  # of the largest logit. Float32 rounds a thousand times finer; a token that sees others moves far more


class Laid(NamedTuple):
    """A batch as a model reads it. ends: int64 [steps], where in the rows, one behind the other, each step is judged.
    padding: int, the positions without a token."""

    inputs: dict[str, Any]
    ends: Tensor
    padding: int


def laid(batch: Sequence[Marked], device: torch.device, packing: bool) -> Laid:
    """The responses in rows as long as the longest: one in each, or, with `packing`, as many as it has room for."""
    rows = packed([len(one.ids) for one in batch]) if packing else [[k] for k in range(len(batch))]
    inputs = _inputs([[batch[k].ids for k in row] for row in rows], device, packing)
    length, ends = inputs["input_ids"].shape[1], {}
    for number, row in enumerate(rows):
        start = number * length
        for k in row:
            ends[k] = [start + end for end in batch[k].ends]
            start += len(batch[k].ids)
    every = [end for k in range(len(batch)) for end in ends[k]]
    padding = inputs["input_ids"].numel() - sum(len(one.ids) for one in batch)
    return Laid(inputs, torch.tensor(every, device=device), padding)


def packed(lengths: Sequence[int]) -> list[list[int]]:
    """Indices row by row: the longest first, and each in the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        at = next((number for number, left in enumerate(room) if left >= lengths[k]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[at].append(k)
        room[at] -= lengths[k]
    return rows


def _inputs(rows: Sequence[Sequence[list[int]]], device: torch.device, packing: bool) -> dict[str, Any]:
    ids, mask = padded([list(chain(*row)) for row in rows], device)
    if not packing:
        return {"input_ids": ids, "attention_mask": mask}
    places = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        # what is left of a row is a response, too: no other one sees it
        lengths = [*map(len, row), ids.shape[1] - sum(map(len, row))]
        places[number] = torch.cat([torch.arange(length) for length in lengths])
    # positions are looked at where there is neither a mask nor a cache
    return {"input_ids": ids, "position_ids": places, "use_cache": False}


@torch.no_grad()
def check_packing(model: Any, responses: Sequence[Marked]) -> None:
    """ValueError for a model that reads a response otherwise in a row with others: one with a state that runs on, with
    places of its own, or that looks both ways. Tried on three of the responses, the longest among them: what only a
    long one shows, as a window does, shows there."""
    ordered = sorted((one.ids for one in responses), key=len)
    row = [ordered[0], ordered[-1], ordered[len(ordered) // 2]]
    trained = model.training
    model.eval()
    try:
        alone = torch.cat([model(**_inputs([[ids]], model.device, False)).logits[0] for ids in row])
        together = model(**_inputs([row], model.device, True)).logits[0]
        far = float((together - alone).abs().max() / alone.abs().max())
        reason = f"its logits move by {far:.2g} of the largest" if not far <= _APART else None
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = first_line(error)
    finally:
        model.train(trained)
    if reason is not None:
        kind = type(model).__name__
        raise ValueError(f"packing: {kind} does not keep the responses of a row apart, {reason}: leave it off")
