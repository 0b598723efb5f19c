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
each run is a fork of it, so runs share nothing.

What a verdict is worth: it comes through a pipe, with a token that no name of the program leads to, and each run ends
with a control that has to fail. A program that exits, prints verdicts, replaces built-ins or hooks the interpreter is
found out. One that walks the interpreter's frames or memory, with this file's text in mind, could still forge its
own verdict (never reach the parent): code and tests run in one process. So could an object that equals everything.
"""

from __future__ import annotations

import marshal
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple

_GUEST = Path(__file__).with_name("sandbox_guest.py")
_RECORD_BYTES = 1 << 20  # a program's records in all, as the guest bounds them


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


class Result(NamedTuple):
    """How a cell ended. error: the exception's type, "died" (the process ended in this cell), "not run", or empty where
    all went well. places: file and line of the program's frames, outermost first, each once."""

    error: str
    message: str = ""
    places: tuple[tuple[str, int], ...] = ()


class Run(NamedTuple):
    """results: one a cell. output: what was written to stdout and stderr, within the bound. honest: False where the
    records cannot be true."""

    results: tuple[Result, ...]
    output: bytes
    honest: bool


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
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-X", "utf8", str(_GUEST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"},  # sets in one order; no file of ours hides a module
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
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

    def seconds_left(self) -> float:
        """For all further runs."""
        return max(0.0, self.deadline - time.monotonic())

    def run(self, cells: Sequence[Cell]) -> Run:
        """One program: its cells in order in one namespace, each whatever those before it did, while there is time."""
        token, secret = secrets.token_hex(16), secrets.token_hex(8)
        control = Cell("<control>", f"assert False, {secret!r}")
        if not self.seconds_left():
            raise SandboxError("no time left")
        limits = replace(self.limits, wall_seconds=min(self.limits.wall_seconds, self.seconds_left()))
        self._send(marshal.dumps(([tuple(cell) for cell in (*cells, control)], token, astuple(limits))))
        reply = self._receive(_RECORD_BYTES + self.limits.output_bytes + (1 << 17))
        why, status, size, rest = reply.split(b"\n", 3)
        head, _, records = rest[: int(size)].partition(b"\x1e")
        output = rest[int(size) :]
        if head != token.encode():
            raise SandboxError("a protection failed: nothing was run")
        ending = why.decode() or f"the process ended with status {int(status)}"
        results, honest = _read_records(records, token, secret, len(cells), ending)
        return Run(tuple(results), output, honest)

    def _send(self, data: bytes) -> None:
        assert self._child.stdin is not None
        data = len(data).to_bytes(4, "little") + data
        try:
            while data:
                data = data[self._child.stdin.write(data) :]
        except OSError:
            raise SandboxError("the child process broke") from None

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


def _read_records(records: bytes, token: str, secret: str, count: int, ending: str) -> tuple[list[Result], bool]:
    """The results of `count` cells, and whether the records can be true: in order, signed, the control failed last."""
    results = [Result("not run")] * count
    last = -1
    try:
        for record in records.decode("ascii").split("\x1e")[:-1]:
            signature, index, error, message, places = record.split("\x1f")
            if signature != token or not last < int(index) <= count:
                return results, False
            last = int(index)
            if last == count:
                return results, (error, message) == ("AssertionError", secret)
            pairs = (place.split("\x1c") for place in places.split("\x1d") if place)
            results[last] = Result(error, message, tuple((file, int(line)) for file, line in pairs))
    except ValueError:
        return results, False
    if last + 1 == count:
        return results, False  # nothing but the control was left to do
    results[last + 1] = Result("died", ending)
    return results, True
