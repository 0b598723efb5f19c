"""The public functions: check, choose the back-end, call it, wrap the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.backends import memory, reference
from prefixloss.backends.torch import loss as torch_backend
from prefixloss.backends.torch import operators as torch_operators
from prefixloss.backends.torch.sharded import Shard, Whole
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Batch, TokenInputs, TokenValues
from prefixloss.inputs.layout import Layout
from prefixloss.inputs.token_advantages import TokenAdvantages
from prefixloss.maths.metrics import metrics
from prefixloss.maths.precision import accumulation_dtype


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
            the loss, the whole gradient of hidden and that of its rows. By backend="torch", on any device.
        vocab_size: ids from there on are padding: those columns never count. None: there is none.
        cp_group: a torch.distributed group whose processes have consecutive parts of every response, in the order of
            their ranks: lengths, prefixes, sequence ratios and denominators are those of whole responses. A process's
            loss is its share: the shares, and their gradients, add up to the whole. Metrics are of the part alone.
        backend: "auto" | "triton" | "torch" | "reference" (`prefixloss.backends.reference` is the plainest form).
            "auto" takes the Triton kernels on CUDA, ROCm and XPU, plain torch elsewhere and for float64.
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
    backend = check.backend(backend, tp_group, cp_group, hidden, lm_head_weight)
    check.transforms(backend, hidden, lm_head_weight, lm_head_bias)
    check.config(config, LossConfig)
    check.tokens(tokens)
    memory.budget(tokens.device)  # an unusable PREFIXLOSS_MEMORY is found before any work
    lm_head_weight, lm_head_bias = _whole(lm_head_weight, tp_group), _whole(lm_head_bias, tp_group)
    ref_lm_head_weight = _whole(ref_lm_head_weight, tp_group)
    ref_lm_head_bias = _whole(ref_lm_head_bias, tp_group)
    names = ("hidden", "lm_head_weight", "lm_head_bias")
    check.head(hidden, lm_head_weight, lm_head_bias, names, tokens.shape)
    check.device("tokens", tokens, hidden.device)
    inputs = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer, cp_group
    )
    exact = {"ref_hidden": ref_hidden, "ref_lm_head_weight": ref_lm_head_weight}
    dtype, ref_head = accumulation_dtype(hidden, lm_head_weight), None
    columns = _columns(tp_group, len(lm_head_weight), vocab_size, tokens, dtype, 1 + (config.kl == "full"))
    batch = inputs.checked(config, dtype, columns.vocabulary, exact)
    if config.kl == "full":
        ref_head = _reference_head(ref_hidden, ref_lm_head_weight, ref_lm_head_bias, lm_head_weight, tokens.shape)
        ref_head = (ref_head[0], *columns.head(*ref_head[1:]))
    most = _most_tokens(max_learning_tokens, mask, batch, config)
    head = (_rows(hidden), *columns.head(lm_head_weight, lm_head_bias))
    with _as_given(hidden):
        if backend == "reference":
            rows = batch.layout.scored.nonzero().squeeze(1)
            logits = reference.learning_logits(head, rows, batch.learning, dtype)
            ref_logits = None if ref_head is None else reference.linear_logits(ref_head, rows, dtype)
            result = reference.loss(logits, ref_logits, rows, batch, config)
        elif backend == "triton":
            result = _kernels().linear_loss(head, ref_head, batch, config, most)
        elif _compiled(tp_group):
            result = torch_operators.loss(head, ref_head, batch, config)
        else:
            source = torch_backend.linear_source(ref_head, config, batch.tokens, columns)
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
    vocab_size: int | None = None,
    cp_group: Any = None,
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
    backend = check.backend(backend, tp_group, cp_group, logits)
    check.transforms(backend, logits)
    check.config(config, LossConfig)
    check.flag("inplace", inplace)
    check.tokens(tokens)
    memory.budget(tokens.device)  # an unusable PREFIXLOSS_MEMORY is found before any work
    check.logits("logits", logits, tokens)
    if inplace:
        check.overwritable(logits)
    inputs = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer, cp_group
    )
    dtype = accumulation_dtype(logits)
    columns = _columns(tp_group, logits.shape[-1], vocab_size, tokens, dtype, 1 + (config.kl == "full"))
    batch = inputs.checked(config, dtype, columns.vocabulary, {"ref_logits": ref_logits})
    if config.kl == "full":
        assert ref_logits is not None
        check.logits("ref_logits", ref_logits, tokens)
        if inplace:
            check.own_storage("ref_logits", ref_logits, logits)
        check.device("ref_logits", ref_logits, logits.device)
        check.same_vocabulary("ref_logits", ref_logits.shape[-1], logits.shape[-1])
    ref_logits = columns.logits(ref_logits.detach()) if config.kl == "full" and ref_logits is not None else None
    logits = columns.logits(logits)
    with _as_given(logits):
        if backend == "triton":
            return _output(
                _kernels().logit_loss(logits, ref_logits, batch, config, inplace), batch, config, tokens.shape
            )
        policy, ref_rows = _rows(logits), None if ref_logits is None else _rows(ref_logits)
        if backend == "reference":
            rows = batch.layout.scored.nonzero().squeeze(1)
            chosen, ref_chosen = policy[rows].to(dtype), None if ref_rows is None else ref_rows[rows].to(dtype)
            result = reference.loss(chosen, ref_chosen, rows, batch, config)
        elif _compiled(tp_group):
            result = torch_operators.loss((policy,), None if ref_rows is None else (ref_rows,), batch, config)
        else:
            source = torch_backend.logit_source(ref_rows, inplace, config, batch.tokens, columns)
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
    max_scored_tokens: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> LogpOutput:
    """Log-probs (and entropies) of `tokens`, differentiable, for trainers that keep their own loss.

    hidden: [B, T, D] or [N, D]; lm_head_weight: [V, D]; tokens, mask: [B, T] or [N]. Results are float32 (float64 for
    float64 input), 0 outside the mask. The backward skips every token whose incoming gradients are exactly 0.
    max_scored_tokens: an upper bound on the tokens in the mask, with which nothing waits for the device (and the
    backward skips none of them; a bound that is too low makes everything NaN). chunk_tokens as in `LossConfig`.
    tp_group, vocab_size and errors as in `linear_prefix_loss`.
    """
    backend = check.backend(backend, tp_group, None, hidden, lm_head_weight)
    check.transforms(backend, hidden, lm_head_weight, lm_head_bias)
    check.tokens(tokens)
    memory.budget(tokens.device)  # an unusable PREFIXLOSS_MEMORY is found before any work
    check.flag("entropy", entropy)
    # checks the four; a coefficient says that the entropy has a gradient
    options = LossConfig(
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy_coef=1.0 if entropy else 0.0,
        chunk_tokens=chunk_tokens,
    )
    lm_head_weight, lm_head_bias = _whole(lm_head_weight, tp_group), _whole(lm_head_bias, tp_group)
    names = ("hidden", "lm_head_weight", "lm_head_bias")
    check.head(hidden, lm_head_weight, lm_head_bias, names, tokens.shape)
    check.device("tokens", tokens, hidden.device)
    layout = Layout.of(tokens.shape, tokens.device, mask, None)
    ids = tokens.reshape(-1).long().contiguous()
    dtype = accumulation_dtype(hidden, lm_head_weight)
    columns = _columns(tp_group, len(lm_head_weight), vocab_size, tokens, dtype, 1)
    layout.check_token_ids(ids, columns.vocabulary)
    if max_scored_tokens is not None:
        check.most_tokens("max_scored_tokens", max_scored_tokens, layout.scored)
    head = (_rows(hidden), *columns.head(lm_head_weight, lm_head_bias))
    with _as_given(hidden):
        if backend == "triton":
            bound = -1 if max_scored_tokens is None else int(max_scored_tokens)
            tensors = (*head, None, None, None, ids)
            stats = _kernels().linear_statistics(tensors, layout.scored, options, bound)
            return LogpOutput(
                stats.logp.reshape(tokens.shape), stats.entropy.reshape(tokens.shape) if entropy else None
            )
        if backend == "torch" and _compiled(tp_group):
            made = torch_operators.statistics(head, None, ids, layout.scored, options)
            return LogpOutput(made.logp.reshape(tokens.shape), made.entropy.reshape(tokens.shape) if entropy else None)
        values: tuple[Tensor, ...]
        rows = layout.scored.nonzero().squeeze(1)
        if backend == "reference":
            logits = reference.linear_logits(head, rows, dtype)
            values = reference.log_probs_and_entropies(logits, ids[rows], options)
        else:
            source = torch_backend.linear_source(None, options, ids, columns)
            values = torch_backend.row_statistics(source, rows, head, entropy_grad=entropy)[:2]
        logps, entropies = (v.new_zeros(len(ids)).index_copy(0, rows, v).reshape(tokens.shape) for v in values)
    return LogpOutput(logps, entropies if entropy else None)


def _columns(
    tp_group: Any, given: int, vocab_size: int | None, tokens: Tensor, dtype: torch.dtype, buffers: int
) -> Whole:
    """The part of the vocabulary that is here, of `given` columns. buffers: of logits, for a chunk."""
    if vocab_size is not None:
        check.vocab_size(vocab_size, given, tp_group)
    if tp_group is None:
        return Whole(given if vocab_size is None else int(vocab_size))
    per_row = max(1, given) * dtype.itemsize * buffers
    fit = memory.rows_in_budget(tokens.numel(), per_row, tokens.device)
    return Shard.of(tp_group, given, fit, tokens.device, vocab_size)


def _compiled(tp_group: Any) -> bool:
    """Whether this call is on its way into a graph of `torch.compile`; one with collectives inside goes in pieces."""
    return torch.compiler.is_compiling() and tp_group is None


def _kernels() -> Any:
    """`prefixloss.backends.triton.loss`, which needs triton: imported where it is used first."""
    from prefixloss.backends.triton import loss as triton_backend  # noqa: PLC0415

    return triton_backend


def _most_tokens(given: int | None, mask: Tensor | None, batch: Batch, config: LossConfig) -> int | None:
    """An upper bound on the tokens to compute, if one is known without looking."""
    every_scored = config.shows_every_scored or config.sequence_ratio
    if given is not None:
        check.most_tokens("max_learning_tokens", given, batch.layout.scored if every_scored else batch.computed)
        return int(given)
    penalised = config.penalises_kl or config.entropy_coef != 0
    return batch.tokens.shape[0] if mask is None and (every_scored or penalised) else None


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


def _whole(weight: Any, tp_group: Any) -> Any:
    """A DTensor gathered; each rank's gradient is a share of the sum over ranks."""
    if not hasattr(weight, "full_tensor"):
        return weight
    check.not_over(tp_group, weight.device_mesh)
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
