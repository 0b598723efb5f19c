"""One run at a time in a directory: two that resume it at once, as a requeued job may, would mix their files."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import warnings
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from prefixloss.check import UsageError

NAME = ".lock"


class Lock:
    """A file in the directory that the system locks for this process: it is free again once the process has ended,
    however it ended. What the file says is for the reader only.
    """

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def take(self, run: Path) -> None:
        """Makes the directory if it is not there. UsageError where another process has it, or it cannot be made."""
        path = run / NAME
        while self.file is None:
            try:
                run.mkdir(parents=True, exist_ok=True)
                file = path.open("a+", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--out: cannot write to {run}: {error.strerror}") from None
            if not _locked(file, run):
                return
            if _is_at(file, path):
                self.file = file
            else:
                file.close()  # its owner has just removed it, and another process may have made a new one
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        self.file.flush()


def _locked(file: TextIO, run: Path) -> bool:
    """Whether the file is locked now; False where the file system has no locks."""
    import fcntl  # noqa: PLC0415 (not on Windows)

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(f"{run} is in use by {holder}: stop that run, or wait until it has ended") from None
        warnings.warn(f"{run} cannot be locked ({error.strerror}): start no other run in it", RuntimeWarning, 2)
        return False


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_empty(run: Path) -> bool:
    """Whether a directory has nothing but a lock, which a run leaves that ended before it began."""
    return all(path.name == NAME for path in run.iterdir())


def clear(run: Path) -> None:
    """Removes everything but the lock."""
    for path in run.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != NAME:
            path.unlink()
