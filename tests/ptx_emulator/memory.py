"""Global and shared memory: where an access may go, and who went there before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .errors import MemoryAccessError, RaceError, UninitialisedError
from .numbers import UNSIGNED, Array


class Access(NamedTuple):
    """Of some threads at once. offsets: of the first byte; size: bytes a thread; phases: which barrier came before,
    for each program; at: the instruction."""

    offsets: Array
    lanes: Array
    size: int
    writes: bool
    phases: Array
    at: int


class Touched(NamedTuple):
    """For each piece of memory that was touched: the first and last program, and whether any wrote."""

    pieces: Array
    first: Array
    last: Array
    written: Array


class Memory:
    """Regions with addresses of their own. An offset counts through all of them, one behind the other."""

    def __init__(self, regions: list[tuple[int, Array]], threads: int, grain: int) -> None:
        """regions: first address and bytes (uint8) of each. grain: bytes of the smallest access there will be."""
        self.grain = grain
        self.regions = sorted(regions, key=lambda region: region[0])
        self.starts = np.array([start for start, _ in self.regions], np.int64)
        self.sizes = np.array([len(data) for _, data in self.regions], np.int64)
        self.firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])
        self.threads = threads
        self.log: list[Access] = []

    def load(self, addresses: Array, kind: int, count: int) -> list[Array]:
        """`count` neighbouring numbers of `kind` bits from each address."""
        found = np.empty((len(addresses), count), UNSIGNED[kind])
        for here, data, index in self._views(addresses, kind, count):
            found[here] = data[index]
        return [found[:, i] for i in range(count)]

    def store(self, addresses: Array, kind: int, values: list[Array]) -> None:
        stacked = np.stack(values, 1)
        for here, data, index in self._views(addresses, kind, len(values)):
            data[index] = stacked[here]

    def offsets(self, addresses: Array, size: int) -> Array:
        """Checks bounds and alignment."""
        if (addresses % size).any():
            wrong = int(addresses[addresses % size != 0][0])
            raise MemoryAccessError(f"address {wrong:#x} is not a multiple of {size} bytes")
        region = np.searchsorted(self.starts, addresses, "right") - 1
        inside = addresses - self.starts[region]
        outside = (region < 0) | (inside + size > self.sizes[region])
        if outside.any():
            wrong = int(addresses[outside][0])
            known = ", ".join(f"{start:#x}+{len(data)}" for start, data in self.regions)
            raise MemoryAccessError(f"{size} bytes at {wrong:#x} are outside of {known or 'no memory at all'}")
        return self.firsts[region] + inside

    def note(self, access: Access) -> None:
        self.log.append(access)

    def note_store(self, access: Access, values: list[Array], warp: int) -> None:
        """So many threads one behind the other may store one value at one place: any of them does. The first of each
        counts."""
        owner = access.offsets * (int(access.lanes[-1]) // warp + 1) + access.lanes // warp
        order = np.argsort(owner, kind="stable")
        again = owner[order][1:] == owner[order][:-1]
        for stored in values:
            again &= stored[order][1:] == stored[order][:-1]
        kept = np.sort(order[np.concatenate([[True], ~again])])
        self.note(access._replace(offsets=access.offsets[kept], lanes=access.lanes[kept]))

    def _views(self, addresses: Array, kind: int, count: int) -> list[tuple[Array, Array, Array]]:
        """For each region: which of the accesses are in it, its numbers of `kind` bits, and the indices into them."""
        size = kind // 8
        region = np.searchsorted(self.starts, addresses, "right") - 1
        found = []
        for number in range(len(self.regions)):
            here = np.flatnonzero(region == number)
            if len(here):
                start, data = self.regions[number]
                skipped = -start % size
                length = (len(data) - skipped) // size * size
                numbers = data[skipped : skipped + length].view(UNSIGNED[kind])
                index = (addresses[here] - start - skipped) // size
                found.append((here, numbers, index[:, None] + np.arange(count)))
        return found

    def settle(self, texts: Sequence[str]) -> Touched | None:
        """Looks for races inside of programs; what is left to compare with other programs. texts: of instructions."""
        log, self.log = self.log, []
        if not log:
            return None
        grain = self.grain
        pieces = [(a.offsets[:, None] + np.arange(0, a.size, grain)).ravel() // grain for a in log]
        repeats = [a.size // grain for a in log]
        lanes = np.concatenate([np.repeat(a.lanes, n) for a, n in zip(log, repeats, strict=True)])
        writes = np.repeat([a.writes for a in log], [len(p) for p in pieces])
        steps = np.repeat([a.at for a in log], [len(p) for p in pieces])
        programs = lanes // self.threads
        phases = np.concatenate(
            [np.repeat(a.phases[a.lanes // self.threads], n) for a, n in zip(log, repeats, strict=True)]
        )
        where = np.concatenate(pieces)
        # programs have phases of their own, and pieces of memory come first in the order
        most = int(phases.max()) + 1
        count = int(programs.max()) + 1
        key = (where * count + programs) * most + phases
        order = np.argsort(key, kind="stable")
        key, lanes, writes, steps = key[order], lanes[order], writes[order], steps[order]
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        low, high = np.minimum.reduceat(lanes, starts), np.maximum.reduceat(lanes, starts)
        written = np.logical_or.reduceat(writes, starts)
        raced = np.flatnonzero((low != high) & written)
        if len(raced):
            first = starts[raced[0]]
            group = slice(first, first + np.argmax(np.append(key[first:] != key[first], True)))
            instructions = [texts[at] for at in sorted(set(steps[group].tolist()))]
            raise RaceError(
                f"threads {sorted(set((lanes[group] % self.threads).tolist()))[:4]} of program "
                f"{int(lanes[first]) // self.threads} at byte {int(key[first]) // (most * count) * grain}: "
                f"{instructions}, {len(raced)} pieces of {grain} bytes in all"
            )
        owner = low // self.threads
        spot = key[starts] // (most * count) * grain
        return Touched(spot, owner, owner, written)


class SharedMemory(Memory):
    """Each program's own. It begins at address 0; the programs of a launch lie one behind the other."""

    def __init__(self, programs: int, size: int, threads: int, grain: int) -> None:
        super().__init__([(0, np.zeros(programs * size, np.uint8))], threads, grain)
        self.size = size
        self.known = np.zeros(programs * size, np.bool_)

    def placed(self, addresses: Array, lanes: Array, size: int) -> Array:
        """Addresses among those of all programs."""
        if ((addresses < 0) | (addresses + size > self.size)).any():
            raise MemoryAccessError(f"{size} bytes outside of {self.size} bytes of shared memory")
        if (addresses % size).any():
            raise MemoryAccessError(f"an address in shared memory is not a multiple of {size} bytes")
        return addresses + lanes // self.threads * self.size

    def mark(self, placed: Array, size: int) -> None:
        self.known[placed[:, None] + np.arange(size)] = True

    def require(self, placed: Array, size: int) -> None:
        if not self.known[placed[:, None] + np.arange(size)].all():
            raise UninitialisedError("shared memory is read that nobody wrote")


def check_between_programs(parts: list[Touched]) -> None:
    """Two programs may not touch the same byte if one of them writes."""
    if not parts:
        return
    pieces = np.concatenate([part.pieces for part in parts])
    order = np.argsort(pieces, kind="stable")
    pieces = pieces[order]
    starts = np.flatnonzero(np.concatenate([[True], pieces[1:] != pieces[:-1]]))
    first = np.minimum.reduceat(np.concatenate([part.first for part in parts])[order], starts)
    last = np.maximum.reduceat(np.concatenate([part.last for part in parts])[order], starts)
    written = np.logical_or.reduceat(np.concatenate([part.written for part in parts])[order], starts)
    raced = np.flatnonzero((first != last) & written)
    if len(raced):
        at = raced[0]
        raise RaceError(
            f"programs {int(first[at])} and {int(last[at])} both touch byte {int(pieces[starts[at]])} of global "
            f"memory, and {len(raced)} pieces in all"
        )
