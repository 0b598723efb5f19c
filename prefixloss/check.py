"""Input checks. Each error names the argument, what it got and what it wants, and comes before any work."""

from __future__ import annotations

import importlib.util
import math
import os
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prefixloss.advantages import TokenAdvantages
    from prefixloss.config import LossConfig
    from prefixloss.layout import Layout

_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """A value as an error message shows it: short for tensors."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def fail(argument: str, got: Any, expected: str, error: type[Exception] = ValueError) -> None:
    got = got if isinstance(got, str) else describe(got)
    raise error(f"{argument}: got {got}, expected {expected}")


def readable(value: Tensor) -> bool:
    """Whether a tensor's values may be looked at: on an accelerator that would stall the stream, and a compiler has
    none to look at. There, values are checked only with PREFIXLOSS_CHECK=1."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("PREFIXLOSS_CHECK") == "1"


def tensor(argument: str, value: Any, kind: str) -> None:
    """kind: "float", "integer", "bool", "number" (any of them) or "mask" (the same, of 0 and 1)."""
    any_dtype = (torch.bool, torch.uint8, torch.int8, *_INTEGERS, *_FLOATS)
    dtypes = {
        "float": _FLOATS,
        "integer": _INTEGERS,
        "bool": (torch.bool,),
        "number": any_dtype,
        "mask": any_dtype,
    }[kind]
    wants = {
        "float": "a float32, bfloat16, float16 or float64 tensor",
        "integer": "an int64 (or int32) tensor",
        "bool": "a bool tensor",
        "number": "a tensor of numbers",
        "mask": "a tensor of bool or of 0 and 1",
    }[kind]
    if not isinstance(value, Tensor):
        fail(argument, type(value).__name__, wants, TypeError)
    if value.dtype not in dtypes:
        fail(argument, value, wants, TypeError)


def shape(argument: str, value: Tensor, expected: tuple[int, ...] | torch.Size, letters: str) -> None:
    if tuple(value.shape) != tuple(expected):
        fail(argument, f"shape {list(value.shape)}", f"{letters} = {list(expected)}")


def device(argument: str, value: Tensor, expected: torch.device) -> None:
    if value.device != expected:
        fail(argument, f"a tensor on {value.device}", f"one on {expected}, like the others")


def number(argument: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    limits = f" between {low:g} and {high:g}" if math.isfinite(low) else ""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        fail(argument, repr(value), f"a finite number{limits}")


def layout(shape_of_tokens: torch.Size, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if len(shape_of_tokens) not in (1, 2):
        fail("tokens", f"shape {list(shape_of_tokens)}", "[B, T] or [N]")
    if mask is not None:
        tensor("mask", mask, "mask")
        shape("mask", mask, shape_of_tokens, "the shape of tokens")
        if mask.dtype != torch.bool and readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            fail("mask", "values other than 0 and 1", "bool, or 0 and 1")
    if cu_seqlens is None:
        return
    tensor("cu_seqlens", cu_seqlens, "integer")
    if len(shape_of_tokens) == 2:
        fail(
            "cu_seqlens",
            f"{describe(cu_seqlens)} with padded tokens {list(shape_of_tokens)}",
            "packed tokens [N]",
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        fail("cu_seqlens", f"shape {list(cu_seqlens.shape)}", "[B + 1]")
    if not readable(cu_seqlens):
        return
    tokens = shape_of_tokens[0]
    if int(cu_seqlens[0]) != 0:
        fail("cu_seqlens", f"a first value of {int(cu_seqlens[0])}", "0")
    if bool((cu_seqlens.diff() < 0).any()):
        fail("cu_seqlens", f"decreasing values {cu_seqlens.tolist()[:8]}", "increasing offsets [B + 1]")
    if int(cu_seqlens[-1]) != tokens:
        fail("cu_seqlens", f"a last value of {int(cu_seqlens[-1])}", f"N = {tokens}, the number of tokens")


def token_advantages(advantages: TokenAdvantages, where: Layout) -> None:
    for name, kind in (("prefix", "float"), ("suffix", "float"), ("prefix_lengths", "integer")):
        value = getattr(advantages, name)
        tensor(f"advantages.{name}", value, kind)
        shape(f"advantages.{name}", value, (where.responses("advantages"),), "[B]")
        device(f"advantages.{name}", value, where.scored.device)
    if readable(advantages.prefix_lengths) and bool((advantages.prefix_lengths < 0).any()):
        fail("advantages.prefix_lengths", f"{int(advantages.prefix_lengths.min())}", "0 or more scored tokens")


def responses(**arguments: Tensor) -> None:
    """Per-response arguments of an advantage function: dtypes, one shared shape [B], and ranges."""
    kinds = {"correct": "bool", "lengths": "integer", "first_error": "integer", "group_ids": "integer"}
    kinds |= {"right_steps": "integer", "total_steps": "integer", "rewards": "number"}
    first = next(iter(arguments.values()))
    for name, value in arguments.items():
        tensor(name, value, kinds.get(name, "float"))
        if value.dim() != 1:
            fail(name, f"shape {list(value.shape)}", "[B]")
        shape(name, value, first.shape, "[B]")
        device(name, value, first.device)
    for name, low in (("lengths", 0), ("first_error", -1), ("right_steps", 0), ("total_steps", 0)):
        if name in arguments and bool((arguments[name] < low).any()):
            fail(name, f"{int(arguments[name].min())}", f"{low} or more")
    if "first_error" in arguments and "lengths" in arguments:
        first_error, lengths = arguments["first_error"], arguments["lengths"]
        _none("first_error", first_error, first_error >= lengths, lengths, "an index below the response's length,")
    if "right_steps" in arguments:
        right, total = arguments["right_steps"], arguments["total_steps"]
        _none("right_steps", right, right > total, total, "no more than total_steps,")


def _none(argument: str, values: Tensor, wrong: Tensor, limits: Tensor, wants: str) -> None:
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        fail(argument, f"{int(values[at])} for response {at}", f"{wants} {int(limits[at])}")


def shorten(value: Any, lengths: Tensor, prompt_lengths: Tensor | None) -> None:
    wants = '"prompt", a whole number of tokens >= 0, or a float share of the length between 0 and 1'
    if value == "prompt":
        if prompt_lengths is None:
            fail("prompt_lengths", "None", 'int64 [B], since shorten="prompt"')
        assert prompt_lengths is not None
        tensor("prompt_lengths", prompt_lengths, "integer")
        shape("prompt_lengths", prompt_lengths, lengths.shape, "[B]")
        if bool((prompt_lengths < 0).any()):
            fail("prompt_lengths", f"{int(prompt_lengths.min())}", "0 or more tokens")
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
    share = isinstance(value, float) and 0 <= value <= 1
    if not (whole or share):
        fail("shorten", repr(value), wants)


def token_ids(tokens: Tensor, scored: Tensor, vocabulary: int) -> None:
    """Ids of scored tokens in [0, V)."""
    if not readable(tokens):
        return
    wrong = scored & ((tokens < 0) | (tokens >= vocabulary))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        fail("tokens", f"id {int(tokens[at])} at flat position {at}", f"ids in [0, V) with V = {vocabulary}")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str], rows: torch.Size) -> None:
    """Hidden states [*rows, D] with a head [V, D] and an optional bias [V]; `names` are the three arguments' names."""
    tensor(names[0], hidden, "float")
    tensor(names[1], weight, "float")
    if hidden.dim() != len(rows) + 1 or hidden.shape[:-1] != rows:
        fail(names[0], f"shape {list(hidden.shape)}", f"[*tokens.shape, D] with tokens of shape {list(rows)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        fail(names[1], f"shape {list(weight.shape)}", f"[V, D] with D = {hidden.shape[-1]}, as in {names[0]}")
    if weight.shape[0] == 0:
        fail(names[1], "an empty vocabulary", "V >= 1")
    if bias is not None:
        tensor(names[2], bias, "float")
        shape(names[2], bias, (weight.shape[0],), "[V]")
        device(names[2], bias, hidden.device)
    device(names[1], weight, hidden.device)


def config(value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        fail("config", type(value).__name__, f"a {expected.__name__}", TypeError)


def own_storage(argument: str, value: Tensor, overwritten: Tensor) -> None:
    if value.untyped_storage().data_ptr() == overwritten.untyped_storage().data_ptr():
        fail(argument, "the storage of logits, which inplace=True overwrites", "a copy")


def logits(argument: str, value: Tensor, tokens: Tensor) -> None:
    """Logits [*tokens.shape, V]."""
    tensor(argument, value, "float")
    if value.dim() != tokens.dim() + 1 or value.shape[:-1] != tokens.shape or value.shape[-1] == 0:
        wants = f"[*tokens.shape, V] with tokens of shape {list(tokens.shape)}"
        fail(argument, f"shape {list(value.shape)}", wants)
    device("tokens", tokens, value.device)


def same_vocabulary(argument: str, got: int, expected: int) -> None:
    if got != expected:
        fail(argument, f"a vocabulary of {got}", f"V = {expected}, the policy's")


def needed_data(config: LossConfig, given: dict[str, Any], exact_reference: tuple[str, ...]) -> None:
    """The arguments that the options call for. `given` maps names to values; `exact_reference` are for kl="full"."""
    needs: list[tuple[str, str]] = []
    if config.kl not in (None, "full"):
        needs.append(("ref_logps", f'kl="{config.kl}"'))
    if config.kl == "full":
        needs += [(name, 'kl="full"') for name in exact_reference]
    if config.sampler_correction is not None:
        needs.append(("sampler_logps", f'sampler_correction="{config.sampler_correction}"'))
    if config.reduction == "group-token-mean":
        needs.append(("group_ids", 'reduction="group-token-mean"'))
    for name, why in needs:
        if given[name] is None:
            fail(name, "None", f"a value, since {why}")
    if config.reduction == "constant" and given["normalizer"] is None and config.max_length is None:
        fail("max_length", "None", 'a value, since reduction="constant" without a normalizer')


def process_group(argument: str, value: Any) -> None:
    if value is not None and not (hasattr(value, "rank") and hasattr(value, "size")):
        fail(argument, value, "a torch.distributed process group", TypeError)


def not_over(tp_group: Any, mesh: Any) -> None:
    """A DTensor that is gathered over its mesh has all of the vocabulary, which a tp_group's process has not."""
    if tp_group is not None:
        gathered = set(mesh.mesh.flatten().tolist()) & set(torch.distributed.get_process_group_ranks(tp_group))
        if len(gathered) > 1:
            fail("tp_group", "a head that is a DTensor over it", "this process's rows as a tensor (`to_local()`)")


def vocab_size(value: Any, columns: int, tp_group: Any) -> None:
    """columns: those that are given, of this process where there are several."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        fail("vocab_size", repr(value), "a whole number of at least 1")
    if tp_group is None and int(value) > columns:
        fail("vocab_size", f"{value} with {columns} columns", "no more than there are")


def normalizer(value: Any) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            fail("normalizer", f"shape {list(value.shape)}", "a number or a 0-d tensor")
        if value.device.type != "cpu":
            return
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        fail("normalizer", repr(value), "a number or a 0-d tensor", TypeError)
    if not math.isfinite(value) or value <= 0:
        fail("normalizer", repr(value), "a finite number > 0")


def most_tokens(argument: str, value: Any, computed: Tensor) -> None:
    """An upper bound on the True entries of computed [N]."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0:
        fail(argument, repr(value), "a whole number of tokens >= 0")
    if readable(computed) and int(computed.sum()) > value:
        fail(argument, f"{value} with {int(computed.sum())} tokens to compute", "at least as many")


def backend(name: Any, tp_group: Any, cp_group: Any, *inputs: Any) -> str:
    """The back-end to use for these inputs: for "auto" the kernels wherever they run as compiled code."""
    if name not in ("auto", "triton", "torch", "reference"):
        fail("backend", repr(name), '"auto", "triton", "torch" or "reference"')
    process_group("tp_group", tp_group)
    process_group("cp_group", cp_group)
    if cp_group is not None and name == "reference":
        raise RuntimeError('backend: got "reference" with cp_group, expected "auto", "torch" or "triton"')
    if tp_group is not None:
        if name not in ("auto", "torch"):
            raise RuntimeError(f'backend: got "{name}" with tp_group, expected "auto" or "torch"')
        return "torch"
    if name in ("torch", "reference"):
        return name
    first = inputs[0]
    if not isinstance(first, Tensor) or (name == "auto" and first.device.type == "cpu"):
        return "torch"  # which says what is wrong with it, if anything
    obstacle = _triton_obstacle(*inputs)
    if obstacle is None:
        return "triton"
    if name == "triton":
        raise RuntimeError(f'backend: got "triton", expected "auto" or "torch": {obstacle}')
    return "torch"


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
