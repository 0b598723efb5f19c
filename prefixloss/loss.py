"""The public functions: check, choose the back-end, call it, wrap the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check, reference, torch_backend
from prefixloss.advantages import TokenAdvantages
from prefixloss.batch import Batch, TokenInputs, TokenValues
from prefixloss.config import LossConfig
from prefixloss.heads import accumulation_dtype
from prefixloss.layout import Layout
from prefixloss.metrics import metrics
from prefixloss.softmax import Transform


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns.

    loss: 0-d (shaped like `tokens` for reduction="none"), float32 or float64, differentiable.
    logps, entropy, kl: float, shaped like `tokens`, detached; 0 where not computed.
    learning: bool, shaped like `tokens`: tokens that may have a gradient.
    metrics: 0-d tensors by name (see `prefixloss.metrics`); reading one is the caller's synchronisation.
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
        normalizer: replaces the reduction's denominator (see `prefixloss.reduction`).
        config: see `LossConfig`.
        tp_group: a head split by vocabulary; not supported yet, must be None.
        backend: "auto" | "torch" | "reference" (`prefixloss.reference` is the method in its plainest form).

    Packed per-response advantages have to differ in length from per-token ones: with N = B they are taken per token.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what it got and what it expects.
        RuntimeError: for a back-end that cannot run here, saying why.
    """
    check.backend(backend, tp_group)
    check.config(config, LossConfig)
    check.tensor("tokens", tokens, "integer")
    lm_head_weight, lm_head_bias = _whole(lm_head_weight), _whole(lm_head_bias)
    ref_lm_head_weight, ref_lm_head_bias = _whole(ref_lm_head_weight), _whole(ref_lm_head_bias)
    names = ("hidden", "lm_head_weight", "lm_head_bias")
    check.head(hidden, lm_head_weight, lm_head_bias, names, tokens.shape)
    check.device("tokens", tokens, hidden.device)
    inputs = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer
    )
    exact = {"ref_hidden": ref_hidden, "ref_lm_head_weight": ref_lm_head_weight}
    dtype, vocabulary = accumulation_dtype(hidden, lm_head_weight), len(lm_head_weight)
    batch = inputs.checked(config, dtype, vocabulary, exact)
    ref_head = None
    if config.kl == "full":
        ref_head = _reference_head(ref_hidden, ref_lm_head_weight, ref_lm_head_bias, lm_head_weight, tokens.shape)
    head = (_rows(hidden), lm_head_weight, lm_head_bias)
    with _as_given(hidden):
        if backend == "reference":
            rows = batch.layout.scored.nonzero().squeeze(1)
            logits = reference.linear_logits(head, rows, dtype)
            ref_logits = None if ref_head is None else reference.linear_logits(ref_head, rows, dtype)
            result = reference.loss(logits, ref_logits, rows, batch, config)
        else:
            source = torch_backend.linear_source(ref_head, _transform(config), batch.tokens, config.chunk_tokens)
            result = torch_backend.loss(source, batch, config, head)
        return _output(result, batch, config, tokens.shape)


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
) -> LossOutput:
    """The policy loss from logits [B, T, V] or [N, V]; everything else as in `linear_prefix_loss`.

    Args:
        logits: the head's raw output; scale, softcap and temperature of `config` are applied here. Logits that are
            not contiguous (`logits[:, :-1]`) are copied first: better to mask the last position.
        ref_logits: like `logits`, raw as well, for kl="full".
        inplace: lets the backward overwrite `logits` (or their copy, see above) with the gradient, so that no second
            [N, V] is ever held.
    """
    check.backend(backend, tp_group)
    check.config(config, LossConfig)
    check.tensor("tokens", tokens, "integer")
    check.logits("logits", logits, tokens)
    inputs = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer
    )
    dtype, vocabulary = accumulation_dtype(logits), logits.shape[-1]
    batch = inputs.checked(config, dtype, vocabulary, {"ref_logits": ref_logits})
    ref_rows = None
    if config.kl == "full":
        assert ref_logits is not None
        check.logits("ref_logits", ref_logits, tokens)
        if inplace:
            check.own_storage("ref_logits", ref_logits, logits)
        check.device("ref_logits", ref_logits, logits.device)
        check.same_vocabulary("ref_logits", ref_logits.shape[-1], vocabulary)
        ref_rows = _rows(ref_logits).detach()
    policy = _rows(logits)
    with _as_given(logits):
        if backend == "reference":
            rows = batch.layout.scored.nonzero().squeeze(1)
            chosen, ref_chosen = policy[rows].to(dtype), None if ref_rows is None else ref_rows[rows].to(dtype)
            result = reference.loss(chosen, ref_chosen, rows, batch, config)
        else:
            transform, chunk = _transform(config), config.chunk_tokens
            source = torch_backend.logit_source(ref_rows, inplace, transform, batch.tokens, chunk)
            # float16 gradients are made once the incoming scale is known, or small ones would underflow before it
            later = inplace or logits.dtype == torch.float16
            result = torch_backend.loss(source, batch, config, (policy,), gradient_later=later)
        return _output(result, batch, config, tokens.shape)


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
) -> LogpOutput:
    """Log-probs (and entropies) of `tokens`, differentiable, for trainers that keep their own loss.

    hidden: [B, T, D] or [N, D]; lm_head_weight: [V, D]; tokens, mask: [B, T] or [N]. Results are float32 (float64 for
    float64 input), 0 outside the mask. The backward skips every token whose incoming gradients are exactly 0. Errors
    as in `linear_prefix_loss`.
    """
    check.backend(backend, tp_group)
    check.tensor("tokens", tokens, "integer")
    options = LossConfig(temperature=temperature, softcap=softcap, logit_scale=logit_scale)  # checks the three
    lm_head_weight, lm_head_bias = _whole(lm_head_weight), _whole(lm_head_bias)
    names = ("hidden", "lm_head_weight", "lm_head_bias")
    check.head(hidden, lm_head_weight, lm_head_bias, names, tokens.shape)
    check.device("tokens", tokens, hidden.device)
    layout = Layout.of(tokens.shape, tokens.device, mask, None)
    ids = tokens.reshape(-1).long()
    check.token_ids(ids, layout.scored, len(lm_head_weight))
    rows = layout.scored.nonzero().squeeze(1)
    head = (_rows(hidden), lm_head_weight, lm_head_bias)
    with _as_given(hidden):
        values: tuple[Tensor, ...]
        if backend == "reference":
            logits = reference.linear_logits(head, rows, accumulation_dtype(hidden, lm_head_weight))
            values = reference.log_probs_and_entropies(logits, ids[rows], options)
        else:
            source = torch_backend.linear_source(None, _transform(options), ids, None)
            values = torch_backend.row_statistics(source, rows, head, entropy_grad=entropy)[:2]
        logps, entropies = (v.new_zeros(len(ids)).index_copy(0, rows, v).reshape(tokens.shape) for v in values)
    return LogpOutput(logps, entropies if entropy else None)


def _as_given(x: Tensor) -> torch.autocast:
    """No autocast: its half-precision products would undo float32 accumulation."""
    return torch.autocast(x.device.type, enabled=False)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _reference_head(
    hidden: Any, weight: Any, bias: Tensor | None, policy_weight: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor | None]:
    check.head(hidden, weight, bias, ("ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias"), shape)
    check.device("ref_hidden", hidden, policy_weight.device)
    check.same_vocabulary("ref_lm_head_weight", len(weight), len(policy_weight))
    return _rows(hidden).detach(), weight.detach(), None if bias is None else bias.detach()


def _transform(config: LossConfig) -> Transform:
    return Transform.of(config.temperature, config.softcap, config.logit_scale)


def _whole(weight: Any) -> Any:
    """A DTensor gathered; each rank's gradient is a share of the sum over ranks."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial  # noqa: PLC0415 (slow to import, seldom needed)

    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def _output(result: tuple[Tensor, TokenValues], batch: Batch, config: LossConfig, shape: torch.Size) -> LossOutput:
    total, values = result
    return LossOutput(
        loss=total.reshape(shape) if config.reduction == "none" else total,
        logps=values.logp.reshape(shape),
        entropy=values.entropy.reshape(shape),
        kl=values.kl.reshape(shape),
        learning=batch.learning.reshape(shape).clone(),  # it may be the caller's mask
        metrics=metrics(config, batch, values, total.detach()),
    )
