"""The sets that a sampler drew from (top-k, top-p): which columns of the vocabulary count for each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.inputs.layout import Layout, in_bounds


class Kept(NamedTuple):
    """ids: int64 [N, K], -1 where unused. places: int64 [N], where in its set each token stands. known: bool [N],
    whether it does."""

    ids: Tensor
    places: Tensor
    known: Tensor


def kept_sets(kept_ids: Tensor, kept_offsets: Tensor | None, tokens: Tensor, layout: Layout, vocabulary: int) -> Kept:
    """kept_ids: [.., K] like tokens [..] with one axis more, or packed [M] with kept_offsets [N + 1]."""
    check.tensor("kept_ids", kept_ids, "integer")
    check.device("kept_ids", kept_ids, tokens.device)
    flat = tokens.reshape(-1).long()
    if kept_offsets is None:
        if kept_ids.shape[:-1] != tokens.shape or kept_ids.dim() != tokens.dim() + 1 or kept_ids.shape[-1] == 0:
            wants = f"[*tokens.shape, K] with tokens of shape {list(tokens.shape)}, or [M] with kept_offsets"
            check.fail("kept_ids", f"shape {list(kept_ids.shape)}", wants)
        ids = kept_ids.flatten(0, -2).long()
    else:
        ids = _padded(kept_ids, kept_offsets, len(flat))
    scored = layout.scored[:, None]
    if check.readable(ids):
        wrong = (scored & ((ids < -1) | (ids >= vocabulary))).any(1)
        _fail_at("kept_ids", wrong, layout, "an id outside", f"ids in [0, V) with V = {vocabulary}, or -1")
        ordered = ids.sort(1).values
        twice = layout.scored & ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any(1)
        _fail_at("kept_ids", twice, layout, "an id twice", "every id once")
    ids = torch.where(scored, ids.clamp(-1, vocabulary - 1), -1)
    found = (ids == flat[:, None]) & (ids >= 0)
    known = found.any(1)
    if check.readable(ids):
        _fail_at("kept_ids", layout.scored & ~known, layout, "a set without the token", "the scored token in its set")
    return Kept(ids, found.int().argmax(1), known)


def _padded(ids: Tensor, offsets: Tensor, count: int) -> Tensor:
    """Packed ids [M] with offsets [N + 1] as [N, K], -1 behind each set's own."""
    check.tensor("kept_offsets", offsets, "integer")
    check.device("kept_offsets", offsets, ids.device)
    if ids.dim() != 1:
        check.fail("kept_ids", f"shape {list(ids.shape)} with kept_offsets", "[M]")
    check.shape("kept_offsets", offsets, (count + 1,), "[N + 1], a set a token")
    if check.readable(offsets):
        ends_right = int(offsets[0]) == 0 and int(offsets[-1]) == len(ids)
        if not ends_right or bool((offsets.diff() < 0).any()):
            check.fail("kept_offsets", f"{offsets.tolist()[:8]}", f"increasing offsets from 0 to M = {len(ids)}")
    starts = in_bounds(offsets.long(), len(ids))
    sizes = starts.diff()
    width = max(1, int(sizes.max())) if count else 1
    columns = torch.arange(width, device=ids.device)
    there = columns < sizes[:, None]
    at = torch.where(there, starts[:-1, None] + columns, 0)
    return torch.where(there, ids.long()[at], -1) if len(ids) else ids.new_full((count, 1), -1, dtype=torch.int64)


def _fail_at(argument: str, wrong: Tensor, layout: Layout, got: str, wants: str) -> None:
    if bool(wrong.any()):
        check.fail(argument, f"{got} at {layout.place(int(wrong.nonzero()[0]))}", wants)
