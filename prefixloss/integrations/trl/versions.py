"""What the installed TRL has: its log-prob function, how that is called, and whether its models have a fused head.

Versions are not compared beyond a first look. What TRL has is found, tried on tiny tensors against what stands in for
it, and refused if it is not understood.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.integrations import installed

FIRST = {"trl": "1.9", "transformers": "4.57"}
# parameters of TRL's function that have had another name
RENAMED = {"last_hidden": "hidden"}
NEEDED = {"hidden", "weight", "targets", "temperature"}
# what `LogProbs.apply` takes
KNOWN = NEEDED | {"bias", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs"}


def check_version() -> None:
    """ImportError unless a TRL and a transformers are there that are new enough, and import together."""
    for package, first in FIRST.items():
        installed.check_version(package, first)
    installed.module("trl.trainer.grpo_trainer", "transformers")


@dataclass(frozen=True)
class Theirs:
    """TRL's function; `names`: what its `apply` takes, in order, by the names of `LogProbs.apply`."""

    function: Any
    names: tuple[str, ...]

    @property
    def all_results(self) -> bool:
        """Whether it gives five results (asked for by `outputs`), or log-probs and entropies alone."""
        return "outputs" in self.names

    def in_full(self, *given: Any) -> Any:
        """TRL's own five results, for the arguments of `LogProbs.apply`; RuntimeError where it makes two."""
        if not self.all_results:
            raise RuntimeError("model: got a head sharded by DeepSpeed ZeRO-3, expected FSDP2, or TRL from 1.15 on")
        return self.function.apply(*given)

    def named(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of one call, by name, with those that `LogProbs.apply` needs and this TRL does not have."""
        return {"bias": None, "outputs": ("entropy",), **dict(zip(self.names, given, strict=False))}


@functools.cache
def theirs() -> Theirs:
    """What this TRL has. ImportError where it is not what we know."""
    function: Any = getattr(installed.module("trl.trainer.utils"), "_ChunkedLogProbFunction", None)
    if function is None:
        refuse("no trl.trainer.utils._ChunkedLogProbFunction (it needs triton in some versions)")
    found = list(inspect.signature(function.forward).parameters)[1:]
    names = tuple(RENAMED.get(name, name) for name in found)
    if not NEEDED <= set(names) <= KNOWN:
        refuse(f"a log-prob function of {', '.join(found)}")
    return Theirs(function, names)


def refuse(got: str) -> NoReturn:
    raise ImportError(f"trl: got {installed.version('trl')} with {got}, expected what 1.9 to 1.16 have")


def refuse_losses(loss_type: str) -> None:
    """ValueError for a loss of the installed TRL that is another one than in later versions."""
    if loss_type == "luspo" and installed.older("trl", "1.10"):
        check.fail(
            "loss_type", '"luspo", which TRL 1.9 averages over padding too', "TRL from 1.10 on, or fused_loss=False"
        )


def has_fused_head() -> bool:
    """Whether TRL's trainers call models with `fused_lm_head=True`; before 1.15 they take logits."""
    return hasattr(installed.module("trl.trainer.utils"), "add_fused_lm_head")


# ---- the self-test -----------------------------------------------------------------------------------------


def check_same(their: Theirs, ours: Any) -> None:
    """ImportError unless `ours.apply` gives what TRL's function gives, and its gradients, on a few numbers.

    Every option is on, so that one applied in another order, or not at all, is off by more than a tenth. The bound is
    what TF32 leaves of logits below 8.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves, given = _few_numbers(their, device)
    try:
        wanted = _results_and_gradients(their.function, leaves, given)
    except Exception as error:  # of a driver, a compiler or TRL
        found = f"TRL {installed.version('trl')}'s own log-probs do not run on this machine ({error})"
        warnings.warn(f"prefixloss: {found}: ours were not compared with them", stacklevel=4)
        return
    got = _results_and_gradients(ours, leaves, given)
    if len(got) != len(wanted):
        refuse(f"{len(wanted)} results and gradients of its log-prob function, where ours has {len(got)}")
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=0, atol=0.02):
            refuse(f"a log-prob function whose result {index} differs from ours by {_distance(a, b)}")


def _few_numbers(their: Theirs, device: str) -> tuple[list[Tensor], tuple[Any, ...]]:
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=draw).to(device) for shape in ((6, 8), (19, 8), (19,)))
    hidden, weight, bias = (x.requires_grad_() for x in drawn)
    by_name = {
        "hidden": hidden, "weight": weight, "bias": bias, "targets": torch.arange(6, device=device) * 3,
        "temperature": 0.7, "chunk_size": 8, "final_logit_softcapping": 3.0, "logit_scale": 0.6,
        "outputs": ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    }  # fmt: skip
    leaves = [hidden, weight] + ([bias] if "bias" in their.names else [])
    return leaves, tuple(by_name[name] for name in their.names)


def _results_and_gradients(function: Any, leaves: list[Tensor], given: tuple[Any, ...]) -> list[Tensor]:
    results = [x for x in function.apply(*given) if x is not None]
    weights = torch.arange(1.0, 7.0, device=results[0].device)
    return [x.detach() for x in results] + list(torch.autograd.grad((results[0] * weights).sum(), leaves))


def _distance(a: Tensor, b: Tensor) -> str:
    return f"{(a.float() - b.float()).abs().max():.3g}" if a.shape == b.shape else f"{list(a.shape)}, {list(b.shape)}"
