"""Distillation: a student's distribution is drawn to a teacher's over the whole vocabulary, by a weight a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from prefixloss import door
from prefixloss.backends.problem import Distil
from prefixloss.inputs.distillation import Distillation, GivenTeacher, TokensToDistil


@dataclass(frozen=True)
class DistillOutput:
    """What a distillation loss returns.

    loss: 0-d (shaped like the tokens for reduction="none"), float32 or float64, differentiable.
    divergence: float, shaped like the tokens, detached; 0 where it was not computed: outside the mask, and at weight 0.
    metrics: 0-d tensors: scored_tokens and learning_tokens (those whose weight is not 0), loss (for reduction="none"
        the mean of its entries over the scored tokens), divergence (the mean over the learning tokens, 0 over none).
    """

    loss: Tensor
    divergence: Tensor
    metrics: dict[str, Tensor]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _between_graphs(function: _Function) -> _Function:
    """Under `torch.compile` a call is not traced: which rows are in its chunks depends on values."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return cast(_Function, call)


@_between_graphs
def linear_distill_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    teacher_offsets: Tensor | None = None,
    teacher_vocabulary: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: str = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "token-mean",
    tp_group: Any = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> DistillOutput:
    """The divergence of a student from a teacher, without ever holding [N, V] of either.

    Gradients reach hidden, lm_head_weight and lm_head_bias; the teacher gets none. Only tokens in the mask whose weight
    is not 0 enter a matrix product. With the same mask, "token-mean" divides by the same count as the policy loss, so
    that the two can be added: see `prefixloss.advantages.from_first_error` for weights that begin at the first error.

    Args:
        hidden: [B, T, D] or [N, D]; float32, bfloat16, float16 or float64. T or N are "the tokens" below.
        lm_head_weight, lm_head_bias: [V, D], [V].
        teacher_hidden, teacher_lm_head_weight, teacher_lm_head_bias: [.., D_t], [V, D_t], [V]: the teacher's whole
            distribution, of any width. Or instead
        teacher_ids, teacher_logps: what a served teacher returns: int64 [.., K] with -1 where unused, and log-probs.
            The rest of the vocabulary is one class, with what the listed ids leave of 1: 2^-53 at least, since rounded
            log-probs may leave less than nothing, and nothing where all ids are listed. A row that lists nothing says
            nothing: its divergence is 0.
        teacher_offsets: int64 [N + 1]: then ids and log-probs are packed, [M], and rows may differ in length.
        teacher_vocabulary: int64 [V], the teacher's id for each of the student's, -1 where it has none; None: they are
            the same. The classes are then the ids that both have, and one for each side's rest. teacher_ids are the
            teacher's own; its head and its logits have all of its ids and no padding. Not with a tp_group.
        mask: bool or 0/1, like the tokens; False is not scored. weights: float, like the tokens; 0 costs nothing.
        cu_seqlens: int32 or int64 [B + 1], for packed input, where the reduction is per response.
        normalizer: replaces the reduction's denominator.
        divergence: with the teacher's T, the student's S and M = beta T + (1 - beta) S: "reverse" KL(S || T),
            "forward" KL(T || S), "jsd" beta KL(T || M) + (1 - beta) KL(S || M), "skew-forward" KL(T || M),
            "skew-reverse" KL(S || M). Formulas and papers: `prefixloss.maths.divergence`.
        beta: above 0 and below 1.
        temperature, softcap, logit_scale: the distributions are softmax(softcap(logit_scale * z) / temperature);
            teacher_temperature is the teacher's own, None: the same. Listed log-probs are taken as given.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "none".
        tp_group: processes that have the same hidden states and consecutive rows of the heads, as for the policy loss.
        vocab_size: ids from there on are padding of the student's head, and of the teacher's, which may be longer.
        backend: "auto" | "triton" | "torch" | "reference". "auto" is "triton", the kernels, on GPUs without a
            tp_group and without teacher_vocabulary for a whole teacher; else "torch". Inside `torch.compile` the call
            is a graph break.

    A divergence is infinite where the first distribution of its KL has a token that the other has not ("jsd" and the
    skewed ones never are). Then the loss is infinite, and that token's gradient 0: it has no slope. Nothing is NaN.

    Raises: as `prefixloss.linear_prefix_loss`, before any work. Values on an accelerator are checked only with
        PREFIXLOSS_CHECK=1; without it, listed ids outside the vocabulary count as unused.
    """
    settings = Distillation.checked(divergence, beta, temperature, teacher_temperature, softcap, logit_scale, reduction)
    given = (hidden, lm_head_weight, lm_head_bias)
    teacher = GivenTeacher(
        teacher_hidden, teacher_lm_head_weight, teacher_lm_head_bias, None, teacher_ids, teacher_logps, teacher_offsets,
        teacher_vocabulary,
    )  # fmt: skip
    chosen = door.distils_by(_reads(backend, teacher), given, tp_group)
    tokens = TokensToDistil(mask, weights, cu_seqlens, normalizer)
    return _answer(chosen, door.head_distillation(given, teacher, tokens, settings, tp_group, vocab_size), hidden)


@_between_graphs
def distill_loss(
    logits: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    teacher_offsets: Tensor | None = None,
    teacher_vocabulary: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: str = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "token-mean",
    tp_group: Any = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> DistillOutput:
    """The same from logits [B, T, V] or [N, V], raw, as are teacher_logits; see `linear_distill_loss`.

    A chunk's temporaries are all that is held beside the logits and their gradient.
    """
    settings = Distillation.checked(divergence, beta, temperature, teacher_temperature, softcap, logit_scale, reduction)
    teacher = GivenTeacher(
        logits=teacher_logits, ids=teacher_ids, logps=teacher_logps, offsets=teacher_offsets,
        vocabulary=teacher_vocabulary,
    )  # fmt: skip
    chosen = door.distils_by(_reads(backend, teacher), (logits,), tp_group)
    tokens = TokensToDistil(mask, weights, cu_seqlens, normalizer)
    return _answer(chosen, door.logit_distillation(logits, teacher, tokens, settings, tp_group, vocab_size), logits)


def _reads(backend: Any, teacher: GivenTeacher) -> Any:
    """The back-end that reads this teacher: there are no kernels for two vocabularies."""
    if teacher.vocabulary is None or teacher.ids is not None or backend not in ("auto", "triton"):
        return backend
    if backend == "triton":
        raise RuntimeError('backend: got "triton" with teacher_vocabulary, expected "auto" or "torch"')
    return "torch"


def _answer(chosen: str, asked: Distil, first: Tensor) -> DistillOutput:
    """first: the student's hidden states or logits, as they came."""
    shape, batch = first.shape[:-1], asked.batch
    # no autocast: its half-precision products would undo float32 accumulation
    with torch.autocast(first.device.type, enabled=False):
        total, values = door.distiller(chosen).distillation(asked)
    scored, learning, detached = batch.layout.scored.sum(), batch.learning.sum(), total.detach()
    metrics = {
        "scored_tokens": scored,
        "learning_tokens": learning,
        "loss": detached if detached.dim() == 0 else detached.sum() / scored.clamp(min=1),
        "divergence": values.sum() / learning.clamp(min=1),
    }
    return DistillOutput(total.reshape(shape) if total.dim() else total, values.reshape(shape), metrics)
