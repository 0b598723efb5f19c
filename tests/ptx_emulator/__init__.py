"""Runs the PTX that Triton makes for an NVIDIA GPU on NumPy: real machine code, without a GPU.

    from ptx_emulator import Emulator
    emulator = Emulator()          # noise=1, 2, ...: approximate instructions err, up to what PTX documents
    emulator.install()             # Triton now compiles for sm_90 and launches here, on CPU tensors
    some_kernel[(4,)](tensor, ...)
    print(emulator.figures)

What it is good for: the interpreter of Triton runs a kernel's Python; it knows no threads, so a missing barrier, a race
between warps, a mask that the compiler dropped, a fused product or a flushed subnormal cannot show in it. Here they do.

The model
- A program (CTA) is as many threads as PTX asks for. All threads of all programs of a launch step together; a branch
  that they take differently splits them into fragments, of which the one furthest behind runs first, until they meet.
- A register is an array with one value a thread, or a single value where all threads have the same.
- Global memory is the storage of the tensors that were passed, and nothing else: an access outside of them, or not
  aligned to its own size, is an error. So is a read of shared memory that nobody wrote.
- `bar.sync` lets a program go on once all its threads have come to the same one. Threads that wait at different
  barriers, or have left, are an error, and so is a shuffle that not all of a warp take part in.
- Two threads that touch the same byte, one of them writing, without a barrier between them are a race, in shared and
  in global memory; so are two programs of a launch that touch the same byte of global memory. Threads of one warp may
  store the same value at the same place in one instruction.
- Float32 arithmetic is rounded as IEEE 754 says, with fused products rounded once. Approximate instructions are
  rounded correctly, or disturbed by up to their documented error; always by the same for the same input.

Its limits
- One schedule. A race is found from the accesses, whatever the order was; an order that changes a result without a
  race is not tried.
- No weak memory: a write is seen at once. No caches, no timing, no registers to spill, no occupancy.
- No atomics, no asynchronous copies, no tensor cores, no clusters, no calls. The kernels here need none; an
  instruction that `instructions` or `machine` does not list is an error that names it.
- The assembler (`ptxas`) does not run: what it does to the code afterwards is not seen.

`parser` reads PTX, `numbers` holds types and rounding, `instructions` is the table of what each instruction computes,
`memory` has allocations and the race detector, `machine` steps through a program, `driver` is what Triton talks to.
"""

from .driver import Emulator, Figures
from .errors import (
    BarrierError,
    EmulationError,
    MemoryAccessError,
    RaceError,
    UninitialisedError,
    UnknownInstructionError,
)

__all__ = [
    "BarrierError",
    "EmulationError",
    "Emulator",
    "Figures",
    "MemoryAccessError",
    "RaceError",
    "UninitialisedError",
    "UnknownInstructionError",
]
