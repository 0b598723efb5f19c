"""What each instruction computes: a table from its name to types and a function.

Control flow, memory, shuffles and barriers are `machine`'s. A modifier that is not named here is an error: it would
change the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from .errors import UnknownInstructionError
from .numbers import FLOATS, SIGNED, UNSIGNED, Array, Noise, bits_of, encode, flushed, fused, larger, smaller


class Operation(NamedTuple):
    """results, sources: types of the operands."""

    results: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable[..., Array | tuple[Array, ...]]


def operation(name: tuple[str, ...], noise: Noise) -> Operation:
    """The operation of an instruction; name: with its modifiers."""
    build = _TABLE.get(name[0])
    found = build(name[1:-1], name[-1], noise) if build and len(name) > 1 else None
    if found is None:
        raise UnknownInstructionError(".".join(name))
    return found


Builder = Callable[[tuple[str, ...], str, Noise], "Operation | None"]


def _allowed(modifiers: tuple[str, ...], *allowed: str) -> bool:
    return set(modifiers) <= set(allowed)


def _is_float(kind: str) -> bool:
    return kind in FLOATS or kind == "bf16"


def _maybe_flushed(compute: Callable[..., Array], modifiers: tuple[str, ...]) -> Callable[..., Array]:
    if "ftz" not in modifiers:
        return compute
    return lambda *inputs: flushed(compute(*(flushed(x) for x in inputs)))


# --- arithmetic


def _elementwise(floats: Callable[..., Array] | None, integers: Callable[..., Array] | None, count: int) -> Builder:
    """The same type for all operands."""

    def build(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
        compute = floats if _is_float(kind) else integers
        # integers know no rounding; numbers of 16 bits are rounded by each operation
        rounding = ("rn", "ftz") if kind == "f32" else ("rn",) if kind in FLOATS else ()
        if compute is None or kind == "bf16" or not _allowed(modifiers, *rounding):
            return None
        return Operation((kind,), (kind,) * count, _maybe_flushed(compute, modifiers))

    return build


def _extreme(floats: Callable[[Array, Array], Array], integers: np.ufunc) -> Builder:
    """max and min, which drop NaN unless told otherwise. `relu`: nothing below 0."""

    def build(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
        if not _is_float(kind):
            if not _allowed(modifiers, "relu") or (modifiers and kind != "s32"):
                return None
            return Operation((kind,), (kind, kind), _not_negative(integers) if modifiers else integers)
        if not _allowed(modifiers, "ftz", "NaN"):
            return None
        compute = _propagating(floats) if "NaN" in modifiers else floats
        return Operation((kind,), (kind, kind), _maybe_flushed(compute, modifiers))

    return build


def _propagating(compute: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(_either_is_nan(a, b), a.dtype.type(np.nan), compute(a, b))


def _not_negative(compute: np.ufunc) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.maximum(compute(a, b), np.int32(0))


def _multiply(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    if _is_float(kind):
        return _elementwise(np.multiply, None, 2)(modifiers, kind, _)
    if modifiers == ("wide",):
        wide = _wider(kind)
        return Operation((wide,), (kind, kind), lambda a, b: _widened(a, wide) * _widened(b, wide))
    if modifiers == ("lo",):
        return Operation((kind,), (kind, kind), np.multiply)
    if modifiers == ("hi",) and bits_of(kind) == 32:
        wide, shift = _wider(kind), np.uint8(32)
        return Operation(
            (kind,), (kind, kind), lambda a, b: (_widened(a, wide) * _widened(b, wide) >> shift).astype(a.dtype)
        )
    return None


def _multiply_add(modifiers: tuple[str, ...], kind: str, noise: Noise) -> Operation | None:
    product = None if _is_float(kind) else _multiply(modifiers, kind, noise)
    if product is None:
        return None
    result = product.results[0]
    return Operation((result,), (kind, kind, result), lambda a, b, c: product.compute(a, b) + c)


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


def _widened(x: Array, kind: str) -> Array:
    return x.astype((SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(kind)])


def _fma(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    if kind != "f32" or not _allowed(modifiers, "rn", "ftz"):
        return None
    return Operation((kind,), (kind,) * 3, _maybe_flushed(fused, modifiers))


def _divide(modifiers: tuple[str, ...], kind: str, noise: Noise) -> Operation | None:
    if kind == "f32":
        # two units in the last place over the whole range
        bound = {"full": 2.0**-22, "approx": 2.0**-22, "rn": 0.0}.get(modifiers[0])
        if bound is None or not _allowed(modifiers[1:], "ftz"):
            return None
        compute = partial(_quotient, noise, bound)
        return Operation((kind,), (kind, kind), _maybe_flushed(compute, modifiers))
    return Operation((kind,), (kind, kind), _whole_quotient) if not modifiers and not _is_float(kind) else None


def _quotient(noise: Noise, bound: float, a: Array, b: Array) -> Array:
    return noise.relative(a.astype(np.float64) / b, bound, a, b)


def _whole_quotient(a: Array, b: Array) -> Array:
    """Towards zero. Whatever a division by 0 gives on a device, it is not defined."""
    return (a - np.fmod(a, b)) // np.where(b == 0, np.ones_like(b), b)


def _remainder(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    return Operation((kind,), (kind, kind), np.fmod) if not modifiers and not _is_float(kind) else None


# --- approximate functions: PTX's own bounds on their errors


def _approximate(function: Callable[[Array], Array], bound: float) -> Builder:
    def build(modifiers: tuple[str, ...], kind: str, noise: Noise) -> Operation | None:
        if kind != "f32" or "approx" not in modifiers or not _allowed(modifiers, "approx", "ftz"):
            return None

        def compute(x: Array) -> Array:
            exact = function(x.astype(np.float64))
            # of 0 each has the value in PTX's table of special ones: 2^0 is 1, not nearly 1
            return np.where(x == 0, exact.astype(np.float32), noise.relative(exact, bound, x))

        return Operation((kind,), (kind,), _maybe_flushed(compute, modifiers))

    return build


def _logarithm(modifiers: tuple[str, ...], kind: str, noise: Noise) -> Operation | None:
    """An absolute error between 1/2 and 2, where the result may be near 0, and a relative one elsewhere."""
    if kind != "f32" or "approx" not in modifiers or not _allowed(modifiers, "approx", "ftz"):
        return None

    def compute(x: Array) -> Array:
        exact = np.log2(x.astype(np.float64))
        size = np.where((x > 0.5) & (x < 2), 1.0, np.where(np.isfinite(exact), np.abs(exact), 0.0))
        return noise.absolute(exact, 2.0**-22 * size, x)

    return Operation((kind,), (kind,), _maybe_flushed(compute, modifiers))


# --- bits


def _shift(left: bool) -> Builder:
    def build(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
        if modifiers or _is_float(kind):
            return None
        bits = bits_of(kind)

        def compute(x: Array, by: Array) -> Array:
            far = by >= bits
            near = np.minimum(by, bits - 1).astype(x.dtype)
            if left:
                return np.where(far, np.zeros_like(x), np.left_shift(x, near))
            shifted = np.right_shift(x, near)
            # a signed number is filled with its sign
            return shifted if kind[0] == "s" else np.where(far, np.zeros_like(x), shifted)

        return Operation((kind,), (kind, "u32"), compute)

    return build


def _negate(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    if not _allowed(modifiers, "ftz"):
        return None
    return Operation((kind,), (kind,), _maybe_flushed(np.negative, modifiers))


def _absolute(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    if not _allowed(modifiers, "ftz"):
        return None
    return Operation((kind,), (kind,), _maybe_flushed(np.abs, modifiers))


def _copysign(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    return Operation((kind,), (kind, kind), lambda sign, x: np.copysign(x, sign)) if not modifiers else None


def _extract(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    """So many bits of a number from a place on; the first one of a signed field is its sign."""
    if modifiers or kind not in ("s32", "u32"):
        return None

    def compute(x: Array, place: Array, count: Array) -> Array:
        size = np.int64(1) << np.minimum(count, 32).astype(np.int64)
        field = (x.astype(np.int64) >> np.minimum(place, 32).astype(np.int64)) & (size - 1)
        negative = (kind == "s32") & (count > 0) & (2 * field >= size)
        return np.where(negative, field - size, field).astype(x.dtype)

    return Operation((kind,), (kind, "u32", "u32"), compute)


def _permute(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    """Any four of the eight bytes of two numbers."""
    if modifiers or kind != "b32":
        return None

    def compute(low: Array, high: Array, choice: Array) -> Array:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        made = np.zeros_like(both)
        for place in range(4):
            wanted = choice.astype(np.uint64) >> np.uint64(4 * place) & np.uint64(15)
            byte = both >> (wanted & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            # the sign of the byte eight times
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            made = made | np.where(wanted > 7, sign, byte) << np.uint64(8 * place)
        return made.astype(np.uint32)

    return Operation((kind,), (kind, kind, kind), compute)


# --- choices and comparisons


def _select(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    raw = f"b{bits_of(kind)}"
    return Operation((raw,), (raw, raw, "pred"), lambda a, b, p: np.where(p, a, b)) if not modifiers else None


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # unsigned ones have names of their own as well
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(name: str) -> Callable[[Array, Array], Array] | None:
    """Without `u` a comparison with NaN is false, with it true."""
    if name == "num":
        return lambda a, b: ~_either_is_nan(a, b)
    if name == "nan":
        return _either_is_nan
    plain = _COMPARISONS.get(name)
    if plain is not None:
        # only `ne` is true for NaN in NumPy
        return plain if name != "ne" else lambda a, b: (a != b) & ~_either_is_nan(a, b)
    unordered = _COMPARISONS.get(name[:-1]) if name[-1] == "u" else None
    return unordered and (lambda a, b: unordered(a, b) | _either_is_nan(a, b))


def _either_is_nan(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _compare(modifiers: tuple[str, ...], kind: str, _: Noise) -> Operation | None:
    """`setp.comparison[.combination].type`"""
    compute, rest = _comparison(modifiers[0]), tuple(m for m in modifiers[1:] if m != "ftz")
    if compute is None:
        return None
    if kind.endswith("x2") and not rest:
        return Operation(
            ("pred", "pred"), (kind[:-2] + "pair",) * 2, lambda a, b: (compute(a[0], b[0]), compute(a[1], b[1]))
        )
    if not rest:
        return Operation(("pred",), (kind, kind), compute)
    combine = {("and",): np.logical_and, ("or",): np.logical_or, ("xor",): np.logical_xor}.get(rest)
    if combine is None:
        return None
    return Operation(("pred",), (kind, kind, "pred"), lambda a, b, p: combine(compute(a, b), p))


# --- conversions


_TO_WHOLE: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(modifiers: tuple[str, ...], source: str, _: Noise) -> Operation | None:
    """`cvt[.rounding][.ftz].to.from`"""
    if not modifiers or not _allowed(modifiers[:-1], "rn", "ftz", *_TO_WHOLE):
        return None
    to, rest = modifiers[-1], modifiers[:-1]
    to_whole = next((_TO_WHOLE[name] for name in rest if name in _TO_WHOLE), None)
    if to in ("bf16x2", "f16x2") and source == "f32":
        # the first operand is the upper half
        return Operation((to,), (source, source), lambda high, low: _pair(high, low, to[:-2]))
    if not _is_float(to):
        dtype = (SIGNED if to[0] == "s" else UNSIGNED)[bits_of(to)]
        if not _is_float(source):
            return Operation((to,), (source,), lambda x: x.astype(dtype))
        return to_whole and Operation((to,), (source,), partial(_whole, to_whole, dtype))
    wide = np.float32 if to == "bf16" else FLOATS[to]
    return Operation((to,), (source,), _maybe_flushed(to_whole or (lambda x: x.astype(wide)), rest))


def _pair(high: Array, low: Array, kind: str) -> Array:
    with_high = encode(high, kind).astype(np.uint32) << np.uint32(16)
    return with_high | encode(low, kind).astype(np.uint32)


def _whole(to_whole: Callable[[Array], Array], dtype: type, x: Array) -> Array:
    """Clamped to what fits, and NaN to 0."""
    limits = np.iinfo(dtype)
    whole = np.nan_to_num(to_whole(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    top = whole >= float(limits.max)
    bottom = whole <= float(limits.min)
    inside = np.where(top | bottom, 0.0, whole).astype(dtype)
    return np.where(top, dtype(limits.max), np.where(bottom, dtype(limits.min), inside))


_TABLE: dict[str, Builder] = {
    "add": _elementwise(np.add, np.add, 2),
    "sub": _elementwise(np.subtract, np.subtract, 2),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "div": _divide,
    "rem": _remainder,
    "neg": _negate,
    "abs": _absolute,
    "copysign": _copysign,
    "max": _extreme(larger, np.maximum),
    "min": _extreme(smaller, np.minimum),
    "ex2": _approximate(np.exp2, 2.0**-22),
    "lg2": _logarithm,
    "rcp": _approximate(lambda x: 1.0 / x, 2.0**-23),
    "sqrt": _approximate(np.sqrt, 2.0**-23),
    "rsqrt": _approximate(lambda x: 1.0 / np.sqrt(x), 2.0**-22.9),
    "tanh": _approximate(np.tanh, 2.0**-11),
    "and": _elementwise(None, np.bitwise_and, 2),
    "or": _elementwise(None, np.bitwise_or, 2),
    "xor": _elementwise(None, np.bitwise_xor, 2),
    "not": _elementwise(None, np.bitwise_not, 1),
    "bfe": _extract,
    "prmt": _permute,
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
}
