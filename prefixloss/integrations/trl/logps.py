"""Our log-probs, and our loss, in the place of TRL's log-probs, under its own trainers.

All of its trainers score tokens with one function, `ChunkedLogProbFunction.apply(hidden, weight, bias, targets, ...)`;
before 1.15 some only, and `prefixloss.integrations.trl.head` brings GRPO and RLOO to it. `LogProbs` has the same method
and gives the same five results; `StandIn` is called as the installed TRL calls its own. `FusedLoss` stands in the same
place, where hidden states, head and scales are at hand, and makes the whole loss.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefixloss.backends import memory, products, reference
from prefixloss.config import LossConfig
from prefixloss.integrations.models.heads import as_autocast
from prefixloss.integrations.trl import distill
from prefixloss.integrations.trl.head import patched, per_token_logps
from prefixloss.integrations.trl.versions import check_same, check_version, has_fused_head, theirs
from prefixloss.loss import LossOutput, linear_logps, linear_prefix_loss
from prefixloss.maths.precision import accumulation_dtype
from prefixloss.maths.softmax import Transform

# what TRL asks for beside the log-probs, in the order in which it comes back
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

Scores = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LogProbs:
    """Stands in for TRL's `ChunkedLogProbFunction`; `apply` takes and gives what that of TRL 1.16 does.

    Log-probs and entropies are float32 (float64 for float64 inputs) from float32 sums: logits are never rounded to
    half precision, as TRL's are. The backward skips tokens whose incoming gradients are 0.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> Scores:
        """Log-probs, entropies, log sum p^2, mean logits and whether the target is the argmax, [N] each.

        hidden: [N, D]; weight: [V, D]; bias: [V] or None; targets: int64 [N]. chunk_size is not needed. All but the
        log-probs are None unless named in `outputs`; only log-probs and entropies have a gradient.
        """
        if _sharded_by_deepspeed():
            return theirs().in_full(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        hidden, weight, bias = as_autocast(hidden, weight, bias)
        logps, entropy = linear_logps(
            hidden,
            weight,
            targets,
            lm_head_bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            entropy="entropy" in outputs,
            backend=self.backend,
        )
        transform = Transform.of(temperature, final_logit_softcapping, logit_scale)
        return logps, entropy, *_statistics((hidden, weight, bias), targets, transform, outputs)


@torch.no_grad()
def _statistics(
    head: tuple[Tensor, Tensor, Tensor | None], targets: Tensor, transform: Transform, outputs: tuple[str, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The last three results, which take one more product, a chunk of tokens at a time; None where not asked for."""
    hidden, weight, bias = head
    dtype, device = accumulation_dtype(hidden, weight), hidden.device
    wanted = [name in outputs for name in OPTIONAL[1:]]
    dtypes = (dtype, dtype, torch.bool)
    log_sum_sq, mean, top1 = (
        torch.empty(len(targets), dtype=d, device=device) if w else None for w, d in zip(wanted, dtypes, strict=True)
    )
    if not any(wanted):
        return log_sum_sq, mean, top1
    # a chunk's logits and the two temporaries of a logsumexp
    size = memory.rows_in_budget(len(targets), 3 * len(weight) * dtype.itemsize, device)
    with torch.autocast(device.type, enabled=False):
        for rows in torch.arange(len(targets), device=device).split(size):
            if dtype == torch.float64:
                scores = reference.linear_logits((hidden, weight, bias), rows, dtype)
            else:
                scores = torch.empty(len(rows), len(weight), dtype=dtype, device=device)
                products.logits(hidden[rows], weight, bias, scores)
            scores = transform.cap_(scores.mul_(transform.before))
            if mean is not None:
                mean[rows] = scores.mean(1)
            if top1 is not None:
                top1[rows] = scores.argmax(1) == targets[rows]  # the first of several largest, as in TRL
            if log_sum_sq is not None:
                # log sum p^2 = log sum exp(2 s) - 2 log sum exp(s)
                log_z = scores.logsumexp(1)
                log_sum_sq[rows] = scores.mul_(2).logsumexp(1) - 2 * log_z
    return log_sum_sq, mean, top1


class StandIn(LogProbs):
    """`LogProbs` in the signature of the installed TRL: its arguments in its order, and as many results."""

    def apply(self, *given: Any) -> Any:
        their = theirs()
        if _sharded_by_deepspeed():
            return their.function.apply(*given)
        results = super().apply(**their.named(given))
        return results if their.all_results else results[:2]


def _sharded_by_deepspeed() -> bool:
    """Under ZeRO-3 the head is there in the forward only; TRL's function gathers it again in its backward."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: PLC0415

    if not is_deepspeed_zero3_enabled():
        return False
    warnings.warn("prefixloss: the head is sharded by DeepSpeed ZeRO-3: TRL's own log-probs are used", stacklevel=3)
    return True


# ---- putting it in place -----------------------------------------------------------------------------------


class Patch:
    """An active `patch_trl`; calling it, or leaving it as a context, undoes it."""

    def __init__(self, function: StandIn) -> None:
        self.function = function

    def __call__(self) -> None:
        if self in _active:
            _active.remove(self)
            _rebind()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self()


_active: list[Patch] = []


def patch_trl(backend: str = "auto") -> Patch:
    """Lets the trainers of TRL (GRPO, RLOO, DPO, KTO, SFT, ...) take their log-probs from `linear_logps`.

    From TRL 1.15 on these are all trainers. Before, it is GRPO and RLOO (without images), and what else calls TRL's
    chunked log-probs: in 1.14 DPO and KTO with `use_liger_kernel=True`, in all of them AsyncGRPO.

    Divergences from a teacher are those of `linear_distill_loss` and `distill_loss`: in `DistillationTrainer`
    from TRL 1.12 on, and in the experimental GKD and GOLD where they reduce a divergence of logits.

    The hidden states are TRL's: with absolute positions (GPT-2) and prompts padded on the left they are those of other
    positions than in generation. `PrefixGRPOTrainer` sees to that, this patch does not.

    backend: as in `linear_logps`. Returns what undoes it: call it, or use it as a context manager. Of several patches
    the last one still active counts; they can be undone in any order, and more than once.

    ImportError: TRL is missing or older than 1.9; or its function has arguments or results that are not known, or gives
    other numbers than ours on a few tokens.
    """
    check_version()
    function = StandIn(backend)
    _tested()
    patch = Patch(function)
    _active.append(patch)
    _rebind()
    return patch


@functools.cache
def _tested() -> None:
    """Once a process, before the first rebinding."""
    check_same(theirs(), StandIn())
    if not has_fused_head():
        for trainer in _trainers():
            _methods[trainer] = vars(trainer)[SCORER]
    distill.places()


# TRL's own methods, where trainers take logits
_methods: dict[type, Any] = {}
SCORER = "_get_per_token_logps_and_entropies"


def _trainers() -> tuple[type, ...]:
    from trl import GRPOTrainer, RLOOTrainer  # noqa: PLC0415

    return GRPOTrainer, RLOOTrainer


def _rebind() -> None:
    """Every name in TRL's modules for its function, or for one of ours, becomes a name for the one that counts."""
    original = theirs().function
    new = _active[-1].function if _active else original
    for module in _modules():
        for name, value in list(vars(module).items()):
            if value is original or isinstance(value, StandIn):
                setattr(module, name, new)
    for trainer, method in _methods.items():
        setattr(trainer, SCORER, patched(method, _scorer(_active[-1].function.backend)) if _active else method)
    for place in distill.places():
        place.put(_active[-1].function.backend if _active else None)


def _scorer(backend: str) -> Any:
    def score(*args: Any, **kwargs: Any) -> Any:
        with scored_by(LogProbs(backend)):
            return per_token_logps(*args, **kwargs)

    return score


def _modules() -> list[types.ModuleType]:
    return [m for name, m in list(sys.modules.items()) if m is not None and name.split(".")[0] == "trl"]


@contextmanager
def scored_by(function: Any) -> Iterator[None]:
    """Inside the block the models' fused heads score tokens with `function.apply`, called as in TRL 1.16."""
    from trl.trainer import utils  # noqa: PLC0415

    before = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = function
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = before


# ---- the whole loss in its place ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FusedLoss:
    """One micro-batch's loss, but for the model: all [B, T] over its completions. completions: the tokens that TRL
    scores; mask: those in the loss. With `apply` it stands where TRL's log-probs are made, and hears what they do."""

    config: LossConfig
    completions: Tensor
    mask: Tensor
    advantages: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    normalizer: Tensor | float
    backend: str

    @contextmanager
    def listening(self) -> Iterator[list[LossOutput]]:
        """Inside the block the model's head makes this loss, and it is added to the list."""
        made: list[LossOutput] = []

        def apply(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, _chunk_size: int,
            softcap: float | None, logit_scale: float, _outputs: tuple[str, ...],
        ) -> tuple[Tensor, Tensor, None, None, None]:  # fmt: skip
            made.append(self.of(as_autocast(hidden, weight, bias), targets, temperature, softcap, logit_scale))
            return made[-1].logps, made[-1].entropy, None, None, None

        with scored_by(types.SimpleNamespace(apply=apply)):
            yield made

    def of(
        self, head: Any, targets: Tensor, temperature: float, softcap: float | None, logit_scale: float
    ) -> LossOutput:
        """head: hidden [N, D], weight [V, D], bias. The N rows are all positions, or only the scored completions."""
        hidden, weight, bias = head
        responses, length = self.mask.shape
        scored = self.completions.bool()
        if _compacts(hidden.device):
            lengths = scored.sum(1)
            rows = lambda x: x[scored]
        else:
            width = len(targets) // responses  # completions end where their sequences do
            lengths = torch.full((responses,), width, device=targets.device)
            rows = lambda x: pad(x, (width - length, 0)).flatten()
        return linear_prefix_loss(
            hidden,
            weight,
            targets,
            rows(self.advantages),
            mask=rows(self.mask.bool()),
            cu_seqlens=pad(lengths.cumsum(0), (1, 0)),
            old_logps=None if self.old_logps is None else rows(self.old_logps),
            ref_logps=None if self.ref_logps is None else rows(self.ref_logps),
            lm_head_bias=bias,
            normalizer=self.normalizer,
            config=replace(self.config, temperature=temperature, softcap=softcap, logit_scale=logit_scale),
            backend=self.backend,
        )


def _compacts(device: torch.device) -> bool:
    """Whether the head hands over the scored rows alone, as all do but that of TRL 1.16 where it has no Triton."""
    from trl.trainer import utils  # noqa: PLC0415

    return bool(utils._use_triton(device)) if hasattr(utils, "_use_triton") else True


def add_fused_loss(model: Any) -> None:
    """Lets `model(..., fused_lm_head=True, prefix_loss=FusedLoss)` return that loss. It is made within the forward, so
    that wrappers (DDP, FSDP, ZeRO) see the head used there and the loss come out."""
    inner = model.forward

    # the original signature: `generate` validates its arguments against it
    @functools.wraps(type(model).forward)
    def forward(_: Any, *args: Any, prefix_loss: FusedLoss | None = None, **kwargs: Any) -> Any:
        if prefix_loss is None:
            return inner(*args, **kwargs)
        with prefix_loss.listening() as made:
            output = inner(*args, **kwargs)
        output["loss"] = made[0].loss
        return output

    model.forward = types.MethodType(forward, model)
