"""The state a run resumes from, with a checksum; and the signals after which it is saved."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from prefixloss.check import UsageError, first_line
from prefixloss.io.files import write_whole

_MARK = b"\nsha256 "  # behind what torch wrote: its readers look for the end of their part
_SIZE = len(_MARK) + 64
_CHUNK = 1 << 20


def save(path: Path, state: dict[str, Any]) -> None:
    """A dict of tensors and plain values, together with the state of every random generator, and a checksum."""
    write_whole(path, lambda file: _write({**state, "random": random_state()}, file))


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    summed: Any = _Summed(file)
    try:
        torch.save(state, summed)
    except RuntimeError:
        if summed.failure is not None:  # torch makes another error of a full disk
            raise summed.failure from None
        raise
    file.write(_MARK + summed.sum.hexdigest().encode())


class _Summed:
    """A file, and the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self.sum.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What `save` wrote, or None if nothing was; `restore_random` puts the generators back.

    UsageError where the file is not what was written. One without a checksum, from an earlier version, is held to the
    checksums that torch writes for each tensor.
    """
    if not path.exists():
        return None
    try:
        _verify(path)
    except OSError as error:
        raise UsageError(f"--resume: cannot read {path}: {error.strerror}") from None
    except _DamagedError as error:
        raise UsageError(
            f"--resume: {path} is damaged, {error}: put a copy of it in its place, or delete it to start the run over"
        ) from None
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError("it holds no state")
    except Exception as error:  # whatever this version of torch has against it
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(f"--resume: {path} cannot be loaded: {type(error).__name__}: {reason}") from None
    return saved


class _DamagedError(Exception):
    """A file is not what was written; the text says how that is known."""


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise _DamagedError("it is empty")
        file.seek(max(0, size - _SIZE))
        end = file.read()
        if not end.startswith(_MARK):
            _verify_parts(file)
            return
        file.seek(0)
        total, left = hashlib.sha256(), size - _SIZE
        while part := file.read(min(_CHUNK, left)):
            total.update(part)
            left -= len(part)
    if total.hexdigest().encode() != end[len(_MARK) :]:
        raise _DamagedError("its checksum is another one")


def _verify_parts(file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError):
        raise _DamagedError("it is cut off or no checkpoint at all") from None
    if wrong is not None:
        raise _DamagedError(f"the checksum of its part {wrong!r} is another one")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What in it does not fit what was loaded is a UsageError. path: of the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UsageError(
            f"--resume: {path} does not fit the settings in config.json, put those back it was made with: {reason}"
        ) from None


class Stopped(KeyboardInterrupt):
    """The run ended because it was asked to, and is saved. number: of the signal that asked."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stop:
    """Whether the run was asked to end, by Ctrl-C or, as schedulers do, by SIGTERM: the update is finished first, so
    that it can be saved. A second Ctrl-C ends it at once.

    Not under torchrun: it passes on the signal that its processes have got already, and ends them itself in the end.
    """

    asked = False
    number: int = signal.SIGINT

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1

        def handle(number: int, frame: object) -> None:
            if self.asked and alone and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked, self.number = True, number

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
