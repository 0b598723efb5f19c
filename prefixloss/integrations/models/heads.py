"""The LM heads of other people's models: where they are, what they multiply, what happens to the logits afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prefixloss import check

# what configurations of transformers call the two, and the power to which a scale usually multiplies logits
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
SCALES = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


def as_autocast(*tensors: Tensor | None) -> Any:
    """In the dtype that an enclosing autocast would multiply in; as they are without one."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def wrappers(model: Any) -> list[Any]:
    """The model, what is inside, and so on: DDP, DeepSpeed, PEFT and torch.compile; last, the one of transformers."""
    chain = [model]
    while True:
        if hasattr(model, "get_base_model"):  # PEFT, which forwards every attribute
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "module") and not hasattr(model, "get_output_embeddings"):
            model = model.module
        else:
            return chain
        chain.append(model)


def unwrapped(model: Any) -> Any:
    """The model of transformers inside its wrappers; as it is where there are none."""
    return wrappers(model)[-1]


def entrance(model: Any) -> Any:
    """What to call for one forward of `unwrapped(model)`: itself, or the wrapper around it that FSDP2 gathers."""
    chain = wrappers(model)
    return next((m for m in chain if isinstance(m, FSDPModule)), chain[-1])


class LogitMap(NamedTuple):
    """A model's logits are softcap * tanh(scale * z / softcap), or scale * z without a cap, z being its head's."""

    softcap: float | None
    scale: float

    def __call__(self, z: Tensor) -> Tensor:
        return self.scale * z if self.softcap is None else self.softcap * torch.tanh(self.scale * z / self.softcap)

    @classmethod
    def usual(cls, config: Any) -> LogitMap:
        """What a configuration means in most models that have its names."""
        known = config.get_text_config()
        softcap = next((c for name in SOFTCAPS if (c := getattr(known, name, None))), None)
        scale = next((s**power for name, power in SCALES.items() if (s := getattr(known, name, None))), 1.0)
        return cls(None if softcap is None else float(softcap), float(scale))

    @classmethod
    def candidates(cls, config: Any) -> Iterator[LogitMap]:
        """What a configuration may mean: whether a scale multiplies or divides is for the model's code to say."""
        known = config.get_text_config()
        softcap = next((c for name in SOFTCAPS if (c := getattr(known, name, None))), None)
        scale = next((s for name in SCALES if (s := getattr(known, name, None))), None)
        caps = (None,) if softcap is None else (float(softcap), None)
        scales = (1.0,) if scale is None else (float(scale), 1 / float(scale), 1.0)
        return (cls(cap, factor) for cap in caps for factor in scales)


class Linear(NamedTuple):
    """A head over hidden states: logits = hidden weight^T + bias; [.., D], [V, D], [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def chosen_module(head: Any) -> Any:
    """The head, or the copy of it that PEFT's `modules_to_save` uses now."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    active = head.active_adapters
    if head.disable_adapters or not active or any(name not in head._adapters for name in active):
        return head.original_module
    return head.modules_to_save[active[0]]


def refuse_quantised(head: Any) -> None:
    """ValueError for a head, under an adapter or not, whose weight is not there in floating point."""
    base = getattr(head, "base_layer", head)
    found = check.quantised(getattr(base, "weight", None))
    if found is None and not type(base).__module__.startswith("bitsandbytes."):
        return
    names = "torchao: filter_fn, bitsandbytes: llm_int8_skip_modules, others: modules_to_not_convert"
    got = f"a quantised head, {_kind(base)} with a weight of {found or type(base.weight).__name__}"
    check.fail("model", got, f"one in floating point: leave it out of the quantisation ({names})")


def linear_of(head: Any, hidden: Tensor) -> Linear:
    """What a head multiplies, with autocast and PEFT's LoRA in it. ValueError for a head of another kind.

    LoRA adds columns, not another matrix of the head's size: W h + s B (A h) = [W, B] [h, s A h].
    """
    adapters = _adapters(head)
    base = head.base_layer if hasattr(head, "lora_A") else head
    if not (isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward):
        check.fail("model", f"a head of type {_kind(head)}", "torch.nn.Linear, or PEFT's LoRA over one")
    if hasattr(base.weight, "full_tensor"):
        wants = "a whole weight there: for a tensor-parallel head call linear_prefix_loss with tp_group"
        check.fail("model", "a head whose weight is sharded in its own forward", wants)
    if not adapters:
        return Linear(*as_autocast(hidden, base.weight, base.bias))
    bias = base.bias
    columns, inputs = [base.weight], [hidden]
    for name in adapters:
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        # dropout is over A's input alone
        inputs.append(a(head.lora_dropout[name](head._cast_input_dtype(hidden, a.weight.dtype))) * scaling)
        columns.append(b.weight)
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
    hidden, weight, bias = as_autocast(hidden, base.weight, bias)
    return Linear(
        torch.cat([x.to(hidden.dtype) for x in inputs], -1), torch.cat([w.to(weight.dtype) for w in columns], 1), bias
    )


def _kind(head: Any) -> str:
    # FSDP2 derives a class of its own, from FSDPModule and then the head's
    made = type(head).__mro__[2] if isinstance(head, FSDPModule) else type(head)
    return f"{made.__module__}.{made.__name__}"


def _adapters(head: Any) -> list[str]:
    """The names of the LoRA adapters that are added to the head's product now."""
    if not hasattr(head, "lora_A"):
        return []
    if _kind(head) != "peft.tuners.lora.layer.Linear":
        check.fail("model", f"a head of type {_kind(head)}", "torch.nn.Linear, or PEFT's LoRA over one")
    if head.disable_adapters:
        if head.merged:
            head.unmerge()  # as its own forward does
        return []
    if head.merged:
        return []
    active = [name for name in head.active_adapters if name in head.lora_A]
    for name in active:
        if name in head.lora_variant:
            kind = type(head.lora_variant[name]).__name__
            check.fail("model", f"a head with the LoRA variant {kind}", "plain LoRA on the head (bodies may have any)")
    return active
