"""The directory of a training run that has not ended, OUT.part beside OUT: its settings, checkpoint and lock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefixloss.check import UsageError
from prefixloss.io import checkpoint
from prefixloss.io import settings as saved_settings
from prefixloss.io.lock import Lock, clear, is_empty


def part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def settings_of(out: Path) -> dict[str, Any]:
    """What a run that is to go on was begun with. UsageError where there is none."""
    path = part_of(out) / "config.json"
    if out.exists():
        raise UsageError(f"--resume: {out} has ended, there is nothing to go on with")
    return saved_settings.read(path, f"{out} is not a run that stopped, there is no readable {path}")


class Run:
    """saved: its last checkpoint, None if it has none yet. stop: whether it was asked to end."""

    def __init__(self, part: Path, stop: checkpoint.Stop) -> None:
        self.path, self.stop = part / "checkpoint.pt", stop
        self.saved = checkpoint.load(self.path)

    def save(self, state: dict[str, Any]) -> None:
        checkpoint.save(self.path, state)

    def end(self) -> None:
        """What it was for is there."""
        self.path.unlink(missing_ok=True)


@contextmanager
def opened(out: Path, settings: Mapping[str, Any], resume: bool) -> Iterator[Run]:
    """A run that makes `out`, locked and listening to signals. One that ends without a checkpoint, whatever ends it,
    leaves nothing. UsageError: another process has it, or there is one and it is not this one that goes on."""
    part, stop = part_of(out), checkpoint.Stop()
    try:
        with Lock() as lock, stop.listening():
            lock.take(part)
            _check(out, part, settings, resume)
            try:
                saved_settings.write(part / "config.json", settings)
                yield Run(part, stop)
            finally:
                if not (part / "checkpoint.pt").exists():
                    clear(part)
    finally:
        with suppress(OSError):  # there is something in it, or another process
            part.rmdir()


def _check(out: Path, part: Path, settings: Mapping[str, Any], resume: bool) -> None:
    if out.exists():
        raise UsageError(f"--out: {out} exists already")
    if is_empty(part):
        return
    if not resume:
        left = f"{part} is left from a run that did not end"
        raise UsageError(f"--out: {left}; --resume {out} goes on with it, or delete it")
    if settings_of(out) != json.loads(json.dumps(settings)):
        raise UsageError(f"--out: {part} holds a run with other settings")
