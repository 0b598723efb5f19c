"""The door of a call: its arguments are checked here, once, and leave as the one object that a back-end is asked.

Errors come in the order of the questions below, before any work and before any collective but those that count the
vocabulary and gather a DTensor.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefixloss import check
from prefixloss.backends import memory, reference, reference_distill
from prefixloss.backends.columns import Columns, Shard
from prefixloss.backends.problem import Backend, Distil, Head, HeadLoss, HeadStatistics, LogitLoss, by_rows
from prefixloss.backends.torch import compiled, eager
from prefixloss.backends.torch import distill as torch_distill
from prefixloss.backends.torch import kept as kept_columns
from prefixloss.backends.two_stages import Statistics
from prefixloss.config import LossConfig
from prefixloss.inputs import distillation
from prefixloss.inputs.batch import Batch, TokenInputs
from prefixloss.inputs.distillation import Distillation, GivenTeacher, Teacher, TokensToDistil
from prefixloss.inputs.kept import Kept, kept_sets
from prefixloss.inputs.layout import Layout
from prefixloss.maths.precision import accumulation_dtype


class Replay(NamedTuple):
    """Kept sets as the caller gave them, and where the padding of the vocabulary begins."""

    ids: Any
    offsets: Any
    vocab_size: int | None


# hidden states [.., D], a head [V, D], perhaps a DTensor, and a bias [V] or None, as the caller gave them
GivenHead = tuple[Any, Any, Any]


def backend(
    name: Any, tokens: Any, inputs: tuple[Any, ...], config: Any, tp_group: Any = None, cp_group: Any = None
) -> Backend:
    """The back-end for inputs (the first of them decides), and what every call checks first."""
    chosen = _chosen(name, tp_group, cp_group, *inputs, splits=len(inputs) == len(Head._fields))
    if chosen != "reference":
        _no_transforms(chosen, *inputs)
    check.config(config, LossConfig)
    check.tokens(tokens)
    memory.budget(tokens.device)  # an unusable PREFIXLOSS_MEMORY is found before any work
    # a graph with collectives inside goes in pieces, so a call that has some is not one operator
    in_graph = chosen == "torch" and tp_group is None and torch.compiler.is_compiling()
    return _loaded(chosen, in_graph)


def head_loss(
    given: GivenHead, ref_given: GivenHead, inputs: TokenInputs, config: LossConfig, tp_group: Any,
    vocab_size: int | None, most: int | None,
) -> HeadLoss:  # fmt: skip
    head, exact = _head(given, inputs.tokens, tp_group), config.exact_kl
    dtype = accumulation_dtype(head.hidden, head.weight)
    columns = _columns(tp_group, len(head.weight), vocab_size, inputs.tokens, dtype, 1 + exact)
    needed = {"ref_hidden": ref_given[0], "ref_lm_head_weight": ref_given[1]}
    batch = inputs.checked(config, dtype, columns.vocabulary, needed)
    made = _reference_head(ref_given, head, inputs.tokens.shape, tp_group) if exact else None
    most = _most_tokens(most, inputs.mask, batch, config)
    made = None if made is None else _unpadded(made, columns)
    return HeadLoss(_unpadded(head, columns), made, batch, config, columns, most, batch.weights.new_zeros(()))


def logit_loss(
    logits: Tensor, ref_logits: Tensor | None, inputs: TokenInputs, config: LossConfig, inplace: bool, tp_group: Any,
    vocab_size: int | None,
) -> LogitLoss:  # fmt: skip
    check.logits("logits", logits, inputs.tokens)
    if inplace:
        check.overwritable(logits)
    exact = config.exact_kl
    dtype = accumulation_dtype(logits)
    columns = _columns(tp_group, logits.shape[-1], vocab_size, inputs.tokens, dtype, 1 + exact)
    batch = inputs.checked(config, dtype, columns.vocabulary, {"ref_logits": ref_logits})
    made = None
    if exact:
        assert ref_logits is not None
        check.logits("ref_logits", ref_logits, inputs.tokens)
        if inplace:
            check.own_storage("ref_logits", ref_logits, logits)
        check.device("ref_logits", ref_logits, logits.device)
        check.same_vocabulary("ref_logits", ref_logits.shape[-1], logits.shape[-1])
        made = columns.logits(ref_logits.detach())
    return LogitLoss(columns.logits(logits), made, batch, config, columns, inplace, batch.weights.new_zeros(()))


def head_statistics(
    given: GivenHead, tokens: Tensor, mask: Tensor | None, config: LossConfig, tp_group: Any, vocab_size: int | None,
    most: int | None,
) -> HeadStatistics:  # fmt: skip
    head = _head(given, tokens, tp_group)
    layout = Layout.of(tokens.shape, tokens.device, mask, None)
    ids = tokens.reshape(-1).long().contiguous()
    dtype = accumulation_dtype(head.hidden, head.weight)
    columns = _columns(tp_group, len(head.weight), vocab_size, tokens, dtype, 1)
    layout.check_token_ids(ids, columns.vocabulary)
    if most is not None:
        check.most_tokens("max_scored_tokens", most, layout.scored)
        most = int(most)
    left_out = torch.zeros((), dtype=dtype, device=ids.device)
    return HeadStatistics(_unpadded(head, columns), None, ids, layout.scored, config, columns, most, left_out)


# --- sampling replay: what is asked of a head, or of logits, is asked of the kept columns' logits


def kept_loss(
    given: GivenHead, ref_given: GivenHead, inputs: TokenInputs, config: LossConfig, replay: Replay, plain: bool
) -> LogitLoss:
    head, exact, shape = _head(given, inputs.tokens, None), config.exact_kl, inputs.tokens.shape
    layout = Layout.of(shape, inputs.tokens.device, inputs.mask, inputs.cu_seqlens)
    kept = _replayed(replay, inputs.tokens, layout, len(head.weight))
    inputs = dataclasses.replace(inputs, tokens=kept.places.reshape(shape))
    needed = {"ref_hidden": ref_given[0], "ref_lm_head_weight": ref_given[1]}
    columns = Columns(kept.ids.shape[1])
    batch = inputs.checked(config, accumulation_dtype(head.hidden, head.weight), columns.vocabulary, needed)
    made = None
    if exact:
        reference = _reference_head(ref_given, head, shape, None)
        made = kept_columns.of_head(reference, kept, layout.scored, plain=False).detach()
    logits = kept_columns.of_head(head, kept, layout.scored, plain)
    return LogitLoss(logits, made, batch, config, columns, False, batch.weights.new_zeros(()))


def kept_logit_loss(
    logits: Tensor, ref_logits: Tensor | None, inputs: TokenInputs, config: LossConfig, replay: Replay
) -> LogitLoss:
    check.logits("logits", logits, inputs.tokens)
    layout = Layout.of(inputs.tokens.shape, inputs.tokens.device, inputs.mask, inputs.cu_seqlens)
    kept = _replayed(replay, inputs.tokens, layout, logits.shape[-1])
    inputs = dataclasses.replace(inputs, tokens=kept.places.reshape(inputs.tokens.shape))
    columns = Columns(kept.ids.shape[1])
    batch = inputs.checked(config, accumulation_dtype(logits), columns.vocabulary, {"ref_logits": ref_logits})
    made = None
    if config.exact_kl:
        assert ref_logits is not None
        check.logits("ref_logits", ref_logits, inputs.tokens)
        check.same_vocabulary("ref_logits", ref_logits.shape[-1], logits.shape[-1])
        made = kept_columns.of_logits(by_rows(ref_logits).detach(), kept, layout.scored)
    chosen = kept_columns.of_logits(by_rows(logits), kept, layout.scored)
    return LogitLoss(chosen, made, batch, config, columns, False, batch.weights.new_zeros(()))


def kept_statistics(
    given: GivenHead, tokens: Tensor, mask: Tensor | None, config: LossConfig, replay: Replay, plain: bool
) -> Statistics:
    """Log-probs and entropies; the kept columns are few, so that every back-end has them from plain torch."""
    head = _head(given, tokens, None)
    layout = Layout.of(tokens.shape, tokens.device, mask, None)
    kept, rows = _replayed(replay, tokens, layout, len(head.weight)), layout.scored.nonzero().squeeze(1)
    logits = kept_columns.of_head(head, kept, layout.scored, plain)
    return reference.statistics(config, logits[rows], kept.places, rows)


def replay_of(
    kept_ids: Any, kept_offsets: Any, tp_group: Any, vocab_size: int | None, inplace: bool = False
) -> Replay | None:
    """None without kept sets."""
    if kept_ids is None:
        if kept_offsets is not None:
            check.fail("kept_ids", "None with kept_offsets", "a tensor [M]")
        return None
    if tp_group is not None:
        check.fail("kept_ids", "kept sets with tp_group", "a head that is whole on every process")
    if inplace:
        check.fail("inplace", "True with kept_ids", "False: most of the gradient is 0 there")
    return Replay(kept_ids, kept_offsets, vocab_size)


def _replayed(replay: Replay, tokens: Tensor, layout: Layout, columns: int) -> Kept:
    """The kept sets, checked."""
    if replay.vocab_size is not None:
        check.vocab_size(replay.vocab_size, columns, None)
    vocabulary = columns if replay.vocab_size is None else int(replay.vocab_size)
    layout.check_token_ids(tokens.reshape(-1), vocabulary)
    return kept_sets(replay.ids, replay.offsets, tokens, layout, vocabulary)


# --- heads and vocabularies


def _gathered(weight: Any, tp_group: Any) -> Any:
    """A DTensor's whole; each rank's gradient is a share of the sum over ranks."""
    if not hasattr(weight, "full_tensor"):
        return weight
    check.not_over(tp_group, weight.device_mesh)
    from torch.distributed.tensor import Partial  # noqa: PLC0415 (slow to import, seldom needed)

    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def _head(given: GivenHead, tokens: Tensor, tp_group: Any) -> Head:
    hidden, weight, bias = given[0], _gathered(given[1], tp_group), _gathered(given[2], tp_group)
    check.head(hidden, weight, bias, ("hidden", "lm_head_weight", "lm_head_bias"), tokens.shape)
    check.device("tokens", tokens, hidden.device)
    return Head(by_rows(hidden), weight, bias)


def _reference_head(given: GivenHead, policy: Head, shape: torch.Size, tp_group: Any) -> Head:
    hidden, weight, bias = given[0], _gathered(given[1], tp_group), _gathered(given[2], tp_group)
    check.head(hidden, weight, bias, ("ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias"), shape)
    check.device("ref_hidden", hidden, policy.weight.device)
    check.same_vocabulary("ref_lm_head_weight", len(weight), len(policy.weight))
    return Head(by_rows(hidden).detach(), weight.detach(), None if bias is None else bias.detach())


def _columns(
    tp_group: Any, given: int, vocab_size: int | None, tokens: Tensor, dtype: torch.dtype, buffers: int
) -> Columns:
    """The part of the vocabulary that is here, of `given` columns. buffers: of logits, for a chunk."""
    if vocab_size is not None:
        check.vocab_size(vocab_size, given, tp_group)
    if tp_group is None:
        return Columns(given if vocab_size is None else int(vocab_size))
    per_row = max(1, given) * dtype.itemsize * buffers
    fit = memory.rows_in_budget(tokens.numel(), per_row, tokens.device)
    return Shard.of(tp_group, given, fit, tokens.device, vocab_size)


def _unpadded(head: Head, columns: Columns) -> Head:
    return Head(head.hidden, *columns.head(head.weight, head.bias))


def _most_tokens(given: int | None, mask: Tensor | None, batch: Batch, config: LossConfig) -> int | None:
    """An upper bound on the tokens to compute, if one is known without looking; none where a tolerance makes the host
    wait anyway."""
    of_many = config.of_responses is not None or config.of_batch or batch.by_batch
    every_scored = config.shows_every_scored or of_many
    if given is not None:
        check.most_tokens("max_learning_tokens", given, batch.layout.scored if every_scored else batch.computed)
        return int(given)
    known = mask is None and (every_scored or config.penalised) and not config.tolerant
    return batch.tokens.shape[0] if known else None


# --- the choice of a back-end


def _chosen(name: Any, tp_group: Any, cp_group: Any, *inputs: Any, splits: bool = False) -> str:
    """The back-end to use for these inputs: for "auto" the kernels wherever they run as compiled code.

    splits: whether the kernels can work on a part of the vocabulary.
    """
    if not isinstance(name, str) or name not in ("auto", "triton", "torch", "reference"):
        check.fail("backend", check.describe(name), '"auto", "triton", "torch" or "reference"')
    check.process_group("tp_group", tp_group)
    check.process_group("cp_group", cp_group)
    if cp_group is not None and name == "reference":
        raise RuntimeError('backend: got "reference" with cp_group, expected "auto", "torch" or "triton"')
    if tp_group is not None:
        if name == "reference" or (name == "triton" and not splits):
            wanted = '"auto", "torch" or "triton"' if splits else '"auto" or "torch"'
            raise RuntimeError(f'backend: got "{name}" with tp_group, expected {wanted}')
        if not splits:
            return "torch"
    if name in ("torch", "reference"):
        return name
    first = inputs[0]
    if not isinstance(first, Tensor) or first.device.type == "meta" or (name == "auto" and first.device.type == "cpu"):
        return "torch"  # which says what is wrong with it, if anything
    obstacle = _triton_obstacle(*inputs)
    if obstacle is None:
        return "triton"
    if name == "triton":
        raise RuntimeError(f'backend: got "triton", expected "auto" or "torch": {obstacle}')
    return "torch"


def _loaded(chosen: str, in_graph: bool) -> Backend:
    """Imported where it is used first: the kernels need triton."""
    if chosen == "triton":
        from prefixloss.backends.triton import loss  # noqa: PLC0415

        return loss
    if chosen == "reference":
        return reference
    return compiled if in_graph else eager


def _no_transforms(backend: str, *inputs: Any) -> None:
    """No transform of torch.func and no forward-mode derivative, which our own derivatives know nothing of."""
    if torch._C._are_functorch_transforms_active():
        kind = torch._C._functorch.peek_interpreter_stack().key().name
        if kind == "Vmap":
            raise RuntimeError("vmap: got a call inside it, expected one call for the batch: tokens [B, T] or [N]")
        under = f"inside torch.func ({kind.lower()})"
    elif any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        under = "for a forward-mode derivative"
    else:
        return
    raise RuntimeError(f'backend: got "{backend}" {under}, expected "reference", or backward() and torch.autograd.grad')


def _triton_obstacle(*inputs: Any) -> str | None:
    """Why the kernels cannot run on these inputs, if so."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs):
        return "the kernels compute in float32, the input is float64"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    device = inputs[0].device.type
    if device in ("cuda", "xpu") or (device == "cpu" and _interpreted()):
        return None
    return f"the kernels run on CUDA, ROCm and XPU, the input is on {device} (for tests: TRITON_INTERPRET=1)"


def _interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors, in Python: TRITON_INTERPRET=1 when they were first imported."""
    from prefixloss._kernels.scale import scale_kernel  # noqa: PLC0415 (imports triton)

    return type(scale_kernel).__name__ == "InterpretedFunction"


# --- distillation


def distils_by(name: Any, inputs: tuple[Any, ...], tp_group: Any) -> str:
    """The back-end for the student's tensors, and its first checks."""
    chosen = _chosen(name, tp_group, None, *inputs)
    if chosen != "reference":
        _no_transforms(chosen, *inputs)
    return chosen


def distiller(chosen: str) -> Any:
    """The module of a back-end whose `distillation` answers a `Distil`."""
    if chosen == "triton":
        from prefixloss.backends.triton import distill  # noqa: PLC0415 (as in `_loaded`)

        return distill
    return reference_distill if chosen == "reference" else torch_distill


def head_distillation(
    given: GivenHead, teacher: GivenTeacher, tokens: TokensToDistil, settings: Distillation, tp_group: Any,
    vocab_size: int | None,
) -> Distil:  # fmt: skip
    listed = teacher.is_listed(("hidden", "lm_head_weight"), settings)
    shape = _token_shape("hidden", given[0], "D")
    hidden, weight, bias = given[0], _gathered(given[1], tp_group), _gathered(given[2], tp_group)
    check.head(hidden, weight, bias, ("hidden", "lm_head_weight", "lm_head_bias"), shape)
    beside = Teacher()
    if not listed:
        whole = teacher._replace(
            lm_head_weight=_gathered(teacher.lm_head_weight, tp_group),
            lm_head_bias=_gathered(teacher.lm_head_bias, tp_group),
        )
        beside = distillation.of_head(whole, shape, len(weight), _least(vocab_size, len(weight), tp_group))
        check.device("teacher_hidden", whole.hidden, hidden.device)
    batch = tokens.checked(shape, settings.student, accumulation_dtype(hidden, weight), hidden.device)
    columns = _columns(tp_group, len(weight), vocab_size, batch.weights, batch.weights.dtype, 2)
    teacher = _mapped(teacher, columns, None if listed else len(whole.lm_head_weight), hidden.device, tp_group)
    if listed:
        beside = distillation.of_list(teacher, batch.layout, shape, columns.vocabulary)
    elif teacher.vocabulary is None:
        made = columns.head(beside.weight, beside.bias)  # type: ignore[arg-type]
        beside = beside._replace(weight=made[0], bias=made[1])
    vocabulary = None if listed else teacher.vocabulary
    return Distil(_unpadded(Head(by_rows(hidden), weight, bias), columns), beside, batch, settings, columns, vocabulary)


def logit_distillation(
    logits: Any, teacher: GivenTeacher, tokens: TokensToDistil, settings: Distillation, tp_group: Any,
    vocab_size: int | None,
) -> Distil:  # fmt: skip
    listed = teacher.is_listed(("logits",), settings)
    shape = _token_shape("logits", logits, "V")
    count, beside = logits.shape[-1], Teacher()
    if not listed:
        beside = distillation.of_logits(teacher, shape, count, _least(vocab_size, count, tp_group))
        check.device("teacher_logits", teacher.logits, logits.device)
    batch = tokens.checked(shape, settings.student, accumulation_dtype(logits), logits.device)
    columns = _columns(tp_group, count, vocab_size, batch.weights, batch.weights.dtype, 2)
    teacher = _mapped(teacher, columns, None if listed else teacher.logits.shape[-1], logits.device, tp_group)
    if listed:
        beside = distillation.of_list(teacher, batch.layout, shape, columns.vocabulary)
    elif teacher.vocabulary is None:
        beside = beside._replace(first=columns.logits(beside.first))  # type: ignore[arg-type]
    vocabulary = None if listed else teacher.vocabulary
    return Distil((by_rows(columns.logits(logits)),), beside, batch, settings, columns, vocabulary)


def _mapped(
    teacher: GivenTeacher, columns: Columns, most: int | None, device: torch.device, tp_group: Any
) -> GivenTeacher:
    """With its mapping of ids checked, if it has one."""
    if teacher.vocabulary is None:
        return teacher
    made = distillation.mapping(teacher.vocabulary, columns.vocabulary, most, device, tp_group)
    return teacher._replace(vocabulary=made)


def _token_shape(argument: str, x: Any, letter: str) -> torch.Size:
    """[B, T] or [N], of [B, T, *] or [N, *]."""
    check.tensor(argument, x, "float")
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        check.fail(argument, f"shape {list(x.shape)}", f"[B, T, {letter}] or [N, {letter}]")
    memory.budget(x.device)  # an unusable PREFIXLOSS_MEMORY is found before any work
    return x.shape[:-1]


def _least(vocab_size: int | None, columns: int, tp_group: Any) -> int | None:
    """How many columns a teacher has to have at least, if not as many as the student."""
    if vocab_size is None or tp_group is not None:
        return None
    check.vocab_size(vocab_size, columns, None)
    return vocab_size
