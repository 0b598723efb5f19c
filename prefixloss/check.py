"""Input checks. Each error names the argument, what it got and what it wants, and comes before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what a number has to fit into: the kernels compute in float32, where one over a smaller number is infinite
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
_LARGEST_WHOLE = 2**63 - 1
# rewards and advantages end as float32; the difference of two of this size still fits
_LARGEST_REWARD = 1e38
# no response has an index above it: a larger one is an error of its maker, and arithmetic on it would wrap
_LARGEST_INDEX = 2**31 - 1
# how far above 1 probabilities may add up that somebody else has rounded
ROUNDED_PROBABILITIES = 1e-3
_LONGEST = 120  # characters of a value in a message


class UsageError(ValueError):
    """An option of a command that cannot work, found before any work was done; the message names it."""


def first_line(error: Exception) -> str:
    """Of an error's text; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(value: Any) -> str:
    """A value as an error message shows it: short for tensors, cut where it is long."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to write down the longest
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def fail(argument: str, got: Any, expected: str, error: type[Exception] = ValueError) -> None:
    got = got if isinstance(got, str) else describe(got)
    raise error(f"{argument}: got {got}, expected {expected}")


def readable(value: Tensor) -> bool:
    """Whether a tensor's values may be looked at: on an accelerator that would stall the stream, and a compiler has
    none to look at. There, values are checked only with PREFIXLOSS_CHECK=1."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("PREFIXLOSS_CHECK") == "1"


def dense(argument: str, value: Any, wants: str = "a tensor") -> None:
    """A tensor whose numbers lie in memory, one beside the other: subclasses may, and a compiler's inputs do."""
    if not isinstance(value, Tensor):
        fail(argument, type(value).__name__, wants, TypeError)
    odd = None if torch.compiler.is_compiling() else _oddity(value)
    if odd is not None:
        fail(argument, odd, "a dense tensor with values", TypeError)


def _oddity(value: Tensor) -> str | None:
    """What a tensor is that is not one of numbers in memory, if so. In this order: a nested one takes few questions."""
    kinds: dict[str, Callable[[], bool]] = {
        "a nested tensor": lambda: value.is_nested,
        "a quantized tensor": lambda: value.is_quantized,
        "a sparse tensor, or one of another layout": lambda: value.layout != torch.strided,
        "a tensor on the meta device, without values": lambda: value.device.type == "meta",
        "a fake tensor, without values": lambda: isinstance(value, FakeTensor),
        "a tensor with named dimensions": lambda: any(getattr(value, "names", ())),  # torch 2.13 has none
        # kernels read memory, where the sign does not stand
        "a tensor with its negative bit set": lambda: value.is_neg(),
    }
    return next((kind for kind, holds in kinds.items() if holds()), None)


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
    dense(argument, value, wants)
    if value.dtype not in dtypes:
        fail(argument, value, wants, TypeError)


def shape(argument: str, value: Tensor, expected: tuple[int, ...] | torch.Size, letters: str) -> None:
    if tuple(value.shape) != tuple(expected):
        fail(argument, f"shape {list(value.shape)}", f"{letters} = {list(expected)}")


def device(argument: str, value: Tensor, expected: torch.device) -> None:
    if value.device != expected:
        fail(argument, f"a tensor on {value.device}", f"one on {expected}, like the others")


def is_number(value: Any) -> bool:
    """A finite number in float32's range: of Python or NumPy, or a fraction; no bool, no Decimal, no tensor."""
    if isinstance(value, np.generic):
        value = value.item()  # NumPy would compare in a type too small for the limits
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and (value == 0 or _SMALLEST <= value <= _LARGEST or -_LARGEST <= value <= -_SMALLEST)


def is_whole(value: Any, low: int = 0) -> bool:
    """A whole number of at least `low` that fits into int64."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= _LARGEST_WHOLE


def number(argument: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The number, as Python's own."""
    limits = f" between {low:g} and {high:g}" if math.isfinite(low) else " within float32's range"
    if not is_number(value) or not low <= value <= high:
        fail(argument, describe(value), f"a finite number{limits}")
    return float(value)


def flag(argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(argument, describe(value), "True or False", TypeError)


def rows(argument: str, value: Tensor) -> None:
    if value.dim() not in (1, 2):
        fail(argument, f"shape {list(value.shape)}", "[B, T] or [N]")


def tokens(value: Any) -> None:
    tensor("tokens", value, "integer")
    rows("tokens", value)


def layout(shape_of_tokens: torch.Size, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
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
    count = shape_of_tokens[0]
    if int(cu_seqlens[0]) != 0:
        fail("cu_seqlens", f"a first value of {int(cu_seqlens[0])}", "0")
    if bool((cu_seqlens.diff() < 0).any()):
        fail("cu_seqlens", f"decreasing values {cu_seqlens.tolist()[:8]}", "increasing offsets [B + 1]")
    if int(cu_seqlens[-1]) != count:
        fail("cu_seqlens", f"a last value of {int(cu_seqlens[-1])}", f"N = {count}, the number of tokens")


def rounding_of(logps: Tensor) -> float:
    """How far from 1 probabilities may add up that somebody else has rounded to these log-probs."""
    # of a half-precision log-prob of 8 or so, its last digit
    return max(ROUNDED_PROBABILITIES, 16 * torch.finfo(logps.dtype).eps)


def responses(judged: Tensor | None = None, **arguments: Tensor) -> None:
    """Per-response arguments of an advantage function: dtypes, one shared shape [B], and, where `judged`, ranges."""
    kinds = {"correct": "bool", "lengths": "integer", "first_error": "integer", "group_ids": "integer"}
    kinds |= {"right_steps": "integer", "total_steps": "integer", "rewards": "number", "judged": "bool"}
    first = next(iter(arguments.values()))
    for name, value in (arguments if judged is None else {**arguments, "judged": judged}).items():
        tensor(name, value, kinds.get(name, "float"))
        if value.dim() != 1:
            fail(name, f"shape {list(value.shape)}", "[B]")
        shape(name, value, first.shape, "[B]")
        device(name, value, first.device)
    for name, low in (("lengths", 0), ("first_error", -1), ("right_steps", 0), ("total_steps", 0)):
        if name in arguments:
            _within(name, arguments[name], low, judged)
    if "first_error" in arguments and "lengths" in arguments:
        first_error, lengths = arguments["first_error"], arguments["lengths"]
        wants = "an index below the response's length,"
        none("first_error", first_error, first_error >= lengths, wants, lengths, judged)
    if "right_steps" in arguments:
        right, total = arguments["right_steps"], arguments["total_steps"]
        none("right_steps", right, right > total, "no more than total_steps,", total, judged)
    for name in ("rewards", "mean_step_scores", "response_advantages"):
        if name in arguments and arguments[name].is_floating_point() and readable(arguments[name]):
            value = arguments[name]
            wants = f"a finite number between -{_LARGEST_REWARD:g} and {_LARGEST_REWARD:g}"
            # a NaN is not below any limit
            none(name, value, ~(value.double().abs() <= _LARGEST_REWARD), wants, judged=judged)


def _within(argument: str, values: Tensor, low: int, judged: Tensor | None) -> None:
    wrong = (values < low) | (values > _LARGEST_INDEX)
    none(argument, values, wrong, f"{low} or more, up to {_LARGEST_INDEX}", judged=judged)


def none(
    argument: str,
    values: Tensor,
    wrong: Tensor,
    wants: str,
    limits: Tensor | None = None,
    judged: Tensor | None = None,
) -> None:
    """The error for the first response that is `wrong`, if any; those without a verdict never are."""
    if judged is not None:
        wrong = wrong & judged
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        wants = wants if limits is None else f"{wants} {int(limits[at])}"
        fail(argument, f"{values[at].item()} for response {at}", wants)


def shorten(value: Any, lengths: Tensor, prompt_lengths: Tensor | None, judged: Tensor | None = None) -> None:
    wants = '"prompt", a whole number of tokens >= 0, or a float share of the length between 0 and 1'
    if isinstance(value, str) and value == "prompt":
        if prompt_lengths is None:
            fail("prompt_lengths", "None", 'int64 [B], since shorten="prompt"')
        assert prompt_lengths is not None
        tensor("prompt_lengths", prompt_lengths, "integer")
        shape("prompt_lengths", prompt_lengths, lengths.shape, "[B]")
        device("prompt_lengths", prompt_lengths, lengths.device)
        _within("prompt_lengths", prompt_lengths, 0, judged)
        return
    share = is_number(value) and not isinstance(value, Integral) and 0 <= value <= 1
    if not (is_whole(value) or share):
        fail("shorten", describe(value), wants)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str], rows: torch.Size) -> None:
    """Hidden states [*rows, D] with a head [V, D] and an optional bias [V]; `names` are the three arguments' names."""
    tensor(names[0], hidden, "float")
    head_weight(names[1], weight)
    tensor(names[1], weight, "float")
    if hidden.dim() and hidden.shape[-1] == 0:
        fail(names[0], f"shape {list(hidden.shape)}", "a width D of at least 1")
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


def quantised(weight: Any) -> str | None:
    """What a weight is that does not hold its numbers as they are; None for one that does."""
    if not isinstance(weight, Tensor):
        return type(weight).__name__
    # such a subclass only stands for the numbers; these two are gathered, and waited for
    wraps = is_traceable_wrapper_subclass(weight) and type(weight).__name__ not in ("DTensor", "AsyncCollectiveTensor")
    if wraps:
        return type(weight).__name__
    return None if weight.dtype in _FLOATS else describe(weight)


def head_weight(argument: str, weight: Any) -> None:
    found = quantised(weight)
    if found is not None:
        wants = "a float32, bfloat16, float16 or float64 tensor as it is: leave the head out of the quantisation"
        fail(argument, found, f"{wants}, or pass what it dequantises to", TypeError)


def config(value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        fail("config", type(value).__name__, f"a {expected.__name__}", TypeError)


def own_storage(argument: str, value: Tensor, overwritten: Tensor) -> None:
    # empty ones all lie at address 0
    if overwritten.numel() and value.untyped_storage().data_ptr() == overwritten.untyped_storage().data_ptr():
        fail(argument, "the storage of logits, which inplace=True overwrites", "a copy")


def overwritable(value: Tensor) -> None:
    """Logits that inplace=True may overwrite: no element may lie where another does.

    Dimensions in the order of their strides: each step has to pass all that the smaller ones reach. Views do, but for
    expanded ones and those that `as_strided` makes overlap.
    """
    # a compiled call overwrites nothing
    if torch.compiler.is_compiling() or value.numel() == 0:
        return
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride <= reach:
            got = f"shape {list(value.shape)} with strides {list(value.stride())}, whose elements overlap in memory"
            fail("logits", got, "elements of their own, since inplace=True overwrites them (or inplace=False)")
        reach += stride * (size - 1)


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
    if not is_whole(value, 1):
        fail("vocab_size", describe(value), "a whole number of at least 1")
    if tp_group is None and int(value) > columns:
        fail("vocab_size", f"{value} with {columns} columns", "no more than there are")


def normalizer(value: Any) -> None:
    if isinstance(value, Tensor):
        dense("normalizer", value)
        if value.dim() != 0:
            fail("normalizer", f"shape {list(value.shape)}", "a number or a 0-d tensor")
        if value.dtype == torch.bool or value.is_complex():
            fail("normalizer", value, "a number or a 0-d tensor of one", TypeError)
        if not readable(value):
            return
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        fail("normalizer", describe(value), "a number or a 0-d tensor", TypeError)
    if not is_number(value) or value <= 0:
        fail("normalizer", describe(value), f"a finite number > 0, from {_SMALLEST:g} to {_LARGEST:g}")


def most_tokens(argument: str, value: Any, computed: Tensor) -> None:
    """An upper bound on the True entries of computed [N]."""
    if not is_whole(value):
        fail(argument, describe(value), "a whole number of tokens >= 0")
    if readable(computed) and int(computed.sum()) > value:
        fail(argument, f"{value} with {int(computed.sum())} tokens to compute", "at least as many")
