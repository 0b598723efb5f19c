"""A fused head for TRL before 1.15, whose GRPO and RLOO trainers take the model's logits.

It answers the same call as the head that TRL adds from 1.15 on: `model(..., labels=labels, fused_lm_head=True)` has
`log_probs` and `entropy`, made where the model's LM head is called, so that wrappers (DDP, FSDP, PEFT) see it used.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.integrations.models.heads import LogitMap, chosen_module, linear_of, refuse_quantised, unwrapped


def per_token_logps(
    trainer: Any,
    call: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **images: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The trainer's log-probs, entropies and router loss, [B, logits_to_keep], in the signature of its own method.

    call: the model, or a function around it with that model as its attribute `module`.
    """
    for name, value in images.items():
        if value is not None:
            check.fail(name, "a value", "None: images need TRL from 1.15 on")
    add_fused_head(unwrapped(call))
    options: dict[str, Any] = {"fused_lm_head": True, "temperature": trainer.temperature, "use_cache": False}
    if "logits_to_keep" in trainer.model_kwarg_keys:
        options["logits_to_keep"] = logits_to_keep + 1
    if compute_aux_loss:
        options["output_router_logits"] = True
    made = []
    for ids, seen in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
        labels = ids.masked_fill(seen == 0, -100)
        labels[:, :-logits_to_keep] = -100
        made.append(call(input_ids=ids, attention_mask=seen, labels=labels, **options))
    logps, entropy = (torch.cat([out[name] for out in made])[:, -logits_to_keep:] for name in ("log_probs", "entropy"))
    if not getattr(trainer, "_entropy_bonus_enabled", False):
        entropy = entropy.detach()
    aux_loss = torch.stack([out["aux_loss"] for out in made]).mean() if compute_aux_loss else None
    return logps, entropy if compute_entropy else None, aux_loss


def add_fused_head(model: Any) -> None:
    """Once a model; without `fused_lm_head` its forward stays what it was. ValueError where its logits are scaled."""
    if hasattr(model.forward, "fused_lm_head"):
        return
    maps = list(LogitMap.candidates(model.config))
    if maps[0].scale != 1:
        check.fail(
            "model", f"{type(model).__name__}, which scales its logits", "one that does not, or TRL from 1.15 on"
        )
    inner = model.forward

    # the original signature: `generate` validates its arguments against it
    @functools.wraps(type(model).forward)
    def forward(
        this: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, temperature: float = 1.0, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs) if labels is None else inner(*args, labels=labels, **kwargs)
        with _scoring(this, labels, temperature, maps[0].softcap) as made:
            output = inner(*args, **kwargs)
        output["log_probs"], output["entropy"] = made[0].unbind(-1)
        return output

    forward.fused_lm_head = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


@contextmanager
def _scoring(model: Any, labels: Tensor, temperature: float, softcap: float | None) -> Iterator[list[Tensor]]:
    """Inside it the head gives log-probs and entropies of the labels, [B, L - 1, 2], and they are in the list."""
    from trl.trainer import utils  # noqa: PLC0415 (whose function `scored_by` has replaced with ours)

    head = chosen_module(model.get_output_embeddings())
    refuse_quantised(head)
    before = vars(head).get("forward")
    made: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        linear = linear_of(head, hidden[:, :-1])
        targets = labels[:, -linear.hidden.shape[1] :]
        mask = targets != -100
        results = utils._ChunkedLogProbFunction.apply(
            linear.hidden[mask], linear.weight, linear.bias, targets[mask], temperature, 0, softcap, 1.0, ("entropy",)
        )
        # connected to the model even where nothing is scored
        returned = torch.stack([x.new_zeros(mask.shape).masked_scatter(mask, x) for x in results[:2]], -1)
        # wrappers hang their backward hooks on what the head returns; what the model makes of it has no effect
        made.append(returned.clone())
        return returned

    head.forward = forward
    try:
        yield made
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def patched(theirs: Any, ours: Callable[..., Any]) -> Any:
    """TRL's method for log-probs with `ours` in its place, but for images, which stay TRL's."""
    text = inspect.signature(per_token_logps).parameters

    @functools.wraps(theirs)
    def method(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        shown = any(value is not None for name, value in kwargs.items() if name not in text)
        return (theirs if shown else ours)(self, model, *args, **kwargs)

    return method
