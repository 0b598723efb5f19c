"""Where the tokens of a model's forward stand: which positions a token follows, which reach the head, and their ids."""

from __future__ import annotations

import inspect
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from prefixloss import check


class Inputs:
    """What one forward of a model of transformers is given, by name or in its place."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names, self.args, self.kwargs = names, args, kwargs

    def __getitem__(self, name: str) -> Any:
        """None where it is not given."""
        at = self.names.index(name) if name in self.names else len(self.args)
        return self.args[at] if at < len(self.args) else self.kwargs.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        at = self.names.index(name) if name in self.names else len(self.args)
        if at < len(self.args):
            self.args = (*self.args[:at], value, *self.args[at + 1 :])
        else:
            self.kwargs = {**self.kwargs, name: value}

    @property
    def length(self) -> int | None:
        """L, the positions of a row; None for a model of other inputs."""
        given = self["input_ids"] if self["inputs_embeds"] is None else self["inputs_embeds"]
        return None if given is None else given.shape[1]

    @property
    def padding(self) -> Tensor | None:
        """The attention mask [B, L or more] where it is one of tokens: others say more than what is padding."""
        mask = self["attention_mask"]
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def takes_positions(model: Any) -> bool:
    """Whether a model's forward takes position ids [B, L], and leaves it to its caller to make them.

    Models whose positions have several axes make their own, for generation too, and from the mask.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    classes = [c for c in type(model).__mro__ if c.__name__ != "GenerationMixin"]
    makes_them = any("_prepare_position_ids_for_generation" in vars(c) for c in classes)
    return not makes_them and not any(hasattr(module, "get_rope_index") for module in model.modules())


def position_ids(attention_mask: Tensor, length: int) -> Tensor:
    """int64 [B, length]: each token's place among those attended to, as generation counts; of the last columns."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """bool [length]: the first token of each of the sequences that are packed into one row."""
    # one place more: that of empty sequences at the end
    first = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return first.index_fill(0, cu_seqlens[:-1].long().clamp(0, length), True)[:length]


def follows(padding: Tensor | None, cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """bool [B or 1, length]: columns whose token has one before it, of the same sequence and attended to."""
    if cu_seqlens is not None:
        return ~starts(cu_seqlens.to(device), length)[None]
    if padding is None:
        return torch.arange(length, device=device)[None] > 0
    before = padding.to(device)[:, -length:] != 0
    return torch.nn.functional.pad(before, (1, -1))


def kept(logits_to_keep: Any, length: int, device: torch.device) -> Tensor | None:
    """int64 [K]: the positions whose hidden states the model hands to its head; None for all."""
    wants = "a whole number of positions >= 0, or an integer tensor of increasing positions"
    if isinstance(logits_to_keep, Tensor):
        check.tensor("logits_to_keep", logits_to_keep, "integer")
        if logits_to_keep.dim() != 1:
            check.fail("logits_to_keep", logits_to_keep, wants)
        at = logits_to_keep.to(device=device, dtype=torch.int64)
        if check.readable(at) and bool(((at < -length) | (at >= length)).any()):
            check.fail("logits_to_keep", f"{at.tolist()[:8]}", f"positions in [0, {length})")
        at = torch.where(at < 0, at + length, at)
        if check.readable(at) and bool((at.diff() <= 0).any()):
            check.fail("logits_to_keep", f"{at.tolist()[:8]}", wants)
        return at
    if logits_to_keep is None:
        return None
    if not isinstance(logits_to_keep, Integral) or isinstance(logits_to_keep, bool) or int(logits_to_keep) < 0:
        check.fail("logits_to_keep", repr(logits_to_keep), wants)
    last = min(int(logits_to_keep) or length, length)
    return None if last == length else torch.arange(length - last, length, device=device)
