"""Steps through a program with all its threads at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import BarrierError, EmulationError, MemoryAccessError, UninitialisedError, UnknownInstructionError
from .instructions import operation
from .memory import Access, Memory, SharedMemory, Touched, check_between_programs
from .numbers import FLOATS, SIGNED, UNSIGNED, Array, Noise, bits_of, decode, encode
from .parser import Instruction, Program

WARP = 32
# threads that step together: more programs of a launch come after them
_MOST_LANES = 2**15


class Fragment(NamedTuple):
    """Threads that are at the same instruction; lanes None: all of them."""

    at: int
    lanes: Array | None


class Launch(NamedTuple):
    """values: of the parameters, as bits. grid: programs in x, y and z. shared: bytes a program."""

    values: tuple[Array, ...]
    grid: tuple[int, int, int]
    shared: int
    regions: list[tuple[int, Array]]


# one instruction for the active lanes (None: all)
Step = Callable[["Machine", "Array | None"], None]


class Code:
    """A program's instructions, each as a function; made once and run often."""

    def __init__(self, program: Program, noise: Noise) -> None:
        self.program = program
        self.noise = noise
        self.parameters = {name: (i, kind) for i, (kind, name) in enumerate(program.parameters)}
        self.steps: list[Step | None] = [
            None if instruction.name[0] in ("bra", "ret", "exit", "bar", "barrier") else self._step(at, instruction)
            for at, instruction in enumerate(program.code)
        ]
        sizes = {
            space: [_bytes_of(i) for i in program.code if i.name[0] in ("ld", "st", "ldmatrix") and space in i.name]
            for space in ("global", "shared")
        }
        self.grains = {space: min(found, default=1) for space, found in sizes.items()}

    def run(self, launch: Launch) -> int:
        """All programs of a grid; how many instructions they took, counted once a program."""
        x, y, z = launch.grid
        programs = x * y * z
        together = max(1, _MOST_LANES // self.program.threads)
        taken, touched = 0, []
        with np.errstate(all="ignore"):
            for first in range(0, programs, together):
                machine = Machine(self, launch, np.arange(first, min(first + together, programs)))
                machine.run()
                taken += machine.taken
                touched += machine.touched()
        check_between_programs(touched)
        return taken

    # --- one instruction as a function

    def _step(self, at: int, instruction: Instruction) -> Step:
        name = instruction.name
        if name[0] in ("ld", "st") and name[1] != "param":
            return self._access(at, instruction)
        if name[0] == "ldmatrix":
            return self._load_matrix(at, instruction)
        if name[-1] == "pred" and name[0] in _LOGIC:
            return self._logic(instruction)
        special = {"mov": self._move, "ld": self._load_parameter, "shfl": self._shuffle, "redux": self._reduce}.get(
            name[0]
        )
        return special(instruction) if special else self._compute(instruction)

    def _compute(self, instruction: Instruction) -> Step:
        """What the table of instructions has."""
        operands = instruction.operands
        results, sources, compute = operation(instruction.name, self.noise)
        targets = operands[0].split("|")
        if len(targets) != len(results) or len(operands) - 1 != len(sources):
            raise UnknownInstructionError(instruction.text)
        reads = [self._source(text, kind) for text, kind in zip(operands[1:], sources, strict=True)]

        def step(machine: Machine, lanes: Array | None) -> None:
            found = compute(*[read(machine) for read in reads])
            for target, kind, numbers in zip(
                targets, results, found if isinstance(found, tuple) else (found,), strict=True
            ):
                machine.write(target, encode(numbers, kind), lanes)

        return step

    def _source(self, text: str, kind: str) -> Callable[[Machine], Array]:
        """How to read an operand."""
        if kind.endswith("pair"):
            return self._pair(text, kind[:-4])
        if text.startswith("%"):
            special = _SPECIAL.get(text)
            if special is not None:
                return lambda machine: decode(special(machine), kind)
            return lambda machine: decode(machine.read(text), kind)
        constant = _constant(text, kind)
        return lambda machine: constant

    def _pair(self, text: str, kind: str) -> Callable[[Machine], tuple[Array, Array]]:  # type: ignore[override]
        """The lower and the upper half of a register."""
        read = self._source(text, "b32")

        def halves(machine: Machine) -> tuple[Array, Array]:
            raw = read(machine)
            return decode(raw.astype(np.uint16), kind), decode((raw >> np.uint32(16)).astype(np.uint16), kind)

        return halves

    def _logic(self, instruction: Instruction) -> Step:
        compute = _LOGIC[instruction.name[0]]
        target, *sources = instruction.operands
        reads = [self._source(text, "pred") for text in sources]
        return lambda machine, lanes: machine.write(target, compute(*[read(machine) for read in reads]), lanes)

    def _move(self, instruction: Instruction) -> Step:
        target, source = instruction.operands
        kind = instruction.name[-1]
        if target.startswith("{"):
            return self._unpack(_registers(target), source, kind)
        if source.startswith("{"):
            return self._pack(target, _registers(source), kind)
        read = self._source(source, kind if kind == "pred" else f"b{bits_of(kind)}")
        return lambda machine, lanes: machine.write(target, read(machine), lanes)

    def _unpack(self, targets: list[str], source: str, kind: str) -> Step:
        read, bits = self._source(source, kind), bits_of(kind) // len(targets)

        def step(machine: Machine, lanes: Array | None) -> None:
            raw = read(machine)
            for i, target in enumerate(targets):
                machine.write(target, (raw >> raw.dtype.type(i * bits)).astype(UNSIGNED[bits]), lanes)

        return step

    def _pack(self, target: str, sources: list[str], kind: str) -> Step:
        bits = bits_of(kind) // len(sources)
        reads = [self._source(text, f"b{bits}") for text in sources]
        dtype = UNSIGNED[bits_of(kind)]

        def step(machine: Machine, lanes: Array | None) -> None:
            raw = np.zeros(1, dtype)
            for i, read in enumerate(reads):
                raw = raw | read(machine).astype(dtype) << dtype(i * bits)
            machine.write(target, raw, lanes)

        return step

    def _load_parameter(self, instruction: Instruction) -> Step:
        target, source = instruction.operands
        name = source.strip("[] ")
        if name not in self.parameters or not re.fullmatch(r"[bus](8|16|32|64)|f32|f64", instruction.name[-1]):
            raise UnknownInstructionError(instruction.text)
        index, kind = self.parameters[name][0], instruction.name[-1]
        # into a wider register a signed number keeps its sign
        wide = target.startswith("%rd") and bits_of(kind) < 64

        def step(machine: Machine, lanes: Array | None) -> None:
            numbers = decode(machine.values[index], kind)
            if wide:
                numbers = numbers.astype(np.int64 if kind[0] == "s" else np.uint64)
            machine.write(target, encode(numbers, "b64" if wide else kind), lanes)

        return step

    def _access(self, at: int, instruction: Instruction) -> Step:
        """ld and st of global and shared memory."""
        name = instruction.name
        space, *modifiers = name[1:-1]
        known = ("v2", "v4", "v8", "L1::evict_first", "L1::evict_last", "cs", "nc")
        if space not in ("global", "shared") or any(m not in known for m in modifiers):
            raise UnknownInstructionError(instruction.text)
        bits, loads = bits_of(name[-1]), name[0] == "ld"
        registers, address = instruction.operands if loads else reversed(instruction.operands)
        names = _registers(registers)
        if len(names) != max([int(m[1:]) for m in modifiers if m[0] == "v"], default=1):
            raise UnknownInstructionError(instruction.text)
        size = bits // 8 * len(names)
        where = self._address(address)
        values = [self._source(text, f"b{bits}") for text in names] if not loads else []
        # a byte is held in a register of 16 bits
        held = UNSIGNED[max(bits, 16)]

        def step(machine: Machine, lanes: Array | None) -> None:
            active = machine.lanes if lanes is None else np.flatnonzero(lanes)
            addresses = machine.spread(where(machine))[active]
            memory: Memory = machine.memory
            if space == "shared":
                memory = machine.shared
                addresses = machine.shared.placed(addresses, active, size)
            offsets = memory.offsets(addresses, size)
            access = Access(offsets, active, size, not loads, machine.phases.copy(), at)
            if loads:
                memory.note(access)
                if space == "shared":
                    machine.shared.require(addresses, size)
                for target, found in zip(names, memory.load(addresses, bits, len(names)), strict=True):
                    full = np.zeros(len(machine.lanes), held)
                    full[active] = found
                    machine.write(target, full, lanes)
            else:
                if space == "shared":
                    machine.shared.mark(addresses, size)
                stored = [machine.spread(read(machine))[active] for read in values]
                # in global memory nobody may store what another stores: Triton lets one thread do it
                memory.note_store(access, stored, WARP if space == "shared" else 1)
                memory.store(addresses, bits, stored)

        return step

    def _load_matrix(self, at: int, instruction: Instruction) -> Step:
        """Matrices of 8 rows of 16 bytes: 8 threads name the rows of one, and each thread of the warp gets 4 bytes."""
        targets = _registers(instruction.operands[0])
        count = {"x1": 1, "x2": 2, "x4": 4}.get(instruction.name[4])
        known = ("sync", "aligned", "m8n8", f"x{count}", "shared", "b16")
        if instruction.name[1:] != known or len(targets) != count:
            raise UnknownInstructionError(instruction.text)
        where = self._address(instruction.operands[1])

        def step(machine: Machine, lanes: Array | None) -> None:
            machine.require_whole_warps(lanes)
            active = machine.lanes if lanes is None else np.flatnonzero(lanes)
            rows, lane = machine.spread(where(machine)), active % WARP
            for number, target in enumerate(targets):
                named = rows[active - lane + 8 * number + lane // 4]
                if (named % 16).any():
                    raise MemoryAccessError("a row of a matrix is not aligned to 16 bytes")
                placed = machine.shared.placed(named + lane % 4 * 4, active, 4)
                machine.shared.require(placed, 4)
                machine.shared.note(Access(placed, active, 4, False, machine.phases.copy(), at))
                full = np.zeros(len(machine.lanes), np.uint32)
                full[active] = machine.shared.load(placed, 32, 1)[0]
                machine.write(target, full, lanes)

        return step

    def _address(self, text: str) -> Callable[[Machine], Array]:
        match = re.fullmatch(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise UnknownInstructionError(text)
        base, offset = match[1], np.int64(int(match[2] or "0", 0))
        read = self._source(base, "b64" if base.startswith("%rd") else "b32")
        return lambda machine: read(machine).astype(np.int64) + offset

    def _shuffle(self, instruction: Instruction) -> Step:
        """Between the threads of a warp. Only whole warps take part."""
        target, value, other, clamp, members = instruction.operands
        mode = instruction.name[2] if len(instruction.name) == 4 else ""
        partner = {
            "bfly": lambda lane, by: lane ^ by,
            "idx": lambda lane, by: by,
            "up": lambda lane, by: lane - by,
            "down": lambda lane, by: lane + by,
        }.get(mode)
        if partner is None or (clamp, members) not in ((_LAST_LANE, "-1"), ("0", "-1")) or "|" in target:
            raise UnknownInstructionError(instruction.text)
        read, by = self._source(value, "b32"), self._source(other, "b32")

        def step(machine: Machine, lanes: Array | None) -> None:
            machine.require_whole_warps(lanes)
            lane = machine.lanes % WARP
            source = partner(lane, machine.spread(by(machine)).astype(np.int64))
            # a thread without a partner keeps what it has
            source = np.where((source >= 0) & (source < WARP), source, lane)
            machine.write(target, machine.spread(read(machine))[machine.lanes - lane + source], lanes)

        return step

    def _reduce(self, instruction: Instruction) -> Step:
        """The sum over a warp, for each of its threads. Only whole warps take part."""
        target, value, members = instruction.operands
        if instruction.name != ("redux", "sync", "add", "s32"):
            raise UnknownInstructionError(instruction.text)
        read, read_members = self._source(value, "s32"), self._source(members, "s32")

        def step(machine: Machine, lanes: Array | None) -> None:
            machine.require_whole_warps(lanes)
            if not (read_members(machine) == -1).all():
                raise UnknownInstructionError(instruction.text)
            sums = machine.spread(read(machine)).reshape(-1, WARP).sum(1, dtype=np.int32)
            machine.write(target, encode(np.repeat(sums, WARP), "s32"), lanes)

        return step


# the operand that lets a shuffle go through the whole warp
_LAST_LANE = "31"
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}


class Machine:
    """Some programs of a launch at work."""

    def __init__(self, code: Code, launch: Launch, programs: Array) -> None:
        self.code = code
        self.program = code.program
        self.values = launch.values
        self.grid = launch.grid
        self.programs = programs
        self.threads = code.program.threads
        self.lanes = np.arange(len(programs) * self.threads)
        self.registers: dict[str, Array] = {}
        self.memory = Memory(launch.regions, self.threads, code.grains["global"])
        self.shared = SharedMemory(len(programs), launch.shared, self.threads, code.grains["shared"])
        self.phases = np.zeros(len(programs), np.int64)
        self.waiting: list[Fragment] = []
        self.taken = 0

    def read(self, register: str) -> Array:
        try:
            return self.registers[register]
        except KeyError:
            raise UninitialisedError(f"{register} is read before anything was written to it") from None

    def write(self, register: str, raw: Array, lanes: Array | None) -> None:
        """Into the registers of the active threads. Arrays are never changed in place, so that registers may share."""
        if register == "_":
            return
        if lanes is not None:
            before = self.registers.get(register)
            if before is None:
                # for those that have not come here: NaN if read as a number
                before = np.full(1, ~raw.dtype.type(0))
            raw = np.where(lanes, raw, before)
        self.registers[register] = raw

    def spread(self, raw: Array) -> Array:
        """One value a thread."""
        return np.broadcast_to(raw, self.lanes.shape)

    def touched(self) -> list[Touched]:
        texts = [instruction.text for instruction in self.program.code]
        found = self.memory.settle(texts)
        self.shared.settle(texts)
        if found is None:
            return []
        return [found._replace(first=self.programs[found.first], last=self.programs[found.last])]

    def require_whole_warps(self, lanes: Array | None) -> None:
        if lanes is not None:
            warps = lanes.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise BarrierError("not all threads of a warp take part")

    # --- control flow

    def run(self) -> None:
        ready = [Fragment(0, None)]
        while ready or self.waiting:
            if not ready:
                where = sorted({fragment.at for fragment in self.waiting})
                raise BarrierError(f"threads wait for others at {[self.program.code[at].text for at in where]}")
            ready = self._advance(ready)

    def _advance(self, ready: list[Fragment]) -> list[Fragment]:
        """The fragment furthest behind, up to where another one is or it splits; all that can go on then."""
        at = min(fragment.at for fragment in ready)
        lanes = _united([fragment.lanes for fragment in ready if fragment.at == at])
        if lanes is not None and lanes.all():
            lanes = None
        others = [fragment for fragment in ready if fragment.at != at]
        limit = min((fragment.at for fragment in others), default=len(self.program.code))
        programs = self._programs_of(lanes)
        while at < limit:
            instruction, step = self.program.code[at], self.code.steps[at]
            self.taken += programs
            active = lanes if instruction.guard is None else self._guarded(instruction, lanes)
            if step is not None:
                if active is None or active.any():
                    try:
                        step(self, active)
                    except EmulationError as error:
                        raise type(error)(f"{self.program.name}, {instruction.text!r}: {error}") from error
                at += 1
                continue
            following = self._control(at, instruction, lanes, active)
            if len(following) == 1 and following[0].lanes is lanes:
                at = following[0].at
                continue
            return others + following
        if at >= len(self.program.code):
            raise MemoryAccessError(f"{self.program.name} runs on behind its last instruction")
        return [*others, Fragment(at, lanes)]

    def _guarded(self, instruction: Instruction, lanes: Array | None) -> Array | None:
        """The lanes whose guard holds: `lanes` itself if all of them do."""
        guard = self.read(str(instruction.guard))
        holds = ~guard if instruction.negated else guard
        if holds.all():
            return lanes
        return np.array(self.spread(holds)) if lanes is None else lanes & holds

    def _control(self, at: int, instruction: Instruction, lanes: Array | None, active: Array | None) -> list[Fragment]:
        name = instruction.name[0]
        if name == "bra":
            target = self.program.labels[instruction.operands[0]]
            return _split(lanes, active, target, at + 1)
        if name in ("ret", "exit"):
            return [Fragment(at + 1, rest)] if (rest := _without(lanes, active)) is not None else []
        of_program = instruction.name[:2] in (("bar", "sync"), ("barrier", "sync")) and instruction.operands == ("0",)
        # of a warp that is the whole program
        of_warp = instruction.name == ("bar", "warp", "sync") and instruction.operands == ("-1",)
        if not of_program and not (of_warp and self.threads == WARP):
            raise UnknownInstructionError(instruction.text)
        if active is not lanes:
            raise BarrierError(f"{instruction.text!r} under a condition that not all threads meet")
        return self._wait(at, lanes)

    def _wait(self, at: int, lanes: Array | None) -> list[Fragment]:
        """Programs all of whose threads are here go on."""
        if lanes is None:
            self.phases += 1
            return [Fragment(at + 1, None)]
        here = _united([lanes, *(fragment.lanes for fragment in self.waiting if fragment.at == at)])
        self.waiting = [fragment for fragment in self.waiting if fragment.at != at]
        complete = here.reshape(-1, self.threads).all(1)
        self.phases += complete
        goes_on = np.repeat(complete, self.threads)
        if (here & ~goes_on).any():
            self.waiting.append(Fragment(at, here & ~goes_on))
        if np.array_equal(goes_on, lanes):
            return [Fragment(at + 1, lanes)]
        return [Fragment(at + 1, goes_on)] if goes_on.any() else []

    def _programs_of(self, lanes: Array | None) -> int:
        return len(self.programs) if lanes is None else int(lanes.reshape(-1, self.threads).any(1).sum())


def _united(parts: list[Array | None]) -> Array | None:
    found = parts[0]
    for part in parts[1:]:
        found = None if found is None or part is None else found | part
    return found


def _without(lanes: Array | None, left: Array | None) -> Array | None:
    """None if nobody stays."""
    if left is lanes or left is None:
        return None
    stay = ~left if lanes is None else lanes & ~left
    return stay if stay.any() else None


def _split(lanes: Array | None, jump: Array | None, target: int, following: int) -> list[Fragment]:
    if jump is lanes:
        return [Fragment(target, lanes)]
    assert jump is not None
    if not jump.any():
        return [Fragment(following, lanes)]
    stay = _without(lanes, jump)
    return [Fragment(target, jump)] if stay is None else [Fragment(target, jump), Fragment(following, stay)]


def _bytes_of(access: Instruction) -> int:
    """The smallest piece of memory that it treats as one."""
    return 4 if access.name[0] == "ldmatrix" else bits_of(access.name[-1]) // 8


def _registers(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def _constant(text: str, kind: str) -> Array:
    if text == "global_smem":
        return np.zeros(1, UNSIGNED[bits_of(kind)])
    if kind == "pred":
        return np.array([int(text) != 0])
    if match := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
        raw = np.array([int(match[2], 16)], np.uint32 if match[1] == "f" else np.uint64)
        number = raw.view(np.float32 if match[1] == "f" else np.float64)
        return number.astype(FLOATS[kind]) if kind in FLOATS else raw
    if not re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        raise UnknownInstructionError(f"operand {text!r}")
    bits = bits_of(kind)
    raw = np.array([int(text.removesuffix("U"), 0) & (1 << bits) - 1], UNSIGNED[bits])
    return decode(raw.view(SIGNED[bits]) if kind[0] == "s" else raw, kind)


def _program_number(axis: int) -> Callable[[Machine], Array]:
    def read(machine: Machine) -> Array:
        x, y, _ = machine.grid
        number = (machine.programs % x, machine.programs // x % y, machine.programs // (x * y))[axis]
        return number.astype(np.uint32) if len(number) == 1 else np.repeat(number.astype(np.uint32), machine.threads)

    return read


_SPECIAL: dict[str, Callable[[Machine], Array]] = {
    "%tid.x": lambda machine: (machine.lanes % machine.threads).astype(np.uint32),
    "%tid.y": lambda machine: np.zeros(1, np.uint32),
    "%tid.z": lambda machine: np.zeros(1, np.uint32),
    "%laneid": lambda machine: (machine.lanes % WARP).astype(np.uint32),
    "%ntid.x": lambda machine: np.full(1, machine.threads, np.uint32),
    "%ctaid.x": _program_number(0),
    "%ctaid.y": _program_number(1),
    "%ctaid.z": _program_number(2),
    "%nctaid.x": lambda machine: np.full(1, machine.grid[0], np.uint32),
    "%nctaid.y": lambda machine: np.full(1, machine.grid[1], np.uint32),
    "%nctaid.z": lambda machine: np.full(1, machine.grid[2], np.uint32),
}
