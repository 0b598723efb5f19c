"""Runs foreign Python in a locked-in child process: limits on all it takes, no files, no network, no other processes.

The child (`sandbox_guest`) is a fresh interpreter with an empty environment. On Linux (x86_64, aarch64) it gives
itself, from the outside in, as far as the kernel lets it:

- *namespaces*: own processes, network, ipc and mounts; what is left when it ends is killed by the kernel;
- *private-root* (Linux 5.12 on): a file system in memory with the libraries, read-only, and a small empty directory;
- *own-user*: where we are root, a user that nobody else is, without capabilities;
- *landlock* (Linux 6.2 on): the same files by a second mechanism, and signals and sockets to others refused;
- *seccomp*: a list of the system calls that a program needs; no new process, no socket, no signal to another;
- *limits*: processor seconds, memory, file size, open files, threads, no core dumps; time and output are watched.

No untrusted program is started unless seccomp and one of private-root and landlock are active. Without a private root
a program has nowhere to write, and as root it may stay root, though one without rights. One child serves one response:
each run is two forks of it, so runs share nothing.

What a verdict is worth: the program runs in one process (`sandbox_program`), the tests in another (`sandbox_judge`),
as locked in and with another user where there are users to have. All the program has is a pipe, over which it is asked
for data (`sandbox_wire`); the verdict goes from the judging process to this one directly. Whatever a program patches,
walks or writes, a test passes only if the right data came back. Two things only its process can know: what its own
objects answer when they are compared or computed with, and tests that cannot be judged from outside. What passes by
these is marked `hearsay`. What a program is refused, the kernel tells the watching process (Linux 5.0 on).
"""

from __future__ import annotations

import json
import marshal
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

_GUEST = Path(__file__).with_name("sandbox_guest.py")
_ENDINGS = {"over": "OutOfTime", "gone": "died"}
_RESERVED = {"OutOfTime", "died", "unpassable"}  # words that could be names too
_VERDICT_BYTES = 8 << 20  # of one run


class SandboxError(RuntimeError):
    """The sandbox cannot protect us, or broke."""


@dataclass(frozen=True)
class Limits:
    """What one program may take. disk_bytes is held in memory, beside memory_bytes."""

    cpu_seconds: float = 2.0
    wall_seconds: float = 4.0
    memory_bytes: int = 256 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 1 << 18
    open_files: int = 64
    threads: int = 64


class Cell(NamedTuple):
    """A piece of a program. file: its name in tracebacks."""

    file: str
    source: str


class Check(NamedTuple):
    """A cell that is judged from outside the program's process. inside: it cannot be, and runs in there. names: those
    that mean what the program defines, though they are built-ins' too."""

    file: str
    source: str
    inside: bool = False
    names: tuple[str, ...] = ()


class Result(NamedTuple):
    """How a cell or test ended. error: empty where all went well, the exception's type, or one of "OutOfTime", "died"
    (the process ended in this cell), "not run", "unpassable" (a test that can only run inside); a program's exception
    of such a name stands in quotes. places: file and line of the program's frames, outermost first, each once. claims:
    what the exception and those it came from say that they lack (kind, detail, file of the raising frame). hearsay:
    it passed by the program's own word."""

    error: str
    message: str = ""
    places: tuple[tuple[str, int], ...] = ()
    claims: tuple[tuple[str, str, str], ...] = ()
    hearsay: bool = False


class Execution(NamedTuple):
    """results: one a cell. output: what was written to stdout and stderr, within the bound. honest: False where the
    program answered what nobody can have been asked. tests: one a check. printed: what the checks themselves print.
    refused: what the kernel says that the program was refused ("input": it read its empty standard input); None where
    the kernel does not say."""

    results: tuple[Result, ...]
    output: bytes
    honest: bool
    tests: tuple[Result, ...] = ()
    printed: str = ""
    refused: frozenset[str] | None = None


class Sandbox:
    """A child process to run programs in, each on its own; a context manager.

    limits: for each program. seconds: for all of them together, wall clock. unprotected: run even where nothing but
    limits can protect us. protections: the names of those that are active.
    """

    def __init__(self, limits: Limits = Limits(), seconds: float = 60.0, *, unprotected: bool = False) -> None:
        if os.name != "posix":
            raise SandboxError("the sandbox needs a POSIX system")
        self.limits = limits
        self.deadline = time.monotonic() + seconds
        tests, self._tests = os.pipe()
        self._verdicts, verdicts = os.pipe()
        os.set_blocking(self._verdicts, False)
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-X", "utf8", str(_GUEST), str(tests), str(verdicts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"},  # sets in one order; no file of ours hides a module
            cwd="/",
            start_new_session=True,
            pass_fds=(tests, verdicts),
            bufsize=0,
        )
        os.close(tests)
        os.close(verdicts)
        self._pipes = [self._tests, self._verdicts]
        try:
            self.protections = tuple(self._receive(1 << 10).decode().split())
            if not unprotected:
                _require(self.protections)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child and all its children; whatever they wrote is gone."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(OSError):
            self._child.stdin.close()  # the child ends its program, then itself
        ended, _, _ = select.select([self._child.stdout], [], [], 2.0)
        if not ended or self._child.stdout.read(1):
            self._child.kill()  # its children have asked the kernel to die with it
        self._child.stdout.close()
        self._child.wait()
        while self._pipes:
            os.close(self._pipes.pop())

    def seconds_left(self) -> float:
        """For all further runs."""
        return max(0.0, self.deadline - time.monotonic())

    def run(self, cells: Sequence[Cell], tests: Sequence[Check] = ()) -> Execution:
        """One program: its cells in order in one namespace, each whatever those before it did, while there is time;
        then the tests, in a namespace of their own that leads to the program's."""
        if not self.seconds_left():
            raise SandboxError("no time left")
        limits = replace(self.limits, wall_seconds=min(self.limits.wall_seconds, self.seconds_left()))
        self._send(self._child.stdin, marshal.dumps(([tuple(cell) for cell in cells], astuple(limits))))
        self._send(self._tests, json.dumps(["tests", tests]).encode())
        reply, verdicts = self._receive_both(self.limits.output_bytes + (1 << 10))
        why, status, told, output = reply.split(b"\n", 3)
        frames = _frames(verdicts)
        if next(frames, None) != ["locked in"]:
            raise SandboxError("a protection failed: nothing was run")
        refused = None if told == b"-" else frozenset(told.decode().split())
        ending = why.decode() or f"the process ended with status {int(status)}"
        results, honest, printed = _read_verdicts(frames, len(cells) + len(tests), ending)
        return Execution(tuple(results[: len(cells)]), output, honest, tuple(results[len(cells) :]), printed, refused)

    def _send(self, pipe: IO[bytes] | int | None, data: bytes) -> None:
        assert pipe is not None
        file = pipe if isinstance(pipe, int) else pipe.fileno()
        view = memoryview(len(data).to_bytes(4, "little") + data)
        try:
            while view:
                view = view[os.write(file, view) :]
        except OSError:
            raise SandboxError("the child process broke") from None

    def _receive_both(self, most: int) -> tuple[bytes, bytes]:
        """The child's reply, and all that the judging process wrote until then."""
        assert self._child.stdout is not None
        verdicts = b""
        until = max(self.deadline + 2.0, time.monotonic())
        sources = [self._child.stdout.fileno(), self._verdicts]
        while True:
            ready, _, _ = select.select(sources, [], [], max(0.0, until - time.monotonic()))
            if self._verdicts in ready:
                data = os.read(self._verdicts, 1 << 20)
                if not data or len(verdicts) > _VERDICT_BYTES:
                    raise SandboxError("the child process broke")
                verdicts += data
            elif ready or time.monotonic() >= until:
                return self._receive(most), verdicts  # the judging process has ended, its pipe is empty

    def _receive(self, most: int) -> bytes:
        size = int.from_bytes(self._read(4), "little")
        if size > most:
            raise SandboxError("the child process broke")
        return self._read(size)

    def _read(self, count: int) -> bytes:
        assert self._child.stdout is not None
        data = b""
        until = max(self.deadline + 2.0, time.monotonic())
        while len(data) < count:
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, until - time.monotonic()))
            more = self._child.stdout.read(count - len(data)) if ready else b""
            if not more:
                raise SandboxError("the child process broke" if ready else "the child process does not answer")
            data += more
        return data


def _require(protections: Sequence[str]) -> None:
    if "seccomp" not in protections or not {"private-root", "landlock"}.intersection(protections):
        raise SandboxError(
            f"foreign code cannot be run safely here (active: {', '.join(protections)}; needed: seccomp and one of "
            "private-root, landlock, on Linux, x86_64 or aarch64). Pass unprotected=True to run it all the same."
        )


def _frames(data: bytes) -> Iterator[Any]:
    """The complete frames that the judging process wrote."""
    while len(data) >= 4 and len(data) >= 4 + (size := int.from_bytes(data[:4], "little")):
        yield json.loads(data[4 : 4 + size])
        data = data[4 + size :]


def _read_verdicts(frames: Iterator[Any], count: int, ending: str) -> tuple[list[Result], bool, str]:
    """The results of `count` cells and tests, whether the program answered as asked, and what the tests printed. Where
    the judging process was ended, what it was at "died"."""
    results: list[Result] = []
    honest, printed, complete = True, "", False
    for frame in frames:
        if frame[0] == "end":
            printed, complete = frame[1], True
            continue
        _, _, end, name, message, places, claims, hearsay = frame
        if end == "garbled":
            honest = False
            break
        message = ascii(ending if end == "gone" else message)[1:-1]
        where = tuple((file, line) for file, line in places)
        error = _ENDINGS.get(end, end) if end != "raised" else _class_name(name)
        results.append(Result("" if end == "passed" else error, message, where, _read_claims(claims), bool(hearsay)))
    if honest and not complete and len(results) < count:
        results.append(Result("died", ending))
    return results + [Result("not run")] * (count - len(results)), honest, printed


def _class_name(name: str) -> str:
    """An exception's type; never one of the words that mean something else."""
    return name if name.isidentifier() and name.isascii() and name not in _RESERVED else ascii(name)


def _read_claims(claims: Any) -> tuple[tuple[str, str, str], ...]:
    """From the program's own process, so anything may stand there."""
    if type(claims) is not list:
        return ()
    return tuple(
        (claim[0], claim[1], claim[2])
        for claim in claims[:5]
        if type(claim) is list and [type(part) for part in claim] == [str] * 3
    )
