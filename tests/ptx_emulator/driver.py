"""What Triton talks to in place of a device: a driver whose launcher runs the code here."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from .errors import EmulationError
from .machine import Code, Launch
from .numbers import UNSIGNED, Array, Noise, bits_of
from .parser import parse

TARGET = GPUTarget("cuda", 90, 32)
# of an H100
_DEVICE = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
_MOST_THREADS = 1024


@dataclass
class Figures:
    """What has run. instructions: each counted once a program."""

    launches: Counter[str] = field(default_factory=Counter)
    programs: int = 0
    instructions: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    # "kernel argument=value": what each kernel was compiled for, and the types of its pointers
    variants: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        kernels = ", ".join(f"{name} {count}" for name, count in sorted(self.launches.items()))
        errors = ", ".join(f"{name} {count}" for name, count in sorted(self.errors.items())) or "none"
        return (
            f"{sum(self.launches.values())} launches ({kernels}), {self.programs} programs, "
            f"{self.instructions} instructions; errors: {errors}"
        )


class Emulator:
    """Compiles for sm_90 and launches in NumPy.

    changed: what becomes of a kernel's PTX before it runs. fenced: contiguous tensors that nobody may touch.
    """

    def __init__(self, noise: int = 0, changed: Callable[[str, str], str] = lambda name, ptx: ptx) -> None:
        self.figures = Figures()
        self.noise = Noise(noise)
        self.changed = changed
        self.fenced: list[torch.Tensor] = []
        self._codes: dict[str, Code] = {}

    def install(self) -> None:
        """For the whole process. Kernels must not have been loaded for the interpreter."""
        if triton.knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
        # what is cached under the name of a cubin is PTX: a folder of its own
        triton.knobs.cache.dir = os.path.join(triton.knobs.cache.dir, "emulated")
        CUDABackend.make_cubin = _not_assembled
        driver.set_active(_Driver(self))

    def launch(self, name: str, ptx: str, shared: int, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        ptx = self.changed(name, ptx)
        try:
            code = self._codes.get(ptx) or self._codes.setdefault(ptx, Code(parse(ptx), self.noise))
            values = tuple(_parameters(code, arguments))
            regions = _storages(arguments, self.fenced)
            self.figures.launches[name] += 1
            self.figures.programs += grid[0] * grid[1] * grid[2]
            self.figures.instructions += code.run(Launch(values, grid, shared, regions))
        except EmulationError as error:
            self.figures.errors[type(error).__name__] += 1
            raise


def _not_assembled(self: CUDABackend, src: str, *_: Any) -> bytes:
    return src.encode()


def _storages(arguments: list[Any], fenced: list[torch.Tensor]) -> list[tuple[int, Array]]:
    """The memory of the tensors among the arguments, without what is fenced."""
    found = {}
    for value in arguments:
        if isinstance(value, torch.Tensor) and (size := value.untyped_storage().nbytes()):
            start = value.untyped_storage().data_ptr()
            found[start] = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
    for fence in fenced:
        low, high = fence.data_ptr(), fence.data_ptr() + fence.nbytes
        for start, data in list(found.items()):
            if start <= low < start + len(data):
                found[start] = data[: low - start]
                found[high] = data[high - start :]
    return [(start, data) for start, data in found.items() if len(data)]


def _parameters(code: Code, arguments: list[Any]) -> Iterator[Array]:
    """Their bits. The last parameters are memory for Triton's own use, of which these kernels have none."""
    kinds = [kind for kind, _ in code.program.parameters]
    unused = len(kinds) - len(arguments)
    if not 0 <= unused <= 2 or any(kind != "u64" for kind in kinds[len(arguments) :]):
        raise EmulationError(f"{code.program.name} has {len(kinds)} parameters and was given {len(arguments)}")
    for kind, value in zip(kinds, [*arguments, *[0] * unused], strict=True):
        if kind[0] == "f":
            yield np.array([value], np.float32 if kind == "f32" else np.float64).view(UNSIGNED[bits_of(kind)])
        else:
            number = value.data_ptr() if isinstance(value, torch.Tensor) else int(value)
            yield np.array([number & (1 << bits_of(kind)) - 1], UNSIGNED[bits_of(kind)])


def _given(signature: Any, arguments: Any) -> Iterator[Any]:
    """The arguments that the compiled kernel takes: its signature says which became constants."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _given(kind, value)
        elif kind != "constexpr":
            yield value


def _variant(name: str, source: Any) -> Iterator[str]:
    for argument, kind in source.signature.items():
        pointer = kind[0] if isinstance(kind, tuple) else kind
        if pointer.startswith("*"):
            yield f"{name} {argument}={pointer}"
    for path, value in source.constants.items():
        argument = source.fn.arg_names[path[0]] if len(path) == 1 else None
        if argument and isinstance(value, tuple):
            yield from (f"{name} {argument}.{part}={chosen}" for part, chosen in zip(value._fields, value, strict=True))
        elif argument:
            yield f"{name} {argument}={value}"


class _Driver:
    """As much of a driver as Triton asks for."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.utils = _Utils()
        self.launcher_cls = self._launcher

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        signature = list(source.signature.values())
        self.emulator.figures.variants |= set(_variant(metadata.name, source))

        def launch(x: int, y: int, z: int, stream: int, function: str, *more: Any) -> None:
            # before the arguments: packed and launch metadata, and two hooks
            arguments = list(_given(signature, more[-len(signature) :]))
            if x * y * z:
                self.emulator.launch(metadata.name, function, metadata.shared, (x, y, z), arguments)

        return launch


class _Utils:
    """Of the device, and of what is loaded to it."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return _DEVICE

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, str, int, int, int]:
        """Module, function (its PTX), registers, spills, threads."""
        return name, kernel.decode(), 0, 0, _MOST_THREADS

    def unload_module(self, module: Any) -> None:
        pass
