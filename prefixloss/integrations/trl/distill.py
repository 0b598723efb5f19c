"""Our distillation losses in the place of TRL's: in its `DistillationTrainer`, and in the experimental GKD and GOLD.

TRL computes them in one function of hidden states and two heads, and in methods `generalized_jsd_loss` of logits. What
a call asks for beyond that (probabilities, losses not reduced, heads sharded over processes) stays TRL's.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss.distill import distill_loss, linear_distill_loss
from prefixloss.integrations import installed
from prefixloss.integrations.models.heads import as_autocast
from prefixloss.loss import linear_logps

_ALLOWED = 0.02  # between the two: what TF32 leaves of logits below 8
Loss = Callable[..., Any]


class Place(NamedTuple):
    """A function of TRL's in a module or class, by name; and what makes ours of it and a back-end."""

    holder: Any
    name: str
    theirs: Loss
    ours: Callable[[Loss, str], Loss]

    def put(self, backend: str | None) -> None:
        """Ours with this back-end; None: TRL's own."""
        function = self.theirs if backend is None else self.ours(self.theirs, backend)
        setattr(self.holder, self.name, staticmethod(function) if inspect.isclass(self.holder) else function)


@functools.cache
def places() -> tuple[Place, ...]:
    """Those of the installed TRL. One that is not understood is left as it is, with a warning; an absent one is not."""
    found = []
    for module, holder, name, (needed, optional), ours, few in KNOWN:
        try:
            inside: Any = installed.module(module)
        except ImportError:
            continue
        inside = getattr(inside, holder, None) if holder else inside
        theirs = getattr(inside, name, None)
        if theirs is None:
            continue
        where = f"{module}.{holder}.{name}" if holder else f"{module}.{name}"
        takes = inspect.signature(theirs).parameters
        understood = needed <= set(takes) <= needed | optional
        wrong = _differs(theirs, ours, few) if understood else f"takes {', '.join(takes)}"
        if wrong is None:
            found.append(Place(inside, name, theirs, ours))
        else:
            version = installed.version("trl")
            warnings.warn(f"prefixloss: TRL {version}'s {where} {wrong}: it is left as it is", stacklevel=4)
    return tuple(found)


def _given(theirs: Loss, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, TRL's defaults among them."""
    bound = inspect.signature(theirs).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _divergence(beta: float) -> dict[str, Any]:
    """TRL's beta, whose ends are the two KLs."""
    if beta in (0, 1):
        return {"divergence": "reverse" if beta else "forward"}
    return {"divergence": "jsd", "beta": beta}


def _count(number: Any, device: torch.device) -> Any:
    return number.to(device) if isinstance(number, Tensor) else number


# ---- of hidden states


def of_heads(theirs: Loss, backend: str) -> Loss:
    """In place of `_chunked_divergence_loss`: the loss, the sum of the student's entropies and the number of tokens."""

    @functools.wraps(theirs)
    def loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = _given(theirs, args, kwargs)
        options, sharded = _scales(given), _sharded(given)
        if sharded or options is None:
            why = f"a head is sharded by {sharded}" if sharded else "student and teacher have other softcaps"
            warnings.warn(f"prefixloss: {why}: TRL's own divergence is used", stacklevel=2)
            return theirs(*args, **kwargs)
        student, teacher = (_head(given, who) for who in ("student", "teacher"))
        teacher_temperature = options.pop("teacher_temperature")
        mask = given["completion_mask"] != 0
        out = linear_distill_loss(
            student[0], student[1], lm_head_bias=student[2],
            teacher_hidden=teacher[0], teacher_lm_head_weight=teacher[1], teacher_lm_head_bias=teacher[2], mask=mask,
            normalizer=_count(given["num_items_in_batch"], mask.device), teacher_temperature=teacher_temperature,
            **_divergence(given["beta"]), **options, backend=backend,
        )  # fmt: skip
        with torch.no_grad():
            hidden, weight, bias = student
            tokens = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
            entropy = linear_logps(
                hidden, weight, tokens, lm_head_bias=bias, mask=mask, entropy=True, **options, backend=backend
            ).entropy
        assert entropy is not None
        return out.loss, entropy.sum(), mask.sum()

    return loss


def _head(given: dict[str, Any], who: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in one dtype: that of an autocast, or the hidden states', as TRL projects."""
    hidden, weight, bias = (given[f"{who}_{name}"] for name in ("hidden_states", "lm_head_weight", "lm_head_bias"))
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    return hidden, weight.to(hidden.dtype), bias


def _sharded(given: dict[str, Any]) -> str | None:
    """By what, so that a head is not here as a whole; TRL's own function gathers it."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: PLC0415

    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3"
    weights = (given["student_lm_head_weight"], given["teacher_lm_head_weight"])
    return "FSDP2" if any(hasattr(weight, "full_tensor") for weight in weights) else None


def _scales(given: dict[str, Any]) -> dict[str, Any] | None:
    """Options of `linear_distill_loss`; None where student and teacher differ in more than a temperature can say."""
    temperature, scale, cap = (
        given[name] for name in ("temperature", "student_logit_scale", "student_final_logit_softcapping")
    )
    teacher_scale, teacher_cap = given["teacher_logit_scale"], given["teacher_final_logit_softcapping"]
    options = {"temperature": temperature, "logit_scale": scale, "softcap": cap, "teacher_temperature": None}
    if scale == teacher_scale and cap == teacher_cap:
        return options
    if cap is not None or teacher_cap is not None or not scale > 0 or not teacher_scale > 0:
        return None
    return {**options, "teacher_temperature": temperature * scale / teacher_scale}


# ---- of logits


def of_logits(theirs: Loss, backend: str) -> Loss:
    """In place of `generalized_jsd_loss`, where it reduces a divergence of logits to one number."""

    @functools.wraps(theirs)
    def loss(*args: Any, **kwargs: Any) -> Any:
        given = _given(theirs, args, kwargs)
        logits, labels, count = given["student_logits"], given["labels"], given.get("num_items_in_batch")
        if given.get("logits_are_probs") or (count is None and given["reduction"] not in ("batchmean", "sum")):
            return theirs(*args, **kwargs)
        if count is None and given["reduction"] == "sum":
            count = 1.0
        elif count is None and labels is None:
            count = max(len(logits), 1)
        return distill_loss(
            logits, teacher_logits=given["teacher_logits"], mask=None if labels is None else labels != -100,
            normalizer=_count(count, logits.device), temperature=given["temperature"], **_divergence(given["beta"]),
            backend=backend,
        ).loss  # fmt: skip

    return loss


# ---- the self-test


def _differs(theirs: Loss, ours: Callable[[Loss, str], Loss], few: Callable[[str], dict[str, Any]]) -> str | None:
    """What is wrong with TRL's function beside ours, in values or gradients on a few numbers, if anything."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    takes = inspect.signature(theirs).parameters
    for beta in (0.0, 0.3, 1.0):
        given = {name: value for name, value in {**few(device), "beta": beta}.items() if name in takes}
        try:
            wanted = _results_and_gradients(theirs, given)
        except Exception as error:  # of a driver, a compiler or TRL
            return f"does not run on this machine ({error})"
        got = _results_and_gradients(ours(theirs, "auto"), given)
        if [x.shape for x in got] != [x.shape for x in wanted]:
            return f"gives results of shapes {[list(x.shape) for x in wanted]}, with the gradients"
        for a, b in zip(got, wanted, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=0, atol=_ALLOWED):
                return f"differs from ours at beta={beta:g} by {(a.float() - b.float()).abs().max():.3g}"
    return None


def _results_and_gradients(function: Loss, given: dict[str, Any]) -> list[Tensor]:
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    results = function(**given)
    results = results if isinstance(results, tuple) else (results,)
    return [x.detach() for x in results] + list(torch.autograd.grad(results[0], leaves))


def _drawn(device: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=draw).to(device) for name, shape in shapes.items()}
    return {name: x.requires_grad_(name.startswith("student")) for name, x in made.items()}


def few_hidden(device: str) -> dict[str, Any]:
    """Every option is on, so that one applied in another order, or not at all, is off by more than the tolerance."""
    drawn = _drawn(
        device, student_hidden_states=(2, 3, 8), teacher_hidden_states=(2, 3, 5), student_lm_head_weight=(19, 8),
        teacher_lm_head_weight=(19, 5), student_lm_head_bias=(19,), teacher_lm_head_bias=(19,),
    )  # fmt: skip
    scales = {f"{who}_logit_scale": 0.6 for who in ("student", "teacher")}
    caps = {f"{who}_final_logit_softcapping": 3.0 for who in ("student", "teacher")}
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], device=device)
    others = {"completion_mask": mask, "num_items_in_batch": 2, "temperature": 0.7, "chunk_size": 4}
    return {**drawn, **others, **scales, **caps}


def few_logits(device: str) -> dict[str, Any]:
    labels = torch.tensor([[1, 2, -100], [-100, 0, 3]], device=device)
    drawn = _drawn(device, student_logits=(2, 3, 19), teacher_logits=(2, 3, 19))
    return {**drawn, "labels": labels, "temperature": 0.7}


# the parameters that our function of hidden states, and of logits, needs; and those that it understands beside them
Parameters = tuple[set[str], set[str]]
OF_HEADS: Parameters = ({*few_hidden("cpu"), "beta"} - {"chunk_size"}, {"chunk_size"})
OF_LOGITS: Parameters = ({*few_logits("cpu"), "beta", "reduction"}, {"num_items_in_batch", "logits_are_probs"})
# module, class in it, function, parameters, ours, and numbers to try both on
KNOWN: tuple[tuple[str, str | None, str, Parameters, Any, Any], ...] = (
    ("trl.trainer.distillation_trainer", None, "_chunked_divergence_loss", OF_HEADS, of_heads, few_hidden),
    ("trl.experimental.gkd.gkd_trainer", "GKDTrainer", "generalized_jsd_loss", OF_LOGITS, of_logits, few_logits),
    ("trl.experimental.gold.gold_trainer", "GOLDTrainer", "generalized_jsd_loss", OF_LOGITS, of_logits, few_logits),
)
