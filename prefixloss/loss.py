"""The public functions: through the door, to the back-end, and the result wrapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prefixloss import check, door
from prefixloss.backends.problem import HeadLoss, LogitLoss
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import TokenInputs, TokenValues
from prefixloss.inputs.token_advantages import TokenAdvantages
from prefixloss.maths.metrics import metrics


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns.

    loss: 0-d (shaped like `tokens` for reduction="none"), float32 or float64, differentiable.
    logps, entropy, kl: float, shaped like `tokens`, detached; 0 where not computed.
    learning: bool, shaped like `tokens`: tokens that may have a gradient.
    metrics: 0-d tensors by name (see `prefixloss.maths.metrics`); reading one is the caller's synchronisation.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Tensor
    learning: Tensor
    metrics: dict[str, Tensor]


class LogpOutput(NamedTuple):
    """Log-probs and entropies, float, shaped like `tokens`, differentiable, 0 outside the mask; entropy if asked."""

    logps: Tensor
    entropy: Tensor | None


def linear_prefix_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    advantages: Tensor | TokenAdvantages,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    ref_lm_head_bias: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    group_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: LossConfig = LossConfig(),
    tp_group: Any = None,
    backend: str = "auto",
    max_learning_tokens: int | None = None,
    vocab_size: int | None = None,
    cp_group: Any = None,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
) -> LossOutput:
    """The policy loss from hidden states and an LM head, without ever holding [N, V].

    Only tokens that can have a gradient enter a matrix product: scored ones whose advantage is not 0, or, with a KL
    penalty or entropy bonus, all scored ones. (Two options ask for more: stats="scored", and ratio_level="sequence",
    whose ratio is over all of a response's tokens.) Gradients reach hidden, lm_head_weight and lm_head_bias.

    Args:
        hidden: [B, T, D] or [N, D]; float32, bfloat16, float16 or float64. hidden[b, t] predicts tokens[b, t].
        lm_head_weight: [V, D]; a tensor, or a DTensor (its gradient is then the sum over the mesh's ranks).
        tokens: int64 [B, T] or [N]; ids outside the mask may be anything.
        advantages: float [B], float like `tokens`, or `TokenAdvantages`.
        mask: bool or 0/1, like `tokens`; False is not scored. None scores every token.
        cu_seqlens: int32 or int64 [B + 1], 0 to N: packed input's offsets; needed when anything is per response.
        old_logps: like `tokens`, at the sampling policy; None means on-policy: ratio 1, with gradient.
        sampler_logps: like `tokens`: the rollout engine's, for config.sampler_correction.
        ref_logps: like `tokens`: the reference's, for kl "k1", "k2", "k3".
        ref_hidden, ref_lm_head_weight, ref_lm_head_bias: [.., D_ref], [V, D_ref], [V], for kl="full".
        lm_head_bias: [V].
        group_ids: int64 [B], for reduction="group-token-mean".
        normalizer: replaces the reduction's denominator (see `prefixloss.inputs.reduction`).
        config: see `LossConfig`.
        tp_group: a torch.distributed group whose processes have the same tokens and hidden states and consecutive
            rows of the head (and bias, and reference head), in the order of their ranks, not all alike many. Each gets
            the loss, the whole gradient of hidden and that of its rows. `prefix_loss` takes backend="torch" for it.
        vocab_size: ids from there on are padding: those columns never count. None: there is none.
        cp_group: a torch.distributed group whose processes have consecutive parts of every response, in the order of
            their ranks: lengths, prefixes, sequence ratios and denominators are those of whole responses. A process's
            loss is its share: the shares, and their gradients, add up to the whole. Metrics are of the part alone.
        backend: "auto" | "triton" | "torch" | "reference" (`prefixloss.backends.reference` is the plainest form).
            "auto" takes the Triton kernels on CUDA, ROCm and XPU, plain torch elsewhere and for float64.
        kept_ids, kept_offsets: for a sampler that drew from a part of the vocabulary (top-k, top-p): int64 [.., K] like
            `tokens` with one axis more (-1: unused), or packed [M] with offsets int64 [N + 1]. All log-probs,
            entropies, KLs and gradients are then those of the softmax over the kept ids, and only their columns of the
            head are computed. Not with tp_group.
        max_learning_tokens: an upper bound on the learning tokens (on all scored ones with stats="scored" or
            ratio_level="sequence"). With it nothing waits for the device, so that a CUDA graph can hold the call; a
            bound that is too low makes the loss NaN there.

    Values that lie on an accelerator (token ids, cu_seqlens, a mask of numbers) are checked only with
    PREFIXLOSS_CHECK=1: looking at them would stall the stream. Without it wrong ones are never read out of bounds.
    Packed per-response advantages have to differ in length from per-token ones: with N = B they are taken per token.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what it expects.
        RuntimeError: for a back-end that cannot run here, saying why; and, with any but "reference", for a second
            derivative (create_graph=True) and inside the transforms of torch.func.
    """
    given = (hidden, lm_head_weight, lm_head_bias)
    chosen = door.backend(backend, tokens, given, config, tp_group, cp_group)
    inputs = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer, cp_group
    )
    reference = (ref_hidden, ref_lm_head_weight, ref_lm_head_bias)
    replay = door.replay_of(kept_ids, kept_offsets, tp_group, vocab_size)
    if replay is None:
        asked = door.head_loss(given, reference, inputs, config, tp_group, vocab_size, max_learning_tokens)
        with _as_given(hidden):
            return _output(chosen.head_loss(asked), asked, tokens.shape)
    check.tensor("hidden", hidden, "float")
    with _as_given(hidden):
        kept = door.kept_loss(given, reference, inputs, config, replay, plain=backend == "reference")
        return _output(chosen.logit_loss(kept), kept, tokens.shape)


def prefix_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor | TokenAdvantages,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    group_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    config: LossConfig = LossConfig(),
    tp_group: Any = None,
    backend: str = "auto",
    vocab_size: int | None = None,
    cp_group: Any = None,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
) -> LossOutput:
    """The policy loss from logits [B, T, V] or [N, V]; everything else as in `linear_prefix_loss`.

    Args:
        logits: the head's raw output; scale, softcap and temperature of `config` are applied here. backend="torch"
            copies logits that are not contiguous (`logits[:, :-1]`) first: there, better to mask the last position.
        ref_logits: like `logits`, raw as well, for kl="full".
        inplace: lets `logits` (or their copy, see above) be overwritten with the gradient, so that no second [N, V] is
            ever held. backend="torch" does so in the backward; "triton" does it in this call, where each logit is
            read and written once: do not use the logits afterwards (autograd reports it if a backward needs them).
            The gradient handed on is that memory (a leaf's `.grad` then is the leaf's own), but with retain_graph=True
            a copy. Logits that overlap themselves, expanded ones for example, are refused.
    """
    chosen = door.backend(backend, tokens, (logits,), config, tp_group, cp_group)
    check.flag("inplace", inplace)
    inputs = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer, cp_group
    )
    replay = door.replay_of(kept_ids, kept_offsets, tp_group, vocab_size, inplace)
    if replay is not None:
        asked = door.kept_logit_loss(logits, ref_logits, inputs, config, replay)
    else:
        asked = door.logit_loss(logits, ref_logits, inputs, config, inplace, tp_group, vocab_size)
    with _as_given(logits):
        return _output(chosen.logit_loss(asked), asked, tokens.shape)


def linear_logps(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    tp_group: Any = None,
    backend: str = "auto",
    max_scored_tokens: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    gradient_tolerance: float | Literal["auto"] = 0.0,
    head_gradient_tolerance: float | Literal["auto"] = 0.0,
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
) -> LogpOutput:
    """Log-probs (and entropies) of `tokens`, differentiable, for trainers that keep their own loss.

    hidden: [B, T, D] or [N, D]; lm_head_weight: [V, D]; tokens, mask: [B, T] or [N]. Results are float32 (float64 for
    float64 input), 0 outside the mask. The backward skips every token whose incoming gradients are exactly 0.
    max_scored_tokens: an upper bound on the tokens in the mask, with which nothing waits for the device (and the
    backward skips none of them; a bound that is too low makes everything NaN). chunk_tokens and the tolerances as in
    `LossConfig`.
    tp_group, vocab_size, kept_ids, kept_offsets and errors as in `linear_prefix_loss`; of kept sets only their columns
    are computed, and chunk_tokens, the tolerances and the bound are not needed.
    """
    given = (hidden, lm_head_weight, lm_head_bias)
    check.flag("entropy", entropy)
    # the options' checks; a coefficient says that the entropy has a gradient
    config = LossConfig(
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy_coef=1.0 if entropy else 0.0,
        chunk_tokens=chunk_tokens,
        gradient_tolerance=gradient_tolerance,
        head_gradient_tolerance=head_gradient_tolerance,
    )
    chosen = door.backend(backend, tokens, given, config, tp_group)
    replay = door.replay_of(kept_ids, kept_offsets, tp_group, vocab_size)
    if replay is None:
        asked = door.head_statistics(given, tokens, mask, config, tp_group, vocab_size, max_scored_tokens)
        with _as_given(hidden):
            made = chosen.head_statistics(asked)
    else:
        check.tensor("hidden", hidden, "float")
        with _as_given(hidden):
            made = door.kept_statistics(given, tokens, mask, config, replay, plain=backend == "reference")
    return LogpOutput(made.logp.reshape(tokens.shape), made.entropy.reshape(tokens.shape) if entropy else None)


def _as_given(x: Tensor) -> torch.autocast:
    """No autocast: its half-precision products would undo float32 accumulation."""
    return torch.autocast(x.device.type, enabled=False)


def _output(result: tuple[Tensor, TokenValues], asked: HeadLoss | LogitLoss, shape: torch.Size) -> LossOutput:
    (total, values), batch, config = result, asked.batch, asked.config
    return LossOutput(
        loss=total.reshape(shape) if config.reduction == "none" else total,
        logps=values.logp.reshape(shape),
        entropy=values.entropy.reshape(shape),
        kl=values.kl.reshape(shape),
        learning=batch.learning.reshape(shape).clone(),  # it may be the caller's mask
        metrics={**metrics(config, batch, values, total.detach()), "gradient_left_out": asked.left_out},
    )
