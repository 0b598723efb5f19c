"""Types of registers and operands, and the arithmetic that NumPy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
SMALLEST_NORMAL = np.float32(2.0**-126)


def bits_of(kind: str) -> int:
    """Of a PTX type: u8, s16, b32, f64, bf16, f16x2 and so on."""
    name, _, pair = kind.partition("x")
    return int(name.lstrip("busf")) * (int(pair) if pair else 1)


def decode(raw: Array, kind: str) -> Array:
    """A register's bits as numbers of a type; bf16 comes as float32."""
    if kind == "pred" or raw.dtype == np.bool_:
        return raw
    bits = bits_of(kind)
    if raw.dtype.itemsize * 8 != bits:
        raw = raw.astype(UNSIGNED[bits])
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in FLOATS:
        return raw.view(FLOATS[kind])
    return raw.view(SIGNED[bits]) if kind[0] == "s" else raw


def encode(numbers: Array, kind: str) -> Array:
    """The other way, rounded to nearest, ties to even."""
    if kind == "pred":
        return numbers.astype(np.bool_)
    bits = bits_of(kind)
    if kind == "bf16":
        return to_bf16(numbers)
    if kind in FLOATS:
        found = numbers.astype(FLOATS[kind], copy=False)
        missing = np.isnan(found)
        raw = found.view(UNSIGNED[bits])
        # a device has one NaN: all bits but the sign
        return np.where(missing, UNSIGNED[bits]((1 << bits - 1) - 1), raw) if missing.any() else raw
    if numbers.dtype.itemsize * 8 == bits:
        return numbers.view(UNSIGNED[bits])
    return numbers.astype(UNSIGNED[bits])


def to_bf16(x: Array) -> Array:
    """The bits of bfloat16 nearest to float32 numbers."""
    raw = x.astype(np.float32, copy=False).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def flushed(x: Array) -> Array:
    """Subnormal numbers as 0 of the same sign, as `.ftz` has it."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def larger(a: Array, b: Array) -> Array:
    """Drops NaN; 0 is larger than -0."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def smaller(a: Array, b: Array) -> Array:
    """Drops NaN; -0 is smaller than 0."""
    return -larger(-a, -b)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (the last bit set wherever it is inexact), so that
    the rounding to float32 is the only one that counts.
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    inexact = np.isfinite(total) & (error != 0)
    raw = np.atleast_1d(total).view(np.int64)
    towards_zero = raw - ((error < 0) != (total < 0)).astype(np.int64)
    return np.where(inexact, towards_zero | 1, raw).view(np.float64).astype(np.float32)


class Noise:
    """Errors of approximate instructions, up to their bounds; the same for the same input, as on a device.

    seed 0: none.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def relative(self, exact: Array, bound: float, *inputs: Array) -> Array:
        """exact: float64. Rounded to float32 after an error of up to `bound` of it."""
        if not self.seed:
            return exact.astype(np.float32)
        return (exact * (1.0 + bound * self._uniform(inputs))).astype(np.float32)

    def absolute(self, exact: Array, bound: Array, *inputs: Array) -> Array:
        if not self.seed:
            return exact.astype(np.float32)
        return (exact + bound * self._uniform(inputs)).astype(np.float32)

    def _uniform(self, inputs: tuple[Array, ...]) -> Array:
        """-1 to 1 from the inputs' bits: a hash, as `splitmix64` mixes."""
        mixed = np.full(1, self.seed * 0x9E3779B97F4A7C15 & 2**64 - 1, np.uint64)
        for x in inputs:
            mixed = mixed ^ np.atleast_1d(x).view(np.uint32).astype(np.uint64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
