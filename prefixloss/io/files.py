"""Files that are there whole or not at all, or grow under another name until they are; JSON lines of any text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def json_line(value: Any) -> bytes:
    """A line of UTF-8. Half a character, a lone surrogate, has no UTF-8: it stays the JSON escape that it was."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside `path`, force it to the disk, then rename it over `path`.

    If that fails, `path` is as it was and the temporary file is gone. A device or a pipe is written to as it is.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            write(file)
        return
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk it is in the way
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    _sync_directory(path.parent)


def check_writable(path: Path) -> None:
    """OSError where `write_whole` cannot work, before any work is done."""
    if path.exists() and not path.is_file():
        path.open("wb").close()
        return
    temporary = _beside(path)
    temporary.open("wb").close()
    temporary.unlink()


class Growing:
    """A file written while the work goes on, as PATH.part until it is whole: what was done before a crash is there.

    FileExistsError where PATH.part is left from a run that did not end. A device or a pipe is written to as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path, direct = path, path.exists() and not path.is_file()
        self.part = path if direct else path.with_name(f"{path.name}.part")
        self.file = self.part.open("wb" if direct else "xb")

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.file.flush()

    def finish(self) -> None:
        """It is whole, and gets its name."""
        if self.part == self.path:
            self.file.close()
            return
        os.fsync(self.file.fileno())
        self.file.close()
        self.part.replace(self.path)
        _sync_directory(self.path.parent)

    def leave(self) -> bool:
        """It stays as it is; whether there is anything in it."""
        self.file.close()
        if self.part == self.path or self.part.stat().st_size:
            return True
        self.part.unlink()
        return False


def write_whole_directory(path: Path, write: Callable[[Path], object]) -> None:
    """The same for a directory, which must not exist yet."""
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        _sync_directory(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
